"""Gradients and the autocast rule of torch.ops.simple_moe.*.

Every backward pass is made of the package's own operators and of torch's elementwise ones and
gathers: it waits for no device, adds with no atomics and can be captured, compiled and
differentiated again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._derivatives import activation_and_derivatives
from .reference import ACTIVATIONS, split_branches

ops = torch.ops.simple_moe


def _has_tangent(value) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


class _Library(torch.library.Library):
    """Forward-mode AD raises: torch's own kernels have tangents of zero there, without a word."""

    def impl(self, op_name, fn, dispatch_key="", **options):
        def autograd_kernel(keyset, *args, **kwargs):
            if forward_ad._current_level >= 0 and any(map(_has_tangent, (*args, *kwargs.values()))):
                raise NotImplementedError(
                    f"{op_name.removesuffix('.out')}: an argument has a tangent of forward-mode AD,"
                    " expected none: there are gradients in reverse mode alone"
                )
            return fn(keyset, *args, **kwargs)

        kernel = autograd_kernel if dispatch_key == "Autograd" else fn
        super().impl(op_name, kernel, dispatch_key, **options)


_library = _Library("simple_moe", "IMPL")


def _register_autograd(operator: str, backward, setup_context) -> None:
    torch.library.register_autograd(
        f"simple_moe::{operator}", backward, setup_context=setup_context, lib=_library
    )


def _raise_if_wanted(operator: str, names: list[str], needed: tuple[bool, ...]) -> None:
    # Arguments left out at the end have no entry.
    for name, wanted in zip(names, needed, strict=False):
        if wanted:
            raise NotImplementedError(
                f"{operator}: {name} wants a gradient, expected requires_grad=False: there is none"
            )


def _sum_rows(rows: Tensor, expert_offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, N] -> [E, N]: each expert's rows summed, by a product with ones."""
    # 8 columns of them: the narrowest that a kernel reads 16 bytes at a time.
    ones = rows.new_ones((rows.shape[0], 8))
    sums = ops.grouped_gemm_wgrad(rows, ones, expert_offsets, output_dtype=torch.float32)
    return sums[:, :, 0].to(dtype)


# ---- grouped_gemm and its gradient: each other's derivatives ----


def _grouped_gemm_setup(ctx, inputs, keyword_only_inputs, output):
    a, b, expert_offsets, bias = inputs
    ctx.save_for_backward(a, b, expert_offsets)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.backend = keyword_only_inputs["backend"]


def _grouped_gemm_backward(ctx, grad):
    a, b, expert_offsets = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad = grad.to(a.dtype)
    da = db = dbias = None
    if needs[0]:
        da = ops.grouped_gemm(grad, b.transpose(1, 2), expert_offsets, backend=ctx.backend)
    if needs[1]:
        db = ops.grouped_gemm_wgrad(grad, a, expert_offsets)
    if ctx.bias_dtype is not None and needs[3]:
        dbias = _sum_rows(grad, expert_offsets, ctx.bias_dtype)
    return da, db, None, dbias


_register_autograd("grouped_gemm", _grouped_gemm_backward, _grouped_gemm_setup)


def _grouped_gemm_wgrad_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)


def _grouped_gemm_wgrad_backward(ctx, grad):
    a, b, expert_offsets = ctx.saved_tensors
    grad = grad.to(a.dtype)
    da = db = None
    if ctx.needs_input_grad[0]:
        da = ops.grouped_gemm(b, grad, expert_offsets)
    if ctx.needs_input_grad[1]:
        db = ops.grouped_gemm(a, grad.transpose(1, 2), expert_offsets)
    return da, db, None


_register_autograd("grouped_gemm_wgrad", _grouped_gemm_wgrad_backward, _grouped_gemm_wgrad_setup)


# ---- combine ----


