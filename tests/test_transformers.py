"""experts_implementation="simple_moe": tiny random models of real config classes against their own
eager experts."""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import moe_ops

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.integrations.moe import use_experts_implementation

SMALL = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
    eos_token_id=None, attention_dropout=0.0,
)  # fmt: skip
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(
        **SMALL, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, head_dim=8, intermediate_size=48, moe_intermediate_size=24, num_experts=8,
        num_experts_per_tok=3, decoder_sparse_step=1, norm_topk_prob=True,
    ),
    "olmoe": lambda: transformers.OlmoeConfig(
        **SMALL, intermediate_size=24, num_experts=8, num_experts_per_tok=4
    ),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **(SMALL | {"num_key_value_heads": 4}), intermediate_size=48, moe_intermediate_size=24, n_routed_experts=8,
        num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SMALL, head_dim=8, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=16,
    ),
}  # fmt: skip
MODELS = list(CONFIGS)


@pytest.fixture(autouse=True)
def registered():
    moe_ops.transformers.register()


@pytest.fixture
def never_handed_over(monkeypatch):
    """Also under torch.compile, where grouped_mm would give the same answer, unseen."""

    def fail(self, *args):
        raise AssertionError(f"{type(self).__name__} was handed over")

    monkeypatch.setattr(moe_ops.transformers, "grouped_mm_experts_forward", fail)


def make_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at first, biases too: gates must clamp
            parameter.normal_(0, 1.0 if parameter.ndim == 1 else 0.3)
    return model.eval().to(device, dtype)


def tokens_of(batch: int, length: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * length)
    return torch.randint(2, 64, (batch, length), generator=generator).to(device)


def outputs_and_gradients(model, implementation: str, tokens: torch.Tensor):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    logits = model(tokens).logits
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_near(got: torch.Tensor, expected: torch.Tensor, what: str, tolerance=1e-5) -> None:
    scale = expected.abs().max().item() or 1.0
    error = (got - expected).abs().max().item() / scale
    assert error < tolerance, f"{what}: {error:.1e} of its largest element"


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_eagers(name, device, never_handed_over):
    model, tokens = make_model(name, device), tokens_of(3, 11, device)
    expected, expected_gradients = outputs_and_gradients(model, "eager", tokens)
    got, gradients = outputs_and_gradients(model, "simple_moe", tokens)
    answers = moe_ops.transformers.explain(model)
    assert answers and all(answer.startswith("simple_moe: ") for answer in answers.values())
    assert_near(got, expected, "logits")
    assert gradients.keys() == expected_gradients.keys()
    assert any("experts" in n for n in gradients)
    assert any("gate" in n or "router" in n for n in gradients)
    for parameter, gradient in gradients.items():
        assert_near(gradient, expected_gradients[parameter], parameter, 2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_compiles_whole(name, device, fresh_compiler, never_handed_over):
    model, tokens = make_model(name, device), tokens_of(2, 9, device)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(tokens).logits
        model.set_experts_implementation("simple_moe")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_near(compiled(tokens).logits, expected, "logits")


@pytest.mark.parametrize("name", MODELS)
def test_generates_the_same_tokens(name, device, fresh_compiler, never_handed_over):
    """With a static cache; on CUDA compiled as a whole and replayed as CUDA graphs."""
    model, tokens = make_model(name, device), tokens_of(2, 5, device)

    def generate(implementation: str, **options) -> torch.Tensor:
        model.set_experts_implementation(implementation)
        return model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False,
            cache_implementation="static", **options,
        )  # fmt: skip

    expected = generate("eager", disable_compile=True)
    if device == "cpu":
        assert torch.equal(generate("simple_moe", disable_compile=True), expected)
        return
    whole = transformers.CompileConfig(fullgraph=True, mode="reduce-overhead")
    assert torch.equal(generate("simple_moe", compile_config=whole), expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        assert torch.equal(generate("simple_moe", compile_config=whole), expected)
    replays = [event for event in profile.events() if "GraphLaunch" in event.name]
    assert len(replays) >= 7, "a step of the decoding was no CUDA graph"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, device):
    """Of experts alone: a whole model's rounding is mostly elsewhere."""
    model = make_model("gpt-oss", device)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(7, 32, device=device)
    ids = torch.randint(0, 4, (7, 2), device=device)
    weights = torch.rand(7, 2, device=device)
    model.set_experts_implementation("eager")
    expected = experts(x.to(dtype).float(), ids, weights.to(dtype).float())
    experts.to(dtype)
    for name, parameter in experts.named_parameters():
        assert parameter.dtype == dtype, name
    model.set_experts_implementation("simple_moe")
    out = experts(x.to(dtype), ids, weights.to(dtype))
    assert out.dtype == dtype
    assert_near(out.float(), expected, "output", 2e-2)


