"""Times fused_moe on layers that people run: python benchmarks/bench_moe.py [--json FILE]

One CUDA graph holds many calls, each with other inputs, other routing and other weights, so that
at least four times the L2 passes before any weight is used again. The figure is the median replay
divided by the calls.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

import moe_ops

LAYERS = {  # experts, top-k, hidden size, intermediate size, token counts
    "guide": (8, 2, 512, 2048, [128]),
    "mixtral": (8, 2, 4096, 14336, [1, 16, 64, 512, 4096, 16384]),
    "qwen3-30b": (128, 8, 2048, 768, [1, 16, 64, 512, 4096, 16384]),
    "olmoe": (64, 8, 2048, 1024, [1, 16, 64, 512, 4096, 16384]),
    "qwen3-next": (512, 10, 2048, 512, [1, 16, 64, 512, 4096, 16384]),
    "gpt-oss": (128, 4, 2880, 2880, [1, 16, 64, 512, 4096, 16384]),
    "deepseek-v3": (256, 8, 7168, 2048, [1, 16, 64, 512, 4096, 16384]),
}
COLD_BYTES = 4 * 60e6  # that pass between two uses of a weight


def random_weights(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    bound = (3 / shape[-1]) ** 0.5
    return torch.empty(shape, device="cuda", dtype=dtype).uniform_(-bound, bound)


def time_cell(weights, experts, topk, hidden, tokens, dtype, calls, backend) -> float:
    """Microseconds of a call."""
    inputs = []
    for _ in range(calls):
        logits = torch.randn(tokens, experts, device="cuda")
        chosen = logits.topk(topk, dim=1)
        inputs.append(
            (
                torch.randn(tokens, hidden, device="cuda", dtype=dtype),
                chosen.values.softmax(dim=1),
                chosen.indices.int(),
            )
        )

    def run() -> None:
        for i, (x, topk_weights, ids) in enumerate(inputs):
            w1, w2 = weights[i % len(weights)]
            moe_ops.fused_moe(x, w1, w2, topk_weights, ids, backend=backend)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[2:])


def error_of(experts, topk, hidden, intermediate, dtype, tokens=64) -> float:
    """Relative error of the layer against its reference in float64, on few tokens."""
    x = torch.randn(tokens, hidden, device="cuda", dtype=dtype)
    w1 = random_weights(min(experts, 8), 2 * intermediate, hidden, dtype=dtype)
    w2 = random_weights(min(experts, 8), hidden, intermediate, dtype=dtype)
    chosen = torch.rand(tokens, min(experts, 8), device="cuda").topk(min(topk, 8), dim=1)
    arguments = (x, w1, w2, chosen.values, chosen.indices.int())
    expected = moe_ops.reference.fused_moe(*arguments, compute_dtype=torch.float64)
    out = moe_ops.fused_moe(*arguments).double()
    return ((out - expected).norm() / expected.norm()).item()


def commit() -> str:
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"]
    return (
        subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        or "unknown"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, help="in the place of the layers' own")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}")
    print(f"{'layer':<12} {'tokens':>6} {'µs':>10} {'TFLOP/s':>8} {'error':>8}")
    cells, begin = [], time.perf_counter()
    for name in args.layers:
        experts, topk, hidden, intermediate, token_counts = LAYERS[name]
        bytes_of_expert = 3 * hidden * intermediate * dtype.itemsize
        copies = 1 + max(1, round(COLD_BYTES / (bytes_of_expert * topk)))
        copies = max(2, min(copies, int(25e9 // (bytes_of_expert * experts))))
        weights = [
            (
                random_weights(experts, 2 * intermediate, hidden, dtype=dtype),
                random_weights(experts, hidden, intermediate, dtype=dtype),
            )
            for _ in range(copies)
        ]
        error = error_of(experts, topk, hidden, intermediate, dtype)
        for tokens in args.tokens or token_counts:
            calls = max(2, min(2 * copies, 64)) if tokens <= 512 else 2
            us = time_cell(weights, experts, topk, hidden, tokens, dtype, calls, args.backend)
            tflops = 6e-6 * tokens * topk * hidden * intermediate / us
            cells.append(dict(layer=name, tokens=tokens, us=us, tflops=tflops, error=error))
            print(f"{name:<12} {tokens:>6} {us:>10.1f} {tflops:>8.1f} {error:>8.1e}", flush=True)
        del weights
    print(f"{time.perf_counter() - begin:.0f} s")
    if args.json:
        about = dict(
            date=date.today().isoformat(), gpu=torch.cuda.get_device_name(),
            torch=torch.__version__, cuda=torch.version.cuda, python=sys.version.split()[0],
            commit=commit(), dtype=args.dtype, backend=args.backend,
        )  # fmt: skip
        Path(args.json).write_text(json.dumps(dict(about=about, cells=cells), indent=1) + "\n")


if __name__ == "__main__":
    main()
