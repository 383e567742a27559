"""Every test's inputs: a case is a few small values whose repr makes the same tensors again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from moe_ops import reference
from moe_ops.reference import ACTIVATIONS, GATE_LAYOUTS

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
ROUTINGS = ["uniform", "skewed", "one_hot", "idle", "masked", "duplicated"]
LAYOUTS = ["contiguous", "padded", "strided", "transposed", "misaligned"]
# Sizes of the fast path (16-byte rows) and others, below and above every tile's width.
WIDTHS = [1, 7, 8, 16, 20, 64, 72, 130, 264]
TOKENS = [0, 1, 2, 3, 16, 17, 65, 130]


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, otherwise in memory; what lies between them is NaN."""
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor.contiguous()
    filler = float("nan") if tensor.is_floating_point() else -7
    *outer, width = tensor.shape
    if layout == "padded":
        return tensor.new_full((*outer, width + 3), filler)[..., :width].copy_(tensor)
    if layout == "strided":
        return tensor.new_full((*outer, 2 * width), filler)[..., ::2].copy_(tensor)
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if layout == "misaligned":  # By one element: 2 bytes where elements are of 2.
        storage = tensor.new_full((tensor.numel() + 1,), filler)
        return storage[1:].view(tensor.shape).copy_(tensor)
    raise ValueError(layout)


