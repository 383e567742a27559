"""What only a GPU can show: graphs, streams, no waiting, sizes past 2**31, other GPUs' limits."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import (
    DTYPES,
    TOLERANCE,
    assert_accurate,
    assert_same_bits,
    require_gradients,
    tolerance_of,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from strategies import CombineCase, GemmCase, MoeCase, RouteCase, lay_out

import moe_ops
from moe_ops import _library, reference
from moe_ops.__main__ import has

LAYER = MoeCase(tokens=65, topk=3, experts=8, hidden=264, intermediate=130, bias="float32")

BFLOAT16 = LAYER.but(dtype=torch.bfloat16)
# operator: (its arguments, those that get a gradient)
OPERATORS = {
    "fused_moe": (BFLOAT16.arguments, ["x", "w1", "w2", "b1", "b2", "topk_weights"]),
    "topk_route": (
        RouteCase(correction_bias="normal", num_groups=4, topk_groups=2).arguments,
        ["router_logits"],
    ),
    "sort_by_expert": (
        lambda device: {"topk_ids": LAYER.tensors(device)["topk_ids"], "num_experts": 8},
        [],
    ),
    "grouped_gemm": (
        GemmCase(rows=90, bias="float32", dtype=torch.bfloat16).arguments,
        ["a", "b", "bias"],
    ),
    "grouped_gemm_wgrad": (GemmCase(rows=90, dtype=torch.bfloat16).wgrad_arguments, ["a", "b"]),
    "combine": (CombineCase(BFLOAT16).arguments, ["expert_out", "topk_weights"]),
}
operators = pytest.mark.parametrize("operator", OPERATORS)


def forward_and_backward(operator: str, arguments: dict, leaves: list) -> list[torch.Tensor]:
    """The outputs, and the gradients of their sum."""
    out = getattr(moe_ops, operator)(**arguments)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    if not leaves:
        return outputs
    differentiable = [o for o in outputs if o.requires_grad]
    ones = [torch.ones_like(o) for o in differentiable]
    gradients = torch.autograd.grad(differentiable, leaves, ones)
    return [o.detach() for o in outputs] + list(gradients)


def whole_layer(x, logits, w1, w2):
    weights, ids = moe_ops.topk_route(logits, 2)
    return moe_ops.fused_moe(x, w1, w2, weights, ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 300, 9000])
def test_a_graph_follows_new_routing_and_weights(tokens, dtype, cuda):
    def fill():
        return [
            torch.randn(tokens, 64, device=cuda).to(dtype),
            torch.randn(tokens, 8, device=cuda),
            torch.randn(8, 96, 64, device=cuda).div(8).to(dtype),
            torch.randn(8, 64, 48, device=cuda).div(8).to(dtype),
        ]

    static = fill()
    whole_layer(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = whole_layer(*static)
    for _ in range(3):
        for tensor, new in zip(static, fill(), strict=True):
            tensor.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        assert_same_bits(out, whole_layer(*static))


@operators
def test_forward_and_backward_in_a_graph(operator, cuda):
    make, names = OPERATORS[operator]
    arguments = make(cuda)
    leaves = require_gradients(arguments, names)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = forward_and_backward(operator, arguments, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward_and_backward(operator, arguments, leaves)
    for tensor in got:
        tensor.fill_(-7)
    graph.replay()
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@operators
def test_never_waits_for_the_device(operator, cuda):
    make, names = OPERATORS[operator]
    arguments = make(cuda)
    leaves = require_gradients(arguments, names)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(operator, arguments, leaves)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_while_the_device_is_busy(dtype, cuda):
    arguments = LAYER.but(tokens=700, dtype=dtype).arguments(cuda)
    expected = moe_ops.fused_moe(**arguments)
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=cuda)
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(other):
            noise @ noise
        assert_same_bits(moe_ops.fused_moe(**arguments), expected)


def test_runs_on_the_current_stream(cuda):
    arguments = LAYER.arguments(cuda)
    expected = moe_ops.fused_moe(**arguments)
    x = arguments["x"].clone()
    arguments["x"] = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        arguments["x"].copy_(x)  # Seen only by what waits in the same stream.
        out = moe_ops.fused_moe(**arguments)
    stream.synchronize()
    assert_same_bits(out, expected)


@operators
def test_on_a_device_that_is_not_the_current(operator, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    make, names = OPERATORS[operator]
    results = []
    for device in ("cuda:1", "cuda:0"):
        arguments = make(device)
        results.append(
            forward_and_backward(operator, arguments, require_gradients(arguments, names))
        )
        assert torch.cuda.current_device() == 0
        assert all(result.device == torch.device(device) for result in results[-1])
    for there, here in zip(*results, strict=True):
        assert_same_bits(there.cpu(), here.cpu())


def test_cublas_agrees_and_cannot_be_captured(cuda):
    for dtype in DTYPES:
        for case in (LAYER.but(dtype=dtype), LAYER.but(dtype=dtype, routing="masked", tokens=9)):
            arguments = case.arguments(cuda)
            expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
            out = moe_ops.fused_moe(**arguments, backend="cublas")
            assert_accurate(out, expected, TOLERANCE[dtype])
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="cublas"), torch.cuda.graph(graph):
        moe_ops.fused_moe(**arguments, backend="cublas")
    torch.cuda.synchronize()
    moe_ops.fused_moe(**arguments)


def test_batch_invariant(cuda):
    """One order of addition in every kernel: the bits don't depend on T."""
    case = MoeCase(tokens=3000, experts=8, hidden=264, intermediate=72, dtype=torch.bfloat16)
    arguments = case.arguments(cuda)
    whole = moe_ops.fused_moe(**arguments, batch_invariant=True)
    for count in (1, 5, 40, 200, 1500):
        part = {k: v[:count] if k in ("x", "topk_weights", "topk_ids") else v
                for k, v in arguments.items()}  # fmt: skip
        assert_same_bits(moe_ops.fused_moe(**part, batch_invariant=True), whole[:count])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.builds(
        MoeCase,
        tokens=st.just(70),
        topk=st.sampled_from([1, 2, 3, 8, 10, 16, 17]),
        experts=st.sampled_from([20, 80, 200]),
        hidden=st.sampled_from([72, 264, 1000, 2048]),
        intermediate=st.sampled_from([72, 136, 768, 1040]),
        dtype=st.sampled_from([torch.float16, torch.bfloat16]),
        routing=st.sampled_from(["uniform", "skewed", "masked", "duplicated"]),
        activation=st.sampled_from(list(reference.ACTIVATIONS)),
        gate_layout=st.sampled_from(reference.GATE_LAYOUTS),
        bias=st.sampled_from([None, "float32", "as x"]),
        parameters=st.sampled_from([None, "number", "tensor"]),
        ids_dtype=st.sampled_from([torch.int32, torch.int64]),
        weights_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        output_dtype=st.sampled_from([None, torch.float32]),
        expert_offset=st.sampled_from([0, 3]),
        seed=st.integers(0, 1 << 30),
    )
)
@example(MoeCase(tokens=70, topk=10, experts=200, hidden=2048, intermediate=512,
                 dtype=torch.bfloat16))  # fmt: skip
