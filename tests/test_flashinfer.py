"""FlashInfer's cutlass_fused_moe: its meanings against a loop over the experts in float64, and its
place in the real package where that is installed."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from helpers import DTYPES, TOLERANCE, assert_accurate
from torch import nn
from torch.nn import functional as F

import moe_ops
from moe_ops import ActivationType, cutlass_fused_moe
from moe_ops import flashinfer as ours
from moe_ops.__main__ import device_info

GATED = {
    ActivationType.Swiglu: lambda gate, up: F.silu(gate) * up,
    ActivationType.Geglu: lambda gate, up: F.gelu(gate) * up,
    ActivationType.GegluTanh: lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    ActivationType.SwigluBias: lambda gate, up: F.silu(gate) * up,
    ActivationType.SwigluStep: lambda gate, up: F.silu(gate).clamp(max=7) * up.clamp(-7, 7),
    ActivationType.Situ: lambda gate, up: (
        4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 25 * torch.tanh(up / 25)
    ),
}
UNGATED = {
    ActivationType.Gelu: F.gelu,
    ActivationType.Relu: F.relu,
    ActivationType.Silu: F.silu,
    ActivationType.Relu2: lambda x: F.relu(x) ** 2,
    ActivationType.Identity: lambda x: x,
}


def make_layer(tokens=1, experts=2, topk=2, hidden=128, intermediate=128, gated=True,
               dtype=torch.float16, device="cpu", scale=0.2, seed=0):  # fmt: skip
    """FlashInfer's own tests draw everything as randn / 5."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    rows = 2 * intermediate if gated else intermediate
    logits = torch.randn(tokens, experts, generator=generator)
    weights, ids = logits.softmax(dim=-1).topk(topk, dim=-1)
    return {
        "input": randn(tokens, hidden),
        "token_selected_experts": ids.int().to(device),
        "token_final_scales": weights.to(device),
        "fc1_expert_weights": randn(experts, rows, hidden),
        "fc2_expert_weights": randn(experts, hidden, intermediate),
        "output_dtype": dtype,
        "quant_scales": None,
    }


def with_biases(layer: dict) -> dict:
    fc1, fc2 = layer["fc1_expert_weights"], layer["fc2_expert_weights"]
    return layer | {
        "fc1_expert_biases": torch.randn_like(fc1[:, :, 0]),
        "fc2_expert_biases": torch.randn_like(fc2[:, :, 0]),
    }


def expected_of(layer: dict, activation, first_expert: int = 0) -> torch.Tensor:
    """The formula in float64, one slot after another; `activation` takes an expert too."""
    x = layer["input"].double()
    out = torch.zeros(x.shape[0], layer["fc2_expert_weights"].shape[1], dtype=torch.float64)
    for t in range(x.shape[0]):
        for k in range(layer["token_selected_experts"].shape[1]):
            e = int(layer["token_selected_experts"][t, k]) - first_expert
            if not 0 <= e < layer["fc1_expert_weights"].shape[0]:
                continue
            h1 = layer["fc1_expert_weights"][e].double() @ x[t]
            if layer.get("fc1_expert_biases") is not None:
                h1 = h1 + layer["fc1_expert_biases"][e].double()
            h2 = layer["fc2_expert_weights"][e].double() @ activation(h1, e)
            if layer.get("fc2_expert_biases") is not None:
                h2 = h2 + layer["fc2_expert_biases"][e].double()
            out[t] += layer["token_final_scales"][t, k].item() * h2.cpu()
    return out.to(x.device)


def gated_by(function):
    def activation(h1, e):
        up, gate = h1.chunk(2)  # up first
        return function(gate, up)

    return activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*GATED, *UNGATED], ids=lambda kind: kind.name)
def test_activations(kind, dtype, device):
    for tokens in (1, 9):
        layer = make_layer(tokens, gated=kind in GATED, dtype=dtype, device=device)
        layer = with_biases(layer)
        if kind in GATED:
            activation = gated_by(GATED[kind])
        else:
            activation = lambda h1, e: UNGATED[kind](h1)
        out = cutlass_fused_moe(**layer, activation_type=kind)
        assert out.dtype == dtype
        assert_accurate(out, expected_of(layer, activation), TOLERANCE[dtype])


