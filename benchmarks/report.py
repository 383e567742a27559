"""bench_moe.py's results as a table and a plot: python benchmarks/report.py FILE.json

Writes FILE.md and FILE.svg beside the JSON, from the JSON alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from figures import best_peer, share, tflops
from plot import svg

# ---- The table ----


class Column(NamedTuple):
    header: str
    width: int
    text: Callable[[dict], str]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def columns(about: dict) -> list[Column]:
    """What a run's table shows, `about` saying what was asked for."""
    ours, peers = about["backends"], about["peers"]

    def us(name: str) -> Callable[[dict], str]:
        return lambda cell: (
            "failed" if name in cell["failed"] else _number(cell["us"].get(name), ".1f")
        )

    def ratio(kind: str, name: str) -> Callable[[dict], str]:
        def text(cell: dict) -> str:
            both = name in cell[kind] and name in cell["us"]
            return f"{cell[kind][name] / cell['us'][name]:.3f}" if both else ""

        return text

    def best(cell: dict) -> str:
        peer = best_peer(cell, ours)
        return f"{peer[1]:.1f} {peer[0]}" if peer else ""

    def best_share(cell: dict) -> str:
        peer = best_peer(cell, ours)
        return _number(peer and share(cell, peer[0]), ".0f")

    def speedup(name: str) -> Callable[[dict], str]:
        def text(cell: dict) -> str:
            peer = best_peer(cell, ours)
            return f"{peer[1] / cell['us'][name]:.2f}" if peer and name in cell["us"] else ""

        return text

    def of_ours(header: str, name: str) -> str:
        return header if name == ours[0] else f"{header} {name}"

    result = [
        Column("layer", 11, lambda cell: cell["layer"]),
        Column("T", 6, lambda cell: str(cell["tokens"])),
        Column("ceiling µs", 10, lambda cell: f"{cell['ceiling_us']:.1f}"),
        Column("by", 3, lambda cell: "mem" if cell["bound"] == "memory" else "TC"),
    ]
    for name in ours + peers:
        result.append(Column(f"{name} µs", 9, us(name)))
        result.append(Column("%", 3, lambda cell, name=name: _number(share(cell, name), ".0f")))
        if name in ours:
            result.append(
                Column("TFLOP/s", 7, lambda cell, name=name: _number(tflops(cell, name), ".0f"))
            )
        result.append(
            Column("error", 7, lambda cell, name=name: _number(cell["error"].get(name), ".1e"))
        )
    if peers or about["published"]:
        result += [
            Column("best peer µs", 19, best),
            Column("%", 3, best_share),
            *(Column(of_ours("speedup", name), 7, speedup(name)) for name in ours),
        ]
    for kind, header in (("zipf_us", "zipf"), ("batch_invariant_us", "invariant")):
        if about[kind]:
            result += [Column(of_ours(header, name), 5, ratio(kind, name)) for name in ours]
    for name in ours:
        header = "MB" if name == ours[0] else f"{name} MB"
        result.append(
            Column(header, 7, lambda cell, name=name: _megabytes(cell["workspace"].get(name)))
        )
    result.append(Column("vLLM's", 7, lambda cell: _megabytes(cell["workspace"]["vllm_formula"])))
    return result


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.2f}"


def legend(about: dict) -> list[str]:
    """What the table's headers don't say."""
    lines = [
        "%: of the ceiling, the larger of bytes / cold read rate (mem) and FLOPs / cuBLAS rate (TC).",
        "error: |out - reference| / |reference|, the reference in float32, on up to 64 tokens.",
        "MB: workspace of a call: T*K*(H + I) elements; where few slots go by themselves T*K*I, where"
        + " k is split up to T*K*3I. And what vLLM's Triton path takes: T*K*(max(2I, H) + I).",
    ]
    if about["peers"] or about["published"]:
        lines.append("speedup: the best peer's time over ours.")
    if about["published"]:
        lines.append(f"*: published, its % is of its own run's ceiling ({about['published']}).")
    if about["zipf_us"]:
        lines.append("zipf: time with Zipf-skewed routing over time with uniform routing.")
    if about["batch_invariant_us"]:
        lines.append("invariant: time with batch_invariant=True over time without.")
    return lines