def test_batch_invariant_by_slots(cuda, case):
    """Few tokens' slots by themselves, many by the tiles: the same bits."""
    arguments = case.arguments(cuda)
    whole = moe_ops.fused_moe(**arguments, batch_invariant=True)
    for tokens in (1, 2, 5):
        part = {k: arguments[k][-tokens:] for k in ("x", "topk_weights", "topk_ids")}
        out = moe_ops.fused_moe(**arguments | part, batch_invariant=True)
        assert_same_bits(out, whole[-tokens:])


def layers_of_two_sizes(cuda) -> list[dict]:
    """Arguments for the same kernels with different sizes of shared memory."""
    small = MoeCase(tokens=1, dtype=torch.bfloat16)
    return [c.arguments(cuda) for c in (small, small.but(hidden=512, intermediate=1024))]


def test_two_sizes_in_two_threads(cuda):
    def run(arguments):
        expected = moe_ops.fused_moe(**arguments, batch_invariant=True)
        for _ in range(300):
            assert_same_bits(moe_ops.fused_moe(**arguments, batch_invariant=True), expected)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, layers_of_two_sizes(cuda)))


def test_two_sizes_in_a_graph(cuda):
    layers = layers_of_two_sizes(cuda)
    expected = [moe_ops.fused_moe(**layer, batch_invariant=True) for layer in layers]
    for order in ([0, 1], [1, 0]):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = [moe_ops.fused_moe(**layers[i], batch_invariant=True) for i in order]
        for out in got:
            out.fill_(torch.nan)
        graph.replay()
        for i, out in zip(order, got, strict=True):
            assert_same_bits(out, expected[i])