def test_its_scalars(device):
    """One per expert; with Swiglu any of them makes it SwigluBias, missing ones are 1, 0, inf."""
    layer = make_layer(9, 4, 2, 32, 16, dtype=torch.float32, device=device, scale=1.0)

    def per_expert(*values: float) -> torch.Tensor:
        return torch.tensor(values, device=device)

    alpha, beta = per_expert(1.0, 1.7, 0.3, -1.0), per_expert(0.0, 1.0, 0.5, -2.0)
    limit = per_expert(0.5, 1.0, 2.0, 0.1)
    for given in (
        {"swiglu_alpha": alpha, "swiglu_beta": beta, "swiglu_limit": limit},
        {"swiglu_alpha": alpha},
        {"swiglu_beta": beta},
        {"swiglu_limit": limit},
    ):

        def swiglu_bias(h1, e, given=given):
            up, gate = h1.chunk(2)
            a = given["swiglu_alpha"][e].item() if "swiglu_alpha" in given else 1.0
            b = given["swiglu_beta"][e].item() if "swiglu_beta" in given else 0.0
            most = given["swiglu_limit"][e].item() if "swiglu_limit" in given else math.inf
            gate = gate.clamp(max=most)
            return gate * torch.sigmoid(a * gate) * (up.clamp(-most, most) + b)

        expected = expected_of(layer, swiglu_bias)
        for kind in (ActivationType.Swiglu, ActivationType.SwigluBias):
            assert_accurate(cutlass_fused_moe(**layer, **given, activation_type=kind), expected)

    def step(h1, e):
        up, gate = h1.chunk(2)
        most = limit[e].item()
        return F.silu(gate).clamp(max=most) * up.clamp(-most, most)

    out = cutlass_fused_moe(**layer, swiglu_limit=limit, activation_type=ActivationType.SwigluStep)
    assert_accurate(out, expected_of(layer, step))

    def situ(h1, e):
        up, gate = h1.chunk(2)
        b, c = limit[e].item(), 2 * limit[e].item()
        return b * torch.tanh(gate / b) * torch.sigmoid(gate) * c * torch.tanh(up / c)

    out = cutlass_fused_moe(
        **layer, situ_beta=limit, situ_linear_beta=2 * limit, activation_type=ActivationType.Situ
    )
    assert_accurate(out, expected_of(layer, situ))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_expert_parallel(dtype, device):
    """Ranks of two experts each: global ids in, and the ranks' outputs make up the layer."""
    layer = make_layer(11, 8, 2, dtype=dtype, device=device)
    total = 0.0
    for rank in range(4):
        held = slice(2 * rank, 2 * rank + 2)
        part = layer | {
            "fc1_expert_weights": layer["fc1_expert_weights"][held],
            "fc2_expert_weights": layer["fc2_expert_weights"][held],
            "output_dtype": torch.float32,
        }
        out = cutlass_fused_moe(**part, ep_size=4, ep_rank=rank)
        assert_accurate(out, expected_of(part, gated_by(GATED[3]), 2 * rank), TOLERANCE[dtype])
        total = total + out
    assert_accurate(total, expected_of(layer, gated_by(GATED[3])), TOLERANCE[dtype])


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel(ranks, device):
    """Shards of I, and fc2's bias once."""
    layer = with_biases(make_layer(5, 4, 2, dtype=torch.bfloat16, device=device))
    up, gate = layer["fc1_expert_weights"].chunk(2, dim=1)
    up_bias, gate_bias = layer["fc1_expert_biases"].chunk(2, dim=1)
    total = 0.0
    for rank in range(ranks):

        def shard(tensor, dim=1, rank=rank):
            return tensor.chunk(ranks, dim=dim)[rank]

        part = layer | {
            "fc1_expert_weights": torch.cat([shard(up), shard(gate)], dim=1),
            "fc1_expert_biases": torch.cat([shard(up_bias), shard(gate_bias)], dim=1),
            "fc2_expert_weights": shard(layer["fc2_expert_weights"], 2),
            "output_dtype": torch.float32,
        }
        total = total + cutlass_fused_moe(**part, tp_size=ranks, tp_rank=rank)
    assert_accurate(total, expected_of(layer, gated_by(GATED[3])), TOLERANCE[torch.bfloat16])


