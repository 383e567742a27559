"""The weighted sum of experts' rows back into tokens."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_accurate, reproducible, tolerance_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, LAYOUTS, ROUTINGS, CombineCase, MoeCase, moe_cases

import moe_ops
from moe_ops import reference


@reproducible
def check_combine(case: CombineCase, device: str) -> None:
    arguments = case.arguments(device)
    out = moe_ops.combine(**arguments)
    assert out.shape == (case.moe.tokens, case.moe.hidden)
    assert out.dtype == (case.moe.output_dtype or case.moe.dtype)
    arguments["output_dtype"] = torch.float64
    expected = reference.combine(**arguments, compute_dtype=torch.float64)
    assert_accurate(out, expected, tolerance_of(case.moe.dtype, case.moe.output_dtype))


@given(case=st.builds(CombineCase, moe_cases(intermediate=1)))
def test_any_case(case, device):
    check_combine(case, device)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_routings(dtype, routing, device):
    check_combine(CombineCase(MoeCase(dtype=dtype, routing=routing, topk=3, tokens=50)), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, layout, device):
    check_combine(CombineCase(MoeCase(dtype=dtype, layout=layout, hidden=130)), device)


@pytest.mark.parametrize("output_dtype", FLOATS)
@pytest.mark.parametrize("weights_dtype", FLOATS)
def test_dtypes(weights_dtype, output_dtype, device):
    case = MoeCase(weights_dtype=weights_dtype, output_dtype=output_dtype, routing="masked")
    check_combine(CombineCase(case), device)


def by_hand(device, slots, offsets, weights=((1.0, 10.0), (100.0, 1000.0))):
    return dict(
        expert_out=torch.tensor([[1.0], [2], [3], [4]], device=device),
        topk_weights=torch.tensor(weights, device=device),
        sorted_slots=torch.tensor(slots, dtype=torch.int32, device=device),
        expert_offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
    )


@pytest.mark.parametrize(
    "slots, offsets, expected",
    [
        ([0, 1, 2, 3], [0, 2, 4], [[21.0], [4300.0]]),
        ([3, 2, 1, 0], [0, 2, 4], [[34.0], [1200.0]]),
        ([0, 1, 2, 3], [0, 2, 3], [[21.0], [300.0]]),  # The last row is past the last offset.
        ([0, -1, 4, 3], [0, 2, 4], [[1.0], [4000.0]]),  # Two slots that don't exist.
        ([2, 2, 2, 1], [0, 4, 4], [[40.0], [300.0]]),  # The later row of three.
        ([0, 1, 2, 3], [0, 99, -5], [[21.0], [4300.0]]),  # Clamped, then a running maximum.
        ([0, 1, 2, 3], [0, 0, 0], [[0.0], [0.0]]),
    ],
)
def test_by_hand(slots, offsets, expected, device):
    assert moe_ops.combine(**by_hand(device, slots, offsets)).tolist() == expected


def test_rows_past_the_last_offset_and_their_weights_do_not_count(device):
    arguments = by_hand(device, [0, 2, 1, 3], [0, 1, 2], [[1.0, torch.nan], [100.0, torch.inf]])
    arguments["expert_out"][2:] = torch.nan
    assert moe_ops.combine(**arguments).tolist() == [[1.0], [200.0]]


@pytest.mark.parametrize("tokens, rows", [(3, 0), (0, 4), (0, 0), (3, 2), (2, 9)])
def test_any_number_of_rows(tokens, rows, device):
    """M needn't be T * K: without rows there are zeros, and nothing is read."""
    out = torch.randn(rows, 5, device=device, requires_grad=True)
    weights = torch.rand(tokens, 2, device=device, requires_grad=True)
    slots = torch.arange(rows, device=device, dtype=torch.int32)
    offsets = torch.tensor([0, rows // 2, rows], device=device, dtype=torch.int32)
    arguments = (out, weights, slots, offsets)
    got = moe_ops.combine(*arguments)
    expected = reference.combine(*arguments, compute_dtype=torch.float64)
    assert got.shape == (tokens, 5)
    assert_accurate(got, expected)
    got = torch.autograd.grad(got.square().sum(), (out, weights))
    expected = [torch.zeros_like(out), torch.zeros_like(weights)]
    if tokens and rows:
        total = reference.combine(*arguments, compute_dtype=torch.float64).square().sum()
        expected = torch.autograd.grad(total, (out, weights))
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert_accurate(a, b.double())


def test_sums_in_float32(device):
    """The weights are not rounded to the rows' dtype, nor is any partial sum."""
    arguments = by_hand(device, [0, 1, 2, 3], [0, 4], [[1.0, 2**-12], [2.0**12, -(2.0**12)]])
    arguments["expert_out"] = arguments["expert_out"].half()
    out = moe_ops.combine(**arguments, output_dtype=torch.float32)
    assert out.tolist() == [[1 + 2**-11], [-(2.0**12)]]
    expected = reference.combine(**arguments, compute_dtype=torch.float64)
    assert_accurate(out, expected)
