"""Every operator in plain eager PyTorch: what the fused ones are tested against.

Written to be read, not to be fast: one expert after another, any device, any floating dtype,
differentiable by autograd alone. A function computes in the dtype of its inputs, or in
`compute_dtype` where that is given; `compute_dtype=torch.float64` makes it an oracle, because
nothing is then rounded in between and the result stays in float64 unless `output_dtype` says
otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Scalar = float | Tensor  # A tensor holds one value per expert.


# ---- Activations ----


def _swiglu_oai(gate: Tensor, up: Tensor, alpha: Scalar, beta: Scalar, limit: Scalar) -> Tensor:
    gate = torch.clamp(gate, max=limit)
    return gate * torch.sigmoid(alpha * gate) * (_clamp_both(up, limit) + beta)


def _swiglu_step(gate: Tensor, up: Tensor, limit: Scalar) -> Tensor:
    return torch.clamp(F.silu(gate), max=limit) * _clamp_both(up, limit)


def _situ(gate: Tensor, up: Tensor, beta: Scalar, limit: Scalar) -> Tensor:
    gate = beta * torch.tanh(gate / beta) * torch.sigmoid(gate)
    return gate * (limit * torch.tanh(up / limit))


def _clamp_both(x: Tensor, limit: Scalar) -> Tensor:
    return torch.clamp(x, min=-limit, max=limit)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class Activation(NamedTuple):
    """`function(gate, up, **parameters)` where gated, `function(x)` elsewhere."""

    function: Callable[..., Tensor]
    gated: bool
    defaults: dict[str, float] = {}  # The parameters it takes.


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(lambda gate, up: F.silu(gate) * up, gated=True),
    "geglu": Activation(lambda gate, up: F.gelu(gate) * up, gated=True),
    "geglu_tanh": Activation(lambda gate, up: _gelu_tanh(gate) * up, gated=True),
    "reglu": Activation(lambda gate, up: F.relu(gate) * up, gated=True),
    "swiglu_oai": Activation(_swiglu_oai, True, {"alpha": 1.702, "beta": 1.0, "limit": 7.0}),
    "swiglu_step": Activation(_swiglu_step, True, {"limit": 7.0}),
    "situ": Activation(_situ, True, {"beta": 4.0, "limit": 25.0}),
    "silu": Activation(F.silu, gated=False),
    "gelu": Activation(F.gelu, gated=False),
    "gelu_tanh": Activation(_gelu_tanh, gated=False),
    "relu": Activation(F.relu, gated=False),
    "relu2": Activation(lambda x: F.relu(x) ** 2, gated=False),
    "identity": Activation(lambda x: x, gated=False),
}
GATE_LAYOUTS = ("gate_up", "up_gate", "interleaved")
SCORINGS = ("softmax", "sigmoid")


def activate(
    gate: Tensor,
    up: Tensor | None,
    activation: str = "swiglu",
    alpha: Scalar | None = None,
    beta: Scalar | None = None,
    limit: Scalar | None = None,
) -> Tensor:
    """The activation of one expert's first product; `up` is None for an ungated one."""
    entry = _lookup("activation", activation, ACTIVATIONS)
    parameters = _parameters(activation, alpha=alpha, beta=beta, limit=limit)
    if not entry.gated:
        return entry.function(gate)
    return entry.function(gate, up, **parameters)


def split_branches(h1: Tensor, gate_layout: str = "gate_up") -> tuple[Tensor, Tensor]:
    """(gate, up) from the columns of a gated layer's first product."""
    if gate_layout == "interleaved":
        return h1[..., 0::2], h1[..., 1::2]
    first, second = h1.chunk(2, dim=-1)
    return (first, second) if gate_layout == "gate_up" else (second, first)


def _parameters(activation: str, **given: Scalar | None) -> dict[str, Scalar]:
    """The parameters the activation takes, its defaults in the place of those not given."""
    defaults = ACTIVATIONS[activation].defaults
    for name, value in given.items():
        if value is not None and name not in defaults:
            takes = ", ".join(defaults) or "no parameters"
            raise ValueError(f"{name} was given, but activation '{activation}' takes {takes}")
    return {name: default if given[name] is None else given[name]
            for name, default in defaults.items()}  # fmt: skip


