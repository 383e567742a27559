"""Tokens per second and time to first token of a transformers model, by experts implementation.

    python benchmarks/bench_transformers.py [--layers 4] [--batch 1 16] [--out NAME.json]

A Qwen3-30B-A3B of random weights, cut to a few layers, generates with a static cache; on a GPU its
decoding is compiled as a whole and replayed as a CUDA graph, but for eager experts, which break the
graph. error: norm of the logits' difference from eager's over their norm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
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
    logits = model(tokens[:, :64]).logits.float()
    error = ((logits - expected).norm() / expected.norm()).item()
    compiled = tokens.is_cuda and implementation != "eager"
    for _ in range(2 if compiled else 1):  # compiles; records
        seconds_of(model, tokens, NEW, compiled)
    first = statistics.median(seconds_of(model, tokens, 1, compiled) for _ in range(REPEATS))
    whole = statistics.median(seconds_of(model, tokens, NEW, compiled) for _ in range(REPEATS))
    return {
        "implementation": implementation, "batch": tokens.shape[0], "compiled": compiled,
        "first_token_ms": round(first * 1e3, 2),
        "tokens_per_second": round(tokens.shape[0] * (NEW - 1) / (whole - first), 1),
        "error": float(f"{error:.2g}"),
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS,
                        default=list(IMPLEMENTATIONS))  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="widths of a 16th, to try it out")
    parser.add_argument("--out", type=Path, help="writes the figures as JSON")
    args = parser.parse_args()
    moe_ops.transformers.register()
    model = make_model(args)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    root = Path(__file__).parent
    commit = output_of("git", "-C", root, "describe", "--always", "--dirty", "--exclude=*")
    about = {"date": date.today().isoformat(), "commit": commit, "device": name, "torch": torch.__version__, "transformers": transformers.__version__,
             "layers": args.layers, "prompt": PROMPT, "new_tokens": NEW, "tiny": args.tiny}  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(
        f"{'implementation':<15} {'batch':>5} {'first token, ms':>16} {'tokens/s':>9} {'error':>8}"
    )
    rows = []
    for batch in args.batch:
        generator = torch.Generator().manual_seed(batch)
        tokens = torch.randint(2, model.config.vocab_size, (batch, PROMPT), generator=generator)
        tokens = tokens.to(args.device)
        model.set_experts_implementation("eager")
        expected = model(tokens[:, :64]).logits.float()
        for implementation in args.implementations:
            row = time_one(model, implementation, tokens, expected)
            rows.append(row)
            print(f"{implementation:<15} {batch:>5} {row['first_token_ms']:>16.2f} "
                  f"{row['tokens_per_second']:>9.1f} {row['error']:>8.1e}", flush=True)  # fmt: skip
            if args.out:
                args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
