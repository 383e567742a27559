"""The gradient of grouped_gemm's weights, as an operator of its own."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_accurate, reproducible, tolerance_of
from hypothesis import given
from strategies import FLOATS, LAYOUTS, GemmCase, gemm_cases

import moe_ops
from moe_ops import reference


@reproducible
def check_wgrad(case: GemmCase, device: str) -> None:
    arguments = case.wgrad_arguments(device)
    out = moe_ops.grouped_gemm_wgrad(**arguments)
    assert out.shape == (case.experts, case.k, case.n)
    assert out.dtype == (case.output_dtype or case.dtype)
    arguments["output_dtype"] = torch.float64
    expected = reference.grouped_gemm_wgrad(**arguments, compute_dtype=torch.float64)
    for expert, rows in enumerate(reference.row_ranges(arguments["expert_offsets"], case.rows)):
        assert rows.start < rows.stop or not out[expert].any(), "no rows, but a gradient"
    assert_accurate(out, expected, tolerance_of(case.dtype, case.output_dtype))


@given(case=gemm_cases())
def test_any_case(case, device):
    check_wgrad(case, device)


@pytest.mark.parametrize("offsets", ["uniform", "one", "idle", "partial", "malformed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets(dtype, offsets, device):
    for seed in range(5):
        check_wgrad(GemmCase(dtype=dtype, offsets=offsets, rows=100, seed=seed), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, layout, device):
    check_wgrad(GemmCase(dtype=dtype, layout=layout, n=20, k=7), device)
    check_wgrad(GemmCase(dtype=dtype, layout=layout, rows=300), device)


@pytest.mark.parametrize("output_dtype", FLOATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_dtype(dtype, output_dtype, device):
    check_wgrad(GemmCase(dtype=dtype, output_dtype=output_dtype), device)


def test_by_hand(device):
    a = torch.tensor([[1.0, 2], [3, 4], [5, 6]], device=device)
    b = torch.tensor([[1.0], [10], [100]], device=device)
    offsets = torch.tensor([0, 2, 2], dtype=torch.int32, device=device)
    assert moe_ops.grouped_gemm_wgrad(a, b, offsets).tolist() == [[[31], [42]], [[0], [0]]]


def test_is_the_gradient_of_grouped_gemm(device):
    arguments = GemmCase(offsets="partial").arguments(device)
    a, offsets = arguments["a"].nan_to_num(), arguments["expert_offsets"]
    b = arguments["b"].nan_to_num().requires_grad_()
    out = moe_ops.grouped_gemm(a, b, offsets)
    grad = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, b, grad)
    assert_accurate(moe_ops.grouped_gemm_wgrad(grad, a, offsets), expected.double())
