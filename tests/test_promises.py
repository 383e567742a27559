"""What every operator promises besides the right numbers."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DTYPES,
    assert_accurate,
    assert_same_bits,
    clone_arguments,
)
from strategies import ROUTINGS, CombineCase, GemmCase, MoeCase, RouteCase

import moe_ops
from moe_ops import reference

CASES = {
    "fused_moe": MoeCase(tokens=40, bias="float32", routing="masked").arguments,
    "topk_route": RouteCase(tokens=40).arguments,
    "sort_by_expert": lambda device: {
        "topk_ids": MoeCase(tokens=40).tensors(device)["topk_ids"],
        "num_experts": 8,
    },
    "grouped_gemm": GemmCase(rows=90, offsets="partial", bias="float32").arguments,
    "grouped_gemm_wgrad": GemmCase(rows=90, offsets="idle").wgrad_arguments,
    "combine": CombineCase(MoeCase(tokens=40, routing="masked")).arguments,
}
operators = pytest.mark.parametrize("operator", CASES)


def call(operator: str, arguments: dict) -> list[torch.Tensor]:
    out = getattr(moe_ops, operator)(**arguments)
    return [out] if isinstance(out, torch.Tensor) else list(out)


@operators
def test_same_bits_every_time(operator, device):
    arguments = CASES[operator](device)
    first = call(operator, arguments)
    for _ in range(5):
        for a, b in zip(call(operator, arguments), first, strict=True):
            assert_same_bits(a, b)


@operators
def test_inputs_are_not_written(operator, device):
    arguments = CASES[operator](device)
    before = clone_arguments(arguments)
    call(operator, arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            assert_same_bits(value, before[name], name)


@operators
def test_output_is_fresh_storage(operator, device):
    arguments = CASES[operator](device)
    first = call(operator, arguments)
    copies = [out.clone() for out in first]
    second = call(operator, arguments)
    inputs = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    storages = [t.untyped_storage().data_ptr() for t in (*first, *second, *inputs)]
    assert len(set(storages)) == len(storages)
    for out in second:  # Nobody keeps it: writing to it harms nothing.
        out.fill_(7)
    for a, b, c in zip(first, copies, call(operator, arguments), strict=True):
        assert_same_bits(a, b)
        assert_same_bits(c, b)


@operators
def test_every_element_is_written(operator, device):
    """In its deterministic mode torch fills new tensors with NaN, or the largest integer."""
    arguments = CASES[operator](device)
    expected = call(operator, arguments)
    torch.use_deterministic_algorithms(True)
    try:
        got = call(operator, arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_permuting_tokens_permutes_the_output(routing, dtype, device):
    arguments = MoeCase(tokens=70, topk=3, routing=routing, dtype=dtype).arguments(device)
    out = moe_ops.fused_moe(**arguments)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(device)
    for name in ("x", "topk_weights", "topk_ids"):
        arguments[name] = arguments[name][order]
    permuted = moe_ops.fused_moe(**arguments)
    if device == "cuda":
        assert_same_bits(permuted, out[order])
    else:  # Its products may round otherwise for another number of rows.
        assert_accurate(permuted, out[order].double())


def test_other_tokens_routing_changes_nothing(cuda):
    arguments = MoeCase(tokens=70, dtype=torch.bfloat16).arguments(cuda)
    for name in ("w1", "w2"):
        arguments[name] = arguments[name].nan_to_num(0.1)
    out = moe_ops.fused_moe(**arguments)
    arguments["topk_ids"][1:] = 3
    arguments["x"][1:] *= 2
    assert_same_bits(moe_ops.fused_moe(**arguments)[0], out[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant(dtype, cuda):
    arguments = MoeCase(tokens=200, dtype=dtype).arguments(cuda)
    for name in ("w1", "w2"):
        arguments[name] = arguments[name].nan_to_num(0.1)
    whole = moe_ops.fused_moe(**arguments, batch_invariant=True)
    for tokens in (1, 2, 3, 17, 64, 129):
        part = {n: arguments[n][:tokens] for n in ("x", "topk_weights", "topk_ids")}
        out = moe_ops.fused_moe(**(arguments | part), batch_invariant=True)
        assert_same_bits(out, whole[:tokens])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_nan_stays_in_its_row_and_gets_through(activation, value, device):
    arguments = MoeCase(tokens=20, activation=activation, parameters="number").arguments(device)
    clean = moe_ops.fused_moe(**arguments)
    arguments["x"][3] = value
    out = moe_ops.fused_moe(**arguments)
    others = torch.arange(20, device=device) != 3
    assert_accurate(out[others], clean[others].double())
    expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
    if value != value:
        assert out[3].isnan().all() and expected[3].isnan().all()
    # Infinities of both signs meet in the sums: NaN there, whatever the activation.
    assert torch.equal(out[3].isfinite(), expected[3].isfinite())


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_nan_in_one_branch_alone(activation, device):
    """A clamp by fmin and fmax would drop it."""
    gated = reference.ACTIVATIONS[activation].gated
    for branch in (0, 1) if gated else (0,):
        arguments = MoeCase(tokens=6, experts=1, topk=1, activation=activation).arguments(device)
        arguments["w1"][0, branch * 72] = torch.nan  # The first row of gate or up.
        assert moe_ops.fused_moe(**arguments).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_held_nowhere_gets_exact_zeros(dtype, device):
    arguments = MoeCase(tokens=20, dtype=dtype, bias="float32").arguments(device)
    arguments["topk_ids"][::2] = -1
    arguments["topk_weights"][::2] = torch.nan
    arguments["x"][::2] = torch.nan
    out = moe_ops.fused_moe(**arguments)
    assert not out[::2].any() and not out.isnan().any()


def test_nobody_chosen_at_all(device):
    arguments = MoeCase(bias="as x").arguments(device)
    for name in ("w1", "w2", "b1", "b2", "topk_weights"):
        arguments[name] = torch.full_like(arguments[name], torch.nan)
    arguments["topk_ids"].fill_(8)
    assert not moe_ops.fused_moe(**arguments).any()


def test_float16_range(device):
    """Sums and products past 65504 are fine where what is stored is not past it."""
    tokens, hidden = 5, 64
    half = dict(dtype=torch.float16, device=device)
    x = torch.full((tokens, hidden), 16.0, **half)
    # h1 = 64 * 16 * 32 = 32768; h2 = 64 * 32768 / 16 = 131072; the output is a tenth of that.
    w1 = torch.full((2, hidden, hidden), 32.0, **half)
    w2 = torch.full((2, hidden, hidden), 1 / 16, **half)
    weights = torch.full((tokens, 2), 0.05, device=device)
    ids = torch.tensor([[0, 1]] * tokens, dtype=torch.int32, device=device)
    out = moe_ops.fused_moe(x, w1, w2, weights, ids, activation="identity")
    assert_accurate(out, torch.full((tokens, hidden), 13107.2, device=device))
    # h1 = 131072 for the gate, which the clamp brings back.
    w1 = torch.full((2, 2 * hidden, hidden), 128.0, **half)
    arguments = dict(activation="swiglu_oai", limit=7.0)
    out = moe_ops.fused_moe(x, w1, w2, weights, ids, **arguments)
    expected = reference.fused_moe(
        x, w1, w2, weights, ids, **arguments, compute_dtype=torch.float64
    )
    assert_accurate(out, expected)


@pytest.mark.parametrize("tokens", [1, 2, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nothing_is_rounded_before_the_bias_and_the_weight(dtype, tokens, device):
    """A product that is rounded to 16 bits first is mostly rounding in both of these."""
    case = MoeCase(tokens=tokens, experts=2, hidden=512, intermediate=520, dtype=dtype,
                   activation="silu", bias="float32", routing="duplicated")  # fmt: skip
    cancelling, tiny = case.arguments(device), case.arguments(device)
    x = cancelling["x"]
    x[:] = x[0]  # One bias cancels the product for all tokens.
    h1 = (x[0].double() @ cancelling["w1"].double().mT).float()
    cancelling["b1"] = cancelling["b1"] / 16 - h1
    cancelling["b2"] /= 64
    tiny["w2"] *= 2.0**-20  # Products under float16's smallest normal number.
    tiny["b2"] *= 2.0**-20
    tiny["topk_weights"] *= 2.0**16
    for arguments in (cancelling, tiny):
        expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
        assert_accurate(moe_ops.fused_moe(**arguments), expected)


def test_ids_past_int32(device):
    arguments = MoeCase(ids_dtype=torch.int64).arguments(device)
    for name in ("w1", "w2"):
        arguments[name] = arguments[name].nan_to_num()
    arguments["topk_ids"][:, 0] = 2**40 + 3
    arguments["topk_ids"][:, 1] = 3
    out = moe_ops.fused_moe(**arguments)
    arguments["topk_ids"][:, 0] = -1
    assert_same_bits(out, moe_ops.fused_moe(**arguments))


def test_an_expert_chosen_twice_counts_twice(device):
    arguments = MoeCase(topk=1, bias="float32").arguments(device)
    once = moe_ops.fused_moe(**arguments)
    arguments["topk_ids"] = arguments["topk_ids"].expand(-1, 2)
    arguments["topk_weights"] = arguments["topk_weights"].expand(-1, 2)
    assert_accurate(moe_ops.fused_moe(**arguments), 2 * once.double())
