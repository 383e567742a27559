"""Gradients against float64 autograd through the reference."""

from __future__ import annotations

import pytest
import torch
from helpers import BAD_INPUT, DTYPES, assert_accurate, reproducible, require_gradients
from hypothesis import given
from strategies import ROUTINGS, CombineCase, GemmCase, MoeCase, RouteCase, moe_cases

import moe_ops
from moe_ops import reference

# A backward pass multiplies what the forward pass rounded: about twice its error.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
LAYER = ["x", "w1", "w2", "b1", "b2", "topk_weights"]
FORWARD_MODE = {
    "fused_moe": MoeCase(bias="float32").arguments,
    "topk_route": RouteCase().arguments,
    "grouped_gemm": GemmCase(bias="float32").arguments,
    "grouped_gemm_wgrad": GemmCase().wgrad_arguments,
    "combine": CombineCase(MoeCase()).arguments,
}


def gradients(outputs, leaves, grad_outputs):
    """Zeros where an input has no part in the output."""
    if not outputs.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(
        outputs, leaves, grad_outputs, allow_unused=True, materialize_grads=True
    )


def compare(operator, oracle, arguments: dict, names: list[str], dtype: torch.dtype) -> None:
    """Gradients of the named arguments, from both, for one random gradient of the output."""
    leaves = require_gradients(arguments, names)
    out = operator(**arguments)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    got = gradients(out, leaves, grad)

    exact = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for name in names:
        if exact.get(name) is not None:
            exact[name] = exact[name].double()
    exact_leaves = require_gradients(exact, names)
    if "output_dtype" in exact:
        exact["output_dtype"] = torch.float64
    expected = gradients(oracle(**exact, compute_dtype=torch.float64), exact_leaves, grad.double())

    present = [name for name in names if arguments.get(name) is not None]
    for name, leaf, a, b in zip(present, leaves, got, expected, strict=True):
        assert a.shape == leaf.shape and a.dtype == leaf.dtype, name
        assert_accurate(a, b, max(TOLERANCE[dtype], TOLERANCE[a.dtype]), f"gradient of {name}")


@reproducible
def check_layer(case: MoeCase, device: str) -> None:
    compare(moe_ops.fused_moe, reference.fused_moe, case.arguments(device), LAYER, case.dtype)


@given(case=moe_cases())
def test_any_case(case, device):
    check_layer(case, device)