@pytest.fixture(scope="module")
def sm90():
    if not torch.cuda.is_available() or not has("cuda", "sm90"):
        pytest.skip("needs a GPU of compute capability 9.0 and a build with code for it")


# 150 rows an expert: row tiles of 192, by 128 columns; or of 192, for the wider first product.
HIGHEST_TILES = MoeCase(
    tokens=600, hidden=1544, intermediate=1536, dtype=torch.bfloat16, routing="skewed",
    gate_layout="interleaved", bias="float32",
)  # fmt: skip


@settings(max_examples=20)
@given(
    case=st.builds(
        MoeCase,
        tokens=st.integers(500, 2500),
        topk=st.integers(1, 2),
        experts=st.integers(2, 5),
        hidden=st.sampled_from([1032, 1544, 2048]),
        intermediate=st.sampled_from([1032, 1536]),
        dtype=st.sampled_from([torch.float16, torch.bfloat16]),
        routing=st.sampled_from(["uniform", "skewed", "masked", "idle", "one_hot"]),
        activation=st.sampled_from(["swiglu", "swiglu_oai", "gelu"]),
        gate_layout=st.sampled_from(reference.GATE_LAYOUTS),
        bias=st.sampled_from([None, "float32", "as x"]),
        seed=st.integers(0, 1 << 30),
    )
)
@example(HIGHEST_TILES)
@example(HIGHEST_TILES.but(intermediate=3072))
@example(HIGHEST_TILES.but(dtype=torch.float16, gate_layout="up_gate", routing="masked"))
def test_sm90_has_the_bits_of_sm80(sm90, case):
    """So that `auto` may take either, whatever T is."""
    arguments = case.arguments("cuda")
    expected = moe_ops.fused_moe(**arguments, backend="sm80")
    for _ in range(2):
        out = torch.full_like(expected, torch.nan)
        moe_ops.fused_moe(**arguments, backend="sm90", out=out)
        assert_same_bits(out, expected)


@settings(max_examples=40)
@given(
    case=st.builds(
        GemmCase,
        rows=st.integers(200, 2500),
        n=st.sampled_from([2048, 3080, 4096]),
        k=st.sampled_from([8, 64, 72, 136, 264]),
        experts=st.integers(1, 12),
        dtype=st.sampled_from([torch.float16, torch.bfloat16]),
        offsets=st.sampled_from(["uniform", "malformed"]),
        bias=st.sampled_from([None, "float32"]),
        seed=st.integers(0, 1 << 30),
    )
)
def test_sm90_with_short_k(sm90, case):
    """A ring that holds several tiles' operands at once."""
    arguments = case.arguments("cuda")
    expected = moe_ops.grouped_gemm(**arguments, backend="sm80")
    assert_same_bits(moe_ops.grouped_gemm(**arguments, backend="sm90"), expected)


