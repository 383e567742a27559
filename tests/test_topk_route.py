"""Routing: which experts, in which order, with which weights."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, reproducible
from hypothesis import given
from strategies import RouteCase, route_cases

import moe_ops
from moe_ops import reference

# Choices this close may come out in either order: float32 sums differ in their last bits.
NEAR = 4e-6


@reproducible
def check_route(case: RouteCase, device: str) -> None:
    arguments = case.arguments(device)
    weights, ids = moe_ops.topk_route(**arguments)
    shape = (case.tokens, case.topk)
    assert weights.shape == ids.shape == shape
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32

    ids = ids.long()
    assert ((ids >= 0) & (ids < case.experts)).all(), "an id that doesn't exist"
    ordered = ids.sort(dim=1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "an expert chosen twice by one token"

    expected_weights, expected_ids = reference.topk_route(**arguments)
    clear = ~near_ties(arguments)
    assert torch.equal(ids[clear], expected_ids.long()[clear]), "other experts than the reference"
    torch.testing.assert_close(weights[clear], expected_weights[clear], rtol=2e-6, atol=1e-9)
    if case.kind == "ties" and case.correction_bias != "normal":
        assert clear.float().mean() > 0.5 or not case.tokens, "exact ties are no near ties"


def near_ties(arguments: dict) -> torch.Tensor:
    """[T]: whether what decides lies so close together, but not equal, that rounding decides."""
    scores = reference._scores(arguments["router_logits"].double(), arguments["scoring"])
    bias = arguments["correction_bias"]
    choices = scores if bias is None else scores + bias.double()
    close = _has_near(choices, arguments["topk"] if arguments["num_groups"] == 1 else None)
    if arguments["num_groups"] > 1:
        groups = choices.unflatten(1, (arguments["num_groups"], -1))
        close |= _has_near(reference._group_scores(groups), None)
    return close


def _has_near(values: torch.Tensor, count: int | None) -> torch.Tensor:
    largest = torch.where(values.isnan(), -torch.inf, values).sort(dim=1, descending=True).values
    largest = largest if count is None else largest[:, : count + 1]
    gaps = largest[:, :-1] - largest[:, 1:]
    # In float64 equal logits have equal scores, or as good as.
    near = (gaps > 1e-14 * largest[:, 1:].abs()) & (gaps < NEAR * largest[:, :-1].abs())
    return near.any(dim=1)


@given(case=route_cases())
def test_any_case(case, device):
    check_route(case, device)


@pytest.mark.parametrize("scoring", reference.SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, scoring, device):
    for renormalize in (False, True):
        case = RouteCase(dtype=dtype, scoring=scoring, renormalize=renormalize, tokens=100)
        check_route(case, device)


@pytest.mark.parametrize("kind", ["ties", "nan", "inf"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (16, 5), (2, 1)])
@pytest.mark.parametrize("scoring", reference.SCORINGS)
def test_awkward_logits(scoring, groups, kind, device):
    num_groups, topk_groups = groups
    check_route(
        RouteCase(kind=kind, scoring=scoring, num_groups=num_groups, topk_groups=topk_groups),
        device,
    )


@pytest.mark.parametrize(
    "sizes", [(1, 1), (8, 8), (1025, 22), (512, 10), (2048, 8), (5000, 4)], ids=str
)
def test_expert_counts(sizes, device):
    experts, topk = sizes
    for tokens in (0, 1, 33):
        check_route(RouteCase(tokens=tokens, experts=experts, topk=topk), device)


@pytest.mark.parametrize("bias", ["normal", "integers", "nan"])
def test_deepseek_v3(bias, device):
    case = RouteCase(
        tokens=50, experts=256, topk=8, scoring="sigmoid", correction_bias=bias,
        num_groups=8, topk_groups=4, scaling=2.5,
    )  # fmt: skip
    check_route(case, device)


def test_all_equal_gives_the_lowest_ids(device):
    weights, ids = moe_ops.topk_route(torch.zeros(3, 12, device=device), 4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert weights.tolist() == [[0.25] * 4] * 3


def test_correction_bias_moves_the_choice_but_not_the_weights(device):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], device=device)
    bias = torch.tensor([5.0, 0.0, 0.0, 0.0], device=device)
    weights, ids = moe_ops.topk_route(
        logits, 2, scoring="sigmoid", renormalize=False, correction_bias=bias
    )
    assert ids.tolist() == [[0, 3]]
    torch.testing.assert_close(weights, torch.sigmoid(logits[:, [0, 3]]))


@pytest.mark.parametrize("scoring", reference.SCORINGS)
def test_nan_ranks_last_with_weight_0(scoring, device):
    nan = torch.nan
    logits = torch.tensor([[nan, 1.0, nan, -torch.inf, 3.0]], device=device)
    weights, ids = moe_ops.topk_route(logits, 5, scoring=scoring)
    assert ids.tolist() == [[4, 1, 3, 0, 2]]
    assert weights[0, 2:].tolist() == [0, 0, 0]
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(1, device=device))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_one_proper_softmax_score(value, device):
    weights, ids = moe_ops.topk_route(torch.full((2, 6), value, device=device), 3)
    assert ids.tolist() == [[0, 1, 2]] * 2 and weights.tolist() == [[0.0] * 3] * 2


def test_unchosen_groups_cannot_be_chosen(device):
    # The best single expert, 0, is in the worst group: a group counts by its best two.
    logits = torch.tensor([[3.0, -9, -9, 2, 2, -9, 2, 2.5, -9]], device=device)
    _, ids = moe_ops.topk_route(logits, 3, scoring="sigmoid", num_groups=3, topk_groups=1)
    assert ids.tolist() == [[7, 6, 8]]


def test_scaling_comes_after_renormalisation(device):
    logits = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).to(device)
    weights, _ = moe_ops.topk_route(logits, 4, scaling=2.5)
    torch.testing.assert_close(weights.sum(dim=1), torch.full((9,), 2.5, device=device))
