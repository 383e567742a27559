"""`python -m moe_ops`: what is built, what this device gets, every operator checked and timed."""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

import moe_ops
from moe_ops import reference
from moe_ops._library import build_info

ALLOWED = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
# Tokens, experts, top-k, hidden and intermediate size of the layer that is checked.
TOKENS, EXPERTS, TOPK, HIDDEN, INTERMEDIATE = 130, 8, 2, 264, 136


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_info(device: str) -> dict:
    name = f"cpu, {torch.get_num_threads()} threads"
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
    return {"name": name, "backends": [b for b in build_info()["backends"] if has(device, b)]}


def has(device: str, backend: str) -> bool:
    a, b = torch.ones(1, 8, device=device), torch.ones(1, 8, 8, device=device)
    offsets = torch.tensor([0, 1], device=device, dtype=torch.int32)
    try:
        moe_ops.grouped_gemm(a, b, offsets, backend=backend)
    except RuntimeError as error:
        if "backend is" not in str(error):
            raise
        return False
    return True


def checks(device: str, dtype: torch.dtype):
    """(operator, its outputs, the reference's in float64)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x = normal(TOKENS, HIDDEN).to(dtype)
    w1 = (normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5).to(dtype)
    w2 = (normal(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5).to(dtype)
    logits = normal(TOKENS, EXPERTS).to(dtype)
    exact = {"compute_dtype": torch.float64}
    routing = weights, ids = moe_ops.topk_route(logits, TOPK)
    yield "topk_route", routing, reference.topk_route(logits, TOPK, **exact)
    order = offsets, slots = moe_ops.sort_by_expert(ids, EXPERTS)
    yield "sort_by_expert", order, reference.sort_by_expert(ids, EXPERTS)
    rows = x[slots.long() // TOPK]
    h1 = moe_ops.grouped_gemm(rows, w1, offsets)
    yield "grouped_gemm", [h1], [reference.grouped_gemm(rows, w1, offsets, **exact)]
    gradient = normal(*h1.shape).to(dtype)
    yield ("grouped_gemm_wgrad", [moe_ops.grouped_gemm_wgrad(gradient, rows, offsets)],
           [reference.grouped_gemm_wgrad(gradient, rows, offsets, **exact)])  # fmt: skip
    yield ("combine", [moe_ops.combine(h1, weights, slots, offsets)],
           [reference.combine(h1, weights, slots, offsets, **exact)])  # fmt: skip
    yield ("fused_moe", [moe_ops.fused_moe(x, w1, w2, weights, ids)],
           [reference.fused_moe(x, w1, w2, weights, ids, **exact)])  # fmt: skip


def error_of(out: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """The relative error, or of integers the share that is wrong; and what is allowed."""
    if not out.is_floating_point():
        return (out != expected).double().mean().item(), 0.0
    difference = (out.double() - expected.double()).norm()
    return (difference / expected.double().norm()).item(), ALLOWED[out.dtype]


def run_checks(device: str) -> list[dict]:
    results = []
    for dtype in ALLOWED:
        for operator, outs, expected in checks(device, dtype):
            errors = [error_of(a, b) for a, b in zip(outs, expected, strict=True)]
            # One output stands for all: one that fails, if any does, and the worst of those.
            error, allowed = max(errors, key=lambda e: (e[0] > e[1], e[0]))
            results.append({"operator": operator, "dtype": name_of(dtype), "error": error,
                            "allowed": allowed, "passed": error <= allowed})  # fmt: skip
    return results


def microseconds(function, device: str) -> float:
    """The fastest of a few calls."""
    best = float("inf")
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 1e6 * best


def run_timings(device: str) -> list[dict]:
    results = []
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    experts, topk, hidden, intermediate = (
        (64, 8, 1024, 512) if device == "cuda" else (8, 2, 256, 512)
    )
    w1 = torch.randn(experts, 2 * intermediate, hidden, device=device).to(dtype) / hidden**0.5
    w2 = torch.randn(experts, hidden, intermediate, device=device).to(dtype) / intermediate**0.5
    for tokens in (1, 32, 512):
        x = torch.randn(tokens, hidden, device=device).to(dtype)
        weights, ids = moe_ops.topk_route(torch.randn(tokens, experts, device=device), topk)
        arguments = (x, w1, w2, weights, ids)
        fused = microseconds(lambda a=arguments: moe_ops.fused_moe(*a), device)
        eager = microseconds(lambda a=arguments: reference.fused_moe(*a), device)
        results.append({"layer": [experts, topk, hidden, intermediate], "dtype": name_of(dtype),
                        "tokens": tokens, "fused_us": fused, "eager_us": eager})  # fmt: skip
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_ops", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="CUDA where there is one")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    report = {"build": build_info(), "torch": torch.__version__, "device": device_info(device),
              "checks": run_checks(device), "timings": run_timings(device)}  # fmt: skip
    passed = all(check["passed"] for check in report["checks"])
    if args.json:
        print(json.dumps(report | {"passed": passed}, indent=1))
    else:
        show(report)
    return 0 if passed else 1


def show(report: dict) -> None:
    build, device = report["build"], report["device"]
    targets = ", ".join(build["cuda_targets"]) or "none: built for the CPU alone"
    print(f"simple_moe {build['version']}, for torch >= {build['torch_target']}"
          f" (this is {report['torch']})\n  CUDA targets  {targets}\n"
          f"  this device   {device['name']}\n  backends      {', '.join(device['backends'])}\n\n"
          "relative error against float64")  # fmt: skip
    dtypes = [name_of(dtype) for dtype in ALLOWED]
    print(f"  {'':<20}" + "".join(f"{dtype:>12}" for dtype in dtypes))
    for operator in dict.fromkeys(check["operator"] for check in report["checks"]):
        found = [c for c in report["checks"] if c["operator"] == operator]
        cells = "".join(f"{c['error']:>11.1e}{' ' if c['passed'] else '!'}" for c in found)
        print(f"  {operator:<20}{cells}")
    failed = [c for c in report["checks"] if not c["passed"]]
    for c in failed:
        print(
            f"  FAILED: {c['operator']} in {c['dtype']}: {c['error']:.1e}, allowed {c['allowed']:.0e}"
        )
    print(f"  {'all right' if not failed else f'{len(failed)} FAILED'}\n")
    layer, dtype = report["timings"][0]["layer"], report["timings"][0]["dtype"]
    experts, topk, hidden, intermediate = layer
    print(f"a layer of {experts} experts, top-{topk}, {hidden} x {intermediate}, {dtype}")
    print(f"  {'tokens':>6} {'fused_moe':>13} {'eager PyTorch':>15} {'speed-up':>9}")
    for t in report["timings"]:
        print(f"  {t['tokens']:>6} {t['fused_us']:>10.0f} µs {t['eager_us']:>12.0f} µs"
              f" {t['eager_us'] / t['fused_us']:>8.1f}x")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