def table_header(about: dict) -> str:
    return " ".join(_pad(i, c.header, c) for i, c in enumerate(columns(about)))


def table_row(about: dict, cell: dict) -> str:
    row = " ".join(_pad(i, c.text(cell), c) for i, c in enumerate(columns(about)))
    return "\n".join([row, *(f"  {line}" for line in remarks(cell))])


def _pad(index: int, text: str, column: Column) -> str:
    width = max(column.width, len(column.header))
    return text.ljust(width) if index == 0 else text.rjust(width)


def remarks(cell: dict) -> list[str]:
    """What went wrong in a cell."""
    lines = [f"{name} failed: {reason}" for name, reason in cell["failed"].items()]
    if cell["cold_l2"] < 4:
        lines.append(f"not cold: only {cell['cold_l2']:.1f} times the L2 pass between two uses")
    return lines


def facts(results: dict) -> list[tuple[str, str]]:
    about, ceilings = results["about"], results["ceilings"]
    reads = ", ".join(f"{size} MB {gbps / 1e3:.2f}" for size, gbps in ceilings["read_gbps"].items())
    mma = ceilings["mma_sync_tflops"]
    lines = [
        ("GPU", f"{about['gpu']}, driver {about['driver']}"),
        ("software", f"torch {about['torch']}, CUDA {about['cuda']}, Python {about['python']}"),
        ("date, commit", f"{about['date']}, {about['commit']}"),
        ("command", about["command"]),
        ("routing, dtype", f"{about['routing']}, {about['dtype']}"),
        ("cold reads, TB/s", reads),
        ("batched cuBLAS", f"{ceilings['cublas_tflops']:.0f} TFLOP/s"),
        ("mma.sync alone", f"{mma:.0f} TFLOP/s, bfloat16" if mma else "not measured"),
    ]
    if results["host_us"]:
        host = results["host_us"]
        lines.append(
            ("host, one operator call", f"{host['functional']} µs, {host['out']} µs with out=")
        )
    if "seconds" in about:
        lines.append(("time of the run", f"{about['seconds']:.0f} s"))
    return lines + [("note", note) for note in about["notes"]]


def markdown(results: dict, plot: str) -> str:
    about, cells = results["about"], results["cells"]
    shown = columns(about)
    lines = [f"# fused_moe on one {about['gpu']}", ""]
    lines += [f"- {name}: {f'`{text}`' if name == 'command' else text}"
              for name, text in facts(results)]  # fmt: skip
    lines += ["", f"![microseconds and percent of the ceiling over tokens]({plot})", ""]
    lines.append("| " + " | ".join(column.header for column in shown) + " |")
    lines.append("| --- |" + " ---: |" * (len(shown) - 1))
    lines += ["| " + " | ".join(c.text(cell) for c in shown) + " |" for cell in cells]
    lines += [""] + [f"- {line}" for line in legend(about)]
    for cell in cells:
        lines += [f"- {cell['layer']}, {cell['tokens']} tokens: {line}" for line in remarks(cell)]
    return "\n".join(lines) + "\n"


# ---- Files ----


def write(results: dict, stem: Path) -> None:
    """stem.json, stem.md and stem.svg."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    write_views(results, stem)


def write_views(results: dict, stem: Path) -> None:
    plot = stem.name + ".svg"
    stem.with_name(plot).write_text(svg(results))
    stem.with_name(stem.name + ".md").write_text(markdown(results, plot))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.json")
    file = parser.parse_args().file
    write_views(json.loads(file.read_text()), file.with_suffix(""))


if __name__ == "__main__":
    main()
