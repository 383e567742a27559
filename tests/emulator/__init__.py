"""Runs the CUDA kernels' own source on the CPU, in a process of its own.

    emulator = Emulator(build())
    offsets, slots, rows = emulator.sort_by_expert(topk_ids, num_experts)

g++ compiles csrc/cuda/*.cu with emulator.h in the place of CUDA and with AddressSanitizer. The
threads of a block take turns in an order that follows from `seed`.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from moe_ops import reference

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulator"
FLAGS = [
    "-std=c++20",
    "-g1",
    "-fsanitize=address,alignment",
    "-fno-sanitize-recover=all",
    "-ffp-contract=off",
    "-DSIMPLE_MOE_SM90",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# As the enumerations of params.h number them.
ACTIVATIONS = list(reference.ACTIVATIONS)
GATE_LAYOUTS = list(reference.GATE_LAYOUTS)
TIMEOUT = 120  # seconds for one request


class EmulatorError(RuntimeError):
    """What the kernels did wrong: ASan's story, a deadlock, a launcher's exception."""


# ---- build ----


def _with_includes(tree: Path, path: Path, seen: dict) -> dict:
    """The file and all it includes by name, with their texts."""
    seen[path.relative_to(tree)] = text = path.read_text()
    for name in re.findall(r'#include "([^"]+)"', text):
        for folder in (path.parent, tree / "csrc"):
            included = Path(os.path.normpath(folder / name))
            if included.exists() and included.relative_to(tree) not in seen:
                _with_includes(tree, included, seen)
    return seen


def _key(*parts) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def _run_compiler(command: list, output: Path) -> None:
    """Another process may want the same file: it appears under its name when it's whole."""
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        unfinished = Path(folder) / output.name
        command = [*command, "-o", unfinished]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr[:8000]}")
        os.replace(unfinished, output)


def _compile(tree: Path, source: Path, optimize: str) -> Path:
    forced = tree / "tests/emulator/emulator.h"
    texts = _with_includes(tree, source, _with_includes(tree, forced, {}))
    output = BUILD / f"{source.stem}-{_key(optimize, FLAGS, sorted(texts.items()))}.o"
    if not output.exists():
        includes = ["-I", tree / "tests/emulator/stubs", "-I", tree / "csrc", "-include", forced]
        _run_compiler(["g++", optimize, *FLAGS, *includes, "-x", "c++", "-c", source], output)
    return output


def _sources() -> list[Path]:
    sources = [ROOT / "tests/emulator" / f for f in ("driver.cpp", "fibers.cpp", "toys.cu")]
    sources.append(ROOT / "csrc/cuda/grouped_gemm.cpp")
    # device.cu has a kernel that a real GPU is asked about: the driver has its own device.
    return sources + sorted(set((ROOT / "csrc/cuda").glob("*.cu")) - {ROOT / "csrc/cuda/device.cu"})


class Bug(NamedTuple):
    """A text of a file, what stands in its place, and the sources that are compiled with that: the
    others are as they are in the tree."""

    file: str
    old: str
    new: str
    sources: list[str]


