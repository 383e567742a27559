"""FlashInfer's `cutlass_fused_moe`: the same call, here, and in FlashInfer's own place.

Read from flashinfer-python 0.7.0 to 0.7.2 (`flashinfer/fused_moe/core.py`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from enum import IntEnum

import torch
from torch import Tensor

from ._functional import fused_moe

KNOWN_VERSIONS = ("0.7",)  # before, the same activations had other numbers
REFUSED = ((8, 0), (8, 6), (8, 7))  # compute capabilities for which FlashInfer has no kernels
_PLACES = ("flashinfer", "flashinfer.fused_moe")
_QUANTISED = (
    "dequantise the weights to bfloat16 or float16; 8-bit and 4-bit weights with 16-bit activations"
    " (W8A16, W4A16) are planned"
)


class ActivationType(IntEnum):
    """FlashInfer's numbers."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Identity = 9
    Situ = 10
    InvalidType = 11
    ClampedRelu2 = 12


_ACTIVATIONS = {
    ActivationType.Gelu: "gelu",
    ActivationType.Relu: "relu",
    ActivationType.Silu: "silu",
    ActivationType.Swiglu: "swiglu",
    ActivationType.Geglu: "geglu",
    ActivationType.SwigluBias: "swiglu_oai",
    ActivationType.Relu2: "relu2",
    ActivationType.SwigluStep: "swiglu_step",
    ActivationType.GegluTanh: "geglu_tanh",
    ActivationType.Identity: "identity",
    ActivationType.Situ: "situ",
}
# What the scalars of an activation are called in fused_moe, and what they are where they aren't
# given; None: fused_moe's own.
_SCALARS = {
    "swiglu_oai": {
        "swiglu_alpha": ("alpha", 1.0),
        "swiglu_beta": ("beta", 0.0),
        "swiglu_limit": ("limit", math.inf),
    },
    "swiglu_step": {"swiglu_limit": ("limit", None)},
    "situ": {"situ_beta": ("beta", None), "situ_linear_beta": ("limit", None)},
}


