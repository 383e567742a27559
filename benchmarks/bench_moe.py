"""Times fused_moe on layers that people run, beside its peers and what the GPU can do at most.

    python benchmarks/bench_moe.py [--out benchmarks/results/NAME]

One CUDA graph holds many calls, each with other inputs, other routing and another copy of the
weights, so that at least four times the L2 of other weights passes before any weight is used again.
The figure is the median replay divided by the calls. The GPU rests before each graph and ceiling,
so that none depends on what ran before; not before the eager loop, which can't be captured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import report
import torch
from ceilings import Ceilings, measure_ceilings
from measure import (
    Inputs,
    Weights,
    eager_us,
    graph_us,
    host_us,
    make_inputs,
    relative_error,
    workspace_bytes,
)
from peers import PEERS, Contender, backend, open_peers, reason

from moe_ops.__main__ import has
from moe_ops._library import build_info

TOKENS = (1, 16, 64, 512, 4096, 16384)
COLD = 4  # times the L2 pass before a weight is used again
SKEW_FROM = 4096  # tokens: with fewer, skewed routing reads other weights, not just unevenly
GRAPH_US = 2000  # of work in a graph, at the ceiling
MOST_CALLS = 96  # in a graph


class Layer(NamedTuple):
    name: str
    experts: int
    topk: int
    hidden: int
    intermediate: int
    tokens: tuple[int, ...] = TOKENS

    def expert_bytes(self, dtype: torch.dtype) -> int:
        return 3 * self.hidden * self.intermediate * dtype.itemsize


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("guide", 8, 2, 512, 2048, (128,)),
        Layer("mixtral", 8, 2, 4096, 14336),
        Layer("qwen3-30b", 128, 8, 2048, 768),
        Layer("olmoe", 64, 8, 2048, 1024),
        Layer("qwen3-next", 512, 10, 2048, 512),
        Layer("gpt-oss", 128, 4, 2880, 2880),
        Layer("deepseek-v3", 256, 8, 7168, 2048),
    )
}
PUBLISHED = Path(__file__).with_name("peers_h200.json")


# ---- One layer ----


def copies_of(layer: Layer, dtype: torch.dtype) -> int:
    """Copies of the weights to rotate through; 0 where the GPU can't hold one."""
    properties = torch.cuda.get_device_properties()
    used = layer.topk * layer.expert_bytes(dtype)  # by a call, at least
    # All other copies pass between two uses of a weight, and the other product of its own copy:
    # a third of it, if it is the second.
    wanted = math.ceil(COLD * properties.L2_cache_size / used + 2 / 3)
    fitting = int(0.6 * properties.total_memory // (layer.experts * layer.expert_bytes(dtype)))
    return min(wanted, fitting)


def make_weights(layer: Layer, copies: int, dtype: torch.dtype) -> Weights:
    generator = torch.Generator("cuda").manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        bound = (3 / shape[-1]) ** 0.5  # keeps a row's variance
        weights = torch.empty(shape, device="cuda", dtype=dtype)
        return weights.uniform_(-bound, bound, generator=generator)

    e, h, i = layer.experts, layer.hidden, layer.intermediate
    return [(uniform(e, 2 * i, h), uniform(e, h, i)) for _ in range(copies)]


def calls_in_a_graph(
    layer: Layer, tokens: int, copies: int, dtype: torch.dtype, ceilings: Ceilings
) -> int:
    """A multiple of the copies, so that a replay goes on where the last one ended."""
    chosen = layer.experts * (1 - (1 - layer.topk / layer.experts) ** tokens)
    us, _ = ceilings.of(chosen * layer.expert_bytes(dtype), flops_of(layer, tokens))
    calls = min(MOST_CALLS, math.ceil(GRAPH_US / us))
    return copies * max(1, calls // copies)


def flops_of(layer: Layer, tokens: int) -> int:
    return 6 * tokens * layer.topk * layer.hidden * layer.intermediate


def describe(
    layer: Layer, tokens: int, copies: int, inputs: list[Inputs], dtype: torch.dtype,
    ceilings: Ceilings,
) -> dict:  # fmt: skip
    """A cell before anything was timed."""
    chosen = [one.topk_ids.unique().numel() for one in inputs]
    expert_bytes, l2 = layer.expert_bytes(dtype), torch.cuda.get_device_properties().L2_cache_size
    activations = 2 * tokens * layer.hidden * dtype.itemsize
    size, flops = sum(chosen) / len(chosen) * expert_bytes + activations, flops_of(layer, tokens)
    ceiling_us, bound = ceilings.of(size, flops)
    widest = max(2 * layer.intermediate, layer.hidden) + layer.intermediate
    return {
        "layer": layer.name, "tokens": tokens,
        "experts": layer.experts, "topk": layer.topk, "hidden": layer.hidden,
        "intermediate": layer.intermediate,
        "copies": copies, "calls": len(inputs),
        "chosen_experts": sum(chosen) / len(chosen), "bytes": round(size), "flops": flops,
        "ceiling_us": round(ceiling_us, 2), "bound": bound,
        "cold_l2": round((copies - 2 / 3) * min(chosen) * expert_bytes / l2, 2),
        "us": {}, "zipf_us": {}, "batch_invariant_us": {}, "error": {}, "failed": {},
        "workspace": {"vllm_formula": tokens * layer.topk * widest * dtype.itemsize},
    }  # fmt: skip


def time_into(
    cell: dict, key: str, contender: Contender, weights: Weights, inputs: list[Inputs]
) -> None:
    """Times and checks one contender; `error` keeps the largest of what was checked."""
    name = contender.name
    try:
        used = workspace_bytes(contender, weights[0], inputs[0])
        timed = graph_us if contender.capturable else eager_us
        us, out = timed(contender, weights, inputs)
        error = relative_error(out, contender.gate_layout, weights[0], inputs[0])
    except Exception as failure:  # noqa: BLE001 (out of memory, a peer's own: the others count)
        cell["failed"][name if key == "us" else f"{name} ({key})"] = reason(failure)
        return
    cell[key][name] = round(us, 2)
    cell["error"][name] = max(cell["error"].get(name, 0.0), float(f"{error:.3g}"))
    if key == "us":
        cell["workspace"][name] = used


def time_cell(
    layer: Layer, tokens: int, weights: Weights, contenders: list[Contender],
    args: argparse.Namespace, ceilings: Ceilings,
) -> dict:  # fmt: skip
    dtype = weights[0][0].dtype
    calls = calls_in_a_graph(layer, tokens, len(weights), dtype, ceilings)

    def inputs_of(routing: str) -> list[Inputs]:
        return make_inputs(layer.experts, layer.topk, layer.hidden, tokens, calls, dtype, routing)

    inputs = inputs_of(args.routing)
    cell = describe(layer, tokens, len(weights), inputs, dtype, ceilings)
    for contender in contenders:
        time_into(cell, "us", contender, weights, inputs)
    if args.batch_invariant:
        for name in args.backends:
            invariant = backend(name, batch_invariant=True)
            time_into(cell, "batch_invariant_us", invariant, weights, inputs)
    if args.skew and tokens >= SKEW_FROM:
        inputs = inputs_of("zipf")
        for name in args.backends:
            time_into(cell, "zipf_us", backend(name), weights, inputs)
    return cell


# ---- The run ----


class Progress:
    """A bar on stderr while a cell is timed, where somebody may be looking."""

    def __init__(self, total: int) -> None:
        self.done, self.total, self.shown = 0, total, sys.stderr.isatty()

    def show(self, what: str) -> None:
        if self.shown:
            filled = 24 * self.done // max(1, self.total)
            bar = "#" * filled + "." * (24 - filled)
            print(f"\r[{bar}] {self.done}/{self.total} {what}\033[K", end="", file=sys.stderr,
                  flush=True)  # fmt: skip

    def step(self) -> None:
        self.done += 1

    def clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def output_of(*command: str | Path) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def published_figures(file: Path | None) -> tuple[str, dict]:
    """What they are, and by (layer, tokens) the ceiling and everybody's microseconds."""
    if file is None:
        return "", {}
    published = json.loads(file.read_text())
    about = published["about"]
    note = about.get("note") or ", ".join([about["gpu"], about["date"], about["commit"]])
    cells = {
        (cell["layer"], cell["tokens"]): {"ceiling_us": cell["ceiling_us"], "us": cell["us"]}
        for cell in published["cells"]
    }
    return note, cells


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    backends = [name for name in build_info()["backends"] if name != "auto"]
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, help="in the place of the layers' own")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--routing", choices=["uniform", "zipf"], default="uniform")
    parser.add_argument("--backends", nargs="+", choices=backends,
                        help="the first is compared with the peers (default: all but cublas)")  # fmt: skip
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS),
                        help="timed too (default: all that can be imported)")  # fmt: skip
    parser.add_argument("--batch-invariant", action="store_true", help="and what it costs")
    parser.add_argument("--skew", action=argparse.BooleanOptionalAction, default=True,
                        help=f"what Zipf routing costs, from {SKEW_FROM} tokens up")  # fmt: skip
    parser.add_argument("--host", action=argparse.BooleanOptionalAction, default=True,
                        help="what an eager call costs the host")  # fmt: skip
    parser.add_argument("--against", type=Path, metavar="FILE.json",
                        help="earlier results to show beside (default: peers_h200.json on an"
                             " H200, for its dtype and routing)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="NAME", help="writes NAME.json, .md and .svg")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    here = [name for name in backends if name != "cublas" and has("cuda", name)]
    args.backends = args.backends or here
    usual = args.dtype == "bfloat16" and args.routing == "uniform"
    if args.against is None and usual and re.search(r"\bH200\b", torch.cuda.get_device_name()):
        args.against = PUBLISHED
    args.skew &= args.routing == "uniform"
    return args


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    begin, dtype = time.perf_counter(), getattr(torch, args.dtype)
    note, published = published_figures(args.against)
    peers, notes = open_peers(args.peers)
    contenders = [backend(name) for name in args.backends] + peers
    cells_to_time = [
        (LAYERS[name], args.tokens or list(LAYERS[name].tokens)) for name in args.layers
    ]
    progress = Progress(sum(len(tokens) for _, tokens in cells_to_time))
    progress.show("ceilings")
    ceilings = measure_ceilings(dtype)
    torch.cuda.empty_cache()
    root = Path(__file__).parent
    results = {
        "about": {
            "date": date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version",
                                "--format=csv,noheader", "--id=0"),
            "torch": torch.__version__, "cuda": torch.version.cuda,
            "python": sys.version.split()[0],
            "commit": output_of("git", "-C", root, "describe", "--always", "--dirty",
                                "--exclude=*"),
            "command": shlex.join(["python", "benchmarks/bench_moe.py", *sys.argv[1:]]),
            "dtype": args.dtype, "routing": args.routing,
            "backends": args.backends, "peers": [peer.name for peer in peers],
            "zipf_us": args.skew, "batch_invariant_us": args.batch_invariant,
            "published": note, "notes": ceilings.notes + notes,
        },
        "ceilings": {key: value for key, value in dataclasses.asdict(ceilings).items()
                     if key != "notes"},
        "host_us": host_us(dtype) if args.host else {},
        "cells": [],
    }  # fmt: skip
    about = results["about"]
    progress.clear()
    for name, text in report.facts(results):
        print(f"{name + ':':<23}{text}")
    print(report.table_header(about), flush=True)
    for layer, token_counts in cells_to_time:
        progress.show(f"{layer.name}, weights")
        copies = copies_of(layer, dtype)
        if copies == 0:
            about["notes"].append(f"{layer.name}: left out, its weights don't fit on this GPU")
            progress.clear()
            print(about["notes"][-1], flush=True)
            continue
        weights = make_weights(layer, copies, dtype)
        for tokens in token_counts:
            progress.show(f"{layer.name}, {tokens} tokens")
            cell = time_cell(layer, tokens, weights, contenders, args, ceilings)
            cell["published"] = published.get((layer.name, tokens), {})
            results["cells"].append(cell)
            progress.step()
            progress.clear()
            print(report.table_row(about, cell), flush=True)
        del weights  # before the next layer's are allocated
        torch.cuda.empty_cache()
        about["seconds"] = round(time.perf_counter() - begin, 1)
        if args.out:
            report.write(results, args.out)
    print(*report.legend(about), f"{time.perf_counter() - begin:.0f} s in all", sep="\n")


if __name__ == "__main__":
    main()