def test_what_may_be_given_and_changes_nothing(device):
    layer = make_layer(7, device=device)
    expected = cutlass_fused_moe(*layer.values())
    hints = {
        "quant_scales": [],
        "tune_max_num_tokens": 16,
        "enable_pdl": True,
        "swizzled_input_sf": False,
        "use_fused_finalize": False,
        "profile_ids": [-1, -1],
        "workspace_buffer": torch.empty(128, dtype=torch.uint8, device=device),
        "activation_type": 3,
    }
    for name, value in hints.items():
        assert torch.equal(cutlass_fused_moe(**(layer | {name: value})), expected), name
    output = torch.full_like(expected, math.nan)
    assert cutlass_fused_moe(**layer, output=output) is output
    assert torch.equal(output, expected)
    ones = layer | {"token_final_scales": torch.ones_like(layer["token_final_scales"])}
    none = layer | {"token_final_scales": None}
    assert torch.equal(cutlass_fused_moe(**none), cutlass_fused_moe(**ones))
    for backend in device_info(device)["backends"]:
        assert_accurate(cutlass_fused_moe(**layer, backend=backend), expected.double())


NOT_HERE = {
    "enable_alltoall": (True, "ep_rank"),
    "use_deepseek_fp8_block_scale": (True, "W8A16"),
    "use_w4_group_scaling": (True, "W8A16"),
    "use_mxfp8_act_scaling": (True, "W8A16"),
    "use_packed_weights": (True, "W8A16"),
    "use_wfp4afp8_humming": (True, "W8A16"),
    "input_sf": (torch.ones(1), "W8A16"),
    "quant_scales": ([torch.ones(1)], "W8A16"),
    "min_latency_mode": (True, "leave it out"),
    "cluster_size": (2, "ep_size"),
    "backend": ("cake", "sm80"),
    "activation_type": (ActivationType.ClampedRelu2, "Relu2"),
    "fc1_expert_weights": (torch.zeros(2, 256, 64, dtype=torch.uint8), "W8A16"),
}


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_is_not_here_is_named(name):
    value, instead = NOT_HERE[name]
    with pytest.raises(NotImplementedError) as raised:
        cutlass_fused_moe(**(make_layer() | {name: value}))
    what = "ClampedRelu2" if name == "activation_type" else name
    assert what in str(raised.value) and instead in str(raised.value)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"activation_type": 11}, "Swiglu (3)"),
        ({"activation_type": 99}, "Swiglu (3)"),
        ({"activation_type": None}, "Swiglu (3)"),
        ({"activation_type": ActivationType.Geglu, "swiglu_limit": torch.ones(2)}, "swiglu_limit"),
        ({"activation_type": ActivationType.SwigluStep, "swiglu_beta": torch.ones(2)}, "beta"),
        ({"situ_beta": torch.ones(2)}, "situ_beta"),
        ({"clamped_relu2_limit": torch.ones(1)}, "clamped_relu2_limit"),
        ({"tp_rank": 2, "tp_size": 2}, "tp_rank is 2"),
        ({"ep_rank": -1}, "ep_rank is -1"),
        ({"output": torch.zeros(1, 128), "output_dtype": torch.float16}, "output_dtype"),
    ],
)
def test_contradictions(given, said):
    with pytest.raises(ValueError) as raised:
        cutlass_fused_moe(**(make_layer() | given))
    assert said in str(raised.value)


def test_compiles(fresh_compiler, device):
    layer = make_layer(6, dtype=torch.float32, device=device)
    compiled = torch.compile(cutlass_fused_moe, fullgraph=True)
    assert_accurate(compiled(**layer), cutlass_fused_moe(**layer).double())


# ---- In FlashInfer's place ----


