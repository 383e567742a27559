"""The two programs, python -m moe_ops and python -m moe_ops.demo, and what import says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import needs_compiler

import moe_ops
from moe_ops import __main__ as program
from moe_ops import demo

OPERATORS = {
    "fused_moe", "topk_route", "sort_by_expert", "grouped_gemm", "grouped_gemm_wgrad", "combine",
}  # fmt: skip


def test_report_for_people(device, capsys):
    assert program.main(["--device", device]) == 0
    text = capsys.readouterr().out
    assert all(operator in text for operator in OPERATORS) and "all right" in text


def test_report_for_programs(device, capsys):
    assert program.main(["--device", device, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and {c["operator"] for c in report["checks"]} == OPERATORS
    assert all(t["fused_us"] > 0 for t in report["timings"])
    backends = report["device"]["backends"]
    assert backends[0] == "auto" and set(backends) <= set(report["build"]["backends"])
    if device == "cpu":
        assert backends == ["auto"]


@pytest.mark.parametrize("operator, output", [("topk_route", 1), ("sort_by_expert", 0)])
def test_one_wrong_integer_is_found(operator, output, monkeypatch):
    original = getattr(moe_ops, operator)

    def wrong(*args):
        outputs = original(*args)
        outputs[output][-1:].add_(1)
        return outputs

    monkeypatch.setattr(moe_ops, operator, wrong)
    failed = {c["operator"] for c in program.run_checks("cpu") if not c["passed"]}
    assert operator in failed


def test_every_dtype_is_routed(monkeypatch):
    original, seen = moe_ops.topk_route, set()

    def route(logits, topk):
        seen.add(logits.dtype)
        return original(logits, topk)

    monkeypatch.setattr(moe_ops, "topk_route", route)
    program.run_checks("cpu")
    assert seen == set(program.ALLOWED)


def test_a_failing_check_is_said(monkeypatch, capsys):
    monkeypatch.setattr(program, "ALLOWED", dict.fromkeys(program.ALLOWED, 1e-12))
    assert program.main(["--device", "cpu"]) == 1
    assert "FAILED: fused_moe" in capsys.readouterr().out


def test_demo(device, capsys):
    assert demo.main(["--steps", "4", "--device", device]) == 0
    text = capsys.readouterr().out
    for part in ("agree:", "What it writes", "layer 3", "times as fast"):
        assert part in text


def test_demo_refuses_no_steps(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0"])
    assert "--steps" in capsys.readouterr().err


def import_error(folder: Path, library: Path | None) -> str:
    """What a copy of the package says with this file in the place of its library."""
    package = folder / "moe_ops"
    shutil.copytree(Path(moe_ops.__file__).parent, package, ignore=shutil.ignore_patterns("*.so"))
    if library:
        shutil.copy(library, package / "libsimple_moe.so")
    command = [sys.executable, "-c", "import moe_ops"]
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode
    return result.stderr.strip().splitlines()[-1]


def test_import_without_the_library(tmp_path):
    message = import_error(tmp_path, None)
    assert message.startswith("ImportError: simple_moe's compiled library is missing")
    assert "pip install" in message


def test_import_with_a_file_that_is_no_library(tmp_path):
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"no library")
    message = import_error(tmp_path, garbage)
    assert message.startswith("ImportError: simple_moe's compiled library can't be loaded")
    assert torch.__version__ in message and "pip install" in message


@needs_compiler
def test_import_with_somebody_elses_library(tmp_path):
    source = tmp_path / "other.c"
    source.write_text("int other(void) { return 0; }\n")
    compiler = shutil.which("g++") or shutil.which("clang++")
    library = tmp_path / "other.so"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    message = import_error(tmp_path, library)
    assert message.startswith("ImportError:") and "isn't simple_moe's library" in message