def _lookup(what: str, name: str, table):
    if name not in table:
        raise ValueError(f"{what} is '{name}', expected one of {', '.join(table)}")
    return table[name] if isinstance(table, dict) else name


# ---- The layer ----


def fused_moe(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "swiglu",
    gate_layout: str = "gate_up",
    alpha: Scalar | None = None,
    beta: Scalar | None = None,
    limit: Scalar | None = None,
    expert_offset: int = 0,
    output_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The whole layer: x [T, H], topk_weights and topk_ids [T, K] -> [T, H].

    w1 is [E, 2*I, H] where the activation is gated and [E, I, H] elsewhere, w2 [E, H, I], b1 and
    b2 have their first two axes. The weights of an expert that no token chose are not read, and a
    slot whose expert is not held here adds nothing, whatever its routing weight.
    """
    gated = _lookup("activation", activation, ACTIVATIONS).gated
    _lookup("gate_layout", gate_layout, GATE_LAYOUTS)
    parameters = _parameters(activation, alpha=alpha, beta=beta, limit=limit)
    dtype = compute_dtype or x.dtype
    out = x.new_zeros(x.shape, dtype=dtype)
    for expert in range(w1.shape[0]):
        token, choice = (topk_ids.long() == expert + expert_offset).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        h1 = _linear(x[token], w1[expert], b1, expert, dtype)
        gate, up = split_branches(h1, gate_layout) if gated else (h1, None)
        scalars = {name: _of_expert(value, expert) for name, value in parameters.items()}
        h2 = _linear(activate(gate, up, activation, **scalars), w2[expert], b2, expert, dtype)
        # A token that chose the expert twice occurs twice here, and is added twice.
        out.index_add_(0, token, topk_weights[token, choice].to(dtype).unsqueeze(1) * h2)
    return out.to(output_dtype or dtype)


def _linear(
    x: Tensor, weight: Tensor, biases: Tensor | None, expert: int, dtype: torch.dtype
) -> Tensor:
    bias = None if biases is None else biases[expert].to(dtype)
    return F.linear(x.to(dtype), weight.to(dtype), bias)


def _of_expert(value: Scalar, expert: int) -> Scalar:
    return value[expert] if isinstance(value, Tensor) and value.dim() else value


# ---- Routing ----


def topk_route(
    router_logits: Tensor,
    topk: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    scaling: float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """router_logits [T, E] -> (topk_weights [T, K] in float32 or compute_dtype, topk_ids int32).

    Experts are chosen and ordered by score + correction_bias; the weights are the scores alone.
    """
    _lookup("scoring", scoring, SCORINGS)
    scores = _scores(router_logits.to(compute_dtype or torch.float32), scoring)
    choices = scores.detach()
    if correction_bias is not None:
        choices = choices + correction_bias.detach().to(choices.dtype)

    tokens, experts = choices.shape
    candidates = torch.arange(experts, device=choices.device).expand(tokens, experts)
    if num_groups > 1:
        groups = candidates.unflatten(1, (num_groups, experts // num_groups))
        group_scores = _group_scores(choices.view_as(groups))
        # In the order of their ids, so that ties still go to the lower one.
        best = _descending(group_scores)[:, :topk_groups].sort(dim=-1).values
        chosen = best.unsqueeze(-1).expand(-1, -1, groups.shape[-1])
        candidates = groups.gather(1, chosen).flatten(1)
    order = _descending(choices.gather(1, candidates))[:, :topk]
    ids = candidates.gather(1, order)

    weights = scores.gather(1, ids)
    rejected = torch.isnan(choices.gather(1, ids))
    weights = weights.masked_fill(rejected, 0.0)
    if renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, torch.ones_like(total))
    return weights * scaling, ids.int()


def _scores(logits: Tensor, scoring: str) -> Tensor:
    # One NaN must not spoil the others: it is left out of the sum, keeps only its own place, and
    # its gradient is zero.
    is_nan = torch.isnan(logits)
    if scoring == "sigmoid":
        scores = torch.sigmoid(logits.masked_fill(is_nan, 0.0))
    else:
        logits = logits.masked_fill(is_nan, -torch.inf)
        # Of +inf, or of only -inf, every score is NaN.
        no_score = logits.amax(dim=-1, keepdim=True).isinf()
        is_nan = is_nan | no_score
        scores = torch.softmax(logits.masked_fill(no_score, 0.0), dim=-1)
    return scores.masked_fill(is_nan, torch.nan)


def _group_scores(choices: Tensor) -> Tensor:
    """[T, groups, experts of a group] -> [T, groups]: the sum of a group's two best choices."""
    choices = torch.where(torch.isnan(choices), -torch.inf, choices)
    return choices.topk(min(2, choices.shape[-1]), dim=-1).values.sum(dim=-1)


def _descending(values: Tensor) -> Tensor:
    """The order of the last axis: largest first, ties in place, NaN after -inf."""
    # sort() takes NaN for the largest value, negation doesn't change that: last when ascending.
    return torch.sort(-values, dim=-1, stable=True).indices


def sort_by_expert(
    topk_ids: Tensor, num_experts: int, expert_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """topk_ids [T, K] -> (expert_offsets int32 [E+1], sorted_slots int32 [T*K]).

    Stable within an expert; the slots of experts not held here come last, in their own order.
    """
    ids = topk_ids.long().flatten()
    # Compared before the subtraction: an id may be anything an int64 holds.
    held = (ids >= expert_offset) & (ids < expert_offset + num_experts)
    local = torch.where(held, ids - expert_offset, num_experts)
    counts = torch.bincount(local, minlength=num_experts + 1)[:num_experts]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return offsets.int(), torch.argsort(local, stable=True).int()


# ---- The primitives between routing and output ----


def row_ranges(expert_offsets: Tensor, rows: int) -> Iterator[slice]:
    """The experts' rows. Malformed offsets give ranges within [0, rows] that don't overlap."""
    bounds = _bounds(expert_offsets, rows)
    return (slice(begin, end) for begin, end in itertools.pairwise(bounds))


def _bounds(expert_offsets: Tensor, rows: int) -> list[int]:
    return expert_offsets.long().clamp(0, rows).cummax(0).values.tolist()


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows expert_offsets[e] : expert_offsets[e+1] of a [M, K] times b[e].T, b being [E, N, K].

    -> [M, N]; rows that belong to no expert are zero. bias is [E, N].
    """
    dtype = compute_dtype or a.dtype
    out = a.new_zeros(a.shape[0], b.shape[1], dtype=dtype)
    for expert, rows in enumerate(row_ranges(expert_offsets, a.shape[0])):
        if rows.start < rows.stop:
            out[rows] = _linear(a[rows], b[expert], bias, expert, dtype)
    return out.to(output_dtype or dtype)


def grouped_gemm_wgrad(
    a: Tensor,
    b: Tensor,
    expert_offsets: Tensor,
    *,
    output_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """a [M, m], b [M, n] -> [E, m, n]: a[rows].T @ b[rows] over each expert's rows."""
    dtype = compute_dtype or a.dtype
    out = a.new_zeros(expert_offsets.shape[0] - 1, a.shape[1], b.shape[1], dtype=dtype)
    for expert, rows in enumerate(row_ranges(expert_offsets, a.shape[0])):
        if rows.start < rows.stop:
            out[expert] = a[rows].to(dtype).T @ b[rows].to(dtype)
    return out.to(output_dtype or dtype)


def combine(
    expert_out: Tensor,
    topk_weights: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    *,
    output_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The weighted sum of expert_out's rows [M, H] back into tokens: topk_weights [T, K] -> [T, H].

    Row r belongs to slot sorted_slots[r]. Rows past the last offset are not read, slots that
    don't exist are skipped, and of two rows for one slot the later one counts.
    """
    dtype = compute_dtype or expert_out.dtype
    tokens, topk = topk_weights.shape
    held = _bounds(expert_offsets, expert_out.shape[0])[-1]
    row_of_slot = {
        slot: row
        for row, slot in enumerate(sorted_slots[:held].tolist())
        if 0 <= slot < tokens * topk
    }
    out = expert_out.new_zeros(tokens, expert_out.shape[1], dtype=dtype)
    if row_of_slot:
        slots, rows = torch.tensor(list(row_of_slot.items()), device=out.device).unbind(1)
        weights = topk_weights.flatten()[slots].to(dtype).unsqueeze(1)
        out.index_add_(0, slots // topk, weights * expert_out[rows].to(dtype))
    return out.to(output_dtype or dtype)