def test_weights_are_read_as_they_lie(device):
    """GPT-OSS's are transposed: no copy of them, in a call without gradients."""
    experts = make_model("gpt-oss", device).model.layers[0].mlp.experts
    calls = []
    real = moe_ops.transformers.fused_moe

    def spy(x, w1, w2, *args, **kwargs):
        calls.append((w1.data_ptr(), w2.data_ptr()))
        return real(x, w1, w2, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_ops.transformers, "fused_moe", spy)
        x, ids = torch.randn(5, 32, device=device), torch.zeros(5, 2, dtype=int, device=device)
        moe_ops.transformers.experts_forward(experts, x, ids, torch.ones(5, 2, device=device))
    assert calls == [(experts.gate_up_proj.data_ptr(), experts.down_proj.data_ptr())]


def test_sentinels_of_expert_parallelism(device):
    """Slots of other ranks come with id num_experts and weight 0, and weigh nothing."""
    experts = make_model("mixtral", device).model.layers[0].mlp.experts
    x = torch.randn(6, 32, device=device)
    ids = torch.tensor([[0, 4], [4, 4], [1, 2], [4, 3], [2, 4], [0, 1]], device=device)
    weights = torch.rand(6, 2, device=device) * (ids < 4)
    out = moe_ops.transformers.experts_forward(experts, x, ids, weights)
    expected = moe_ops.transformers.experts_forward(experts, x, ids.clamp(max=3), weights)
    assert_near(out, expected, "output")
    assert torch.equal(out[1], torch.zeros_like(out[1]))


KNOWN_GATES = {
    "deepseek_v4": "DeepseekV4Experts",
    "glm5_next": "Glm5NextTextExperts",
    "gpt_oss": "GptOssExperts",
    "hy_v4": "HYV4Experts",
    "hy_v4_vl": "HYV4VLExperts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "nemotron_h": "NemotronHExperts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
}


@pytest.mark.parametrize("module", KNOWN_GATES)
def test_gates_of_their_own(module, device, fresh_compiler, never_handed_over):
    """The real classes, with what any of their configs may say, as they are and compiled."""
    config = SimpleNamespace(
        hidden_size=12, intermediate_size=8, moe_intermediate_size=8, num_local_experts=4,
        num_experts=4, n_routed_experts=4, moe_latent_size=None, hidden_act="silu",
        mlp_hidden_act="relu2", swiglu_alpha=1.702, swiglu_limit=0.75,
        _experts_implementation="simple_moe",
    )  # fmt: skip
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    torch.manual_seed(0)
    experts = getattr(modeling, KNOWN_GATES[module])(config).to(device)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    assert moe_ops.transformers.explain(experts)[""].startswith("simple_moe: ")
    assert_near(*run_toy(experts, device), module)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x, ids, weights = torch.randn(5, 12), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    arguments = x.to(device), ids.to(device), weights.to(device)
    assert torch.equal(compiled(*arguments), experts(*arguments))