@pytest.mark.parametrize(("dtype", "spread"), [(torch.bfloat16, 30), (torch.float16, 9)])
def test_sm90_adds_as_sm80_does(sm90, dtype, spread):
    """Of products far apart, too: both drop the same bits."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        values = torch.randn(shape, device="cuda", generator=generator)
        powers = torch.randint(-spread, spread, shape, device="cuda", generator=generator)
        return (values * 2.0**powers).to(dtype)

    a, b = draw(700, 2048), draw(1, 4096, 2048) / 512  # float16's sums rarely overflow
    offsets = torch.tensor([0, 700], dtype=torch.int32, device="cuda")
    expected = moe_ops.grouped_gemm(a, b, offsets, backend="sm80")
    assert_same_bits(moe_ops.grouped_gemm(a, b, offsets, backend="sm90"), expected)


def planned(case, sms: int, keys=("rows", "cols", "parts")) -> tuple[int, ...]:
    """The rows and columns of the tile that shapes.h plans for a layer's second product, and in how
    many parts its k is split; or others of its figures."""
    plan = ctypes.CDLL(str(_library.PATH)).simple_moe_plan
    plan.restype = ctypes.c_char_p
    plan.argtypes = [ctypes.c_int64] * 5 + [ctypes.c_int] * 3
    tiles = plan(case.tokens, case.topk, case.experts, case.hidden, case.intermediate, 1, sms, 227)
    return tuple(json.loads(tiles)[1][key] for key in keys)


def case_of_the_highest_tiles(cols: int, sms: int) -> MoeCase:
    """At most two rounds over the GPU either way, which the narrower tile ends sooner; or only
    with the wider one."""
    hidden = 128 * (sms // 14 + 1) if cols == 128 else 56 * sms
    case = MoeCase(tokens=600, topk=2, experts=8, hidden=hidden, intermediate=2048, bias="float32",
                   dtype=torch.bfloat16)  # fmt: skip
    assert planned(case, sms) == (160, cols, 1)
    return case


@pytest.mark.skipif(not _library.build_info()["cuda_targets"], reason="needs a build with CUDA")
@pytest.mark.parametrize("sms", [114, 132])
@pytest.mark.parametrize("cols", [128, 256])
def test_the_highest_tiles_are_planned(cols, sms):
    case_of_the_highest_tiles(cols, sms)


@pytest.mark.skipif(not _library.build_info()["cuda_targets"], reason="needs a build with CUDA")
def test_the_height_of_tiles_follows_the_rows_of_an_expert():
    planned_rows = {
        mean: planned(MoeCase(tokens=4 * mean, hidden=4096, intermediate=4096), 132)[0]
        for mean in (8, 24, 40, 64, 100, 200, 256, 512, 1024)
    }
    assert planned_rows == {
        8: 16, 24: 32, 40: 64, 64: 160, 100: 160, 200: 160, 256: 160, 512: 160, 1024: 160
    }  # fmt: skip


@pytest.mark.skipif(not _library.build_info()["cuda_targets"], reason="needs a build with CUDA")
def test_more_is_in_flight_where_weights_come_from_memory():
    """An expert has one tile, or several that share its weights."""
    planned_stages = {
        mean: planned(MoeCase(tokens=4 * mean, hidden=4096, intermediate=4096), 132, ["stages"])[0]
        for mean in (64, 160, 161, 1024)
    }
    assert planned_stages == {64: 4, 160: 4, 161: 3, 1024: 3}


# Few experts and columns, so few tiles.
FEW_TILES = MoeCase(
    tokens=128, topk=2, experts=8, hidden=512, intermediate=2048, dtype=torch.bfloat16
)


@pytest.mark.skipif(not _library.build_info()["cuda_targets"], reason="needs a build with CUDA")
def test_one_round_of_wide_tiles_is_better_than_two():
    mixtral = MoeCase(tokens=512, topk=2, experts=8, hidden=4096, intermediate=14336)
    assert planned(mixtral, 132) == (160, 256, 1)


@pytest.mark.skipif(not _library.build_info()["cuda_targets"], reason="needs a build with CUDA")
def test_tiles_are_lower_where_they_are_few():
    # 176 at most for 132 multiprocessors, and 48, 128, 192.
    assert planned(FEW_TILES.but(tokens=256), 132) == (160, 128, 4)
    assert planned(FEW_TILES.but(intermediate=512), 132)[0] == 16


@pytest.mark.skipif(not _library.build_info()["cuda_targets"], reason="needs a build with CUDA")
def test_k_is_split_where_tiles_are_few():
    parts = {
        tokens: planned(FEW_TILES.but(tokens=tokens), 132)[2]
        for tokens in (16, 128, 500, 1000, 2000)
    }
    assert parts == {16: 2, 128: 4, 500: 4, 1000: 2, 2000: 1}
    for other in (dict(hidden=1032), dict(intermediate=2056), dict(hidden=64, intermediate=256)):
        assert planned(FEW_TILES.but(**other), 132)[2] == 1


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.builds(
        MoeCase,
        tokens=st.integers(2, 900),
        topk=st.integers(1, 3),
        experts=st.integers(2, 9),
        hidden=st.sampled_from([72, 264, 512]),
        intermediate=st.sampled_from([1040, 2048, 4128]),
        dtype=st.sampled_from([torch.float16, torch.bfloat16]),
        routing=st.sampled_from(["uniform", "skewed", "masked", "idle", "one_hot", "duplicated"]),
        activation=st.sampled_from(["swiglu", "swiglu_oai", "gelu"]),
        bias=st.sampled_from([None, "float32", "as x"]),
        output_dtype=st.sampled_from([None, torch.float32]),
        expert_offset=st.sampled_from([0, 3]),
        seed=st.integers(0, 1 << 30),
    )
)
@example(FEW_TILES)
@example(FEW_TILES.but(tokens=500, bias="float32", routing="masked"))
def test_split_k(cuda, case):
    """By both backends alike; in any order of the tokens; not where the bits mustn't depend on how
    many they are."""
    arguments = case.arguments(cuda)
    out = moe_ops.fused_moe(**arguments, backend="sm80")
    expected = reference.fused_moe(
        **arguments | dict(output_dtype=torch.float64), compute_dtype=torch.float64
    )
    assert_accurate(out, expected, tolerance_of(case.dtype, case.output_dtype))
    assert_same_bits(moe_ops.fused_moe(**arguments), out)
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(0)).to(cuda)
    permuted = {k: arguments[k][order] for k in ("x", "topk_weights", "topk_ids")}
    assert_same_bits(moe_ops.fused_moe(**arguments | permuted), out[order])
    whole = moe_ops.fused_moe(**arguments, batch_invariant=True)
    half = {k: v[: case.tokens // 2] for k, v in permuted.items()}
    of_half = moe_ops.fused_moe(**arguments | half, batch_invariant=True)
    assert_same_bits(of_half, whole[order[: case.tokens // 2]])


@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "transposed"])
@pytest.mark.parametrize("cols", [128, 256])
def test_the_highest_tiles(cols, layout, cuda):
    """Tiles of 160 rows, most of them not full, and wgmma's of 192: their bits are the same."""
    properties = torch.cuda.get_device_properties(cuda)
    if properties.shared_memory_per_block_optin < 227 << 10:
        pytest.skip("needs a GPU whose blocks may have 227 KB of shared memory")
    case = case_of_the_highest_tiles(cols, properties.multi_processor_count).but(layout=layout)
    arguments = case.arguments(cuda)
    out = moe_ops.fused_moe(**arguments)
    expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
    assert_accurate(out, expected, TOLERANCE[torch.bfloat16])
    copies = {k: v.contiguous().clone() if isinstance(v, torch.Tensor) else v
              for k, v in arguments.items()}  # fmt: skip
    assert_same_bits(out, moe_ops.fused_moe(**copies))
    assert_same_bits(out, moe_ops.fused_moe(**copies, backend="sm80"))


