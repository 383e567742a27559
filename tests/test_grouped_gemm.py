"""Rows of many experts times their own weights, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_accurate, reproducible, tolerance_of
from hypothesis import given
from strategies import FLOATS, LAYOUTS, GemmCase, gemm_cases

import moe_ops
from moe_ops import reference


@reproducible
def check_gemm(case: GemmCase, device: str) -> None:
    arguments = case.arguments(device)
    out = moe_ops.grouped_gemm(**arguments)
    assert out.shape == (case.rows, case.n) and out.dtype == (case.output_dtype or case.dtype)
    arguments["output_dtype"] = torch.float64
    expected = reference.grouped_gemm(**arguments, compute_dtype=torch.float64)
    # Norms would hide a single number in the rows that are to be zero.
    ranges = list(reference.row_ranges(arguments["expert_offsets"], case.rows))
    assert not out[: ranges[0].start].any() and not out[ranges[-1].stop :].any()
    assert_accurate(out, expected, tolerance_of(case.dtype, case.output_dtype))


@given(case=gemm_cases())
def test_any_case(case, device):
    check_gemm(case, device)


@pytest.mark.parametrize("offsets", ["uniform", "one", "idle", "partial", "malformed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets(dtype, offsets, device):
    for seed in range(5):
        check_gemm(GemmCase(dtype=dtype, offsets=offsets, rows=100, seed=seed), device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, layout, device):
    check_gemm(GemmCase(dtype=dtype, layout=layout), device)
    check_gemm(GemmCase(dtype=dtype, layout=layout, n=7, k=1030), device)


@pytest.mark.parametrize("output_dtype", FLOATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_dtype_and_bias(dtype, output_dtype, device):
    for bias in (None, "float32", "as x"):
        check_gemm(GemmCase(dtype=dtype, output_dtype=output_dtype, bias=bias), device)


def test_by_hand(device):
    a = torch.tensor([[1.0, 2], [3, 4], [5, 6]], device=device)
    b = torch.tensor([[[1.0, 1]], [[10, 0]]], device=device)
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    assert moe_ops.grouped_gemm(a, b, offsets).tolist() == [[3], [30], [0]]


def test_no_rows(device):
    out = moe_ops.grouped_gemm(**GemmCase(rows=0).arguments(device))
    assert out.shape == (0, 64)
