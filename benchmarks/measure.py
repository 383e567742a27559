"""How bench_moe.py measures: graphs of many calls, memory, errors, host time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from peers import Contender
from torch import Tensor

import moe_ops

Result = TypeVar("Result")
# Idle before a graph or a ceiling is timed: the power cap looks back, and what ran before would
# lower the clock, of an H200 by up to 6 %.
REST_SECONDS = 0.2
WARM_SECONDS = 0.03  # of replays before the timed ones, for the clocks
TIMED_SECONDS = 0.3
REPLAYS = (5, 100)  # at least, at most
CHECKED_TOKENS = 64


class Inputs(NamedTuple):
    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor


Weights = Sequence[tuple[Tensor, Tensor]]  # copies of (w1, w2)


def make_inputs(
    experts: int, topk: int, hidden: int, tokens: int, calls: int, dtype: torch.dtype,
    routing: str, device: str = "cuda",
) -> list[Inputs]:  # fmt: skip
    """`calls` inputs that differ in everything; the same ones in every run."""
    generator = torch.Generator(device).manual_seed(tokens)
    popularity = torch.ones(experts)
    if routing == "zipf":
        order = torch.randperm(experts, generator=torch.Generator().manual_seed(0))
        popularity = 1.0 / (1 + order)
    log_popularity = popularity.log().to(device)

    def one() -> Inputs:
        # Gumbel top-k: K different experts, drawn one after another by popularity.
        uniform = torch.rand(tokens, experts, device=device, generator=generator)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 2**-24)))
        ids = (log_popularity + gumbel).topk(topk, dim=1).indices.int()
        scores = torch.randn(tokens, topk, device=device, generator=generator)
        x = torch.randn(tokens, hidden, device=device, generator=generator).to(dtype)
        return Inputs(x, scores.softmax(dim=1), ids)

    return [one() for _ in range(calls)]


def replay_us(record: Callable[[], Result], seconds: float = TIMED_SECONDS) -> tuple[float, Result]:
    """Median microseconds of a replay of the graph of record(), and what record() returned."""
    graph = torch.cuda.CUDAGraph()
    # The outer context restores the stream even where the capture fails.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        result = record()
    graph.replay()
    torch.cuda.synchronize()
    time.sleep(REST_SECONDS)
    begin, warm = time.perf_counter(), 0
    while warm == 0 or time.perf_counter() - begin < WARM_SECONDS:
        graph.replay()
        torch.cuda.synchronize()
        warm += 1
    one = (time.perf_counter() - begin) / warm
    replays = max(REPLAYS[0], min(REPLAYS[1], int(seconds / one)))
    # Enqueued in one go: between an event and its replay the GPU must not wait for the host.
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 2)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events[1:])]
    return statistics.median(times) * 1e3, result


def graph_us(
    contender: Contender, weights: Weights, inputs: Sequence[Inputs]
) -> tuple[float, Tensor]:
    """Microseconds of a call among many in one graph, and the first call's output."""

    def record() -> Tensor:
        first = None
        for i, (x, topk_weights, topk_ids) in enumerate(inputs):
            out = contender.call(x, *weights[i % len(weights)], topk_weights, topk_ids)
            first = out if first is None else first
        return first

    us, first = replay_us(record)
    return us / len(inputs), first


def eager_us(
    contender: Contender, weights: Weights, inputs: Sequence[Inputs]
) -> tuple[float, Tensor]:
    """As graph_us, for what can't be captured: the median of single calls between events."""
    times, first, begin = [], None, time.perf_counter()
    while len(times) <= REPLAYS[0] or time.perf_counter() - begin < TIMED_SECONDS:
        x, topk_weights, topk_ids = inputs[len(times) % len(inputs)]
        copy = weights[len(times) % len(weights)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        out = contender.call(x, *copy, topk_weights, topk_ids)
        events[1].record()
        torch.cuda.synchronize()
        first = out if first is None else first
        times.append(events[0].elapsed_time(events[1]) * 1e3)
    return statistics.median(times[1:]), first


def workspace_bytes(contender: Contender, copy: tuple[Tensor, Tensor], one: Inputs) -> int:
    """What one call allocates beside its output, at most at a time."""

    def call() -> Tensor:
        return contender.call(one.x, *copy, one.topk_weights, one.topk_ids)

    call()  # The first may allocate what stays: a cuBLAS workspace, a compiled kernel's scratch.
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    peak = torch.cuda.max_memory_allocated()
    return max(0, peak - before - out.numel() * out.element_size())


def relative_error(
    out: Tensor, gate_layout: str, copy: tuple[Tensor, Tensor], one: Inputs
) -> float:
    """|out - reference| / |reference| over some of the tokens, the reference in float32."""
    tokens = out.shape[0]
    some = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:CHECKED_TOKENS]
    some = some.to(out.device)
    expected = moe_ops.reference.fused_moe(
        one.x[some], *copy, one.topk_weights[some], one.topk_ids[some],
        gate_layout=gate_layout, compute_dtype=torch.float32,
    )  # fmt: skip
    return ((out[some].float() - expected).norm() / expected.norm()).item()


def host_us(dtype: torch.dtype, calls: int = 200) -> dict[str, float]:
    """Microseconds the host spends on one operator call in inference mode, none waiting for the GPU.

    Qwen3-30B's layer at one token, with no more experts than the token chose: the host can't tell.
    """
    topk, hidden, intermediate = 8, 2048, 768
    x, topk_weights, topk_ids = make_inputs(topk, topk, hidden, 1, 1, dtype, "uniform")[0]
    w1 = torch.randn(topk, 2 * intermediate, hidden, device="cuda", dtype=dtype)
    w2 = torch.randn(topk, hidden, intermediate, device="cuda", dtype=dtype)
    arguments, out = (x, w1, w2, topk_weights, topk_ids), torch.empty_like(x)

    def median(call: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        for _ in range(calls):
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e6)
        torch.cuda.synchronize()
        return round(statistics.median(times), 1)

    op = torch.ops.simple_moe.fused_moe
    with torch.inference_mode():
        return {
            "functional": median(lambda: op.default(*arguments)),
            "out": median(lambda: op.out(*arguments, out=out)),
        }
