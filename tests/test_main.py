"""The two programs: python -m moe_ops and python -m moe_ops.demo."""

import json

import pytest

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
