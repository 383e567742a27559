"""Which tiles the sm80 backend would pick for every cell on GPUs that aren't here, and why.

    python benchmarks/picks.py [--gpus A100 "RTX 4090"]

No GPU is needed: the library is asked what csrc/cuda/shapes.h chooses from the GPUs' published
figures. The times are floors from the same figures, not measurements.
"""

import argparse
import ctypes
import json
from typing import NamedTuple

from bench_moe import LAYERS

from moe_ops import _library


class Gpu(NamedTuple):
    sms: int
    smem_kb: int  # that one block may have
    tflops: float  # mma.sync, 16-bit operands, float32 sums
    tbps: float


GPUS = {
    "A100": Gpu(108, 163, 312, 1.9),
    "RTX 4090": Gpu(128, 99, 165, 1.0),
    "H100": Gpu(132, 227, 640, 3.35),
    "H200": Gpu(132, 227, 640, 4.8),
}


def plan(layer, tokens: int, gpu: Gpu) -> list[dict]:
    """The tiles of the layer's two products."""
    function = ctypes.CDLL(str(_library.PATH)).simple_moe_plan
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_int64] * 5 + [ctypes.c_int] * 3
    experts, topk, hidden, intermediate = layer[1:5]
    return json.loads(
        function(tokens, topk, experts, hidden, intermediate, 1, gpu.sms, gpu.smem_kb)
    )


def shape(tile: dict) -> str:
    if "threads" in tile:
        return f"1x{tile['cols']} by {tile['threads']}"
    parts = f" in {tile['parts']} parts" if tile["parts"] > 1 else ""
    return "x".join(str(tile[key]) for key in ("rows", "cols", "depth", "stages")) + parts


def floor(layer, tokens: int, gpu: Gpu) -> tuple[float, float]:
    """Microseconds for the bytes of uniform routing and for the operations."""
    experts, topk, hidden, intermediate = layer[1:5]
    active = experts * (1 - (1 - topk / experts) ** tokens)
    moved = 2 * (3 * active * hidden * intermediate + 2 * tokens * hidden)
    return moved / gpu.tbps * 1e-6, 6e-6 * tokens * topk * hidden * intermediate / gpu.tflops


def reason(tile: dict, rows: float, gpu: Gpu) -> str:
    if "threads" in tile:
        blocks = gpu.sms * (1024 // tile["threads"])
        return (f"each slot by itself, no sort; 128 KB in flight an SM;"
                f" {tile['blocks'] / blocks:.1f} rounds of {blocks} blocks")  # fmt: skip
    blocks = gpu.sms * tile["blocks_per_sm"]
    flight = tile["blocks_per_sm"] * (tile["stages"] - 1) * 2 * tile["depth"]
    flight *= tile["rows"] + tile["cols"]
    return (
        f"{rows:.3g} rows an expert; {flight >> 10} KB in flight an SM;"
        f" up to {tile['most_items'] / blocks:.1f} rounds of {blocks} blocks"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=["A100", "RTX 4090"])
    args = parser.parse_args()
    for name in args.gpus:
        gpu = GPUS[name]
        print(f"{name}: {gpu.sms} SMs, {gpu.smem_kb} KB a block, {gpu.tflops:g} TFLOP/s,"
              f" {gpu.tbps:g} TB/s. Tiles: rows x cols x depth x stages, or 1 x cols by threads")  # fmt: skip
        print(f"{'layer':<12} {'tokens':>6} {'floor µs':>9} {'bound':<7} "
              f"{'first, second product':<34} why (the first)")  # fmt: skip
        for layer_name, layer in LAYERS.items():
            for tokens in layer.tokens:
                tiles = plan(layer, tokens, gpu)
                memory, tensor = floor(layer, tokens, gpu)
                slots = tokens * layer.topk
                rows = slots / min(slots, layer.experts)
                print(f"{layer_name:<12} {tokens:>6} {max(memory, tensor):>9.0f} "
                      f"{'memory' if memory > tensor else 'tensor':<7} {', '.join(map(shape, tiles)):<34} "
                      f"{reason(tiles[0], rows, gpu)}")  # fmt: skip
        print()


if __name__ == "__main__":
    main()
