"""Fake implementations of torch.ops.simple_moe.*: the outputs' shapes, dtypes and strides, and the
same complaints as the compiled checks, without data."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake

from .reference import ACTIVATIONS, GATE_LAYOUTS, SCORINGS

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class _Checks:
    """Messages read "operator: argument ... expected ...", as the compiled ones."""

    def __init__(self, op: str, reference: Tensor, name: str):
        self.op, self.reference, self.name = op, reference, name

    def that(self, holds: bool, message: str) -> None:
        if not holds:
            raise RuntimeError(f"{self.op}: {message}")

    def dims(self, name: str, tensor: Tensor, dims: int) -> None:
        device = self.reference.device
        self.that(tensor.device == device,
                  f"{name} is on {tensor.device}, expected {device} as {self.name}")  # fmt: skip
        self.that(tensor.dim() == dims,
                  f"{name} has shape {list(tensor.shape)}, expected {dims} dimensions")  # fmt: skip

    def shape(self, name: str, tensor: Tensor, *shape) -> None:
        self.dims(name, tensor, len(shape))
        same = all(has == wanted for has, wanted in zip(tensor.shape, shape, strict=True))
        self.that(same, f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")

    def dtype(self, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.that(tensor.dtype in dtypes, f"{name} has dtype {dtype}, expected {expected}")

    def positive(self, name: str, tensor: Tensor, size, what: str) -> None:
        self.that(size >= 1, f"{name} has shape {list(tensor.shape)}, expected {what} >= 1")

    def countable(self, name: str, tensor: Tensor, count, what: str) -> None:
        # A size that isn't known yet is not to be bound by asking.
        if isinstance(count, int):
            self.that(count < 2**31,
                      f"{name} has shape {list(tensor.shape)}, expected {what} < 2**31")  # fmt: skip

    def lies_apart(self, name: str, tensor: Tensor) -> None:
        rows, columns = tensor.shape
        row_stride, col_stride = tensor.stride()
        if rows > 1 and columns > 1:
            apart = (col_stride > 0 and row_stride > (columns - 1) * col_stride) or (
                row_stride > 0 and col_stride > (rows - 1) * row_stride
            )
        else:  # The stride of a size of 1 may be anything.
            apart = (rows <= 1 or row_stride > 0) and (columns <= 1 or col_stride > 0)
        self.that(tensor.numel() == 0 or apart,
                  f"{name} has strides {list(tensor.stride())} for shape {list(tensor.shape)},"
                  " expected rows, or columns, that don't overlap")  # fmt: skip

    def one_of(self, name: str, value: str, names) -> None:
        self.that(value in names, f"{name} is '{value}', expected one of {', '.join(names)}")

    def output_dtype(self, given: torch.dtype | None, otherwise: torch.dtype) -> torch.dtype:
        self.that(given is None or given in FLOATS,
                  f"output_dtype is {given}, expected float16, bfloat16 or float32")  # fmt: skip
        return given or otherwise


def _check_layer(x, w1, w2, topk_weights, topk_ids, b1, b2, tensors, *, activation, gate_layout,
                 numbers, check: _Checks) -> None:  # fmt: skip
    check.one_of("activation", activation, ACTIVATIONS)
    check.one_of("gate_layout", gate_layout, GATE_LAYOUTS)
    entry = ACTIVATIONS[activation]
    check.dims("x", x, 2)
    check.dtype("x", x, *FLOATS)
    check.dims("w1", w1, 3)
    tokens, hidden = x.shape
    experts, rows, _ = w1.shape
    check.positive("x", x, hidden, "H")
    check.shape("w1", w1, experts, rows, hidden)
    check.positive("w1", w1, experts, "E")
    branches = 2 if entry.gated else 1
    check.that(rows % branches == 0 and rows >= branches,
               f"w1 has shape {list(w1.shape)}, expected {branches}*I rows")  # fmt: skip
    check.dtype("w1", w1, x.dtype)
    check.shape("w2", w2, experts, hidden, rows // branches)
    check.dtype("w2", w2, x.dtype)
    check.dims("topk_weights", topk_weights, 2)
    topk = topk_weights.shape[1]
    check.shape("topk_weights", topk_weights, tokens, topk)
    check.positive("topk_weights", topk_weights, topk, "K")
    check.countable("topk_weights", topk_weights, tokens * topk, "T * K")
    check.dtype("topk_weights", topk_weights, *FLOATS)
    check.shape("topk_ids", topk_ids, tokens, topk)
    check.dtype("topk_ids", topk_ids, torch.int32, torch.int64)
    for name, bias, width in (("b1", b1, rows), ("b2", b2, hidden)):
        if bias is not None:
            check.shape(name, bias, experts, width)
            check.dtype(name, bias, torch.float32, x.dtype)
    for name in ("alpha", "beta", "limit"):
        tensor, number = tensors[name], numbers[name]
        if tensor is not None:
            check.shape(name, tensor, experts)
            check.dtype(name, tensor, torch.float32)
        check.that(tensor is None or number is None,
                   f"{name} is given as a float and as a tensor, expected one of them")  # fmt: skip
        given = tensor is not None or number is not None
        check.that(not given or name in entry.defaults,
                   f"{name} is given, but '{activation}' takes no {name}: expected none")  # fmt: skip


def _check_backend(check: _Checks, backend: str, batch_invariant: bool = False) -> None:
    from ._library import build_info

    names = ["auto"]
    if check.reference.device.type != "cpu":
        names = build_info()["backends"]
    check.one_of("backend", backend, names)
    check.that(not (batch_invariant and backend == "cublas"),
               "batch_invariant is True, expected False with backend 'cublas'")  # fmt: skip


@register_fake("simple_moe::fused_moe")
def _(x, w1, w2, topk_weights, topk_ids, b1=None, b2=None, expert_alpha=None, expert_beta=None,
      expert_limit=None, *, activation="swiglu", gate_layout="gate_up", alpha=None, beta=None,
      limit=None, expert_offset=0, output_dtype=None, batch_invariant=False,
      backend="auto"):  # fmt: skip
    check = _Checks("fused_moe", x, "x")
    _check_layer(x, w1, w2, topk_weights, topk_ids, b1, b2,
                 dict(alpha=expert_alpha, beta=expert_beta, limit=expert_limit),
                 numbers=dict(alpha=alpha, beta=beta, limit=limit),
                 activation=activation, gate_layout=gate_layout, check=check)  # fmt: skip
    _check_backend(check, backend, batch_invariant)
    return x.new_empty(x.shape, dtype=check.output_dtype(output_dtype, x.dtype))


@register_fake("simple_moe::fused_moe.out")
def _(x, w1, w2, topk_weights, topk_ids, b1=None, b2=None, expert_alpha=None, expert_beta=None,
      expert_limit=None, *, activation="swiglu", gate_layout="gate_up", alpha=None, beta=None,
      limit=None, expert_offset=0, batch_invariant=False, backend="auto", out):  # fmt: skip
    check = _Checks("fused_moe", x, "x")
    _check_layer(x, w1, w2, topk_weights, topk_ids, b1, b2,
                 dict(alpha=expert_alpha, beta=expert_beta, limit=expert_limit),
                 numbers=dict(alpha=alpha, beta=beta, limit=limit),
                 activation=activation, gate_layout=gate_layout, check=check)  # fmt: skip
    _check_backend(check, backend, batch_invariant)
    check.shape("out", out, *x.shape)
    check.dtype("out", out, *FLOATS)
    check.lies_apart("out", out)


@register_fake("simple_moe::topk_route")
def _(router_logits, topk, correction_bias=None, *, scoring="softmax", renormalize=True,
      num_groups=1, topk_groups=1, scaling=1.0):  # fmt: skip
    check = _Checks("topk_route", router_logits, "router_logits")
    check.dims("router_logits", router_logits, 2)
    check.dtype("router_logits", router_logits, *FLOATS)
    tokens, experts = router_logits.shape
    check.positive("router_logits", router_logits, experts, "E")
    check.countable("router_logits", router_logits, experts, "E")
    if correction_bias is not None:
        check.shape("correction_bias", correction_bias, experts)
        check.dtype("correction_bias", correction_bias, *FLOATS)
    check.that(num_groups >= 1 and experts % num_groups == 0,
               f"num_groups is {num_groups}, expected a divisor of {experts}")  # fmt: skip
    check.that(1 <= topk_groups <= num_groups,
               f"topk_groups is {topk_groups}, expected 1 to {num_groups}")  # fmt: skip
    choices = experts // num_groups * topk_groups
    check.that(1 <= topk <= choices, f"topk is {topk}, expected 1 to {choices}")
    check.countable("router_logits", router_logits, tokens * topk, "T * topk")
    check.one_of("scoring", scoring, SCORINGS)
    shape = (tokens, topk)
    return (router_logits.new_empty(shape, dtype=torch.float32),
            router_logits.new_empty(shape, dtype=torch.int32))  # fmt: skip


@register_fake("simple_moe::sort_by_expert")
def _(topk_ids, num_experts, expert_offset=0):
    check = _Checks("sort_by_expert", topk_ids, "topk_ids")
    check.dims("topk_ids", topk_ids, 2)
    check.dtype("topk_ids", topk_ids, torch.int32, torch.int64)
    slots = topk_ids.shape[0] * topk_ids.shape[1]
    check.countable("topk_ids", topk_ids, slots, "T * K")
    check.that(1 <= num_experts < 2**31 - 1,
               f"num_experts is {num_experts}, expected 1 to 2**31 - 2")  # fmt: skip
    return (topk_ids.new_empty(num_experts + 1, dtype=torch.int32),
            topk_ids.new_empty(slots, dtype=torch.int32))  # fmt: skip


@register_fake("simple_moe::grouped_gemm")
def _(a, b, expert_offsets, bias=None, *, output_dtype=None, backend="auto"):
    check = _Checks("grouped_gemm", a, "a")
    check.dims("a", a, 2)
    check.dtype("a", a, *FLOATS)
    check.countable("a", a, a.shape[0], "M")
    check.dims("b", b, 3)
    experts, n, _ = b.shape
    check.shape("b", b, experts, n, a.shape[1])
    check.positive("b", b, experts, "E")
    check.dtype("b", b, a.dtype)
    check.shape("expert_offsets", expert_offsets, experts + 1)
    check.dtype("expert_offsets", expert_offsets, torch.int32)
    if bias is not None:
        check.shape("bias", bias, experts, n)
        check.dtype("bias", bias, torch.float32, a.dtype)
    dtype = check.output_dtype(output_dtype, a.dtype)
    _check_backend(check, backend)
    return a.new_empty((a.shape[0], n), dtype=dtype)


@register_fake("simple_moe::grouped_gemm_wgrad")
def _(a, b, expert_offsets, *, output_dtype=None):
    check = _Checks("grouped_gemm_wgrad", a, "a")
    check.dims("a", a, 2)
    check.dtype("a", a, *FLOATS)
    check.countable("a", a, a.shape[0], "M")
    check.dims("b", b, 2)
    check.shape("b", b, a.shape[0], b.shape[1])
    check.dtype("b", b, a.dtype)
    check.dims("expert_offsets", expert_offsets, 1)
    check.dtype("expert_offsets", expert_offsets, torch.int32)
    experts = expert_offsets.shape[0] - 1
    check.positive("expert_offsets", expert_offsets, experts, "E")
    dtype = check.output_dtype(output_dtype, a.dtype)
    return a.new_empty((experts, a.shape[1], b.shape[1]), dtype=dtype)


@register_fake("simple_moe::combine")
def _(expert_out, topk_weights, sorted_slots, expert_offsets, *, output_dtype=None):
    check = _Checks("combine", expert_out, "expert_out")
    check.dims("expert_out", expert_out, 2)
    check.dtype("expert_out", expert_out, *FLOATS)
    check.countable("expert_out", expert_out, expert_out.shape[0], "M")
    check.dims("topk_weights", topk_weights, 2)
    check.dtype("topk_weights", topk_weights, *FLOATS)
    check.positive("topk_weights", topk_weights, topk_weights.shape[1], "K")
    check.countable("topk_weights", topk_weights, topk_weights.numel(), "T * K")
    check.shape("sorted_slots", sorted_slots, expert_out.shape[0])
    check.dtype("sorted_slots", sorted_slots, torch.int32)
    check.dims("expert_offsets", expert_offsets, 1)
    check.dtype("expert_offsets", expert_offsets, torch.int32)
    check.positive("expert_offsets", expert_offsets, expert_offsets.shape[0] - 1, "E")
    dtype = check.output_dtype(output_dtype, expert_out.dtype)
    return expert_out.new_empty((topk_weights.shape[0], expert_out.shape[1]), dtype=dtype)
