"""What the tests share: tolerances, comparison, and the report of a failing call."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch

# norm(out - reference) / norm(reference), as promised for each dtype.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
DTYPES = list(TOLERANCE)
# No element may be further off than so many times that, by its own size and the others' together.
ELEMENTWISE = 5
# Checks in C++ raise RuntimeError, checks in Python what fits best.
BAD_INPUT = (RuntimeError, ValueError, TypeError)

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


def worst_element(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest |out - expected| over the element's size plus that of its row or, where the row
    is small, of all. (One wholly wrong element of many thousands doesn't show in the norm.)
    """
    if expected.numel() == 0:
        return 0.0
    expected = expected.double()
    size = expected.square().nanmean(dim=-1, keepdim=True) if expected.dim() else expected.square()
    size = torch.maximum(size, expected.square().nanmean()).sqrt()
    if expected.numel() < 256:  # As in relative_error.
        size = size.clamp(min=1)
    error = (out.double() - expected).abs() / (expected.abs() + size)
    return error.nan_to_num(0.0).max().item()


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """norm(out - expected) / norm(expected)."""
    expected = expected.double()
    difference = torch.linalg.vector_norm(out.double() - expected)
    norm = torch.linalg.vector_norm(expected)
    if expected.numel() < 256:
        # The terms of a few sums may happen to cancel; of many they don't. Inputs are of size 1.
        norm = norm.clamp(min=max(1, expected.numel()) ** 0.5)
    return (difference / norm if norm > 0 else difference).item()


def tolerance_of(*dtypes: torch.dtype | None) -> float:
    return max(TOLERANCE[dtype] for dtype in dtypes if dtype is not None)


def assert_accurate(
    out: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None, what: str = "output"
) -> None:
    """Same shape, NaN in the same places, and everything else close in the norm."""
    assert out.shape == expected.shape, f"{what}: {tuple(out.shape)} != {tuple(expected.shape)}"
    tolerance = TOLERANCE[out.dtype] if tolerance is None else tolerance
    out, expected = out.detach(), expected.detach()
    is_nan = expected.isnan()
    assert torch.equal(out.isnan(), is_nan), f"{what}: NaN elsewhere than in the reference"
    error = relative_error(out[~is_nan], expected[~is_nan])
    assert error < tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"
    error, allowed = worst_element(out, expected), ELEMENTWISE * tolerance
    assert error <= allowed, f"{what}: an element is off by {error:.2e}, allowed {allowed:.0e}"


def assert_same_bits(a: torch.Tensor, b: torch.Tensor, what: str = "output") -> None:
    """Equal as bytes, so that NaN equals itself and -0 doesn't equal 0."""
    assert a.shape == b.shape and a.dtype == b.dtype, f"{what}: {a.shape} {a.dtype}"
    same = a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))
    assert same, f"{what}: bits differ"


def reproducible(check):
    """Prints the call that failed: hypothesis's own report leaves the imports out."""

    @functools.wraps(check)
    def wrapper(*args, **kwargs):
        try:
            return check(*args, **kwargs)
        except Exception:
            texts = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
            print("To reproduce, in the folder tests:\n")
            print("  import torch; from strategies import *")
            print(f"  from {check.__module__} import {check.__name__}")
            print(f"  {check.__name__}({', '.join(texts)})\n")
            raise

    return wrapper


def clone_arguments(args):
    """A deep copy of tensors in a dict, None and other values as they are."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def require_gradients(args: dict, names) -> list[torch.Tensor]:
    """Makes fresh leaves of the named tensors that are there, in place; returns them."""
    for name in names:
        if args.get(name) is not None:
            args[name] = args[name].detach().clone().requires_grad_()
    return [args[name] for name in names if args.get(name) is not None]
