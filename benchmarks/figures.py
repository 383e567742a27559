"""What bench_moe.py's results say, cell by cell."""

from __future__ import annotations


def best_peer(cell: dict, ours: list[str]) -> tuple[str, float] | None:
    """The fastest that isn't ours, timed in the same run or published: (name, microseconds)."""
    timed = {name: us for name, us in cell["us"].items() if name not in ours}
    published = {
        f"{name}*": us for name, us in cell["published"].get("us", {}).items() if name not in ours
    }
    return min((timed | published).items(), key=lambda item: item[1], default=None)


def share(cell: dict, name: str) -> float | None:
    """Percent of the ceiling; of its own run's where the figure was published."""
    if name.endswith("*"):
        us, ceiling = cell["published"].get("us", {}).get(name[:-1]), cell["published"]
    else:
        us, ceiling = cell["us"].get(name), cell
    return us and 100 * ceiling["ceiling_us"] / us


def tflops(cell: dict, name: str) -> float | None:
    return 1e-6 * cell["flops"] / cell["us"][name] if name in cell["us"] else None
