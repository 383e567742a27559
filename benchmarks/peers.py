"""What bench_moe.py times: moe_ops' backends, and what one would use without moe_ops.

Every peer takes (x, w1, w2, topk_weights, topk_ids) as moe_ops.fused_moe does.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ops


class Contender(NamedTuple):
    name: str
    call: Callable[..., Tensor]
    # How it reads w1. All get the same weights, unpermuted: gate and up are random alike, so only
    # the reference has to know.
    gate_layout: str = "gate_up"
    capturable: bool = True


def backend(name: str, **options) -> Contender:
    # "cublas" reads the expert offsets on the host.
    call = partial(moe_ops.fused_moe, backend=name, **options)
    return Contender(name, call, capturable=name != "cublas")


def grouped_mm() -> Contender:
    """The composition of torch operators that transformers uses by default."""

    def call(x: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        sorted_ids, slots = torch.sort(topk_ids.flatten())
        experts = torch.arange(w1.shape[0], device=x.device, dtype=topk_ids.dtype)
        ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
        rows = x[slots // topk_ids.shape[1]]
        gate, up = F.grouped_mm(rows, w1.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)
        rows = rows * topk_weights.flatten()[slots, None].to(x.dtype)
        # Back to the order of the slots, and summed: index_add_ would add with atomics, slower.
        unsorted = torch.empty_like(rows)
        unsorted[slots] = rows
        return unsorted.view(*topk_ids.shape, -1).sum(dim=1)

    return Contender("grouped_mm", call)


def eager() -> Contender:
    """The loop over the experts that models ship with."""

    def call(x: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in topk_ids.unique().tolist():
            token, choice = torch.where(topk_ids == expert)
            gate, up = F.linear(x[token], w1[expert]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, w2[expert])
            out.index_add_(0, token, rows * topk_weights[token, choice, None].to(x.dtype))
        return out

    return Contender("eager", call, capturable=False)


def vllm() -> Contender:
    """vLLM's Triton path, with its own tuned tables where it ships them."""
    from vllm.model_executor.layers.fused_moe import fused_experts

    return Contender("vllm", fused_experts)


def flashinfer() -> Contender:
    from flashinfer.fused_moe import cutlass_fused_moe

    def call(x: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return cutlass_fused_moe(x, topk_ids, topk_weights, w1, w2, x.dtype, quant_scales=[])[0]

    return Contender("flashinfer", call, gate_layout="up_gate")


def sonicmoe() -> Contender:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    def call(x: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        tokens, topk = topk_ids.shape
        token = torch.arange(tokens, device=x.device, dtype=torch.int32)
        out, _ = moe_general_routing_inputs(
            x, topk_weights.flatten(), token.repeat_interleave(topk, output_size=tokens * topk),
            topk_ids.flatten(), w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None, w1.shape[0],
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=ActivationType.SWIGLU, is_inference_mode_enabled=True,
        )  # fmt: skip
        return out

    return Contender("sonicmoe", call, gate_layout="interleaved")


PEERS = {p.__name__: p for p in (grouped_mm, eager, vllm, flashinfer, sonicmoe)}
PACKAGES = ("vllm", "flashinfer", "sonicmoe")


def open_peers(names: list[str]) -> tuple[list[Contender], list[str]]:
    """The peers that can be had, and a line for each package: its version, or why not timed."""
    contenders, notes = [], []
    for name in names:
        try:
            contenders.append(PEERS[name]())
        except Exception as error:  # noqa: BLE001 (whatever it is, the others count)
            notes.append(f"{name}: not timed, its import failed ({reason(error)})")
        else:
            if name in PACKAGES:
                notes.append(f"{name}: version {version_of(name)}")
    for name in PACKAGES:
        if name not in names:
            there = importlib.util.find_spec(name) is not None
            state = f"installed; --peers {name} times it" if there else "not installed"
            notes.append(f"{name}: not timed, {state}")
    return contenders, notes


def version_of(package: str) -> str:
    distributions = importlib.metadata.packages_distributions().get(package, [])
    return importlib.metadata.version(distributions[0]) if distributions else "unknown"


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    # An error under graph capture makes the end of the capture fail too, with this message.
    while error.__context__ is not None and "previous error during capture" in str(error):
        error = error.__context__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".rstrip(": ")