def test_every_known_gate_is_tested():
    tested = {*KNOWN_GATES.values()} - {"NemotronHExperts"}  # it has none
    assert tested == set(moe_ops.transformers._GATES)


class Experts(nn.Module):
    """Toy experts; the decorator gives them transformers' interface."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = 4
        rows = 16 if config.gated else 8
        name = "gate_up_proj" if config.gated else "up_proj"
        setattr(self, name, nn.Parameter(torch.randn(4, rows, 12)))
        self.down_proj = nn.Parameter(torch.randn(4, 12, 8))
        self.act_fn = transformers.activations.ACT2FN[config.act]

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            for k in range(ids.shape[1]):
                first = self.gate_up_proj if hasattr(self, "gate_up_proj") else self.up_proj
                h = first[ids[t, k]] @ x[t]
                h = self._apply_gate(h) if hasattr(self, "gate_up_proj") else self.act_fn(h)
                out[t] += weights[t, k] * (self.down_proj[ids[t, k]] @ h)
        return out


class Config:
    _experts_implementation = "simple_moe"

    def __init__(self, act: str, gated: bool):
        self.act, self.gated = act, gated


def toy(act: str, gated: bool = True, **methods) -> nn.Module:
    kind = type("Experts", (Experts,), {"__module__": __name__, **methods})
    return use_experts_implementation(kind, has_gate=gated)(Config(act, gated))


def run_toy(experts: nn.Module, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """simple_moe's output and eager's."""
    x, ids = torch.randn(5, 12).to(device), torch.randint(0, 4, (5, 2)).to(device)
    weights = torch.rand(5, 2).to(device)
    out = experts(x, ids, weights)
    experts.config._experts_implementation = "eager"
    expected = experts(x, ids, weights)
    experts.config._experts_implementation = "simple_moe"
    return out, expected


OURS = ["silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"]


@pytest.mark.parametrize("act", OURS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_activations(act, gated):
    torch.manual_seed(0)
    experts = toy(act, gated)
    assert moe_ops.transformers.explain(experts)[""].startswith("simple_moe: ")
    assert_near(*run_toy(experts), act)


@pytest.mark.parametrize("act", ["relu2", "linear"])
def test_activations_without_a_gate(act):
    experts = toy(act, gated=False)
    assert moe_ops.transformers.explain(experts)[""].startswith("simple_moe: ")
    assert_near(*run_toy(experts), act)


def softcapped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.tanh(gate) * up


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: toy("silu", _apply_gate=softcapped), "its gate is its own"),
        (lambda: toy("mish"), "MishActivation"),
        (lambda: toy("mish", gated=False), "MishActivation"),
        (lambda: toy("relu2"), "ReLUSquaredActivation"),
    ],
)
def test_hands_over_what_is_not_ours_and_says_so_once(make, reason, caplog):
    torch.manual_seed(0)
    moe_ops.transformers._logged.cache_clear()
    experts = make()
    with caplog.at_level(logging.WARNING):
        assert_near(*run_toy(experts), reason)
        run_toy(experts)
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert moe_ops.transformers.explain(experts)[""].startswith("grouped_mm: ")


def test_a_class_of_that_name_elsewhere_is_not_taken_for_gpt_oss():
    kind = type("GptOssExperts", (Experts,), {"__module__": __name__, "_apply_gate": softcapped})
    experts = use_experts_implementation(kind)(Config("silu", True))
    assert "its gate is its own" in moe_ops.transformers.explain(experts)[""]


def test_says_where_a_model_never_asks(caplog):
    config = transformers.Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size=24, intermediate_size_mlp=24, num_local_experts=2
    )
    model = transformers.Llama4ForCausalLM(config)
    with caplog.at_level(logging.WARNING):
        assert moe_ops.transformers.explain(model) == {}
    assert "Llama4ForCausalLM" in caplog.text and "changes nothing" in caplog.text


def test_explain_without_it():
    model = make_model("mixtral")
    model.set_experts_implementation("eager")
    assert set(moe_ops.transformers.explain(model).values()) == {
        "eager: the model's experts_implementation"
    }


def test_two_ranks(tmp_path):
    """Shards of I, and shards of E whose ids elsewhere are sentinels: the logits are one rank's."""
    for name in MODELS:
        model, tokens = make_model(name), tokens_of(2, 9, "cpu")
        model.set_experts_implementation("eager")
        with torch.no_grad():
            logits = model(tokens).logits
        model.save_pretrained(tmp_path / name)
        torch.save(tokens, tmp_path / name / "tokens.pt")
        torch.save(logits, tmp_path / name / "logits.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(__file__).with_name("two_ranks.py")), str(tmp_path)]
    ran = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("parallel: ") == 2 * len(MODELS) - 1, ran.stdout


class AnyConfig:
    """What any experts class asks of its config."""

    _experts_implementation = "simple_moe"
    hidden_act = hidden_activation = "silu"
    mlp_hidden_act, moe_latent_size, swiglu_alpha, swiglu_limit = "relu2", None, 1.702, 0.7
    hidden_size = moe_hidden_size = 12
    num_local_experts = num_experts = n_routed_experts = 4

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return 8


def all_experts() -> list[tuple[str, str]]:
    """(module, class) of every experts class in transformers that has the interface."""
    decorated = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)
    models = Path(transformers.__file__).parent / "models"
    return [
        (f"transformers.models.{file.parent.name}.{file.stem}", name)
        for file in sorted(models.glob("*/modeling_*.py"))
        for name in decorated.findall(file.read_text())
    ]