def cutlass_fused_moe(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor | None,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[Tensor] | None,
    fc1_expert_biases: Tensor | None = None,
    fc2_expert_biases: Tensor | None = None,
    input_sf: Tensor | None = None,
    swiglu_alpha: Tensor | None = None,
    swiglu_beta: Tensor | None = None,
    swiglu_limit: Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: ActivationType | int = ActivationType.Swiglu,
    swizzled_input_sf: bool = True,
    use_fused_finalize: bool = True,
    profile_ids: Sequence[int] | None = None,
    workspace_buffer: Tensor | None = None,
    *,
    clamped_relu2_limit: Tensor | None = None,
    situ_beta: Tensor | None = None,
    situ_linear_beta: Tensor | None = None,
    backend: str = "cutlass",
) -> Tensor:
    """FlashInfer's fused Mixture-of-Experts layer, unquantised, on any device `fused_moe` runs on.

    Args:
        input: [T, H], float16, bfloat16 or float32.
        token_selected_experts: [T, K], int32 or int64, numbered over all ranks. An expert of
            another rank, or none at all, adds nothing.
        token_final_scales: [T, K], float32; None: all 1.
        fc1_expert_weights: [E, 2*I, H] where the activation is gated, up in the first I rows and
            gate in the last, [E, I, H] elsewhere. E experts are held here.
        fc2_expert_weights: [E, H, I].
        output_dtype: float16, bfloat16 or float32.
        quant_scales: None or empty.
        fc1_expert_biases, fc2_expert_biases: [E, 2*I] or [E, I], and [E, H], each or None. The
            second is added on tp_rank 0 alone.
        swiglu_alpha, swiglu_beta, swiglu_limit: float32 [E]. With Swiglu or SwigluBias: clamped,
            scaled SwiGLU, `g * sigmoid(alpha * g) * (clamp(up, -limit, limit) + beta)` with
            `g = min(gate, limit)`, where they are 1, 0 and infinity if not given. With SwigluStep:
            the limit alone, 7 if not given.
        situ_beta, situ_linear_beta: float32 [E], of Situ, 4 and 25 if not given.
        tp_size, tp_rank: the weights are this rank's shards of I already, the output is its part of
            a sum.
        ep_size, ep_rank: this rank holds experts ep_rank * E to (ep_rank + 1) * E - 1; the layer's
            output is the sum of all ranks'.
        output: [T, H] of output_dtype, written and returned; has no gradient.
        activation_type: an `ActivationType`, FlashInfer's or this one, or its number.
        tune_max_num_tokens, enable_pdl, profile_ids, use_fused_finalize, workspace_buffer: how
            FlashInfer tunes, launches, sums and allocates. Nothing is tuned here, the sum is always
            the deterministic one and torch's allocator has the workspace: they change nothing.
            swizzled_input_sf says something of input_sf alone.
        backend: "cutlass" as FlashInfer has it, which is "auto" here, or one of `fused_moe`'s.

    Returns:
        The output, [T, H] (FlashInfer returns it first in a list). Differentiable as `fused_moe` is.

    Raises:
        NotImplementedError: something that isn't here was asked for; the message names it and what
            to use instead.
        ValueError: the arguments contradict each other.
        RuntimeError: from `fused_moe`, whose names for them stand in its message.
    """
    activation = _activation_of(activation_type)
    given = {
        "swiglu_alpha": swiglu_alpha,
        "swiglu_beta": swiglu_beta,
        "swiglu_limit": swiglu_limit,
        "situ_beta": situ_beta,
        "situ_linear_beta": situ_linear_beta,
    }
    swiglu = [swiglu_alpha, swiglu_beta, swiglu_limit]
    if activation == "swiglu" and any(value is not None for value in swiglu):
        activation = "swiglu_oai"
    scalars = _scalars_of(activation, given)

    quantised = {
        "quant_scales": quant_scales is not None and len(quant_scales) > 0,
        "input_sf": input_sf is not None,
        "use_deepseek_fp8_block_scale": use_deepseek_fp8_block_scale,
        "use_w4_group_scaling": use_w4_group_scaling,
        "use_mxfp8_act_scaling": use_mxfp8_act_scaling,
        "use_packed_weights": use_packed_weights,
        "use_wfp4afp8_humming": use_wfp4afp8_humming,
    }
    for name, used in quantised.items():
        if used:
            _refuse(f"{name}: quantisation", _QUANTISED)
    for name, tensor in (
        ("input", input),
        ("fc1_expert_weights", fc1_expert_weights),
        ("fc2_expert_weights", fc2_expert_weights),
    ):
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            _refuse(f"{name} of {tensor.dtype}: quantisation", _QUANTISED)
    if enable_alltoall:
        _refuse("enable_alltoall", "give ep_size and ep_rank, and sum the ranks' outputs")
    if min_latency_mode:
        _refuse("min_latency_mode", "leave it out: few tokens take tiles of their own already")
    if (cluster_size, cluster_rank) != (1, 0):
        _refuse("cluster_size, cluster_rank", "leave them at 1 and 0: give ep_size and ep_rank")
    if clamped_relu2_limit is not None:
        raise ValueError("cutlass_fused_moe: clamped_relu2_limit belongs to ClampedRelu2 alone")
    if backend == "cake":
        _refuse('backend="cake"', 'use "cutlass", "sm80", "sm90" or "cublas"')
    for name, rank, size in (("tp", tp_rank, tp_size), ("ep", ep_rank, ep_size)):
        if not 0 <= rank < size:
            raise ValueError(
                f"cutlass_fused_moe: {name}_rank is {rank}, expected 0 to {name}_size - 1 = "
                f"{size - 1}"
            )

    if token_final_scales is None:
        token_final_scales = torch.ones(
            token_selected_experts.shape, dtype=torch.float32, device=input.device
        )
    return fused_moe(
        input,
        fc1_expert_weights,
        fc2_expert_weights,
        token_final_scales,
        token_selected_experts,
        b1=fc1_expert_biases,
        b2=fc2_expert_biases if tp_rank == 0 else None,
        activation=activation,
        gate_layout="up_gate",
        **scalars,
        expert_offset=ep_rank * fc2_expert_weights.shape[0],
        output_dtype=output_dtype,
        out=output,
        backend="auto" if backend == "cutlass" else backend,
    )


