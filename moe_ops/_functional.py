"""The operators as Python functions."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.simple_moe


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
    alpha: float | Tensor | None = None,
    beta: float | Tensor | None = None,
    limit: float | Tensor | None = None,
    expert_offset: int = 0,
    output_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The Mixture-of-Experts layer after routing.

    For every slot (t, k) whose expert e = topk_ids[t, k] - expert_offset is held here:
    out[t] += topk_weights[t, k] * (activation(x[t] @ w1[e].T + b1[e]) @ w2[e].T + b2[e]).
    Other slots, whatever their ids, add nothing. Under torch.autocast x, w1 and w2 are cast to its
    dtype.

    Args:
        x: [T, H], float16, bfloat16 or float32.
        w1: [E, 2*I, H] where the activation is gated, [E, I, H] elsewhere; dtype of x.
        w2: [E, H, I]; dtype of x.
        topk_weights: [T, K], float32 (or float16, bfloat16).
        topk_ids: [T, K], int32 or int64.
        b1, b2: [E, 2*I] or [E, I], and [E, H]; float32 or dtype of x.
        activation: gated "swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "swiglu_step",
            "situ"; ungated "silu", "gelu", "gelu_tanh", "relu", "relu2", "identity".
        gate_layout: how gate and up lie in w1's rows: "gate_up", "up_gate", "interleaved".
        alpha, beta, limit: of swiglu_oai (1.702, 1, 7), swiglu_step (limit 7) and situ (beta 4,
            limit 25); a float, or float32 [E] with one value per expert.
        expert_offset: the id of w1[0].
        output_dtype: float16, bfloat16 or float32; x's unless given.
        out: [T, H], written and returned; has no gradient.
        batch_invariant: the same bits for a token whatever T is. Costs microseconds where T is 1, or a
            few with many experts, or where a small layer makes few tiles; elsewhere nothing.
        backend: "auto", or on CUDA "sm80" (mma.sync), "sm90" (wgmma, on Hopper; the same bits) or
            "cublas" (waits for the device).

    Returns:
        [T, H]. Differentiable in x, w1, w2, b1, b2 and topk_weights.

    Raises:
        RuntimeError: an argument isn't as above; the message names it, what it is and what was
            expected.
        NotImplementedError: in backward, where alpha, beta or limit requires a gradient.
    """
    given = {"alpha": alpha, "beta": beta, "limit": limit}
    tensors = [v if isinstance(v, Tensor) else None for v in given.values()]
    numbers = {k: None if isinstance(v, Tensor) else v for k, v in given.items()}
    tensors = (x, w1, w2, topk_weights, topk_ids, b1, b2, *tensors)
    options = dict(activation=activation, gate_layout=gate_layout, **numbers,
                   expert_offset=expert_offset, batch_invariant=batch_invariant,
                   backend=backend)  # fmt: skip
    if out is None:
        return _ops.fused_moe(*tensors, output_dtype=output_dtype, **options)
    if output_dtype not in (None, out.dtype):
        raise ValueError(f"fused_moe: output_dtype is {output_dtype}, expected out's, {out.dtype}")
    _ops.fused_moe.out(*tensors, out=out, **options)
    return out


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
) -> tuple[Tensor, Tensor]:
    """Chooses each token's experts.

    Experts are chosen and ordered by score + correction_bias, ties to the lower id; a NaN ranks
    last with weight 0. With groups (DeepSeek-V3, arXiv:2412.19437) only experts of the
    `topk_groups` best groups can be chosen; a group's score is the sum of its two best.

    Args:
        router_logits: [T, E], float16, bfloat16 or float32.
        topk: K, 1 to the number of experts that can be chosen.
        scoring: "softmax" or "sigmoid", of the logits, in float32.
        renormalize: divide a token's weights by their sum.
        correction_bias: [E], floating; steers the choice alone, gets no gradient.
        num_groups: a divisor of E.
        topk_groups: 1 to num_groups.
        scaling: factor of the weights.

    Returns:
        topk_weights [T, K] float32, differentiable in router_logits, and topk_ids [T, K] int32.

    Raises:
        RuntimeError: an argument isn't as above.
        NotImplementedError: in backward, where correction_bias requires a gradient.
    """
    return _ops.topk_route(
        router_logits, topk, correction_bias, scoring=scoring, renormalize=renormalize,
        num_groups=num_groups, topk_groups=topk_groups, scaling=scaling,
    )  # fmt: skip


def sort_by_expert(
    topk_ids: Tensor, num_experts: int, expert_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Sorts the slots by expert, stable.

    Args:
        topk_ids: [T, K], int32 or int64, any values.
        num_experts: E, experts held here.
        expert_offset: the id of the first.

    Returns:
        expert_offsets int32 [E+1], and sorted_slots int32 [T*K]: the slots (t*K + k) of expert e are
        sorted_slots[expert_offsets[e] : expert_offsets[e+1]]; slots not held here come last.
    """
    return _ops.sort_by_expert(topk_ids, num_experts, expert_offset)


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rows expert_offsets[e] : expert_offsets[e+1] of a times b[e].T (+ bias[e]).

    Under torch.autocast a and b are cast to its dtype.

    Args:
        a: [M, K], float16, bfloat16 or float32.
        b: [E, N, K], dtype of a. A transposed view is read as it lies.
        expert_offsets: int32 [E+1]; malformed ones are clamped to [0, M] and made monotonic.
        bias: [E, N], float32 or dtype of a.
        output_dtype: a's unless given.
        backend: see fused_moe.

    Returns:
        [M, N], differentiable in a, b and bias; rows of no expert are zero.
    """
    return _ops.grouped_gemm(a, b, expert_offsets, bias, output_dtype=output_dtype, backend=backend)


def grouped_gemm_wgrad(
    a: Tensor, b: Tensor, expert_offsets: Tensor, *, output_dtype: torch.dtype | None = None
) -> Tensor:
    """a[rows].T @ b[rows] over each expert's rows: the gradient of grouped_gemm's b.

    Args:
        a: [M, m], float16, bfloat16 or float32.
        b: [M, n], dtype of a.
        expert_offsets: int32 [E+1], as grouped_gemm's.
        output_dtype: a's unless given.

    Returns:
        [E, m, n]; zeros for an expert without rows. Differentiable in a and b.
    """
    return _ops.grouped_gemm_wgrad(a, b, expert_offsets, output_dtype=output_dtype)


def combine(
    expert_out: Tensor,
    topk_weights: Tensor,
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """The weighted sum of the experts' rows back into tokens, in float32, k ascending.

    Args:
        expert_out: [M, H]: row r belongs to slot sorted_slots[r]. Rows past the last offset are
            never read.
        topk_weights: [T, K], floating.
        sorted_slots: int32 [M], from sort_by_expert.
        expert_offsets: int32 [E+1], from sort_by_expert.
        output_dtype: expert_out's unless given.

    Returns:
        [T, H], differentiable in expert_out and topk_weights.
    """
    return _ops.combine(
        expert_out, topk_weights, sorted_slots, expert_offsets, output_dtype=output_dtype
    )
