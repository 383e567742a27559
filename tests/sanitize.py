"""A small suite for compute-sanitizer: every operator, dtype, tile height and misalignment.

compute-sanitizer --tool memcheck  python tests/sanitize.py
compute-sanitizer --tool racecheck python tests/sanitize.py

Of some dtypes alone where named, as in sanitize.py float16: racecheck takes minutes for each. The
tiles are those that a GPU of 12 multiprocessors gets, which needs less work for the large ones;
SIMPLE_MOE_TEST_DEVICE=sms=12,smem_kb=163 has those of an A100.
"""

import os
import sys

os.environ.setdefault("SIMPLE_MOE_TEST_DEVICE", "sms=12")  # before the library is asked anything

import torch
from helpers import DTYPES, TOLERANCE, assert_accurate, require_gradients
from strategies import CombineCase, GemmCase, MoeCase, RouteCase

import moe_ops
from moe_ops import reference
from moe_ops.__main__ import has


def main(names: list[str]) -> None:
    checked = 0
    backends = [b for b in ("sm80", "sm90") if has("cuda", b)]
    for dtype in [getattr(torch, name) for name in names] or DTYPES:
        for tokens, layout, routing, hidden in (
            # Each slot by itself: 4 columns a block, and 8.
            (1, "contiguous", "uniform", 264),
            (1, "contiguous", "masked", 2200),
            (65, "misaligned", "masked", 264),
            (130, "padded", "skewed", 130),
            (700, "contiguous", "idle", 72),
            (300, "transposed", "uniform", 72),
            # Row tiles of 16, 32, 64 and 160 (256 columns in four slots and in three, and 128) in
            # the kernels for whole vectors, of 128 and 192 (by 192 and by 128) by wgmma; and many.
            (20, "contiguous", "skewed", 264),
            (60, "contiguous", "skewed", 264),
            (160, "contiguous", "masked", 264),
            (400, "contiguous", "skewed", 264),
            (700, "contiguous", "skewed", 264),
            (2000, "contiguous", "skewed", 72),
            (18, "contiguous", "masked", 64),  # k of the second product in two parts
            (400, "contiguous", "skewed", 1544),  # long enough for items to be claimed late
        ):
            case = MoeCase(
                tokens=tokens, layout=layout, routing=routing, hidden=hidden, dtype=dtype,
                intermediate=72 if tokens == 1 else {64: 1040, 1544: 72}.get(hidden, hidden),
                bias="float32", ids_dtype=torch.int64,
            )  # fmt: skip
            arguments = case.arguments("cuda")
            expected = reference.fused_moe(**arguments, compute_dtype=torch.float64)
            by_each = hidden in (264, 1544) and tokens > 200 and dtype != torch.float32
            for backend in backends if by_each else ["auto"]:
                out = moe_ops.fused_moe(**arguments, backend=backend)
                assert_accurate(out, expected, TOLERANCE[dtype])
                checked += 1
            if tokens == 1:
                out = moe_ops.fused_moe(**arguments, batch_invariant=True)
                assert_accurate(out, expected, TOLERANCE[dtype])
                checked += 1
        arguments = MoeCase(tokens=40, dtype=dtype, bias="float32").arguments("cuda")
        leaves = require_gradients(arguments, ["x", "w1", "w2", "b1", "b2", "topk_weights"])
        torch.autograd.grad(moe_ops.fused_moe(**arguments).float().sum(), leaves)
        for offsets in ("uniform", "malformed"):
            case = GemmCase(rows=130, n=130, k=72, dtype=dtype, offsets=offsets)
            moe_ops.grouped_gemm(**case.arguments("cuda"))
            moe_ops.grouped_gemm_wgrad(**case.wgrad_arguments("cuda"))
        moe_ops.combine(**CombineCase(MoeCase(dtype=dtype, routing="masked")).arguments("cuda"))
        for route in (RouteCase(dtype=dtype), RouteCase(num_groups=4, topk_groups=2, dtype=dtype)):
            moe_ops.topk_route(**route.arguments("cuda"))
        checked += 8
    ids = torch.randint(-1, 1026, (9000, 2), device="cuda")
    moe_ops.sort_by_expert(ids, 1025)  # in two kernels
    torch.cuda.synchronize()
    print(f"{checked + 1} calls, all right")


if __name__ == "__main__":
    main(sys.argv[1:])
