"""torch.library.opcheck, all four of its tests, on every operator."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES
from strategies import CombineCase, GemmCase, MoeCase, RouteCase
from torch.library import opcheck

LAYER = ["x", "w1", "w2", "topk_weights", "topk_ids", "b1", "b2"]
PARAMETERS = ["alpha", "beta", "limit"]


def finite(value):
    """Without the NaN that nobody reads; opcheck compares gradients, and those may be NaN."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.nan_to_num() if is_float else value


def layer_call(case: MoeCase, device: str) -> tuple[list, dict]:
    """Positional arguments and options as the operator's schema has them."""
    arguments = {k: finite(v) for k, v in case.arguments(device).items()}
    positional = [arguments.pop(name, None) for name in LAYER]
    for name in PARAMETERS:
        is_tensor = isinstance(arguments.get(name), torch.Tensor)
        positional.append(arguments.pop(name) if is_tensor else None)
    return positional, arguments


def wanting_gradients(positional: list, count: int) -> list:
    """The same arguments, the first `count` floating ones being leaves."""
    return [
        v.detach().requires_grad_()
        if i < count and isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for i, v in enumerate(positional)
    ]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        MoeCase(tokens=6),
        MoeCase(tokens=6, activation="swiglu_oai", bias="float32", parameters="number"),
        MoeCase(tokens=6, activation="situ", bias="as x", parameters="tensor"),
        MoeCase(tokens=6, activation="relu2", routing="masked", ids_dtype=torch.int64),
        MoeCase(tokens=6, layout="strided", gate_layout="interleaved", expert_offset=5),
        MoeCase(tokens=0),
    ],
    ids=lambda case: f"{case.activation}-{case.layout}-{case.tokens}",
)
def test_fused_moe(case, gradients, device):
    positional, options = layer_call(case, device)
    if gradients:
        positional = wanting_gradients(positional, 7)
    opcheck(torch.ops.simple_moe.fused_moe.default, positional, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_moe_dtypes(dtype, device):
    for output_dtype in (None, torch.float32):
        positional, options = layer_call(
            MoeCase(tokens=5, dtype=dtype, output_dtype=output_dtype), device
        )
        opcheck(torch.ops.simple_moe.fused_moe.default, positional, options)


def test_fused_moe_out(device):
    positional, options = layer_call(MoeCase(tokens=6, bias="float32"), device)
    options["out"] = torch.zeros_like(positional[0])
    opcheck(torch.ops.simple_moe.fused_moe.out, positional, options)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        RouteCase(),
        RouteCase(scoring="sigmoid", correction_bias="normal", num_groups=4, topk_groups=2),
        RouteCase(dtype=torch.bfloat16, renormalize=False, scaling=2.5, layout="strided"),
        RouteCase(tokens=0),
    ],
    ids=lambda case: f"{case.scoring}-{case.dtype}-{case.tokens}",
)
def test_topk_route(case, gradients, device):
    arguments = case.arguments(device)
    positional = [arguments.pop(name) for name in ("router_logits", "topk", "correction_bias")]
    if gradients:
        positional = wanting_gradients(positional, 1)
    opcheck(torch.ops.simple_moe.topk_route.default, positional, arguments)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_sort_by_expert(tokens, ids_dtype, device):
    ids = MoeCase(tokens=tokens, ids_dtype=ids_dtype, routing="masked").tensors(device)["topk_ids"]
    opcheck(torch.ops.simple_moe.sort_by_expert.default, (ids, 8))
    opcheck(torch.ops.simple_moe.sort_by_expert.default, (ids, 8, 3))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("bias", [None, "float32"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_grouped_gemm(layout, bias, gradients, device):
    arguments = GemmCase(layout=layout, bias=bias).arguments(device)
    positional = [finite(arguments.pop(k)) for k in ("a", "b", "expert_offsets", "bias")]
    if gradients:
        positional = wanting_gradients(positional, 4)
    opcheck(torch.ops.simple_moe.grouped_gemm.default, positional, arguments)


@pytest.mark.parametrize("output_dtype", [None, torch.float32])
def test_grouped_gemm_wgrad(output_dtype, device):
    case = GemmCase(dtype=torch.bfloat16, output_dtype=output_dtype)
    arguments = case.wgrad_arguments(device)
    positional = [finite(arguments.pop(k)) for k in ("a", "b", "expert_offsets")]
    opcheck(torch.ops.simple_moe.grouped_gemm_wgrad.default, positional, arguments)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_combine(weights_dtype, gradients, device):
    case = MoeCase(tokens=6, dtype=torch.bfloat16, weights_dtype=weights_dtype)
    arguments = CombineCase(case).arguments(device)
    names = ("expert_out", "topk_weights", "sorted_slots", "expert_offsets")
    positional = [finite(arguments.pop(k)) for k in names]
    if gradients:
        positional = wanting_gradients(positional, 2)
    opcheck(torch.ops.simple_moe.combine.default, positional, arguments)
