"""torch.compile, torch.export and AOTInductor: one graph for every number of tokens."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import assert_accurate, needs_compiler
from strategies import CombineCase, GemmCase, MoeCase, RouteCase

import moe_ops

pytestmark = pytest.mark.usefixtures("fresh_compiler")
# Not 2 first, which is the top-k: torch.compile takes sizes for one where they happen to be equal.
TOKENS = [17, 2, 3, 64, 129]


class CountGraphs:
    """A backend that runs the graph as it is and counts how often it was asked for one."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def check_one_graph(function, calls: list[dict]) -> None:
    counter = CountGraphs()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for arguments in calls:
        got, expected = compiled(**arguments), function(**arguments)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert counter.graphs == 1, f"{counter.graphs} graphs for {len(calls)} calls"


@pytest.mark.parametrize(
    "case",
    [
        MoeCase(),
        MoeCase(activation="swiglu_oai", gate_layout="interleaved", bias="as x"),
        MoeCase(activation="situ", parameters="tensor", dtype=torch.bfloat16),
        MoeCase(activation="relu2", routing="masked", output_dtype=torch.float16),
    ],
    ids=lambda case: case.activation,
)
def test_fused_moe(case, device):
    check_one_graph(moe_ops.fused_moe, [case.but(tokens=t).arguments(device) for t in TOKENS])


def test_topk_route(device):
    for case in (RouteCase(), RouteCase(num_groups=4, topk_groups=2, correction_bias="normal")):
        torch._dynamo.reset()
        calls = [
            RouteCase(**{**vars(case), "tokens": tokens}).arguments(device) for tokens in TOKENS
        ]
        check_one_graph(moe_ops.topk_route, calls)


def test_sort_by_expert(device):
    ids = [MoeCase(tokens=t, routing="masked").tensors(device)["topk_ids"] for t in TOKENS]
    calls = [dict(topk_ids=i, num_experts=8, expert_offset=2) for i in ids]
    check_one_graph(moe_ops.sort_by_expert, calls)


def test_grouped_gemm(device):
    cases = [GemmCase(rows=rows, bias="float32") for rows in TOKENS]
    check_one_graph(moe_ops.grouped_gemm, [c.arguments(device) for c in cases])


def test_grouped_gemm_wgrad(device):
    calls = [GemmCase(rows=rows).wgrad_arguments(device) for rows in TOKENS]
    check_one_graph(moe_ops.grouped_gemm_wgrad, calls)


def test_combine(device):
    calls = [CombineCase(MoeCase(tokens=t)).arguments(device) for t in TOKENS]
    check_one_graph(moe_ops.combine, calls)


def test_out(device):
    """Writing into a given tensor, seen through compilation as the mutation that it is."""
    calls = []
    for tokens in TOKENS:
        arguments = MoeCase(tokens=tokens).arguments(device)
        calls.append(arguments | {"out": torch.empty_like(arguments["x"])})

    def write(out, **arguments):
        moe_ops.fused_moe(**arguments, out=out)
        return out + 0

    check_one_graph(write, calls)


def test_out_tells_autograd_that_it_was_written(device):
    arguments = MoeCase().arguments(device)

    @torch.no_grad()
    def write(out, **arguments):
        moe_ops.fused_moe(**arguments, out=out)

    for backend in ("eager", "aot_eager"):
        leaf, out = (torch.rand_like(arguments["x"]) for _ in range(2))
        product = (leaf.requires_grad_() * out).sum()
        torch.compile(write, fullgraph=True, backend=backend)(out, **arguments)
        assert torch.equal(out, moe_ops.fused_moe(**arguments))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def make_module(device: str) -> moe_ops.FusedMoE:
    torch.manual_seed(0)
    return moe_ops.FusedMoE(32, 24, 6, 2, bias=True, device=device)


def inputs(tokens: int, device: str) -> torch.Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens)).to(device)


@needs_compiler
def test_module_with_inductor_forward_and_backward(device):
    module = make_module(device)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for tokens in TOKENS:
        x = inputs(tokens, device).requires_grad_()
        leaves = [x, *module.parameters()]
        expected = module(x)
        got = compiled(x)
        assert_accurate(got, expected.double())
        got_gradients = torch.autograd.grad(got.square().sum(), leaves)
        gradients = torch.autograd.grad(expected.square().sum(), leaves)
        for a, b in zip(got_gradients, gradients, strict=True):
            assert_accurate(a, b.double(), 2e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_zero_and_one_token_compile_too(device):
    """torch.compile makes graphs of their own for these two."""
    compiled = torch.compile(make_module(device), fullgraph=True, dynamic=True, backend="aot_eager")
    module = make_module(device)
    for tokens in (0, 1, 2, 5):
        x = inputs(tokens, device)
        assert_accurate(compiled(x), module(x).double())


def exported(module: moe_ops.FusedMoE, device: str) -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    return torch.export.export(module, (inputs(8, device),), dynamic_shapes=({0: tokens},))


def test_export(device):
    module = make_module(device).eval()
    program = exported(module, device)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "simple_moe.fused_moe.default" in names and "simple_moe.topk_route.default" in names
    for tokens in TOKENS:
        x = inputs(tokens, device)
        assert_accurate(program.module()(x), module(x).double())


PLAIN_MODEL = """
import sys, torch
device, path = sys.argv[1:]
model = torch.nn.Linear(8, 8, device=device)
program = torch.export.export(model, (torch.ones(2, 8, device=device),))
torch._inductor.aoti_load_package(
    torch._inductor.aoti_compile_and_package(program, package_path=path)
)
"""


@needs_compiler
def test_aot_inductor_compiles_loads_and_runs(device, tmp_path):
    # In a process of its own: there are installations where loading ends it.
    command = [sys.executable, "-c", PLAIN_MODEL, device, tmp_path / "plain.pt2"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"this torch can't load a plain nn.Linear through AOTInductor on {device}")
    module = make_module(device).eval()
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            exported(module, device), package_path=str(tmp_path / "moe.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        for tokens in TOKENS:
            x = inputs(tokens, device)
            assert_accurate(loaded(x), module(x).double())
