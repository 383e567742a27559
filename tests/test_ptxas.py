"""What ptxas said of every kernel when the library was built."""

import re
from pathlib import Path

import pytest

from moe_ops._library import build_info

ROOT = Path(__file__).parents[1]
REPORTS = sorted(ROOT.glob("build/csrc/cuda/*.ptxas.txt"))
needs_reports = pytest.mark.skipif(
    not REPORTS, reason="needs the folder build/ of a build with nvcc"
)


@needs_reports
def test_no_kernel_spills_or_has_a_stack_frame():
    kernels = 0
    for report in REPORTS:
        text = report.read_text()
        found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", text)
        kernels += len(found)
        names = re.findall(r"Compiling entry function '(\w+)'", text)
        bad = [n for n, f in zip(names, found, strict=True) if f != ("0", "0", "0")]
        assert not bad, f"{report.name}: {bad}"
    assert kernels


@needs_reports
def test_every_source_was_compiled_for_every_target():
    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    assert {r.name for r in REPORTS} == {f"{s.name}.o.ptxas.txt" for s in sources}
    machine_code = [t for t in build_info()["cuda_targets"] if t.startswith("sm_")]
    for report in REPORTS:
        assert set(re.findall(r"for '(sm_\w+)'", report.read_text())) == set(machine_code)
