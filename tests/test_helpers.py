"""The comparison that most tests rest on."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, TOLERANCE, assert_accurate


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_among_many_is_found(dtype):
    expected = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).double()
    expected[3] *= 1e-4  # A small row takes the size of the others: sums may have cancelled.
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    out = (expected + 0.3 * TOLERANCE[dtype] * noise).to(dtype)
    assert_accurate(out, expected)
    out[100, 200] += 1
    with pytest.raises(AssertionError, match="an element is off"):
        assert_accurate(out, expected, max(TOLERANCE[dtype], 5e-3))
    out[100, 200] = torch.nan
    with pytest.raises(AssertionError, match="NaN"):
        assert_accurate(out, expected)


def test_nan_where_it_is_expected():
    expected = torch.randn(3, 100)
    expected[1] = torch.nan
    expected[2, ::2] = torch.nan
    assert_accurate(expected.clone(), expected)
    assert_accurate(torch.empty(0, 5), torch.empty(0, 5))
    assert_accurate(torch.full((4,), torch.nan), torch.full((4,), torch.nan))