def build(bug: Bug | None = None) -> Path:
    """The emulator's program, with a bug planted in a copy of the tree."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as copy:
        tree = Path(copy)
        for path in [*ROOT.glob("csrc/**/*.*"), *ROOT.glob("tests/emulator/**/*.*")] if bug else []:
            if path.suffix not in (".cu", ".cuh", ".cpp", ".h"):
                continue
            name, text = path.relative_to(ROOT), path.read_text()
            if str(name) == bug.file:
                assert bug.old in text, f"{name} has no {bug.old!r}"
                text = text.replace(bug.old, bug.new, 1)
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text)
        with_bug = [ROOT / name for name in bug.sources] if bug else []

        def compiled(source: Path) -> Path:
            # With a bug for one short test, which compiling takes longer than.
            if source in with_bug:
                return _compile(tree, tree / source.relative_to(ROOT), "-O0")
            return _compile(ROOT, source, "-O1")

        # Of an inline function that several have, the linker takes the first: the bug's.
        sources = sorted(_sources(), key=lambda source: source not in with_bug)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sources))
        program = BUILD / f"emulator-{_key(*objects)}"
        if not program.exists():
            _run_compiler(["g++", "-fsanitize=address,alignment", *objects], program)
        return program


# ---- run ----


def _id_scalars(topk_ids, expert_offset):
    ids_are_int64 = topk_ids is not None and topk_ids.dtype == torch.int64
    return dict(ids_are_int64=ids_are_int64, expert_offset=expert_offset)


def _storage(t: torch.Tensor) -> torch.Tensor:
    """A strided tensor's memory from its first element to its last."""
    if t.numel() == 0:
        return t.new_empty(0)
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.as_strided((span,), (1,))