@pytest.mark.parametrize("gate_layout", reference.GATE_LAYOUTS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(activation, gate_layout, device):
    for parameters in (None, "number", "tensor"):
        case = MoeCase(
            activation=activation, gate_layout=gate_layout, parameters=parameters, bias="float32"
        )
        check_layer(case, device)


@pytest.mark.parametrize("activation", ["swiglu_oai", "swiglu_step", "situ"])
def test_limits_that_bite(activation, device):
    """Inputs ten times larger: clamped values have no gradient."""
    arguments = MoeCase(activation=activation, tokens=50).arguments(device)
    arguments["x"] *= 10
    compare(moe_ops.fused_moe, reference.fused_moe, arguments, LAYER, torch.float32)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_routings_and_dtypes(dtype, routing, device):
    check_layer(MoeCase(dtype=dtype, routing=routing, topk=3, tokens=50, bias="as x"), device)


@pytest.mark.parametrize("name", LAYER)
def test_one_gradient_alone(name, device):
    """What isn't wanted isn't computed, and changes nothing in what is."""
    arguments = MoeCase(bias="float32").arguments(device)
    compare(moe_ops.fused_moe, reference.fused_moe, arguments, [name], torch.float32)


def test_router_logits_through_the_whole_layer(device):
    arguments = MoeCase(tokens=40, experts=16).arguments(device)
    logits = torch.randn(40, 16, generator=torch.Generator().manual_seed(3)).to(device)
    for name in ("w1", "w2"):
        arguments[name] = arguments[name].nan_to_num()
    del arguments["topk_weights"], arguments["topk_ids"]

    def oracle(router_logits, compute_dtype, **rest):
        weights, ids = reference.topk_route(router_logits, 4, compute_dtype=compute_dtype)
        return reference.fused_moe(
            topk_weights=weights, topk_ids=ids, compute_dtype=compute_dtype, **rest
        )

    def fused(router_logits, **rest):
        weights, ids = moe_ops.topk_route(router_logits, 4)
        return moe_ops.fused_moe(topk_weights=weights, topk_ids=ids, **rest)

    arguments["router_logits"] = logits
    compare(fused, oracle, arguments, ["router_logits", "x"], torch.float32)


@pytest.mark.parametrize("scoring", reference.SCORINGS)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("kind", ["normal", "ties", "nan", "inf"])
def test_topk_route(kind, renormalize, scoring, device):
    case = RouteCase(
        kind=kind, scoring=scoring, renormalize=renormalize, correction_bias="integers",
        num_groups=4, topk_groups=2, scaling=2.5,
    )  # fmt: skip
    arguments = case.arguments(device)
    if kind == "inf":  # Also a row of one +inf, and rows of -inf and one number, and of -inf alone.
        arguments["router_logits"][2:5] = -torch.inf
        arguments["router_logits"][2:4, 3] = torch.tensor([torch.inf, 1.5], device=device)
    compare(
        lambda **kw: moe_ops.topk_route(**kw)[0],
        lambda **kw: reference.topk_route(**kw)[0],
        arguments,
        ["router_logits"],
        torch.float32,
    )


@pytest.mark.parametrize("offsets", ["uniform", "idle", "partial", "malformed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_gemm(dtype, offsets, device):
    arguments = GemmCase(dtype=dtype, offsets=offsets, bias="float32", rows=70).arguments(device)
    names = ["a", "b", "bias"]
    compare(moe_ops.grouped_gemm, reference.grouped_gemm, arguments, names, dtype)


@pytest.mark.parametrize("routing", ["uniform", "masked", "duplicated"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(dtype, routing, device):
    arguments = CombineCase(MoeCase(dtype=dtype, routing=routing, topk=3)).arguments(device)
    names = ["expert_out", "topk_weights"]
    compare(moe_ops.combine, reference.combine, arguments, names, dtype)


@pytest.mark.parametrize("offsets", ["uniform", "idle", "partial", "malformed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_gemm_wgrad(dtype, offsets, device):
    arguments = GemmCase(dtype=dtype, offsets=offsets, rows=70).wgrad_arguments(device)
    compare(moe_ops.grouped_gemm_wgrad, reference.grouped_gemm_wgrad, arguments, ["a", "b"], dtype)


def test_second_derivatives(device):
    arguments = MoeCase().arguments(device)
    (x,) = require_gradients(arguments, ["x"])
    out = moe_ops.fused_moe(**arguments)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    out = reference.fused_moe(**arguments, compute_dtype=torch.float64)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), x)
    assert_accurate(second, expected.double(), 1e-4)


def test_out_with_a_gradient_raises(device):
    arguments = MoeCase().arguments(device)
    out = torch.empty_like(arguments["x"])
    require_gradients(arguments, ["w1"])
    with pytest.raises(BAD_INPUT, match="out"):
        moe_ops.fused_moe(**arguments, out=out)
    with torch.no_grad():
        assert moe_ops.fused_moe(**arguments, out=out) is out


def test_out_tells_autograd_that_it_was_written(device):
    """A tensor saved for a backward pass and written since must not be taken for the old one."""
    arguments = MoeCase().arguments(device)
    out = torch.rand_like(arguments["x"])
    for context in (torch.no_grad, torch.inference_mode):
        leaf = torch.rand_like(out).requires_grad_()
        product = (leaf * out).sum()
        version = out._version
        with context():
            moe_ops.fused_moe(**arguments, out=out)
        assert out._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():  # Tensors made here have no version.
        moe_ops.fused_moe(**arguments, out=torch.empty_like(out))


def test_a_correction_bias_that_wants_a_gradient_raises(device):
    arguments = RouteCase(correction_bias="normal").arguments(device)
    require_gradients(arguments, ["router_logits", "correction_bias"])
    with pytest.raises(BAD_INPUT, match="correction_bias"):
        moe_ops.topk_route(**arguments)[0].sum().backward()
    with torch.no_grad():
        moe_ops.topk_route(**arguments)


@pytest.mark.parametrize("operator", FORWARD_MODE)
def test_forward_mode_raises(operator, device):
    """torch's default for an operator in Python: tangents of zero, whatever the operator does."""
    arguments = FORWARD_MODE[operator](device)
    for name, value in arguments.items():
        if not torch.is_tensor(value) or not value.is_floating_point():
            continue

        def function(v, name=name):
            return getattr(moe_ops, operator)(**(arguments | {name: v}))

        with pytest.raises(NotImplementedError, match=f"{operator}: .* forward-mode"):
            torch.func.jvp(function, (value,), (torch.ones_like(value),))
        with torch.autograd.forward_ad.dual_level():
            function(value)  # Nobody asks for a tangent here.
            dual = torch.autograd.forward_ad.make_dual(value, torch.ones_like(value))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                function(dual)


@pytest.mark.parametrize("name", ["alpha", "beta", "limit"])
def test_a_parameter_that_wants_a_gradient_raises(name, device):
    case = MoeCase(activation="swiglu_oai", parameters="tensor")
    arguments = case.arguments(device)
    require_gradients(arguments, [name])
    with pytest.raises(BAD_INPUT, match=name):
        moe_ops.fused_moe(**arguments).sum().backward()


def test_integers_have_no_gradient(device):
    logits = torch.randn(4, 8, device=device, requires_grad=True)
    weights, ids = moe_ops.topk_route(logits, 2)
    assert weights.requires_grad and not ids.requires_grad


def test_gradients_are_the_same_twice(device):
    def run():
        arguments = MoeCase(tokens=60, bias="float32", seed=4).arguments(device)
        leaves = require_gradients(arguments, LAYER)
        return torch.autograd.grad(moe_ops.fused_moe(**arguments).sum(), leaves)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