@pytest.mark.parametrize(
    "case",
    [
        MoeCase(tokens=64, topk=4, experts=64, hidden=1024, intermediate=1024),
        MoeCase(tokens=600, topk=2, experts=8, hidden=2560, intermediate=2560),
    ],
    ids=["low tiles", "high tiles"],
)
def test_second_product_reads_nothing_early(case, cuda):
    """So many tiles that it starts while the first is at work, on memory where a call before left
    NaN; and after the kernel for any alignment, which tells it in another way."""
    arguments = case.but(dtype=torch.bfloat16).arguments(cuda)
    poison = arguments | {"x": torch.full_like(arguments["x"], torch.nan)}
    misaligned = arguments | {"x": lay_out(arguments["x"], "misaligned")}
    expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
    out = moe_ops.fused_moe(**arguments)
    assert_accurate(out, expected, TOLERANCE[torch.bfloat16])
    for again in [arguments, misaligned] * 10:
        moe_ops.fused_moe(**poison)
        assert_same_bits(moe_ops.fused_moe(**again), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_past_2_to_31_elements(dtype, cuda):
    experts, rows, hidden = 140, 4096, 4096  # 2.3e9 elements; the last experts lie past 2**31
    needed = 2 * experts * rows * hidden * dtype.itemsize
    if torch.cuda.mem_get_info()[0] < 1.5 * needed:
        pytest.skip(f"needs {1.5 * needed / 2**30:.0f} GiB of free device memory")
    w1 = torch.zeros(experts, rows, hidden, device=cuda, dtype=dtype)
    w2 = torch.zeros(experts, hidden, rows, device=cuda, dtype=dtype)
    for weight in (w1, w2):
        weight[-1].normal_().mul_(1 / 64)
    x = torch.randn(5, hidden, device=cuda).to(dtype)
    ids = torch.full((5, 1), experts - 1, device=cuda)
    weights = torch.ones(5, 1, device=cuda)
    out = moe_ops.fused_moe(x, w1, w2, weights, ids, activation="relu")
    expected = reference.fused_moe(
        x, w1[-1:], w2[-1:], weights, ids - ids, activation="relu", compute_dtype=torch.float64
    )
    assert_accurate(out, expected)


def test_rows_past_2_to_31_elements(cuda):
    tokens, hidden = 600_000, 4096
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    x = torch.zeros(tokens, hidden, device=cuda, dtype=torch.bfloat16)
    x[-200:].normal_()
    w1 = torch.randn(2, 16, hidden, device=cuda).div(64).bfloat16()
    w2 = torch.randn(2, hidden, 8, device=cuda).div(3).bfloat16()
    ids = torch.randint(2, (tokens, 1), device=cuda)
    weights = torch.ones(tokens, 1, device=cuda)
    out = moe_ops.fused_moe(x, w1, w2, weights, ids)
    expected = reference.fused_moe(
        x[-200:], w1, w2, weights[-200:], ids[-200:], compute_dtype=torch.float64
    )
    assert_accurate(out[-200:], expected)
    assert not out[:-200].any()


def test_long_inputs_go_in_chunks(cuda):
    """The workspace stays under 4 GB, and every row has the bits it has alone."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    tokens, hidden, intermediate, experts = 90_000, 4096, 14336, 2
    x = torch.randn(tokens, hidden, device=cuda, dtype=torch.bfloat16)
    w1 = torch.randn(experts, 2 * intermediate, hidden, device=cuda).div(64).bfloat16()
    w2 = torch.randn(experts, hidden, intermediate, device=cuda).div(120).bfloat16()
    ids = torch.randint(experts, (tokens, 2), device=cuda)
    weights = torch.rand(tokens, 2, device=cuda)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = moe_ops.fused_moe(x, w1, w2, weights, ids)
    assert torch.cuda.max_memory_allocated() - before < 4e9 + out.nbytes
    for first in (0, 29_990, 59_990, 89_000):
        rows = slice(first, first + 1000)
        assert_same_bits(out[rows], moe_ops.fused_moe(x[rows], w1, w2, weights[rows], ids[rows]))
    moe_ops.fused_moe(x, w1, w2, weights, ids, out=x)  # Overlaps an input: not in chunks.
    assert_same_bits(x, out)


@pytest.mark.parametrize(("hidden", "intermediate"), [(2048, 512), (512, 2048)])
@pytest.mark.parametrize("tokens", [1, 2, 65, 3000])
def test_the_workspace_is_as_documented(tokens, hidden, intermediate, cuda):
    """What the sort makes lies in `out`: beside it there are two products."""
    topk, experts = 8, 16
    x = torch.randn(tokens, hidden, device=cuda, dtype=torch.bfloat16)
    w1 = torch.randn(experts, 2 * intermediate, hidden, device=cuda).div(45).bfloat16()
    w2 = torch.randn(experts, hidden, intermediate, device=cuda).div(22).bfloat16()
    weights, ids = torch.rand(tokens, experts, device=cuda).topk(topk)
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    out = moe_ops.fused_moe(x, w1, w2, weights, ids)
    used = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - out.nbytes
    # Where k is split the second product takes as much as the first with both its branches would.
    split = hidden < intermediate and 1 < tokens < 3000
    second = 2 * intermediate if split else hidden
    assert used <= tokens * topk * (second + intermediate) * x.element_size()


SMALL = """
import sys, torch
sys.path.insert(0, "tests")
from helpers import DTYPES, TOLERANCE, assert_accurate
from strategies import GemmCase, MoeCase
import moe_ops
from moe_ops import reference
for dtype in DTYPES:
    for tokens in (3, 65, 400, 3000):
        case = MoeCase(tokens=tokens, hidden=264, intermediate=72, dtype=dtype, routing="skewed")
        arguments = case.arguments("cuda")
        expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
        assert_accurate(moe_ops.fused_moe(**arguments), expected)
    arguments = GemmCase(dtype=dtype, rows=500).wgrad_arguments("cuda")
    expected = reference.grouped_gemm_wgrad(**arguments, compute_dtype=torch.float64)
    assert_accurate(moe_ops.grouped_gemm_wgrad(**arguments), expected)
print("right")
"""


@pytest.mark.parametrize(
    "gpu",
    [
        "sms=108,smem_kb=163",
        "sms=128,smem_kb=99",
        "sms=1,smem_kb=99",
        "memory_gbps=2000",
        "memory_gbps=5000",
        "early_launch=0",
        "sms=108,smem_kb=163,early_launch=0",
    ],
)
def test_the_limits_of_other_gpus(gpu, cuda):
    """An A100's, an RTX 4090's, a GPU of one multiprocessor; slow memory and fast; kernels that
    start early or don't."""
    result = subprocess.run(
        [sys.executable, "-c", SMALL],
        env={**os.environ, "SIMPLE_MOE_TEST_DEVICE": gpu},
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.strip() == "right", result.stderr[-3000:]


def test_every_element_is_written(cuda):
    """torch fills new tensors with NaN in this mode: scratch and outputs alike."""
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in DTYPES:
            for tokens in (1, 65, 700):
                for routing in ("uniform", "masked", "one_hot"):
                    case = LAYER.but(tokens=tokens, dtype=dtype, routing=routing)
                    arguments = case.arguments(cuda)
                    expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
                    assert_accurate(moe_ops.fused_moe(**arguments), expected)
    finally:
        torch.use_deterministic_algorithms(False)
