"""The whole layer against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_accurate, assert_same_bits, reproducible, tolerance_of
from hypothesis import given
from strategies import FLOATS, LAYOUTS, ROUTINGS, MoeCase, moe_cases

import moe_ops
from moe_ops import reference


@reproducible
def check_layer(case: MoeCase, device: str) -> None:
    arguments = case.arguments(device)
    out = moe_ops.fused_moe(**arguments)
    assert out.dtype == (case.output_dtype or case.dtype)
    assert out.is_contiguous() and out.device == arguments["x"].device
    arguments["output_dtype"] = torch.float64
    expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
    assert_accurate(out, expected, tolerance_of(case.dtype, case.output_dtype))


@given(case=moe_cases())
def test_any_case(case, device):
    check_layer(case, device)


@pytest.mark.parametrize("gate_layout", reference.GATE_LAYOUTS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation, gate_layout, device):
    for parameters in (None, "number", "tensor"):
        case = MoeCase(
            activation=activation, gate_layout=gate_layout, parameters=parameters, bias="float32"
        )
        check_layer(case, device)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_routings(dtype, routing, device):
    for tokens in (1, 2, 40, 200):
        check_layer(MoeCase(tokens=tokens, dtype=dtype, routing=routing, topk=3), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_in_memory(dtype, layout, device):
    check_layer(MoeCase(dtype=dtype, layout=layout, bias="as x"), device)
    check_layer(MoeCase(dtype=dtype, layout=layout, hidden=63, intermediate=7), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_at_any_address(dtype, device):
    """What the sort makes lies in `out` meanwhile, wherever that is."""
    for hidden in (7, 72):
        for tokens in (1, 2, 300):
            arguments = MoeCase(tokens=tokens, hidden=hidden, dtype=dtype).arguments(device)
            expected = moe_ops.fused_moe(**arguments)
            buffer = torch.full((tokens + 2, hidden), 3, dtype=dtype, device=device)
            out = buffer[1:-1]
            moe_ops.fused_moe(**arguments, out=out)
            assert_same_bits(out, expected)
            assert (buffer[0] == 3).all() and (buffer[-1] == 3).all()


@pytest.mark.parametrize("output_dtype", FLOATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_dtype(dtype, output_dtype, device):
    check_layer(MoeCase(dtype=dtype, output_dtype=output_dtype), device)


@pytest.mark.parametrize("weights_dtype", FLOATS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_routing_dtypes(ids_dtype, weights_dtype, device):
    case = MoeCase(routing="masked", ids_dtype=ids_dtype, weights_dtype=weights_dtype)
    check_layer(case, device)
    check_layer(case.but(dtype=torch.bfloat16), device)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(topk=22, experts=64),
        dict(topk=10, experts=512),
        dict(experts=1025, hidden=16, intermediate=8),
        dict(experts=1, topk=1),
        dict(experts=2, topk=5),  # More choices than experts: some count twice.
        dict(hidden=1030, intermediate=20),
        dict(hidden=20, intermediate=7),
        dict(hidden=1, intermediate=1),
        dict(hidden=2880, intermediate=360, experts=4),
        dict(hidden=704, intermediate=1408, experts=4),
        dict(tokens=700, routing="one_hot"),
    ],
    ids=lambda sizes: "-".join(f"{k}={v}" for k, v in sizes.items()),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(dtype, sizes, device):
    check_layer(MoeCase(dtype=dtype, **sizes), device)


def test_no_tokens(device):
    arguments = MoeCase(tokens=0).arguments(device)
    out = moe_ops.fused_moe(**arguments)
    assert out.shape == (0, 64) and out.dtype == torch.float32


def test_expert_parallel_ranks_sum_to_the_layer(device):
    """Four ranks hold two of eight experts each, under the same global ids."""
    arguments = MoeCase(topk=3, bias="float32", parameters="tensor", activation="situ",
                        routing="uniform", tokens=64).arguments(device)  # fmt: skip
    whole = moe_ops.fused_moe(**arguments)
    per_expert = ("w1", "w2", "b1", "b2", "beta", "limit")
    total = torch.zeros_like(whole)
    for first in range(0, 8, 2):
        local = {name: arguments[name][first : first + 2] for name in per_expert}
        total += moe_ops.fused_moe(**(arguments | local), expert_offset=first)
    assert_accurate(total, whole.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bias_alone(dtype, device):
    for absent in ("b1", "b2"):
        arguments = MoeCase(dtype=dtype, bias="float32").arguments(device) | {absent: None}
        expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
        assert_accurate(moe_ops.fused_moe(**arguments), expected)


@pytest.mark.parametrize("output_dtype", FLOATS)
def test_out_is_written_and_returned(output_dtype, device):
    arguments = MoeCase(output_dtype=output_dtype).arguments(device)
    expected = moe_ops.fused_moe(**arguments)
    out = torch.full_like(expected, torch.nan)
    assert moe_ops.fused_moe(**arguments, out=out) is out
    assert torch.equal(out, expected)


def test_out_of_any_layout(device):
    """Written in place whatever lies between its elements, which stays as it was."""
    arguments = MoeCase().arguments(device)
    expected = moe_ops.fused_moe(**arguments)
    tokens, hidden = expected.shape
    for shape, view in [
        ((tokens, 2 * hidden), lambda t: t[:, ::2]),
        ((tokens, 2 * hidden - 1), lambda t: t[:, ::2]),
        ((2 * tokens, hidden + 3), lambda t: t[::2, 3:]),
        ((hidden, tokens + 1), lambda t: t[:, 1:].T),
    ]:
        storage = torch.full(shape, 7.0, device=device)
        moe_ops.fused_moe(**arguments, out=view(storage))
        assert torch.equal(view(storage), expected)
        view(storage).fill_(7.0)
        assert (storage == 7.0).all()
    for tokens in (0, 1):  # A stride that is never taken may be 0.
        arguments = MoeCase(tokens=tokens).arguments(device)
        out = torch.empty(hidden, device=device).expand(tokens, hidden)
        assert torch.equal(moe_ops.fused_moe(**arguments, out=out), moe_ops.fused_moe(**arguments))


@pytest.mark.parametrize("tokens", [1, 5])
def test_out_may_lie_where_the_ids_do(tokens, device):
    arguments = MoeCase(tokens=tokens, hidden=4096, dtype=torch.bfloat16).arguments(device)
    expected = moe_ops.fused_moe(**arguments)
    memory = torch.empty(tokens, 4096, dtype=torch.bfloat16, device=device)
    ids = arguments["topk_ids"]
    shared = memory.view(torch.int32).flatten()[: ids.numel()].view(ids.shape)
    arguments["topk_ids"] = shared.copy_(ids)
    assert_same_bits(moe_ops.fused_moe(**arguments, out=memory), expected)


@pytest.mark.parametrize("name", ["x", "w1", "w2", "topk_weights", "b2"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_out_may_lie_where_an_input_does(tokens, name, device):
    case = MoeCase(tokens=tokens, hidden=512, dtype=torch.bfloat16, bias="as x")
    arguments = case.arguments(device)
    expected = moe_ops.fused_moe(**arguments)
    given = arguments[name]
    memory = torch.empty(max(given.nbytes // 2, tokens * 512), dtype=torch.bfloat16, device=device)
    shared = memory.view(given.dtype)[: given.numel()].view(given.shape)
    arguments[name] = shared.copy_(given)
    out = memory[: tokens * 512].view(tokens, 512)
    assert_same_bits(moe_ops.fused_moe(**arguments, out=out), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_few_tokens(tokens, activation, dtype, device):
    """So few of them, and so many experts, that a GPU takes each slot by itself."""
    case = MoeCase(tokens=tokens, topk=3, experts=64, hidden=200, intermediate=72, dtype=dtype,
                   activation=activation, routing="masked", bias="float32", parameters="tensor",
                   gate_layout=reference.GATE_LAYOUTS[tokens % 3], expert_offset=5)  # fmt: skip
    check_layer(case, device)
    arguments = case.arguments(device)
    invariant = moe_ops.fused_moe(**arguments, batch_invariant=True)
    arguments["output_dtype"] = torch.float64
    expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
    assert_accurate(invariant, expected, tolerance_of(dtype))


def test_the_operator_itself(device):
    """torch.ops.simple_moe takes the same first five tensors, and defaults for all the rest."""
    arguments = MoeCase().arguments(device)
    five = [arguments[name] for name in ("x", "w1", "w2", "topk_weights", "topk_ids")]
    assert torch.equal(torch.ops.simple_moe.fused_moe(*five), moe_ops.fused_moe(*five))


def test_batch_invariant_and_auto_are_taken_everywhere(device):
    arguments = MoeCase().arguments(device)
    expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
    out = moe_ops.fused_moe(**arguments, batch_invariant=True, backend="auto")
    assert_accurate(out, expected)