class Emulator:
    """Any keyword that a method doesn't name goes to `run`."""

    def __init__(self, program: Path):
        self.program = program
        self.process = None

    def close(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.stderr.close()
            self.process = None

    def run(self, operator, scalars, inputs, outputs, *, seed=0, sm_count=3,
            smem_per_block=227 << 10, smem_per_sm=228 << 10, offsets=None):  # fmt: skip
        """`outputs` are tensors to take shape, strides and dtype from. `offsets`: by how many
        bytes an array misses alignment."""
        if not self.process:
            self.stderr = tempfile.TemporaryFile()
            options = "detect_leaks=0:detect_stack_use_after_return=0:redzone=256"
            self.process = subprocess.Popen(
                [self.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr,
                env={**os.environ, "ASAN_OPTIONS": options},
            )  # fmt: skip
        inputs = {name: t for name, t in inputs.items() if t is not None}
        scalars = {**scalars, "seed": seed, "sm_count": sm_count,
                   "smem_per_block": smem_per_block, "smem_per_sm": smem_per_sm}  # fmt: skip
        lines = [f"{operator} {len(scalars)} {len(inputs) + len(outputs)}"]
        lines += [f"{name} {float(value)!r}" for name, value in scalars.items()]
        data = b""
        for kind, tensors in (("in", inputs), ("out", outputs)):
            for name, t in tensors.items():
                memory = _storage(t)
                lines.append(f"{name} {kind} {DTYPES.get(t.dtype, -1)} {memory.nbytes}"
                             f" {(offsets or {}).get(name, 0)}")  # fmt: skip
                data += ctypes.string_at(memory.data_ptr(), memory.nbytes) if kind == "in" else b""
        timer = threading.Timer(TIMEOUT, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write("\n".join(lines).encode() + b"\n" + data)
            self.process.stdin.flush()
            answer = self.process.stdout.readline().decode().strip()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if answer != "ok":
            if not answer:
                self.process.wait()
                self.stderr.seek(0)
                answer = f"exit {self.process.returncode}: {self.stderr.read(6000).decode()}"
                self.close()
            raise EmulatorError(answer)
        results = []
        for t in outputs.values():
            memory = _storage(t)
            read = self.process.stdout.read(memory.nbytes)
            flat = torch.frombuffer(bytearray(read), dtype=t.dtype) if read else memory
            results.append(flat.as_strided(t.shape, t.stride()))
        return results[0] if len(results) == 1 else results

    # ---- the operators ----

    def topk_route(self, logits, topk, *, bias=None, scoring="softmax", renormalize=True,
                   num_groups=1, topk_groups=1, scaling=1.0, **machine):  # fmt: skip
        tokens, experts = logits.shape
        scalars = dict(tokens=tokens, experts=experts, topk=topk, sigmoid=scoring == "sigmoid",
                       renormalize=renormalize, num_groups=num_groups, topk_groups=topk_groups,
                       scaling=scaling)  # fmt: skip
        outputs = dict(weights=torch.empty(tokens, topk),
                       ids=torch.empty(tokens, topk, dtype=torch.int32))  # fmt: skip
        return self.run("topk_route", scalars, dict(logits=logits, bias=bias), outputs, **machine)

    def sort_by_expert(self, topk_ids, num_experts, expert_offset=0, *, topk=1, topk_weights=None,
                       tile_height=0, tile_unit_log2=4, **machine):  # fmt: skip
        """expert_offsets, sorted_slots; with topk_weights also source_rows, row_weights
        and, at a tile_height, the row tiles (the first holds their count)."""
        slots = topk_ids.numel()
        scalars = dict(slots=slots, experts=num_experts, topk=topk, tile_height=tile_height,
                       tile_unit_log2=tile_unit_log2, **_id_scalars(topk_ids, expert_offset))  # fmt: skip
        sizes = dict(expert_offsets=num_experts + 1, sorted_slots=slots)
        if topk_weights is not None:
            sizes |= dict(source_rows=slots)
        outputs = {k: torch.empty(size, dtype=torch.int32) for k, size in sizes.items()}
        if topk_weights is not None:
            outputs["row_weights"] = torch.empty(slots)
        if tile_height:
            tiles = 1 + slots // tile_height + min(slots, num_experts)
            outputs["row_tiles"] = torch.empty(tiles, 4, dtype=torch.int32)
        inputs = dict(topk_ids=topk_ids, topk_weights=topk_weights)
        return self.run("sort_by_expert", scalars, inputs, outputs, **machine)

    def sort_by_expert_counts(self, slots, experts, **machine):
        scalars, out = dict(n=slots.numel(), experts=experts), torch.empty_like(slots)
        return self.run(
            "sort_by_expert_counts", scalars, dict(slots=slots), dict(out=out), **machine
        )

    def grouped_gemm(self, a, b, expert_offsets, *, rows=None, bias=None, source_rows=None,
                     out_rows=None, activation="identity", gate_layout="gate_up",
                     alpha=None, beta=None, limit=None, row_weights=None, out_dtype=None,
                     out_padding=0, zero_other_rows=True, columns=None, topk_ids=None, topk=1,
                     expert_offset=0, is_second=False, progress=None, sm90=False, split_log2=0,
                     in_order=False, **machine):  # fmt: skip
        """alpha, beta, limit: tensors, one value per expert. `out_padding`: elements between rows.
        `columns`: of the layer, for which the row tiles are planned. `topk_ids`: in the place of
        expert_offsets, for grouped_gemv. `progress`: True for a first product that is to return its
        own too, the tensor for a second one. `in_order`: grouped_gemv is to add as the tiles do.
        `split_log2`: of the parts that k is split in, whose sums are returned side by side,
        [rows, parts * n]."""
        experts, n, k = b.shape
        entry = reference.ACTIVATIONS[activation]
        n //= 2 if entry.gated else 1
        width = n << split_log2
        rows = a.shape[0] if rows is None else rows
        inputs = dict(a=a, b=b, expert_offsets=expert_offsets, source_rows=source_rows,
                      out_rows=out_rows, topk_ids=topk_ids, bias=bias, row_weights=row_weights,
                      expert_alpha=alpha, expert_beta=beta, expert_limit=limit)  # fmt: skip
        scalars = dict(a_stride=a.stride(0), rows=rows, n=n, k=k >> split_log2, experts=experts,
                       b_expert_stride=b.stride(0),
                       b_row_stride=b.stride(1), b_col_stride=b.stride(2),
                       activation=ACTIVATIONS.index(activation),
                       gate_layout=GATE_LAYOUTS.index(gate_layout), out_stride=width + out_padding,
                       zero_other_rows=zero_other_rows, columns=columns or n, sm90=sm90,
                       topk=topk, is_second=is_second, split_log2=split_log2, in_order=in_order,
                       **_id_scalars(topk_ids, expert_offset),
                       **dict(alpha=0, beta=0, limit=0) | entry.defaults)  # fmt: skip
        out_rows = rows // topk if is_second else rows
        out = torch.empty_strided((out_rows, width), (width + out_padding, 1),
                                  dtype=out_dtype or a.dtype)  # fmt: skip
        outputs = dict(out=out)
        if is_second:
            inputs["progress"] = progress
        elif progress:
            outputs["progress"] = torch.empty(rows, dtype=torch.int32)
        operator = "grouped_gemm" if topk_ids is None else "grouped_gemv"
        return self.run(operator, scalars, inputs, outputs, **machine)

    def grouped_gemv(self, a, b, topk_ids, **arguments):
        tokens, topk = topk_ids.shape
        return self.grouped_gemm(a, b, None, rows=tokens * topk, topk_ids=topk_ids, topk=topk,
                                 **arguments)  # fmt: skip

    def grouped_gemm_wgrad(self, a, b, expert_offsets, *, out_dtype=None, **machine):
        (rows, m), n, experts = a.shape, b.shape[1], expert_offsets.numel() - 1
        scalars = dict(a_stride=a.stride(0), b_stride=b.stride(0), rows=rows, m=m, n=n,
                       experts=experts)  # fmt: skip
        inputs = dict(a=a, b=b, expert_offsets=expert_offsets)
        out = torch.empty(experts, m, n, dtype=out_dtype or a.dtype)
        return self.run("grouped_gemm_wgrad", scalars, inputs, dict(out=out), **machine)

    def combine(self, expert_out, weights, *, tokens, topk, sorted_slots=None, expert_offsets=None,
                topk_ids=None, experts=0, expert_offset=0, split_log2=0, out_dtype=None,
                **machine):  # fmt: skip
        """`topk_ids`: rows in the slots' order, in the place of the two before it; `split_log2`: of
        how many rows a slot then has."""
        rows, hidden = expert_out.shape
        experts = experts if expert_offsets is None else expert_offsets.numel() - 1
        scalars = dict(expert_out_stride=expert_out.stride(0), tokens=tokens, hidden=hidden,
                       rows=rows, topk=topk, experts=experts, split_log2=split_log2,
                       **_id_scalars(topk_ids, expert_offset))  # fmt: skip
        inputs = dict(expert_out=expert_out, weights=weights, topk_ids=topk_ids,
                      sorted_slots=sorted_slots, expert_offsets=expert_offsets)  # fmt: skip
        out = torch.empty(tokens, hidden, dtype=out_dtype or expert_out.dtype)
        return self.run("combine", scalars, inputs, dict(out=out), **machine)

    # ---- the emulator's own ----

    def toy_gemm(self, a, b, *, b_is_k_by_n=False, **machine):
        n = b.shape[1 if b_is_k_by_n else 0]
        scalars = dict(m=a.shape[0], n=n, k=a.shape[1], b_is_k_by_n=b_is_k_by_n)
        out = torch.empty(a.shape[0], n)
        return self.run("toy_gemm", scalars, dict(a=a, b=b), dict(out=out), **machine)

    def toy_scan(self, x, **machine):
        return self.run("toy_scan", dict(n=x.numel()), dict(x=x), dict(out=x), **machine)

    def toy_divide(self, x, divisor, **machine):
        return self.run("toy_divide", dict(n=x.numel(), divisor=divisor), dict(x=x), dict(out=x),
                        **machine)  # fmt: skip

    def toy_tiles(self, expert_offsets, *, rows, column_tiles, group, **machine):
        """-1 where no tile lies."""
        experts = expert_offsets.numel() - 1
        scalars = dict(experts=experts, rows=rows, column_tiles=column_tiles, group=group)
        out = torch.empty(rows, column_tiles, dtype=torch.int32)
        inputs = dict(expert_offsets=expert_offsets)
        out = self.run("toy_tiles", scalars, inputs, dict(out=out), **machine)
        return torch.where(out == 0x7F7F7F7F, -1, out)
