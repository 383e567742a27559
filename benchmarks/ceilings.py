"""What this GPU can do at most: cold reads, batched cuBLAS, mma.sync from registers."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import REST_SECONDS, replay_us
from peers import reason
from torch import Tensor

MEGABYTES = (16, 32, 64, 128, 256, 512, 1024, 4096, 16384)  # of 1e6 bytes
CUBLAS = (8, 4096, 4096, 14336)  # experts, rows of each, hidden, intermediate: Mixtral's 16384
BLOCKS_PER_SM = {"mma_sync": 2, "read_once": 4}  # as peaks.cu bounds its launches
MMA_ITERATIONS = 1 << 16


@dataclasses.dataclass
class Ceilings:
    read_gbps: dict[int, float]  # by megabytes read cold
    cublas_tflops: float
    mma_sync_tflops: float | None
    notes: list[str]

    def gbps(self, size: float) -> float:
        """Interpolated in the logarithm of the size."""
        position = math.log(size / 1e6)
        known = [(math.log(megabytes), gbps) for megabytes, gbps in sorted(self.read_gbps.items())]
        if position <= known[0][0]:
            return known[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(known):
            if position <= x1:
                return y0 + (y1 - y0) * (position - x0) / (x1 - x0)
        return known[-1][1]

    def of(self, size: float, flops: float) -> tuple[float, str]:
        """(the least microseconds for so many bytes and FLOPs, what they are bound by)"""
        memory = size / self.gbps(size) * 1e-3
        tensor_cores = flops / self.cublas_tflops * 1e-6
        bound = "memory" if memory >= tensor_cores else "tensor cores"
        return max(memory, tensor_cores), bound


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    peaks, notes = _compiled_peaks()
    return Ceilings(
        read_gbps=_read_gbps(peaks),
        cublas_tflops=round(_cublas_tflops(dtype), 1),
        mma_sync_tflops=round(_mma_sync_tflops(peaks), 1) if peaks else None,
        notes=notes,
    )


def _compiled_peaks() -> tuple[ctypes.CDLL | None, list[str]]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=Path(home, "bin")) or shutil.which("nvcc")
    without = "mma.sync alone was not measured, reads only through torch's own operators"
    if nvcc is None:
        return None, [f"no nvcc was found: {without}"]
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peaks.so"
        command = [nvcc, "-O3", "-shared", "-Xcompiler", "-fPIC", "-gencode",
                   f"arch=compute_{arch},code=sm_{arch}", "-o", library,
                   Path(__file__).with_name("peaks.cu")]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            log = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
            return None, [f"nvcc failed ({log[-1]}): {without}"]
        try:
            return ctypes.CDLL(str(library)), []
        except OSError as error:
            return None, [f"peaks.cu's library can't be loaded ({reason(error)}): {without}"]


def _blocks(kernel: str) -> int:
    return BLOCKS_PER_SM[kernel] * torch.cuda.get_device_properties().multi_processor_count


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"peaks.cu: CUDA error {status}")


def _read_gbps(peaks: ctypes.CDLL | None) -> dict[int, float]:
    """The best of several ways to read, each size in parts of a buffer far larger than the L2."""
    sink = torch.zeros(1, device="cuda", dtype=torch.int32)

    def kernel(part: Tensor) -> None:
        _check(
            peaks.read_once(
                _blocks("read_once"), ctypes.c_void_p(part.data_ptr()),
                ctypes.c_size_t(part.nbytes), ctypes.c_void_p(sink.data_ptr()),
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            )
        )  # fmt: skip

    def row_sums(part: Tensor) -> None:
        part.view(torch.float32).view(-1, 4000).sum(dim=1)

    def copy(part: Tensor) -> None:  # Half of the bytes are read, half written.
        source, target = part.chunk(2)
        target.copy_(source)

    ways = [row_sums, copy] + ([kernel] if peaks else [])
    properties = torch.cuda.get_device_properties()
    rates = {}
    for megabytes in MEGABYTES:
        size = megabytes * 1_000_000
        parts = 1 + math.ceil(5 * properties.L2_cache_size / size)
        if parts * size > properties.total_memory / 2:
            break
        buffer = torch.empty(parts, size // 4, device="cuda", dtype=torch.int32).random_()
        rates[megabytes] = round(size / min(_read_us(way, buffer) for way in ways) * 1e-3)
        del buffer  # before the next is allocated
    return rates


def _read_us(way: Callable[[Tensor], None], buffer: Tensor) -> float:
    """Microseconds of a read of one of the buffer's parts."""
    rounds = math.ceil(4e9 / buffer.nbytes)  # A replay takes a millisecond or more.
    way(buffer[0])

    def read_all() -> None:
        for _ in range(rounds):
            for part in buffer:
                way(part)

    us, _ = replay_us(read_all, seconds=0.05)
    return us / (rounds * len(buffer))


def _cublas_tflops(dtype: torch.dtype) -> float:
    experts, rows, hidden, intermediate = CUBLAS

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype).normal_()

    x, w1 = normal(experts, rows, hidden), normal(experts, 2 * intermediate, hidden)
    a, w2 = normal(experts, rows, intermediate), normal(experts, hidden, intermediate)

    def products() -> None:
        torch.bmm(x, w1.transpose(1, 2))
        torch.bmm(a, w2.transpose(1, 2))

    products()
    us, _ = replay_us(products)
    return 6e-6 * experts * rows * hidden * intermediate / us


def _mma_sync_tflops(peaks: ctypes.CDLL) -> float:
    sink = torch.zeros(256, device="cuda")
    blocks, milliseconds, times = _blocks("mma_sync"), ctypes.c_float(), []
    torch.cuda.synchronize()
    time.sleep(REST_SECONDS)
    for _ in range(6):
        address = ctypes.c_void_p(sink.data_ptr())
        _check(peaks.mma_sync(blocks, MMA_ITERATIONS, address, ctypes.byref(milliseconds)))
        times.append(milliseconds.value)
    # 8 warps a block, 16 instructions a warp and iteration, 4096 FLOPs an instruction.
    return blocks * 8 * 16 * 4096 * MMA_ITERATIONS / statistics.median(times[1:]) * 1e-9