@dataclass(frozen=True)
class MoeCase:
    """Arguments of fused_moe. Idle experts' weights and masked slots' routing weights are NaN."""

    tokens: int = 17
    topk: int = 2
    experts: int = 8
    hidden: int = 64
    intermediate: int = 72
    dtype: torch.dtype = torch.float32
    routing: str = "uniform"
    activation: str = "swiglu"
    gate_layout: str = "gate_up"
    bias: str | None = None  # "float32" or "as x"
    parameters: str | None = None  # "number" or "tensor"
    layout: str = "contiguous"
    ids_dtype: torch.dtype = torch.int32
    weights_dtype: torch.dtype = torch.float32
    expert_offset: int = 0
    output_dtype: torch.dtype | None = None
    seed: int = 0

    def but(self, **changes) -> MoeCase:
        return replace(self, **changes)

    def tensors(self, device: str = "cpu") -> dict:
        """x, w1, w2, topk_weights, topk_ids, b1, b2: drawn on the CPU, alike on all devices."""
        draw = _Draw(self.seed)
        rows = self.intermediate * (2 if ACTIVATIONS[self.activation].gated else 1)
        held = torch.unique(ids := self._ids(draw))
        idle = [e for e in range(self.experts) if e + self.expert_offset not in held.tolist()]
        weights = draw.uniform(self.tokens, self.topk)
        weights /= weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
        here = (ids >= self.expert_offset) & (ids < self.expert_offset + self.experts)
        tensors = {
            "x": draw.normal(self.tokens, self.hidden).to(self.dtype),
            "w1": draw.weights(self.experts, rows, self.hidden).to(self.dtype),
            "w2": draw.weights(self.experts, self.hidden, self.intermediate).to(self.dtype),
            "topk_weights": weights.masked_fill(~here, torch.nan).to(self.weights_dtype),
            "topk_ids": ids.to(self.ids_dtype),
        }
        if self.bias:
            dtype = torch.float32 if self.bias == "float32" else self.dtype
            tensors["b1"] = draw.normal(self.experts, rows).to(dtype)
            tensors["b2"] = draw.normal(self.experts, self.hidden).to(dtype)
        for name in {"w1", "w2", "b1", "b2"} & tensors.keys():
            tensors[name][idle] = torch.nan
        return {name: lay_out(t.to(device), self.layout) for name, t in tensors.items()}

    def options(self, device: str = "cpu") -> dict:
        """The keyword arguments besides b1 and b2."""
        options = {"activation": self.activation, "gate_layout": self.gate_layout}
        defaults = ACTIVATIONS[self.activation].defaults
        if self.parameters == "number":
            options |= {name: 0.75 * value for name, value in defaults.items()}
        if self.parameters == "tensor":
            steps = torch.linspace(0.2, 1.2, self.experts, device=device)
            options |= {name: steps * value for name, value in defaults.items()}
        if self.expert_offset:
            options["expert_offset"] = self.expert_offset
        if self.output_dtype is not None:
            options["output_dtype"] = self.output_dtype
        return options

    def arguments(self, device: str = "cpu") -> dict:
        return self.tensors(device) | self.options(device)

    def _ids(self, draw: _Draw) -> torch.Tensor:
        """Global ids [T, K], int64."""
        shape = (self.tokens, self.topk)
        distinct = self.topk <= self.experts
        if self.routing == "one_hot":
            ids = torch.full(shape, self.experts // 2)
        elif self.routing == "idle":
            ids = draw.integers(shape, max(1, self.experts // 2))
        elif self.routing == "duplicated" or not distinct:
            ids = draw.integers(shape, self.experts)
        else:
            scores = draw.uniform(self.tokens, self.experts)
            if self.routing == "skewed":  # Few experts get most tokens.
                scores = scores / torch.arange(1, self.experts + 1) ** 2
            ids = scores.topk(self.topk, dim=1).indices
        ids = ids + self.expert_offset
        if self.routing == "masked":
            # Only the low half of the last one is an id, should anybody look at that alone.
            garbage = torch.tensor([-1, self.experts + self.expert_offset, 1 << 30, -(1 << 31)])
            if self.ids_dtype == torch.int64:
                garbage = torch.cat([garbage, torch.tensor([(1 << 40) + self.expert_offset])])
            replacements = garbage[draw.integers(shape, len(garbage))]
            ids = torch.where(draw.uniform(*shape) < 0.4, replacements, ids)
        return ids


@dataclass(frozen=True)
class RouteCase:
    """Arguments of topk_route."""

    tokens: int = 17
    experts: int = 16
    topk: int = 4
    dtype: torch.dtype = torch.float32
    kind: str = "normal"  # "ties": few different logits; "nan", "inf": some of them are
    scoring: str = "softmax"
    renormalize: bool = True
    correction_bias: str | None = None  # "normal", "integers" (which makes ties), "nan"
    num_groups: int = 1
    topk_groups: int = 1
    scaling: float = 1.0
    layout: str = "contiguous"
    seed: int = 0

    def arguments(self, device: str = "cpu") -> dict:
        draw = _Draw(self.seed)
        logits = draw.normal(self.tokens, self.experts)
        if self.kind in ("ties", "nan", "inf"):
            logits = logits.round().clamp(-2, 2)
        if self.kind in ("nan", "inf"):
            special = torch.tensor([torch.nan] if self.kind == "nan" else [torch.inf, -torch.inf])
            chosen = special[draw.integers(logits.shape, len(special))]
            # Row 0 stays clean, row 1 becomes special from end to end.
            share = torch.full((self.tokens, 1), 0.4)
            share[0:1], share[1:2] = 0, 1
            logits = torch.where(draw.uniform(*logits.shape) < share, chosen, logits)
        bias = None
        if self.correction_bias is not None:
            bias = draw.normal(self.experts)
            if self.correction_bias == "integers":
                bias = bias.round()
            if self.correction_bias == "nan":
                bias[::3] = torch.nan
        return {
            "router_logits": lay_out(logits.to(self.dtype).to(device), self.layout),
            "topk": self.topk,
            "scoring": self.scoring,
            "renormalize": self.renormalize,
            "correction_bias": None if bias is None else bias.to(device),
            "num_groups": self.num_groups,
            "topk_groups": self.topk_groups,
            "scaling": self.scaling,
        }


@dataclass(frozen=True)
class GemmCase:
    """Arguments of grouped_gemm, and of grouped_gemm_wgrad with the same rows.

    What is not to be read is NaN: rows of no expert, weights of experts without rows.
    """

    rows: int = 33
    experts: int = 4
    n: int = 64
    k: int = 72
    dtype: torch.dtype = torch.float32
    offsets: str = "uniform"  # "one", "idle", "malformed"; "partial" leaves rows at both ends
    bias: str | None = None
    layout: str = "contiguous"
    output_dtype: torch.dtype | None = None
    seed: int = 0

    def arguments(self, device: str = "cpu") -> dict:
        """a, b, expert_offsets, bias, output_dtype of grouped_gemm."""
        draw = _Draw(self.seed)
        offsets = self._offsets(draw)
        a = self._poison_rows(draw.normal(self.rows, self.k), offsets).to(self.dtype)
        b = draw.weights(self.experts, self.n, self.k).to(self.dtype)
        for expert, rows in enumerate(reference.row_ranges(offsets, self.rows)):
            if rows.start == rows.stop:
                b[expert] = torch.nan
        bias = None
        if self.bias:
            dtype = torch.float32 if self.bias == "float32" else self.dtype
            bias = draw.normal(self.experts, self.n).to(dtype).to(device)
        return {
            "a": lay_out(a.to(device), self.layout),
            "b": lay_out(b.to(device), self.layout),
            "expert_offsets": offsets.int().to(device),
            "bias": bias,
            "output_dtype": self.output_dtype,
        }

    def wgrad_arguments(self, device: str = "cpu") -> dict:
        """a [rows, k], b [rows, n], expert_offsets, output_dtype of grouped_gemm_wgrad."""
        draw = _Draw(self.seed)
        offsets = self._offsets(draw)
        a = self._poison_rows(draw.normal(self.rows, self.k), offsets).to(self.dtype)
        b = self._poison_rows(draw.normal(self.rows, self.n), offsets).to(self.dtype)
        return {
            "a": lay_out(a.to(device), self.layout),
            "b": lay_out(b.to(device), self.layout),
            "expert_offsets": offsets.int().to(device),
            "output_dtype": self.output_dtype,
        }

    def _poison_rows(self, tensor: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ranges = list(reference.row_ranges(offsets, self.rows))
        tensor[: ranges[0].start] = torch.nan
        tensor[ranges[-1].stop :] = torch.nan
        return tensor

    def _offsets(self, draw: _Draw) -> torch.Tensor:
        bounds = draw.integers((self.experts + 1,), self.rows + 1).sort().values
        if self.offsets == "malformed":
            return draw.integers((self.experts + 1,), 3 * self.rows + 3) - self.rows
        if self.offsets == "one":
            bounds[: self.experts // 2 + 1], bounds[self.experts // 2 + 1 :] = 0, self.rows
        if self.offsets == "idle":
            bounds[1:-1] = bounds[1:-1] // 2 * 2
            bounds[: self.experts // 2] = 0
        if self.offsets != "partial":
            bounds[0], bounds[-1] = 0, self.rows
        return bounds


@dataclass(frozen=True)
class CombineCase:
    """Arguments of combine; its slots and offsets come from sort_by_expert's reference."""

    moe: MoeCase = MoeCase()

    def arguments(self, device: str = "cpu") -> dict:
        case, tensors = self.moe, self.moe.tensors()
        offsets, slots = reference.sort_by_expert(
            tensors["topk_ids"], case.experts, case.expert_offset
        )
        rows = _Draw(case.seed + 1).normal(case.tokens * case.topk, case.hidden)
        # Never to be read: the rows of slots that are not held here.
        rows[int(offsets[-1]) :] = torch.nan
        return {
            "expert_out": lay_out(rows.to(case.dtype).to(device), case.layout),
            "topk_weights": tensors["topk_weights"].to(device),
            "sorted_slots": slots.to(device),
            "expert_offsets": offsets.to(device),
            "output_dtype": case.output_dtype,
        }


class _Draw:
    """Seeded random tensors on the CPU."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def integers(self, shape, end: int) -> torch.Tensor:
        return torch.randint(end, tuple(shape), generator=self.generator)

    def weights(self, *shape: int) -> torch.Tensor:
        """Scaled so that products keep their operand's size."""
        return self.normal(*shape) / shape[-1] ** 0.5


# ---- The strategies ----

_seeds = st.integers(0, 2**31 - 1)


@st.composite
def moe_cases(draw, **fixed) -> MoeCase:
    fields = {
        "tokens": st.sampled_from(TOKENS),
        "topk": st.sampled_from([1, 2, 3, 8, 10]),
        "experts": st.sampled_from([1, 2, 8, 33]),
        "hidden": st.sampled_from(WIDTHS),
        "intermediate": st.sampled_from(WIDTHS),
        "dtype": st.sampled_from(FLOATS),
        "routing": st.sampled_from(ROUTINGS),
        "activation": st.sampled_from(list(ACTIVATIONS)),
        "gate_layout": st.sampled_from(GATE_LAYOUTS),
        "bias": st.sampled_from([None, "float32", "as x"]),
        "parameters": st.sampled_from([None, "number", "tensor"]),
        "layout": st.sampled_from(LAYOUTS),
        "ids_dtype": st.sampled_from([torch.int32, torch.int64]),
        "weights_dtype": st.sampled_from(FLOATS),
        "expert_offset": st.sampled_from([0, 5]),
        "output_dtype": st.sampled_from([None, *FLOATS]),
        "seed": _seeds,
    }
    return draw(st.builds(MoeCase, **{k: v for k, v in fields.items() if k not in fixed}, **{
        k: st.just(v) for k, v in fixed.items()}))  # fmt: skip


@st.composite
def route_cases(draw) -> RouteCase:
    num_groups = draw(st.sampled_from([1, 1, 2, 4, 8]))
    group_size = draw(st.sampled_from([1, 2, 8, 33]))
    topk_groups = draw(st.integers(1, num_groups))
    return RouteCase(
        tokens=draw(st.sampled_from([t for t in TOKENS if t < 100])),
        experts=num_groups * group_size,
        topk=draw(st.integers(1, min(22, topk_groups * group_size))),
        dtype=draw(st.sampled_from(FLOATS)),
        kind=draw(st.sampled_from(["normal", "ties", "nan", "inf"])),
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalize=draw(st.booleans()),
        correction_bias=draw(st.sampled_from([None, "normal", "integers", "nan"])),
        num_groups=num_groups,
        topk_groups=topk_groups,
        scaling=draw(st.sampled_from([1.0, 2.5])),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(_seeds),
    )


@st.composite
def gemm_cases(draw) -> GemmCase:
    return GemmCase(
        rows=draw(st.sampled_from(TOKENS)),
        experts=draw(st.sampled_from([1, 2, 5, 33])),
        n=draw(st.sampled_from(WIDTHS)),
        k=draw(st.sampled_from(WIDTHS)),
        dtype=draw(st.sampled_from(FLOATS)),
        offsets=draw(st.sampled_from(["uniform", "one", "idle", "partial", "malformed"])),
        bias=draw(st.sampled_from([None, "float32", "as x"])),
        layout=draw(st.sampled_from(LAYOUTS)),
        output_dtype=draw(st.sampled_from([None, *FLOATS])),
        seed=draw(_seeds),
    )