def test_every_experts_class_of_transformers():
    """Alone, on random weights: run by us or handed over, the output is eager's."""
    found, handed_over = all_experts(), []
    assert len(found) > 30
    for module, name in found:
        torch.manual_seed(0)
        experts = getattr(importlib.import_module(module), name)(AnyConfig())
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.normal_()
        if not moe_ops.transformers.explain(experts)[""].startswith("simple_moe: "):
            handed_over.append(name)
        assert_near(*run_toy(experts), name)
    assert len(handed_over) < 0.1 * len(found), handed_over


def test_a_wrapped_class_keeps_its_gate_and_a_replaced_gate_is_not_ours():
    """FSDP2 and parametrize give a module another class."""
    experts = make_model("gpt-oss").model.layers[0].mlp.experts
    experts.config._experts_implementation = "simple_moe"
    kind = type(experts)
    experts.__class__ = type("FSDPGptOssExperts", (kind,), {"__module__": "torch"})
    assert moe_ops.transformers.explain(experts)[""] == "simple_moe: swiglu_oai"
    experts.__class__ = type("Patched", (kind,), {"_apply_gate": softcapped})
    assert "its gate is its own" in moe_ops.transformers.explain(experts)[""]


def test_fp8_experts_are_handed_over():
    from transformers.integrations import finegrained_fp8

    forward = finegrained_fp8.FP8ExpertsInterface()["simple_moe"]
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            moe_ops.transformers, "fp8_grouped_mm_experts_forward", lambda self, *a: asked.append(a)
        )
        forward(nn.Identity(), 1, 2, 3)
    assert asked == [(1, 2, 3)]


def test_on_the_meta_device_and_with_wide_weights():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS["mixtral"]())
    model.set_experts_implementation("simple_moe")
    assert model(torch.zeros(1, 5, dtype=int, device="meta")).logits.shape == (1, 5, 64)
    experts = make_model("mixtral").model.layers[0].mlp.experts
    x, ids, weights = torch.randn(5, 32), torch.zeros(5, 2, dtype=int), torch.rand(5, 2)
    out = moe_ops.transformers.experts_forward(experts, x, ids, weights.double())
    assert torch.equal(out, moe_ops.transformers.experts_forward(experts, x, ids, weights))
