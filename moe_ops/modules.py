"""FusedMoE: a Mixture-of-Experts layer, router and experts, as an nn.Module."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._functional import fused_moe, topk_route
from .reference import ACTIVATIONS, GATE_LAYOUTS, SCORINGS


class FusedMoE(nn.Module):
    """Routes every token to `topk` of `num_experts` experts and returns their weighted sum.

    Args:
        hidden_size: width of the tokens, H.
        intermediate_size: width between an expert's two products, I; of one branch if gated.
        num_experts: experts of the whole layer, over all ranks.
        topk: experts chosen per token, K.
        activation: see `moe_ops.fused_moe`; decides whether the experts are gated.
        gate_layout: how gate and up lie in the first weight's rows: "gate_up", "up_gate",
            "interleaved".
        bias: whether the experts' two products have biases.
        scoring, renormalize, num_groups, topk_groups, scaling: see `moe_ops.topk_route`.
        correction_bias: whether there is a bias that steers the choice of experts but not their
            weights. It is a float32 buffer, zero at first, that no gradient reaches.
        expert_offset, num_local_experts: this rank holds the experts from `expert_offset` on, by
            default all of them. Other experts' tokens get nothing here: the sum of all ranks'
            outputs is the layer's.
        batch_invariant, backend: see `moe_ops.fused_moe`.
        device, dtype: of the parameters.

    State dict, named and laid out as in transformers 5, so that the routers and experts of its
    Mixtral, Qwen3-MoE, OLMoE and DeepSeek-V3 load as they are (`E` experts held here, `R` = 2*I
    if gated, else I):

        gate.weight                     [num_experts, H]
        gate.e_score_correction_bias    [num_experts], float32; with correction_bias
        experts.gate_up_proj            [E, R, H]; experts.up_proj where not gated
        experts.down_proj               [E, H, I]
        experts.gate_up_proj_bias       [E, R]; experts.up_proj_bias where not gated; with bias
        experts.down_proj_bias          [E, H]; with bias

    transformers stacks all experts in one parameter, which is what the kernels read, and models
    are trained and saved with these names; vLLM's `w13_weight` and `w2_weight` exist only once
    vLLM has loaded a model.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        topk: int,
        *,
        activation: str = "swiglu",
        gate_layout: str = "gate_up",
        bias: bool = False,
        scoring: str = "softmax",
        renormalize: bool = True,
        num_groups: int = 1,
        topk_groups: int = 1,
        scaling: float = 1.0,
        correction_bias: bool = False,
        expert_offset: int = 0,
        num_local_experts: int | None = None,
        batch_invariant: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_local_experts is None:
            num_local_experts = num_experts - expert_offset
        _check_name("activation", activation, ACTIVATIONS)
        _check_name("gate_layout", gate_layout, GATE_LAYOUTS)
        _check_name("scoring", scoring, SCORINGS)
        _check_range("hidden_size", hidden_size, 1)
        _check_range("intermediate_size", intermediate_size, 1)
        _check_range("num_experts", num_experts, 1)
        _check_range("num_groups", num_groups, 1, num_experts)
        if num_experts % num_groups:
            raise ValueError(
                f"FusedMoE: num_groups is {num_groups}, expected a divisor of num_experts,"
                f" {num_experts}"
            )
        _check_range("topk_groups", topk_groups, 1, num_groups)
        _check_range("topk", topk, 1, num_experts // num_groups * topk_groups)
        _check_range("expert_offset", expert_offset, 0, num_experts - 1)
        _check_range("num_local_experts", num_local_experts, 1, num_experts - expert_offset)

        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.topk = topk
        self.scoring = scoring
        self.renormalize = renormalize
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.scaling = scaling
        self.gate = _Router(hidden_size, num_experts, correction_bias, device, dtype)
        self.experts = _Experts(
            num_local_experts, hidden_size, intermediate_size, activation, bias, device, dtype
        )
        # What moe_ops.fused_moe takes besides tensors.
        self.options = {
            "activation": activation,
            "gate_layout": gate_layout,
            "expert_offset": expert_offset,
            "batch_invariant": batch_invariant,
            "backend": backend,
        }

    def reset_parameters(self) -> None:
        """Draws all parameters anew, each from nn.Linear's distribution for its width."""
        self.gate.reset_parameters()
        self.experts.reset_parameters()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts that the tokens choose.

        Args:
            x: [..., H], T tokens in all.

        Returns:
            topk_weights [T, K] float32 and topk_ids [T, K] int32, ids of the whole layer.
        """
        return topk_route(
            self.gate(x.reshape(-1, self.hidden_size)),
            self.topk,
            scoring=self.scoring,
            renormalize=self.renormalize,
            correction_bias=self.gate.e_score_correction_bias,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            scaling=self.scaling,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The layer.

        Args:
            x: [..., H], in the parameters' dtype: float16, bfloat16 or float32. Under torch.autocast
                in any of the three: the experts' products take its dtype, the router float32.

        Returns:
            The weighted sum of the chosen experts, with x's shape and dtype; under autocast with
            its dtype.

        Raises:
            ValueError: the last dimension of x isn't hidden_size.
            RuntimeError: dtype or device differ from the parameters'.
        """
        if x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"FusedMoE: x has shape {list(x.shape)}, expected [..., {self.hidden_size}]"
            )
        tokens = x.reshape(-1, self.hidden_size)
        topk_weights, topk_ids = self.route(tokens)
        w1, w2, b1, b2 = self.experts.weights()
        out = fused_moe(tokens, w1, w2, topk_weights, topk_ids, b1=b1, b2=b2, **self.options)
        return out.view(x.shape)

    def extra_repr(self) -> str:
        text = f"topk={self.topk}, scoring={self.scoring}, renormalize={self.renormalize}"
        if self.num_groups > 1:
            text += f", num_groups={self.num_groups}, topk_groups={self.topk_groups}"
        if self.scaling != 1.0:
            text += f", scaling={self.scaling}"
        defaults = {"gate_layout": "gate_up", "batch_invariant": False, "backend": "auto"}
        held_everywhere = self.experts.num_experts == self.num_experts
        for name, value in self.options.items():
            is_default = held_everywhere if name == "expert_offset" else value == defaults.get(name)
            text += "" if is_default else f", {name}={value}"
        return text


