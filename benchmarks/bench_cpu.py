"""fused_moe on the CPU against a plain loop over the experts, side by side.

    python benchmarks/bench_cpu.py [--repeats 15] [--threads N]

The loop is what one writes without this library: F.linear per expert that has tokens, in x's dtype,
and index_add_. Both are timed in turns, so that a busy machine slows both; a row's figures are
medians. Exits with 1 if a ratio is over its bar.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F

import moe_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Shape:
    tokens: int
    experts: int
    topk: int
    hidden: int
    intermediate: int
    bar: float  # fused_moe's time over the loop's: at most this


SHAPES = (
    Shape(512, 8, 2, 512, 2048, bar=1.2),
    Shape(1, 64, 8, 512, 512, bar=1.0),
    Shape(1, 64, 8, 512, 1024, bar=1.0),
    Shape(1, 64, 4, 1024, 512, bar=1.0),
    Shape(1, 64, 8, 128, 128, bar=1.0),
)


def make_inputs(shape, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).to(dtype)

    e, h, i = shape.experts, shape.hidden, shape.intermediate
    x = normal(shape.tokens, h)
    w1 = normal(e, 2 * i, h, scale=h**-0.5)
    w2 = normal(e, h, i, scale=i**-0.5)
    scores = torch.randn(shape.tokens, e, generator=generator).softmax(-1)
    topk_weights, topk_ids = scores.topk(shape.topk)
    return x, w1, w2, topk_weights / topk_weights.sum(-1, keepdim=True), topk_ids


def expert_loop(x, w1, w2, topk_weights, topk_ids):
    out = torch.zeros_like(x)
    for e in topk_ids.unique().tolist():
        token, choice = torch.where(topk_ids == e)
        gate, up = F.linear(x[token], w1[e]).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, w2[e])
        out.index_add_(0, token, rows * topk_weights[token, choice, None].to(x.dtype))
    return out


def time_in_turns(functions, repeats):
    """Median milliseconds of each."""
    times = [[] for _ in functions]
    for repeat in range(repeats + 2):
        for function, measured in zip(functions, times):
            start = time.perf_counter()
            function()
            if repeat >= 2:  # The first two warm up.
                measured.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(measured) for measured in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=15, help="timed calls of each (1 token: x10)"
    )
    parser.add_argument("--threads", type=int, help="torch's threads, if not its default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"{'T':>5} {'E':>4} {'K':>3} {'H':>5} {'I':>5}  {'dtype':<9}"
        f"{'fused ms':>10}{'loop ms':>10}{'ratio':>8}{'bar':>6}"
    )
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    missed = 0
    for done, (shape, dtype) in enumerate(cases):
        print(f"[{done}/{len(cases)}] {shape} {dtype}", end="\r", file=sys.stderr, flush=True)
        inputs = make_inputs(shape, dtype)
        repeats = args.repeats * (10 if shape.tokens == 1 else 1)
        with torch.no_grad():
            fused, loop = time_in_turns(
                [partial(moe_ops.fused_moe, *inputs), partial(expert_loop, *inputs)], repeats
            )
        ratio = fused / loop
        missed += ratio > shape.bar
        print("\033[2K" if sys.stderr.isatty() else "", end="\r", file=sys.stderr, flush=True)
        print(
            f"{shape.tokens:>5} {shape.experts:>4} {shape.topk:>3} {shape.hidden:>5}"
            f" {shape.intermediate:>5}  {str(dtype).removeprefix('torch.'):<9}"
            f"{fused:>10.2f}{loop:>10.2f}{ratio:>8.2f}{shape.bar:>6.1f}"
            f"{'  MISSED' if ratio > shape.bar else ''}",
            flush=True,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
