"""Hugging Face transformers: `experts_implementation="simple_moe"`.

    import moe_ops
    moe_ops.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="simple_moe")

Every model whose experts go through transformers' experts interface (transformers 5) then runs them
with `moe_ops.fused_moe`. Where a model's gate, activation or shapes aren't ours, transformers' own
`grouped_mm` takes over, which is logged once; `explain(model)` says which experts run how.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._functional import fused_moe

try:
    from transformers import activations
    from transformers.integrations.finegrained_fp8 import (
        FP8ExpertsInterface,
        fp8_grouped_mm_experts_forward,
    )
    from transformers.integrations.moe import (
        ExpertsInterface,
        _default_apply_gate,
        grouped_mm_experts_forward,
    )
except ImportError as error:
    raise ImportError(
        f"moe_ops.transformers needs transformers >= 5.17, with its experts interface ({error})"
    ) from error

NAME = "simple_moe"
_log = logging.getLogger(__name__)

# By an activation's class, or the function: its name where there is no gate. relu2 and identity
# have no gated form here.
_UNGATED = {
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
    activations.LinearActivation: "identity",
    F.silu: "silu",
    F.gelu: "gelu",
    F.relu: "relu",
}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


def _oai(alpha: float, beta: float, limit: float, layout: str = "gate_up") -> dict:
    return {"activation": "swiglu_oai", "gate_layout": layout,
            "alpha": alpha, "beta": beta, "limit": limit}  # fmt: skip


# Gates of their own, by the experts' class: the options of fused_moe that are the same. The key's
# second part is the activation that the gate calls, where it calls one.
_GATES: dict[str, tuple[Callable[[nn.Module], dict], str | None]] = {
    "GptOssExperts": (lambda e: _oai(e.alpha, 1.0, e.limit, "interleaved"), None),
    "OpenAIPrivacyFilterExperts": (lambda e: _oai(e.alpha, 1.0, e.limit), None),
    "MiniMaxM3VLExperts": (lambda e: _oai(e.swiglu_alpha, 1.0, e.swiglu_limit), None),
    "DeepseekV4Experts": (lambda e: _oai(1.0, 0.0, e.limit), "silu"),
    "Glm5NextTextExperts": (lambda e: _oai(1.0, 0.0, e.swiglu_limit), None),
    "HYV4Experts": (lambda e: _oai(1.0, 0.0, e.swiglu_limit), None),
    "HYV4VLExperts": (lambda e: _oai(1.0, 0.0, e.swiglu_limit), None),
}


def register() -> None:
    """Makes `experts_implementation="simple_moe"` known to transformers.

    Before a model is made with it, or before `model.set_experts_implementation("simple_moe")`.
    """
    ExpertsInterface.register(NAME, experts_forward)
    # Experts of a fine-grained FP8 checkpoint ask an interface of their own.
    FP8ExpertsInterface.register(NAME, _fp8_experts_forward)


def _fp8_experts_forward(self: nn.Module, *args, **kwargs) -> Tensor:
    _tell_once(type(self).__name__, "its weights are FP8")
    return fp8_grouped_mm_experts_forward(self, *args, **kwargs)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """An experts module's forward: [T, H], [T, K], [T, K] to [T, H], fresh storage.

    Ids outside the experts held here, as expert parallelism makes them, add nothing.
    """
    options, why_not = _options(self, hidden_states)
    if options is None:
        _tell_once(type(self).__name__, why_not)
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    first = _first_name(self)
    w1, w2 = getattr(self, first), self.down_proj
    if self.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    return fused_moe(
        hidden_states.to(w1.dtype),
        w1,
        w2,
        top_k_weights.float() if top_k_weights.dtype == torch.float64 else top_k_weights,
        top_k_index,
        b1=getattr(self, f"{first}_bias") if self.has_bias else None,
        b2=self.down_proj_bias if self.has_bias else None,
        output_dtype=hidden_states.dtype,
        **options,
    )


def explain(model: nn.Module) -> dict[str, str]:
    """How each of a model's experts modules runs: by its name, "simple_moe: ..." with the
    activation, or "grouped_mm: ..." with the reason, or another implementation where the model has
    one.

    Empty, and a warning is logged, where the model has none that asks transformers' experts
    interface (llama4 and dbrx, for example): setting an implementation changes nothing there.
    """
    answers = {}
    for name, module in model.named_modules():
        if not (hasattr(module, "has_gate") and hasattr(module, "is_transposed")):
            continue
        chosen = module.config._experts_implementation
        if chosen == NAME:
            options, why_not = _options(module, None)
            answers[name] = (
                f"grouped_mm: {why_not}" if options is None else f"{NAME}: {options['activation']}"
            )
        else:
            answers[name] = f"{chosen}: the model's experts_implementation"
    if not answers:
        _log.warning(
            "%s has no experts that ask transformers' experts interface:"
            ' experts_implementation="%s" changes nothing in it',
            type(model).__name__,
            NAME,
        )
    return answers


def _options(experts: nn.Module, hidden_states: Tensor | None) -> tuple[dict | None, str]:
    """fused_moe's options for an experts module, or None and why it can't run it."""
    down = experts.down_proj
    if not isinstance(down, Tensor):
        return None, "its weights aren't stacked in one tensor"
    device = down.device if hidden_states is None else hidden_states.device
    if device.type not in ("cpu", "cuda", "meta"):
        return None, f"simple_moe has no kernels for {device.type}"
    dtypes = {down.dtype, getattr(experts, _first_name(experts)).dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32}:
        return None, f"its weights are {' and '.join(sorted(map(str, dtypes)))}"
    if getattr(experts, "has_post_expert_norm", False):
        return None, "it normalises each expert's output"

    function = getattr(experts, "act_fn", None)
    key = type(function) if isinstance(function, nn.Module) else function
    activation = _UNGATED.get(key)
    if not experts.has_gate:
        if activation is None:
            return None, f"simple_moe has no {getattr(key, '__name__', key)}"
        return {"activation": activation}, ""
    gate = _gate_of(type(experts))
    if gate is None:
        return None, "its gate is its own"
    if gate:
        options, calls = _GATES[gate]
        if calls is not None and activation != calls:
            return None, f"its gate isn't {calls}'s"
        return options(experts), ""
    if activation not in _GATED:
        return None, f"simple_moe has no gated {getattr(key, '__name__', key)}"
    return {"activation": _GATED[activation]}, ""


@torch.compiler.assume_constant_result  # Dynamo finds equal names of functions unequal
def _gate_of(kind: type) -> str | None:
    """The class in _GATES whose gate an experts class has; "" for transformers' own; None for others.

    The class may have been wrapped (FSDP2, parametrize), and its gate replaced.
    """
    gate = kind._apply_gate
    if gate is _default_apply_gate:
        return ""
    for base in kind.__mro__:
        own = gate.__qualname__ == f"{base.__name__}._apply_gate"
        if own and base.__name__ in _GATES and gate.__module__ == base.__module__:
            return base.__name__ if base.__module__.startswith("transformers.models.") else None
    return None


def _first_name(experts: nn.Module) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _tell_once(experts: str, why_not: str) -> None:
    if not torch.compiler.is_compiling():
        _logged(experts, why_not)


@functools.cache
def _logged(experts: str, why_not: str) -> None:
    _log.warning("%s runs with grouped_mm, not %s: %s", experts, NAME, why_not)
