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


MOST_SMEM_KB = 1000  # more than any tile's


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


def reason(layer, tokens: int, gpu: Gpu, product: int) -> str:
    """What one of the two products' tile has in flight, and what ruled out a better one."""
    tile = plan(layer, tokens, gpu)[product]
    if "threads" in tile:  # 1024 threads an SM, 8 loads of 16 bytes each
        blocks = gpu.sms * (1024 // tile["threads"])
        return (f"each slot by itself, no sort; 128 KB in flight an SM;"
                f" {tile['blocks'] / blocks:.1f} rounds of {blocks} blocks")  # fmt: skip
    blocks = gpu.sms * tile["blocks_per_sm"]
    flight = tile["blocks_per_sm"] * (tile["stages"] - 1) * 2 * tile["depth"]
    flight *= tile["rows"] + tile["cols"]
    why = (
        f"{flight >> 10} KB in flight an SM;"
        f" up to {tile['most_items'] / blocks:.1f} rounds of {blocks} blocks"
    )
    # What the same GPU would get with all the shared memory that any tile wants, or one SM to fill.
    with_memory = plan(layer, tokens, gpu._replace(smem_kb=MOST_SMEM_KB))[product]
    with_few = plan(layer, tokens, gpu._replace(sms=1))[product]
    if shape(with_memory) != shape(tile):
        blocks_of = f"{with_memory['blocks_per_sm']} x " * (with_memory["blocks_per_sm"] > 1)
        why += f"; {shape(with_memory)} needs {blocks_of}{with_memory['kb']} KB"
    if shape(with_few) not in (shape(tile), shape(with_memory)):
        why += f"; too few of {shape(with_few)}"
    return why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=["A100", "RTX 4090"])
    args = parser.parse_args()
    for name in args.gpus:
        gpu = GPUS[name]
        print(f"{name}: {gpu.sms} SMs, {gpu.smem_kb} KB a block, {gpu.tflops:g} TFLOP/s,"
              f" {gpu.tbps:g} TB/s. Tiles: rows x cols x depth x stages, or 1 x cols by threads")  # fmt: skip
        print(f"{'layer':<12} {'tokens':>6} {'floor µs':>9} {'bound':<7} "
              f"{'rows an expert':>14}  first product, second, and why")  # fmt: skip
        for layer_name, layer in LAYERS.items():
            for tokens in layer.tokens:
                tiles = plan(layer, tokens, gpu)
                memory, tensor = floor(layer, tokens, gpu)
                slots = tokens * layer.topk
                rows = slots / min(slots, layer.experts)
                cell = (f"{layer_name:<12} {tokens:>6} {max(memory, tensor):>9.0f} "
                        f"{'memory' if memory > tensor else 'tensor':<7} {rows:>14.0f}")  # fmt: skip
                for product, tile in enumerate(tiles):
                    why = reason(layer, tokens, gpu, product)
                    print(f"{cell * (product == 0):<51}  {shape(tile)}: {why}")
        print()


if __name__ == "__main__":
    main()