class _Router(nn.Linear):
    """Router logits in float32, whatever the parameters' dtype and autocast say."""

    def __init__(self, hidden_size, num_experts, correction_bias, device, dtype):
        super().__init__(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        bias = None
        if correction_bias:
            bias = torch.zeros(num_experts, device=device, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        # There is no autocast on the meta device, not even one to switch off.
        exact = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with exact:
            return F.linear(x.float(), self.weight.float())

    def _apply(self, fn, recurse=True):
        """module.bfloat16() and the like: the correction bias moves along, but isn't rounded."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if before is not None:
            after = self.e_score_correction_bias
            if after.dtype != torch.float32:
                self.e_score_correction_bias = before.to(after.device)
        return self

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # Absent while nn.Linear's own constructor runs.
        bias = getattr(self, "e_score_correction_bias", None)
        if bias is not None:
            bias.zero_()


class _Experts(nn.Module):
    """The experts' parameters, stacked; names as in transformers 5."""

    def __init__(
        self, num_experts, hidden_size, intermediate_size, activation, bias, device, dtype
    ):
        super().__init__()
        self.num_experts = num_experts
        gated = ACTIVATIONS[activation].gated
        self.up_name = "gate_up_proj" if gated else "up_proj"
        rows = 2 * intermediate_size if gated else intermediate_size
        shapes = {
            self.up_name: (num_experts, rows, hidden_size),
            "down_proj": (num_experts, hidden_size, intermediate_size),
            f"{self.up_name}_bias": (num_experts, rows) if bias else None,
            "down_proj_bias": (num_experts, hidden_size) if bias else None,
        }
        for name, shape in shapes.items():
            parameter = None
            if shape is not None:
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """w1, w2, b1, b2 as moe_ops.fused_moe takes them."""
        return (
            getattr(self, self.up_name),
            self.down_proj,
            getattr(self, f"{self.up_name}_bias"),
            self.down_proj_bias,
        )

    def reset_parameters(self) -> None:
        w1, w2, b1, b2 = self.weights()
        for weight, bias in ((w1, b1), (w2, b2)):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(p.shape)}" for name, p in self.named_parameters())


def _check_name(what: str, name: str, known) -> None:
    if name not in known:
        raise ValueError(f"FusedMoE: {what} is '{name}', expected one of {', '.join(known)}")


def _check_range(what: str, value: int, lowest: int, highest: int | None = None) -> None:
    if value < lowest or (highest is not None and value > highest):
        expected = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
        raise ValueError(f"FusedMoE: {what} is {value}, expected {expected}")
