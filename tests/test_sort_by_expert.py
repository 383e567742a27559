"""The stable sort of slots by expert: integers, so every comparison is exact."""

from __future__ import annotations

import pytest
import torch
from helpers import reproducible
from hypothesis import given
from strategies import MoeCase, lay_out, moe_cases

import moe_ops
from moe_ops import reference


@reproducible
def check_sort(case: MoeCase, device: str) -> None:
    ids = case.tensors(device)["topk_ids"]
    offsets, slots = moe_ops.sort_by_expert(ids, case.experts, case.expert_offset)
    assert offsets.dtype == slots.dtype == torch.int32
    assert offsets.shape == (case.experts + 1,) and slots.shape == (case.tokens * case.topk,)
    expected_offsets, expected_slots = reference.sort_by_expert(
        ids, case.experts, case.expert_offset
    )
    assert torch.equal(offsets, expected_offsets)
    assert torch.equal(slots, expected_slots)


@given(case=moe_cases(hidden=1, intermediate=1))
def test_any_case(case, device):
    check_sort(case, device)


@pytest.mark.parametrize("tokens", [0, 1, 1000, 20000])
@pytest.mark.parametrize("experts", [1, 8, 1025, 5000])
def test_sizes(experts, tokens, device):
    case = MoeCase(tokens=tokens, experts=experts, routing="duplicated", hidden=1, intermediate=1)
    check_sort(case, device)
    check_sort(case.but(routing="masked", expert_offset=7, ids_dtype=torch.int64), device)


def test_by_hand(device):
    ids = torch.tensor([[2, 0], [9, 2], [-1, 0]], device=device)
    offsets, slots = moe_ops.sort_by_expert(ids, 3)
    assert offsets.tolist() == [0, 2, 2, 4]
    assert slots.tolist() == [1, 5, 0, 3, 2, 4]


@pytest.mark.parametrize("offset", [0, 3, 2**31, 2**40])
def test_ids_are_judged_as_int64(offset, device):
    """Whatever an int64 may hold, and whatever overflows when the offset is taken from it."""
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    values = [3, 2**40 + 3, 2**32 + 3, -(2**32), low, low + 3, high, -1, offset, offset + 3]
    ids = torch.tensor([values], device=device)
    offsets, slots = moe_ops.sort_by_expert(ids, 4, offset)
    expected = sorted((v, slot) for slot, v in enumerate(values) if offset <= v < offset + 4)
    held = [slot for _, slot in expected]
    assert slots[: len(held)].tolist() == held and int(offsets[-1]) == len(held)
    assert sorted(slots.tolist()) == list(range(len(values)))


@pytest.mark.parametrize("layout", ["strided", "padded", "transposed", "misaligned"])
def test_layouts(layout, device):
    ids = torch.randint(6, (50, 4), generator=torch.Generator().manual_seed(0)).int().to(device)
    got = moe_ops.sort_by_expert(lay_out(ids, layout), 6)
    for out, expected in zip(got, reference.sort_by_expert(ids, 6), strict=True):
        assert torch.equal(out, expected)