def _activation_of(activation_type: ActivationType | int) -> str:
    try:
        kind = ActivationType(int(activation_type))
    except (TypeError, ValueError):
        kind = ActivationType.InvalidType
    if kind == ActivationType.ClampedRelu2:
        _refuse("ActivationType.ClampedRelu2", "use Relu2, which doesn't clamp")
    if kind == ActivationType.InvalidType:
        names = ", ".join(f"{known.name} ({known.value})" for known in _ACTIVATIONS)
        raise ValueError(
            f"cutlass_fused_moe: activation_type is {activation_type!r}, expected one of {names}"
        )
    return _ACTIVATIONS[kind]


def _scalars_of(activation: str, given: dict[str, Tensor | None]) -> dict[str, float | Tensor]:
    known = _SCALARS.get(activation, {})
    for name, value in given.items():
        if value is not None and name not in known:
            raise ValueError(f"cutlass_fused_moe: {name} is given, but {activation} has none")
    values = {
        ours: default if given[theirs] is None else given[theirs]
        for theirs, (ours, default) in known.items()
    }
    return {name: value for name, value in values.items() if value is not None}


def _refuse(what: str, instead: str) -> None:
    raise NotImplementedError(
        f"cutlass_fused_moe: {what} isn't implemented by simple_moe: {instead}"
    )


# ---- In FlashInfer's own place ----


_replaced: dict[str, object] = {}  # module's name -> FlashInfer's own function


def install(*, always: bool = False) -> AbstractContextManager:
    """Puts `cutlass_fused_moe` in the place of FlashInfer's, for the devices FlashInfer refuses.

    `flashinfer.cutlass_fused_moe` and `flashinfer.fused_moe.cutlass_fused_moe` then take the same
    arguments and return what FlashInfer returns, a list whose first is the output, without
    gradients. Code that has imported the
    function itself before keeps FlashInfer's. Installing again changes `always`.

        with moe_ops.flashinfer.install():
            ...

    Args:
        always: on every device, not only where FlashInfer has no kernels (SM80, SM86, SM87).

    Returns:
        A context manager, whose end uninstalls.

    Raises:
        ImportError: there is no FlashInfer.
        RuntimeError: its version isn't known here.
    """
    uninstall()
    modules = {place: importlib.import_module(place) for place in _PLACES}
    version = modules["flashinfer"].__version__
    theirs = modules["flashinfer"].cutlass_fused_moe
    signature = inspect.signature(theirs)
    unknown = sorted(signature.parameters.keys() - inspect.signature(cutlass_fused_moe).parameters)
    if ".".join(version.split(".")[:2]) not in KNOWN_VERSIONS or unknown:
        takes = f", whose cutlass_fused_moe takes {', '.join(unknown)}" if unknown else ""
        raise RuntimeError(
            f"simple_moe doesn't know FlashInfer {version}{takes}. It knows "
            f"{', '.join(f'{known}.x' for known in KNOWN_VERSIONS)}: install one of these, or call"
            " moe_ops.cutlass_fused_moe"
        )

    @functools.wraps(theirs)
    def replacement(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        if always or _refuses(arguments["input"].device):
            with torch.no_grad():  # FlashInfer has no gradients: `output` may be given anywhere.
                return _list_of(cutlass_fused_moe(**arguments), arguments)
        return theirs(*args, **kwargs)

    for place, module in modules.items():
        _replaced[place] = module.cutlass_fused_moe
        module.cutlass_fused_moe = replacement
    at_exit = ExitStack()
    at_exit.callback(uninstall)
    return at_exit


def _list_of(output: Tensor, arguments: dict) -> list[Tensor]:
    """FlashInfer's list: after the output come three tensors that only its minimum-latency mode
    writes."""
    experts, tokens = arguments["fc2_expert_weights"].shape[0], output.shape[0]
    return [
        output,
        output.new_empty(1, dtype=torch.int32),
        output.new_empty((experts, tokens), dtype=torch.float32),
        output.new_empty(experts, dtype=torch.int32),
    ]


def _refuses(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in REFUSED


def uninstall() -> None:
    """Gives FlashInfer its own function back. Harmless where nothing is installed."""
    while _replaced:
        place, theirs = _replaced.popitem()
        importlib.import_module(place).cutlass_fused_moe = theirs
