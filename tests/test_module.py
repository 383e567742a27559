"""FusedMoE, the nn.Module."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import DTYPES, TOLERANCE, assert_accurate

import moe_ops
from moe_ops import FusedMoE, reference


def expected_output(module: FusedMoE, x: torch.Tensor) -> torch.Tensor:
    """From the state dict alone, in float64 but for the routing."""
    state = module.state_dict()
    tokens = x.detach().reshape(-1, module.hidden_size)
    weights, ids = reference.topk_route(
        tokens.float() @ state["gate.weight"].float().T,
        module.topk,
        scoring=module.scoring,
        renormalize=module.renormalize,
        correction_bias=state.get("gate.e_score_correction_bias"),
        num_groups=module.num_groups,
        topk_groups=module.topk_groups,
        scaling=module.scaling,
    )
    up = "gate_up_proj" if "experts.gate_up_proj" in state else "up_proj"
    options = {k: module.options[k] for k in ("activation", "gate_layout", "expert_offset")}
    out = reference.fused_moe(
        tokens, state[f"experts.{up}"], state["experts.down_proj"], weights, ids,
        b1=state.get(f"experts.{up}_bias"), b2=state.get("experts.down_proj_bias"),
        **options, compute_dtype=torch.float64,
    )  # fmt: skip
    return out.view(x.shape)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(bias=True, activation="swiglu_oai", gate_layout="interleaved"),
        dict(activation="relu2", gate_layout="up_gate"),
        dict(renormalize=False, scaling=1.5),
        dict(scoring="sigmoid", correction_bias=True, num_groups=4, topk_groups=2, scaling=2.5),
        dict(expert_offset=3, num_local_experts=4, batch_invariant=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype, options, device):
    torch.manual_seed(0)
    module = FusedMoE(48, 40, 8, 3, device=device, dtype=dtype, **options)
    if options.get("correction_bias"):
        module.gate.e_score_correction_bias.normal_()
    for shape in ((48,), (7, 48), (2, 5, 48), (0, 48), (3, 0, 48)):
        x = torch.randn(shape).to(device, dtype)
        out = module(x)
        assert out.shape == x.shape and out.dtype == dtype
        assert_accurate(out, expected_output(module, x))


def test_gradients_reach_every_parameter(device):
    torch.manual_seed(0)
    module = FusedMoE(32, 24, 4, 2, bias=True, device=device)
    x = torch.randn(50, 32).to(device).requires_grad_()
    module(x).square().sum().backward()
    for name, parameter in [("x", x), *module.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_route(device):
    module = FusedMoE(32, 24, 8, 3, device=device, dtype=torch.bfloat16)
    weights, ids = module.route(torch.randn(2, 5, 32).to(device, torch.bfloat16))
    assert weights.shape == ids.shape == (10, 3)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32


def test_state_dict_is_transformers(device):
    gated = FusedMoE(32, 24, 8, 2, bias=True, correction_bias=True, device=device)
    assert {k: tuple(v.shape) for k, v in gated.state_dict().items()} == {
        "gate.weight": (8, 32),
        "gate.e_score_correction_bias": (8,),
        "experts.gate_up_proj": (8, 48, 32),
        "experts.down_proj": (8, 32, 24),
        "experts.gate_up_proj_bias": (8, 48),
        "experts.down_proj_bias": (8, 32),
    }
    ungated = FusedMoE(32, 24, 8, 2, activation="gelu", device=device)
    assert set(ungated.state_dict()) == {"gate.weight", "experts.up_proj", "experts.down_proj"}
    ungated.load_state_dict(ungated.state_dict())


def test_correction_bias_is_a_float32_buffer(device):
    module = FusedMoE(8, 8, 4, 2, correction_bias=True, device=device, dtype=torch.bfloat16)
    bias = module.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and not bias.any()
    assert "gate.e_score_correction_bias" not in dict(module.named_parameters())


def test_correction_bias_stays_float32(device):
    module = FusedMoE(8, 8, 4, 2, correction_bias=True)
    values = module.gate.e_score_correction_bias.normal_().clone()
    for convert in (
        lambda m: m.bfloat16(),
        lambda m: m.to(device, torch.float16),
        lambda m: m.double(),
        lambda m: m.to(torch.zeros(1, dtype=torch.float32, device=device)),
    ):
        convert(module)
        bias = module.gate.e_score_correction_bias
        assert bias.dtype == torch.float32 and torch.equal(bias.cpu(), values)
        assert bias is module.state_dict(keep_vars=True)["gate.e_score_correction_bias"]
    assert bias.device.type == device == module.gate.weight.device.type
    assert module(torch.randn(3, 8, device=device)).shape == (3, 8)


def test_ranks_sum_to_the_layer(device):
    torch.manual_seed(0)
    whole = FusedMoE(32, 24, 8, 3, bias=True, device=device)
    x = torch.randn(20, 32).to(device)
    total = torch.zeros_like(x)
    for first in (0, 4):
        rank = FusedMoE(32, 24, 8, 3, bias=True, expert_offset=first, num_local_experts=4)
        rank.to(device).load_state_dict(
            {
                name: value[first : first + 4] if name.startswith("experts") else value
                for name, value in whole.state_dict().items()
            }
        )
        total += rank(x)
    assert_accurate(total, whole(x).double())


def test_reset_parameters_is_seeded_and_bounded(device):
    torch.manual_seed(1)
    module = FusedMoE(64, 16, 4, 2, bias=True, correction_bias=True, device=device)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    module.gate.e_score_correction_bias.fill_(3)
    torch.manual_seed(1)
    module.reset_parameters()
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert module.experts.gate_up_proj.abs().max() <= 64**-0.5
    assert 64**-0.5 < module.experts.down_proj.abs().max() <= 16**-0.5


def test_meta_device():
    module = FusedMoE(64, 16, 4, 2, device="meta")
    assert module(torch.empty(5, 64, device="meta")).shape == (5, 64)


def test_copies_and_pickles(device):
    module = FusedMoE(32, 24, 8, 2, device=device)
    x = torch.randn(4, 32).to(device)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))


def test_autocast(device):
    """Products in bfloat16, routing untouched."""
    torch.manual_seed(0)
    module = FusedMoE(32, 24, 8, 2, device=device)
    x = torch.randn(20, 32).to(device)
    plain_weights, plain_ids = module.route(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        weights, ids = module.route(x)
        out = module(x)
    assert torch.equal(ids, plain_ids) and torch.equal(weights, plain_weights)
    assert_accurate(out, expected_output(module, x), 2 * TOLERANCE[torch.bfloat16])


def test_repr():
    text = repr(FusedMoE(32, 24, 8, 2, num_groups=4, topk_groups=2, scaling=2.5))
    assert "topk=2" in text and "num_groups=4" in text and "scaling=2.5" in text
    assert "gate_up_proj=[8, 48, 32]" in text and "expert_offset" not in text
    assert "expert_offset=0" in repr(FusedMoE(32, 24, 8, 2, num_local_experts=4))


@pytest.mark.parametrize(
    "name, options",
    [
        ("activation", dict(activation="swish")),
        ("gate_layout", dict(gate_layout="gateup")),
        ("scoring", dict(scoring="tanh")),
        ("topk", dict(topk=0)),
        ("topk", dict(topk=9)),
        ("topk", dict(topk=3, num_groups=4, topk_groups=1)),
        ("num_groups", dict(num_groups=3)),
        ("num_groups", dict(num_groups=0)),
        ("topk_groups", dict(num_groups=4, topk_groups=5)),
        ("expert_offset", dict(expert_offset=8)),
        ("expert_offset", dict(expert_offset=-1)),
        ("num_local_experts", dict(num_local_experts=0)),
        ("num_local_experts", dict(expert_offset=5, num_local_experts=4)),
        ("hidden_size", dict(hidden_size=0)),
        ("intermediate_size", dict(intermediate_size=0)),
        ("num_experts", dict(num_experts=0)),
    ],
    ids=str,
)
def test_constructor_errors(name, options):
    sizes = dict(hidden_size=32, intermediate_size=24, num_experts=8, topk=2)
    with pytest.raises(ValueError, match=f"FusedMoE: {name} is .*expected"):
        FusedMoE(**(sizes | options))


def test_forward_errors(device):
    module = FusedMoE(32, 24, 8, 2, device=device)
    with pytest.raises(ValueError, match=r"x has shape \[3, 31\], expected \[\.\.\., 32\]"):
        module(torch.zeros(3, 31, device=device))
    with pytest.raises(RuntimeError, match="float|dtype|Half"):
        module(torch.zeros(3, 32, device=device, dtype=torch.float16))


def test_it_is_what_the_package_exports():
    assert moe_ops.FusedMoE is FusedMoE and moe_ops.reference is reference