def _combine_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx, grad):
    expert_out, topk_weights, sorted_slots, expert_offsets = ctx.saved_tensors
    rows, topk = expert_out.shape[0], topk_weights.shape[1]
    slots = topk_weights.numel()
    if rows == 0 or slots == 0:  # Nothing that the gathers below could index.
        return torch.zeros_like(expert_out), torch.zeros_like(topk_weights), None, None
    # Which row a slot is summed from, by the operator's own rule: -1 for none, the later of two.
    row = torch.arange(rows, device=grad.device)
    end = expert_offsets.clamp(0, rows).amax()
    valid = (row < end) & (sorted_slots >= 0) & (sorted_slots < slots)
    slot = torch.where(valid, sorted_slots.long(), slots)
    slot_rows = row.new_full((slots + 1,), -1).scatter_reduce(0, slot, row, "amax")
    used = valid & (slot_rows[slot] == row)
    drows = dweights = None
    if ctx.needs_input_grad[0]:
        slot = torch.where(used, slot, 0)
        weight = topk_weights.flatten()[slot].float().unsqueeze(1)
        drows = torch.where(used.unsqueeze(1), weight * grad[slot // topk].float(), 0.0)
        drows = drows.to(expert_out.dtype)
    if ctx.needs_input_grad[1]:
        slot_rows = slot_rows[:slots]
        taken = expert_out[slot_rows.clamp(min=0)].float().unflatten(0, topk_weights.shape)
        products = (taken * grad.float().unsqueeze(1)).sum(dim=2)
        held = (slot_rows >= 0).view(topk_weights.shape)
        dweights = torch.where(held, products, 0.0).to(topk_weights.dtype)
    return drows, dweights, None, None


_register_autograd("combine", _combine_backward, _combine_setup)


# ---- topk_route ----


def _topk_route_setup(ctx, inputs, keyword_only_inputs, output):
    router_logits, _, correction_bias = inputs
    ctx.save_for_backward(router_logits, correction_bias, output[1])
    for name in ("scoring", "renormalize", "scaling"):
        setattr(ctx, name, keyword_only_inputs[name])


def _topk_route_backward(ctx, grad, _):
    # correction_bias only steers the choice: no gradient reaches it.
    _raise_if_wanted("topk_route", ["correction_bias"], ctx.needs_input_grad[2:3])
    router_logits, correction_bias, ids = ctx.saved_tensors
    ids = ids.long()
    logits = router_logits.float()
    is_nan = logits.isnan()
    if ctx.scoring == "sigmoid":
        scores = torch.sigmoid(logits.masked_fill(is_nan, 0.0))
    else:
        logits = logits.masked_fill(is_nan, -torch.inf)
        # Of +inf, or of only -inf, every score is NaN.
        no_score = logits.amax(dim=-1, keepdim=True).isinf()
        is_nan = is_nan | no_score
        scores = torch.softmax(logits.masked_fill(no_score, 0.0), dim=-1)
    # A choice that is NaN ranks last with weight 0.
    scores = scores.masked_fill(is_nan, 0.0)
    rejected = is_nan.gather(1, ids)
    if correction_bias is not None:
        rejected = rejected | correction_bias.isnan()[ids]
    chosen = scores.gather(1, ids).masked_fill(rejected, 0.0)
    grad = grad * ctx.scaling
    if ctx.renormalize:
        # weight = score / total
        total = chosen.sum(dim=1, keepdim=True)
        safe = torch.where(total > 0, total, 1.0)
        along = (grad * chosen).sum(dim=1, keepdim=True) / safe
        grad = torch.where(total > 0, (grad - along) / safe, grad)
    grad = grad.masked_fill(rejected, 0.0)
    # Ids of one token differ: nothing is added.
    dscores = torch.zeros_like(scores).scatter(1, ids, grad)
    if ctx.scoring == "sigmoid":
        dlogits = dscores * scores * (1 - scores)
    else:
        dlogits = scores * (dscores - (dscores * scores).sum(dim=1, keepdim=True))
    return dlogits.to(router_logits.dtype), None, None


_register_autograd("topk_route", _topk_route_backward, _topk_route_setup)


# ---- fused_moe ----


def _fused_moe_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _fused_moe_backward(ctx, grad):
    """Recomputes the first product; keeps nothing but the inputs.

        h1 = x[token] w1'  a = act(h1)  h2 = a w2' + b2  out[token] += weight * h2   (one row a slot)

    With u = grad[token] w2, everything follows: da = weight * u, dweight = <a, u> + <b2, grad>.
    Rows past the last offset (slots not held here) are zero in every product's output and are
    never read as its input.
    """
    x, w1, w2, topk_weights, topk_ids, b1, b2, alpha, beta, limit = ctx.saved_tensors
    options = ctx.options
    needs = ctx.needs_input_grad
    _raise_if_wanted("fused_moe", ["alpha", "beta", "limit"], needs[7:10])
    dtype, experts, topk = x.dtype, w1.shape[0], topk_ids.shape[1]
    activation, gate_layout = options["activation"], options["gate_layout"]
    backend = options["backend"]
    offsets, slots = ops.sort_by_expert(topk_ids, experts, options["expert_offset"])
    slot = slots.long()
    held = torch.arange(slots.shape[0], device=x.device) < offsets[-1]
    expert = torch.where(held, topk_ids.flatten()[slot].long() - options["expert_offset"], 0)
    token = slot // topk
    weight = torch.where(held, topk_weights.flatten()[slot].float(), 0.0).unsqueeze(1)
    x_rows, grad_rows = x[token], grad[token].to(dtype)

    h1 = ops.grouped_gemm(x_rows, w1, offsets, b1, output_dtype=torch.float32, backend=backend)
    gated = ACTIVATIONS[activation].gated
    gate, up = split_branches(h1, gate_layout) if gated else (h1, None)
    parameters = {}
    for name, per_expert in (("alpha", alpha), ("beta", beta), ("limit", limit)):
        if per_expert is not None:
            parameters[name] = per_expert[expert].unsqueeze(1)
        elif options[name] is not None:
            parameters[name] = options[name]
    a, dgate, dup = activation_and_derivatives(activation, gate, up, **parameters)
    u = ops.grouped_gemm(
        grad_rows, w2.transpose(1, 2), offsets, output_dtype=torch.float32, backend=backend
    )
    da = weight * u
    dx = dw1 = dw2 = dweights = db1 = db2 = None

    if needs[3]:
        dweight = (a * u).sum(dim=1)
        if b2 is not None:
            dweight = dweight + (b2[expert].float() * grad_rows.float()).sum(dim=1)
        dweight = torch.where(held, dweight, 0.0)
        # Every slot has one row: nothing is added.
        dweights = torch.zeros_like(dweight).scatter(0, slot, dweight)
        dweights = dweights.view(topk_weights.shape).to(topk_weights.dtype)
    if needs[2] or (b2 is not None and needs[6]):
        dh2 = (weight * grad_rows.float()).to(dtype)
        if needs[2]:
            dw2 = ops.grouped_gemm_wgrad(dh2, a.to(dtype), offsets)
        if b2 is not None and needs[6]:
            db2 = _sum_rows(dh2, offsets, b2.dtype)
    if needs[0] or needs[1] or (b1 is not None and needs[5]):
        dh1 = _join(da * dgate, None if dup is None else da * dup, gate_layout).to(dtype)
        if needs[0]:
            dx_rows = ops.grouped_gemm(dh1, w1.transpose(1, 2), offsets, backend=backend)
            ones = torch.ones_like(topk_weights, dtype=torch.float32)
            dx = ops.combine(dx_rows, ones, slots, offsets)
        if needs[1]:
            dw1 = ops.grouped_gemm_wgrad(dh1, x_rows, offsets)
        if b1 is not None and needs[5]:
            db1 = _sum_rows(dh1, offsets, b1.dtype)
    return dx, dw1, dw2, dweights, None, db1, db2, None, None, None


def _join(gate: Tensor, up: Tensor | None, gate_layout: str) -> Tensor:
    """split_branches' inverse."""
    if up is None:
        return gate
    if gate_layout == "interleaved":
        return torch.stack([gate, up], dim=-1).flatten(1)
    return torch.cat([gate, up] if gate_layout == "gate_up" else [up, gate], dim=1)


_register_autograd("fused_moe", _fused_moe_backward, _fused_moe_setup)


# ---- What has no gradient, and autocast ----


def _fused_moe_out(keyset, *args, **kwargs):
    tensors = [*args, *kwargs.values()]
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError(
            "fused_moe: out is given while an argument requires a gradient, expected no out (or"
            " torch.no_grad()): writing into a tensor has no gradient"
        )
    with torch._C._AutoDispatchBelowAutograd():
        ops.fused_moe.out.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)


_library.impl("fused_moe.out", _fused_moe_out, "Autograd", with_keyset=True)


def _autocast_rules(device: str, key: str):
    # register_autocast would cast the routing weights too, and inputs that are to raise.
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def operand(tensor):
        is_float = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
        return tensor.to(torch.get_autocast_dtype(device)) if is_float else tensor

    def bias(tensor):
        # A float32 one is added as it is.
        return tensor if tensor is None or tensor.dtype == torch.float32 else operand(tensor)

    def layer(operator):
        def rule(x, w1, w2, topk_weights, topk_ids, b1=None, b2=None, *args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return operator(
                    operand(x), operand(w1), operand(w2), topk_weights, topk_ids, bias(b1), bias(b2),
                    *args, **kwargs,
                )  # fmt: skip

        return rule

    def grouped_gemm(a, b, expert_offsets, bias_=None, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return ops.grouped_gemm(operand(a), operand(b), expert_offsets, bias(bias_), **kwargs)

    _library.impl("fused_moe", layer(ops.fused_moe), key)
    _library.impl("fused_moe.out", layer(ops.fused_moe.out), key)
    _library.impl("grouped_gemm", grouped_gemm, key)


_autocast_rules("cpu", "AutocastCPU")
_autocast_rules("cuda", "AutocastCUDA")
