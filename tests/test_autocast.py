"""Under torch.autocast the products run in 16 bits; routing and what is wrong stay as they are."""

from __future__ import annotations

import pytest
import torch
from helpers import BAD_INPUT, assert_accurate, assert_same_bits, require_gradients
from strategies import GemmCase, MoeCase

import moe_ops

DTYPES = [torch.bfloat16, torch.float16]
OPERANDS = ("x", "w1", "w2", "a", "b")
BIASES = ("b1", "b2", "bias")


def layer(device, **case):
    return MoeCase(bias="float32", **case).arguments(device)


def gemm(device):
    return GemmCase(bias="float32").arguments(device)


def cast(arguments: dict, dtype: torch.dtype, names=OPERANDS) -> dict:
    return arguments | {k: arguments[k].to(dtype) for k in names if k in arguments}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator, make", [("fused_moe", layer), ("grouped_gemm", gemm)])
def test_as_with_arguments_cast_by_hand(operator, make, dtype, device):
    function, arguments = getattr(moe_ops, operator), make(device)
    expected = function(**cast(arguments, dtype))
    mixed = arguments | {k: arguments[k].to(dtype) for k in ("x", "b") if k in arguments}
    with torch.autocast(device, dtype=dtype):
        for given in (arguments, mixed, cast(arguments, dtype)):
            assert_same_bits(function(**given), expected)
        with torch.autocast(device, enabled=False):
            assert function(**arguments).dtype == torch.float32


@pytest.mark.parametrize("operator, make", [("fused_moe", layer), ("grouped_gemm", gemm)])
def test_a_bias_of_the_other_16_bits(operator, make, device):
    function, arguments = getattr(moe_ops, operator), make(device)
    half = cast(arguments, torch.float16, BIASES)
    expected = function(**cast(cast(half, torch.bfloat16), torch.bfloat16, BIASES))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same_bits(function(**half), expected)


def test_out(device):
    arguments = layer(device)
    expected = moe_ops.fused_moe(**cast(arguments, torch.bfloat16), output_dtype=torch.float32)
    out = torch.empty_like(expected)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert moe_ops.fused_moe(**arguments, out=out) is out
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_what_is_no_operand_still_raises(dtype, device):
    calls = [(moe_ops.fused_moe, layer(device)), (moe_ops.grouped_gemm, gemm(device))]
    for function, arguments in calls:
        for name in (*OPERANDS, *BIASES):
            if name in arguments:
                bad = arguments | {name: arguments[name].to(dtype)}
                with torch.autocast(device, dtype=torch.bfloat16), pytest.raises(BAD_INPUT):
                    function(**bad)


def test_gradients_reach_float32_leaves(device):
    arguments = layer(device)
    leaves = require_gradients(arguments, ["x", "w1", "w2", "b1", "b2", "topk_weights"])
    with torch.autocast(device, dtype=torch.bfloat16):
        out = moe_ops.fused_moe(**arguments)
    got = torch.autograd.grad(out.float().sum(), leaves)
    expected = moe_ops.fused_moe(**cast(arguments, torch.bfloat16)).float().sum()
    for a, b in zip(got, torch.autograd.grad(expected, leaves), strict=True):
        assert a.dtype == torch.float32
        assert_same_bits(a, b)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(device):
    torch.manual_seed(0)
    module = moe_ops.FusedMoE(32, 24, 6, 2, bias=True, device=device)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (17, 3, 64):
        x = torch.randn(tokens, 32).to(device).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            got, expected = compiled(x), module(x)
        assert_same_bits(got, expected)
        leaves = [x, *module.parameters()]
        gradients = torch.autograd.grad(expected.float().square().sum(), leaves)
        got_gradients = torch.autograd.grad(got.float().square().sum(), leaves)
        for a, b in zip(got_gradients, gradients, strict=True):
            # torch traces the router's backward pass under autocast too, and rounds there.
            assert_accurate(a, b.double(), 2e-2)