@pytest.fixture
def stand_in(monkeypatch):
    """A FlashInfer of a version and with a function as a test wants them."""

    def make(version: str, function) -> ModuleType:
        package, inner = ModuleType("flashinfer"), ModuleType("flashinfer.fused_moe")
        package.__version__, package.fused_moe = version, inner
        package.cutlass_fused_moe = inner.cutlass_fused_moe = function
        monkeypatch.setitem(sys.modules, "flashinfer", package)
        monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", inner)
        return package

    yield make
    ours.uninstall()


def upstream(input, token_selected_experts, token_final_scales, fc1_expert_weights,
             fc2_expert_weights, output_dtype, quant_scales, output=None, *,
             backend="cutlass"):  # fmt: skip
    return "FlashInfer's own"


def test_install_goes_where_flashinfer_does_not(stand_in, monkeypatch, device):
    package = stand_in("0.7.2.post1", upstream)
    layer = make_layer(device=device)
    expected = cutlass_fused_moe(**layer)
    ours.install()
    for place in (package, package.fused_moe):
        assert place.cutlass_fused_moe is not upstream
        assert place.cutlass_fused_moe(**layer) == "FlashInfer's own"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(ours, "_refuses", lambda device: True)
    out, *rest = package.cutlass_fused_moe(*layer.values())
    assert [tuple(t.shape) for t in rest] == [(1,), (2, 1), (2,)]  # as FlashInfer returns them
    assert torch.equal(out, expected)
    ours.uninstall()
    assert package.cutlass_fused_moe is upstream and package.fused_moe.cutlass_fused_moe is upstream
    ours.uninstall()  # harmless


def test_install_always_and_as_a_context_manager(stand_in):
    package, layer = stand_in("0.7.0", upstream), make_layer()
    with ours.install(always=True):
        assert torch.equal(package.cutlass_fused_moe(**layer)[0], cutlass_fused_moe(**layer))
        trained = layer | {"fc1_expert_weights": nn.Parameter(layer["fc1_expert_weights"])}
        output = torch.empty(1, 128, dtype=torch.float16)
        assert package.cutlass_fused_moe(**trained, output=output)[0] is output
        ours.install()  # again, with another answer
        assert package.cutlass_fused_moe(**layer) == "FlashInfer's own"
    assert package.cutlass_fused_moe is upstream


@pytest.mark.parametrize("version", ["0.6.6", "0.8.0", "0.70.1", "1.0.0rc1"])
def test_an_unknown_flashinfer_is_told_so(stand_in, version):
    package = stand_in(version, upstream)
    with pytest.raises(RuntimeError, match=f"FlashInfer {version}.*0.7.x"):
        ours.install()
    assert package.cutlass_fused_moe is upstream


def test_an_unknown_argument_is_told_so(stand_in):
    def newer(input, quant_scales, sparsity=None):
        return None

    stand_in("0.7.9", newer)
    with pytest.raises(RuntimeError, match="sparsity"):
        ours.install()


def test_the_real_flashinfer():
    flashinfer = pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    theirs, layer = flashinfer.cutlass_fused_moe, make_layer()
    expected = cutlass_fused_moe(**layer)
    with moe_ops.flashinfer.install(always=True):
        kind = flashinfer.ActivationType if hasattr(flashinfer, "ActivationType") else None
        for call in (flashinfer.cutlass_fused_moe, flashinfer.fused_moe.cutlass_fused_moe):
            out = call(**layer)  # FlashInfer's callers write [0]
            assert isinstance(out, list) and torch.equal(out[0], expected)
            if kind is not None:
                geglu = call(**layer, activation_type=kind.Geglu)[0]
                assert torch.equal(
                    geglu, cutlass_fused_moe(**layer, activation_type=ActivationType.Geglu)
                )
    assert flashinfer.cutlass_fused_moe is theirs
    assert flashinfer.fused_moe.cutlass_fused_moe is theirs


def test_the_numbers_are_flashinfers():
    enums = pytest.importorskip(
        "flashinfer.tllm_enums", reason="flashinfer-python is not installed"
    )
    theirs = {kind.name: kind.value for kind in enums.ActivationType}
    assert {kind.name: kind.value for kind in ActivationType} == theirs
