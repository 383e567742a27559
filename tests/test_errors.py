"""Bad input raises before anything runs, says what and why, and harms nothing."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import BAD_INPUT, DTYPES, assert_accurate
from strategies import CombineCase, GemmCase, MoeCase, RouteCase
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_ops
from moe_ops import reference


def layer(device):
    return MoeCase(bias="float32", activation="swiglu_oai").arguments(device)


def route(device):
    return RouteCase(correction_bias="normal", num_groups=4, topk_groups=2).arguments(device)


def sort(device):
    return {"topk_ids": MoeCase().tensors(device)["topk_ids"], "num_experts": 8}


def gemm(device):
    return GemmCase(bias="float32").arguments(device)


def wgrad(device):
    return GemmCase().wgrad_arguments(device)


def combine(device):
    return CombineCase(MoeCase()).arguments(device)


def repeated(tensor, dim, size):
    """Of a size that takes no memory."""
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.narrow(dim, 0, 1).expand(shape)


# operator: (arguments, {argument: changes, each of which must raise and name the argument}).
# A change makes the bad value from the good one and all the others.
BAD = {
    "fused_moe": (
        layer,
        {
            "x": [
                lambda x, a: x[0],
                lambda x, a: x[:, :-1],
                lambda x, a: x.double(),
                lambda x, a: x.int(),
            ],
            "w1": [
                lambda w, a: w[0],
                lambda w, a: w[:, :-1],
                lambda w, a: w[:, :, :-1],
                lambda w, a: w.half(),
                lambda w, a: w[:0],
            ],
            "w2": [
                lambda w, a: w[0],
                lambda w, a: w[:-1],
                lambda w, a: w[:, :-1],
                lambda w, a: w[:, :, :-1],
                lambda w, a: w.bfloat16(),
            ],
            "topk_weights": [
                lambda w, a: w[:-1],
                lambda w, a: w[:, :-1],
                lambda w, a: w.flatten(),
                lambda w, a: w.double(),
                lambda w, a: w.int(),
                lambda w, a: repeated(w, 1, 2**27),
            ],
            "topk_ids": [
                lambda i, a: i[:-1],
                lambda i, a: i.flatten(),
                lambda i, a: i.float(),
                lambda i, a: i.short(),
            ],
            "b1": [lambda b, a: b[:, :-1], lambda b, a: b[:-1], lambda b, a: b.double()],
            "b2": [lambda b, a: b[:, :-1], lambda b, a: b[0], lambda b, a: b.half()],
            "activation": [lambda _, a: "swish", lambda _, a: ""],
            "gate_layout": [lambda _, a: "gateup"],
            "alpha": [
                lambda _, a: torch.ones(7, device=a["x"].device),
                lambda _, a: torch.ones(8, 1, device=a["x"].device),
                lambda _, a: torch.ones(8, device=a["x"].device).half(),
            ],
            "beta": [lambda _, a: torch.ones(9, device=a["x"].device)],
            "limit": [lambda _, a: torch.ones(9, device=a["x"].device)],
            "output_dtype": [lambda _, a: torch.int32, lambda _, a: torch.float64],
            "backend": [lambda _, a: "fastest"],
            "out": [
                lambda _, a: torch.empty_like(a["x"])[:-1],
                lambda _, a: torch.empty_like(a["x"])[:, :-1],
                lambda _, a: torch.empty_like(a["x"], dtype=torch.float64),
                lambda _, a: torch.empty_like(a["x"][:1]).expand_as(a["x"]),
                lambda _, a: torch.empty_like(a["x"][:, :1]).expand_as(a["x"]),
                lambda _, a: torch.empty_like(a["x"]).as_strided(a["x"].shape, (1, 1)),
                lambda _, a: torch.empty_like(a["x"]).as_strided(a["x"].shape, (63, 1)),
                lambda _, a: torch.empty_like(a["x"]).as_strided(a["x"].shape, (1, 16)),
            ],
        },
    ),
    "topk_route": (
        route,
        {
            "router_logits": [
                lambda x, a: x[0],
                lambda x, a: x.int(),
                lambda x, a: x.double(),
                lambda x, a: x[:, :0],
                lambda x, a: repeated(x, 0, 2**29),
            ],
            "topk": [lambda _, a: 0, lambda _, a: -1, lambda _, a: 9, lambda _, a: 17],
            "scoring": [lambda _, a: "tanh"],
            "correction_bias": [lambda b, a: b[:-1], lambda b, a: b[None], lambda b, a: b.int()],
            "num_groups": [lambda _, a: 0, lambda _, a: 3, lambda _, a: 32],
            "topk_groups": [lambda _, a: 0, lambda _, a: 5],
        },
    ),
    "sort_by_expert": (
        sort,
        {
            "topk_ids": [
                lambda i, a: i.float(),
                lambda i, a: i.flatten(),
                lambda i, a: repeated(i, 0, 2**30),
            ],
            "num_experts": [lambda _, a: 0, lambda _, a: -1, lambda _, a: 2**31 - 1],
        },
    ),
    "grouped_gemm": (
        gemm,
        {
            "a": [
                lambda t, a: t[0],
                lambda t, a: t[:, :-1],
                lambda t, a: t.double(),
                lambda t, a: repeated(t, 0, 2**31),
            ],
            "b": [lambda t, a: t[0], lambda t, a: t[:, :, :-1], lambda t, a: t.half()],
            "expert_offsets": [
                lambda t, a: t[:-1],
                lambda t, a: t[None],
                lambda t, a: t.long(),
                lambda t, a: t.float(),
            ],
            "bias": [lambda t, a: t[:, :-1], lambda t, a: t[0], lambda t, a: t.double()],
            "output_dtype": [lambda _, a: torch.int32],
        },
    ),
    "grouped_gemm_wgrad": (
        wgrad,
        {
            "a": [
                lambda t, a: t[0],
                lambda t, a: t[:-1],
                lambda t, a: t.double(),
                lambda t, a: repeated(t, 0, 2**31),
            ],
            "b": [lambda t, a: t[0], lambda t, a: t[:-1], lambda t, a: t.half()],
            "expert_offsets": [
                lambda t, a: t[:0],
                lambda t, a: t[None],
                lambda t, a: t.float(),
            ],
            "output_dtype": [lambda _, a: torch.int32],
        },
    ),
    "combine": (
        combine,
        {
            "expert_out": [
                lambda t, a: t[0],
                lambda t, a: t.double(),
                lambda t, a: repeated(t, 0, 2**31),
            ],
            "topk_weights": [
                lambda t, a: t.flatten(),
                lambda t, a: t.int(),
                lambda t, a: repeated(t, 0, 2**30),
            ],
            "sorted_slots": [
                lambda t, a: t[:-1],
                lambda t, a: t[None],
                lambda t, a: t.long(),
            ],
            "expert_offsets": [lambda t, a: t[None], lambda t, a: t[:0], lambda t, a: t.long()],
            "output_dtype": [lambda _, a: torch.int32],
        },
    ),
}
BAD_CALLS = [
    pytest.param(operator, argument, change, id=f"{operator}-{argument}-{i}")
    for operator, (_, changes) in BAD.items()
    for argument, bad in changes.items()
    for i, change in enumerate(bad)
]
# Where two arguments contradict each other, either may be the one that is named.
ALSO = {"x": "w1|w2|topk_weights|x", "a": "a|b", "b": "a|b", "w1": "w1|w2|b1|b2|alpha"}
ALSO |= {"topk_weights": "topk_weights|topk_ids", "topk_ids": "topk_weights|topk_ids"}
ALSO |= {"num_groups": "num_groups|topk|topk_groups", "topk": "topk|num_groups"}
ALSO |= {"router_logits": "router_logits|topk|num_groups"}
ALSO |= {"expert_out": "expert_out|sorted_slots", "sorted_slots": "sorted_slots|topk_weights"}
ALSO |= {"w2": "w2|b2", "topk_groups": "topk_groups|topk", "output_dtype": "output_dtype|dtype"}


def message_of(operator: str, arguments: dict) -> str:
    with pytest.raises(BAD_INPUT) as raised:
        getattr(moe_ops, operator)(**arguments)
    return str(raised.value)


def bad_arguments(operator, argument, change, device) -> dict:
    arguments = BAD[operator][0](device)
    return arguments | {argument: change(arguments.get(argument), arguments)}


@pytest.mark.parametrize("operator, argument, change", BAD_CALLS)
def test_says_what_is_wrong(operator, argument, change, device):
    arguments = bad_arguments(operator, argument, change, device)
    message = message_of(operator, arguments)
    names = ALSO.get(argument, argument)
    assert re.search(rf"{operator}: ({names})\b.*expected", message, re.DOTALL), message


@pytest.mark.parametrize("operator, argument, change", BAD_CALLS)
def test_fake_tensors_raise_too(operator, argument, change, device):
    arguments = bad_arguments(operator, argument, change, device)
    real = message_of(operator, arguments)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in arguments.items()}
        fake = message_of(operator, fakes)
    names = ALSO.get(argument, argument)
    assert re.search(rf"\b({names})\b", fake), f"fake: {fake}\nreal: {real}"


def test_says_what_it_is_and_what_it_should_be(device):
    arguments = layer(device)
    message = message_of("fused_moe", arguments | {"w2": arguments["w2"][:, :6]})
    assert "w2" in message and "[8, 6, 72]" in message and "[8, 64, 72]" in message
    message = message_of("fused_moe", arguments | {"w1": arguments["w1"].half()})
    assert "w1" in message and re.search("half|float16", message, re.IGNORECASE)
    message = message_of("fused_moe", arguments | {"activation": "swish"})
    assert "'swish'" in message and "swiglu" in message and "relu2" in message
    message = message_of("fused_moe", arguments | {"gate_layout": "gateup"})
    assert "'gateup'" in message and "interleaved" in message


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_a_parameter_that_the_activation_does_not_take(activation, device):
    arguments = MoeCase(activation=activation).arguments(device)
    takes = reference.ACTIVATIONS[activation].defaults
    for name in ("alpha", "beta", "limit"):
        for value in (1.5, torch.ones(8, device=device)):
            call = arguments | {name: value}
            if name in takes:
                assert torch.isfinite(moe_ops.fused_moe(**call)).all()
                continue
            for function in (moe_ops.fused_moe, reference.fused_moe):
                with pytest.raises(BAD_INPUT, match=name):
                    function(**call)


def test_no_choice_per_token(device):
    arguments = layer(device)
    for name in ("topk_weights", "topk_ids"):
        arguments[name] = arguments[name][:, :0]
    assert "topk_" in message_of("fused_moe", arguments)


@pytest.mark.parametrize("backend", ["sm80", "sm90", "cublas"])
def test_a_backend_the_cpu_lacks(backend):
    message = message_of("fused_moe", layer("cpu") | {"backend": backend})
    assert f"'{backend}'" in message and "auto" in message


def test_devices_that_differ(cuda):
    for operator, (make, _) in BAD.items():
        good = make(cuda)
        for name, value in good.items():
            if torch.is_tensor(value) and sum(map(torch.is_tensor, good.values())) > 1:
                message = message_of(operator, good | {name: value.cpu()})
                assert "cpu" in message and "cuda" in message, message


GOOD_CALLS = {
    "fused_moe": [
        MoeCase(dtype=dtype, layout=layout, output_dtype=output_dtype).arguments
        for dtype in DTYPES
        for layout in ("contiguous", "transposed", "padded")
        for output_dtype in (None, torch.float32)
    ]
    + [MoeCase(tokens=tokens).arguments for tokens in (0, 1)],
    "topk_route": [RouteCase(tokens=tokens).arguments for tokens in (0, 1, 9)],
    "sort_by_expert": [sort],
    "grouped_gemm": [
        GemmCase(layout=layout, output_dtype=output_dtype).arguments
        for layout in ("contiguous", "transposed")
        for output_dtype in (None, torch.bfloat16)
    ],
    "grouped_gemm_wgrad": [wgrad, GemmCase(dtype=torch.float16).wgrad_arguments],
    "combine": [combine, CombineCase(MoeCase(output_dtype=torch.float16)).arguments],
}


@pytest.mark.parametrize("operator", GOOD_CALLS)
def test_fake_and_real_agree(operator, device):
    for make in GOOD_CALLS[operator]:
        arguments = make(device)
        real = getattr(moe_ops, operator)(**arguments)
        with FakeTensorMode() as mode:
            fakes = {
                k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in arguments.items()
            }
            fake = getattr(moe_ops, operator)(**fakes)
        pairs = [(fake, real)] if torch.is_tensor(real) else zip(fake, real, strict=True)
        for a, b in pairs:
            assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, b.device.type)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("operator", GOOD_CALLS)
def test_meta_tensors(operator):
    arguments = GOOD_CALLS[operator][0]("cpu")
    real = getattr(moe_ops, operator)(**arguments)
    metas = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in arguments.items()}
    meta = getattr(moe_ops, operator)(**metas)
    pairs = [(meta, real)] if torch.is_tensor(real) else zip(meta, real, strict=True)
    for a, b in pairs:
        assert a.device.type == "meta" and (a.shape, a.dtype) == (b.shape, b.dtype)


def test_still_usable_after_errors(device):
    arguments = MoeCase().arguments(device)
    for bad in (dict(w2=arguments["w2"][:-1]), dict(activation="swish"), dict(x=None)):
        message_of("fused_moe", arguments | bad)
        expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
        assert_accurate(moe_ops.fused_moe(**arguments), expected)


def test_wrong_ids_on_the_device_corrupt_nothing(device):
    """Ids can't be checked without waiting for the device: garbage adds nothing instead."""
    case = MoeCase(tokens=64, topk=4, ids_dtype=torch.int64)
    arguments = case.arguments(device)
    ids = torch.randint(-(2**62), 2**62, (64, 4), generator=torch.Generator().manual_seed(0))
    arguments["topk_ids"][1:] = ids.to(device)[1:]
    for name in ("w1", "w2"):
        arguments[name] = arguments[name].nan_to_num()
    out = moe_ops.fused_moe(**arguments)
    assert not out[1:].any()
    expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
    assert_accurate(out, expected)
