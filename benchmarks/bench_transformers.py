"""Tokens per second and time to first token of a transformers model, by experts implementation.

    python benchmarks/bench_transformers.py [--layers 4] [--batch 1 16] [--out NAME]

A Qwen3-30B-A3B of random weights, cut to a few layers, generates with a static cache; on a GPU its
decoding is compiled as a whole and replayed as a CUDA graph, but for eager experts, which break the
graph. transformers decodes with batched_mm where grouped_mm is asked for. error: norm of the
logits' difference from eager's over their norm.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import torch
import transformers
from bench_moe import output_of
from transformers import CompileConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_ops

IMPLEMENTATIONS = ("simple_moe", "grouped_mm", "batched_mm", "eager")
PROMPT, NEW = 512, 65
REPEATS = 5


def make_model(args: argparse.Namespace) -> Qwen3MoeForCausalLM:
    width = 16 if args.tiny else 1
    config = Qwen3MoeConfig(
        vocab_size=151936 // width, hidden_size=2048 // width, moe_intermediate_size=768 // width,
        num_hidden_layers=args.layers, num_attention_heads=32 // width,
        num_key_value_heads=4 // min(width, 2), head_dim=128 // width, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        tie_word_embeddings=False, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(args.device):
        return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def seconds_of(model, tokens: torch.Tensor, new: int, compiled: bool) -> float:
    def synchronize() -> None:
        if tokens.is_cuda:
            torch.cuda.synchronize()

    synchronize()
    begin = time.perf_counter()
    model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=new,
        max_new_tokens=new, cache_implementation="static", disable_compile=not compiled,
        compile_config=CompileConfig(fullgraph=True, mode="reduce-overhead"),
    )  # fmt: skip
    synchronize()
    return time.perf_counter() - begin


def time_one(model, implementation: str, tokens: torch.Tensor, expected: torch.Tensor) -> dict:
    torch._dynamo.reset()
    model.set_experts_implementation(implementation)
    compiled = tokens.is_cuda and implementation != "eager"
    row = {"implementation": implementation, "batch": tokens.shape[0], "compiled": compiled}
    try:
        logits = model(tokens[:, :64]).logits.float()
        error = ((logits - expected).norm() / expected.norm()).item()
        for _ in range(2 if compiled else 1):  # compiles; records
            seconds_of(model, tokens, NEW, compiled)
        first = statistics.median(seconds_of(model, tokens, 1, compiled) for _ in range(REPEATS))
        whole = statistics.median(seconds_of(model, tokens, NEW, compiled) for _ in range(REPEATS))
    except torch.OutOfMemoryError:
        return row | {"failed": "out of memory"}
    return row | {
        "first_token_ms": round(first * 1e3, 2),
        "tokens_per_second": round(tokens.shape[0] * (NEW - 1) / (whole - first), 1),
        "error": float(f"{error:.2g}"),
    }


COLUMNS = ("implementation", "batch", "first token, ms", "tokens/s", "error")


def columns_of(row: dict) -> list[str]:
    columns = [row["implementation"], str(row["batch"])]
    if "failed" in row:
        return [*columns, row["failed"], "", ""]
    ms, rate, error = row["first_token_ms"], row["tokens_per_second"], row["error"]
    return [*columns, f"{ms:.2f}", f"{rate:.0f}", f"{error:.1e}"]


def write(about: dict, rows: list[dict], out: Path) -> None:
    """out.json, and out.md for people."""
    out.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *map(columns_of, rows)]
    text = "# A transformers model with other experts\n\n"
    text += "".join(f"- {key}: {value}\n" for key, value in about.items())
    text += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    out.with_suffix(".md").write_text(text)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS,
                        default=list(IMPLEMENTATIONS))  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="widths of a 16th, to try it out")
    parser.add_argument("--out", type=Path, metavar="NAME", help="writes NAME.json and .md")
    args = parser.parse_args()
    moe_ops.transformers.register()
    model = make_model(args)
    root = Path(__file__).parent
    about = {
        "date": date.today().isoformat(),
        "commit": output_of("git", "-C", root, "describe", "--always", "--dirty", "--exclude=*"),
        "command": shlex.join(["python", "benchmarks/bench_transformers.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": f"{args.layers} layers of Qwen3-30B-A3B{', widths of a 16th' * args.tiny}",
        "generated": f"{NEW} tokens after {PROMPT}",
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    widths = [15, 5, 16, 9, 8]

    def show(line: Iterable[str]) -> None:
        print(" ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)),
              flush=True)  # fmt: skip

    show(COLUMNS)
    rows = []
    for batch in args.batch:
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(2, model.config.vocab_size, (batch, PROMPT), generator=generator)
        tokens = tokens.to(args.device)
        model.set_experts_implementation("eager")
        expected = model(tokens[:, :64]).logits.float()
        for implementation in args.implementations:
            rows.append(time_one(model, implementation, tokens, expected))
            show(columns_of(rows[-1]))
            if args.out:
                write(about, rows, args.out)


if __name__ == "__main__":
    main()
