"""What ptxas said of every kernel when the library was built."""

import re
from pathlib import Path

import pytest

from moe_ops._library import build_info

ROOT = Path(__file__).parents[1]
# Of the sources that there are: a report may outlive its source.
REPORTS = [
    ROOT / "build" / f"{source.relative_to(ROOT)}.o.ptxas.txt"
    for source in sorted(ROOT.glob("csrc/cuda/**/*.cu"))
    if "_sm90_" not in source.name or "sm90" in build_info()["backends"]
]
needs_reports = pytest.mark.skipif(
    not any(report.exists() for report in REPORTS),
    reason="needs the folder build/ of a build with nvcc",
)


@needs_reports
def test_no_kernel_spills_or_has_a_stack_frame():
    kernels = 0
    for report in REPORTS:
        text = report.read_text()
        found = re.findall(
            r"properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", text
        )
        kernels += text.count("Compiling entry function")
        bad = [name for name, *used in found if any(map(int, used))]
        assert len(found) >= text.count("Compiling entry function")
        assert not bad, f"{report.name}: {bad}"
    assert kernels


@needs_reports
def test_every_source_was_compiled_for_every_target():
    machine_code = {t for t in build_info()["cuda_targets"] if t.startswith("sm_")}
    for report in REPORTS:
        expected = {"sm_90a"} if "_sm90_" in report.name else machine_code  # wgmma's own
        assert set(re.findall(r"for '(sm_\w+)'", report.read_text())) == expected
