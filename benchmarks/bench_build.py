"""How long the build takes: all of it, after an edit of one .cu, and with nothing to do.

    python benchmarks/bench_build.py [--json FILE]

Works on a copy of the tree, with no compiler cache. Every .cu gets an edit of its own code, one
after another; the slowest counts. Exits with 1 if a bar is missed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BARS = {"clean": 60.0, "one_cu": 10.0, "no_op": 1.0}  # seconds
CLEAN = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
ENVIRONMENT = {**os.environ, "CCACHE_DISABLE": "1"}


def ninja() -> list[str]:
    """What setup.py calls, without the seconds that it takes itself."""
    try:
        from ninja import BIN_DIR

        return [str(Path(BIN_DIR) / "ninja"), "-f", "build/build.ninja"]
    except ImportError:
        return ["ninja", "-f", "build/build.ninja"]


def seconds(command: list[str], tree: Path) -> tuple[float, str]:
    start = time.perf_counter()
    result = subprocess.run(
        command, cwd=tree, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout[-4000:]}{result.stderr[-4000:]}")
    return time.perf_counter() - start, result.stdout


def copy_of_the_tree(folder: str) -> Path:
    tree = Path(folder) / "simple_moe"
    tree.mkdir()
    for name in ("csrc", "moe_ops"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


def measure() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_the_tree(folder)
        clean, _ = seconds(CLEAN, tree)
        kernels = sorted(tree.glob("csrc/cuda/**/*.cu"))
        if not list(tree.glob("build/**/*.cu.o")):
            sys.exit("no nvcc was found: there is no .cu to time")
        one_cu = {}
        for kernel in kernels:
            with kernel.open("a") as file:
                file.write(f"\n__global__ void edited_{kernel.stem}(float* x) {{ *x += 1.0f; }}\n")
            one_cu[kernel.name], log = seconds(ninja(), tree)
            # That file and the link, nothing else.
            assert "[2/2]" in log and "[3/" not in log, log
        no_op, log = seconds(ninja(), tree)
        assert "no work to do" in log, log
    return {"clean": clean, "one_cu": one_cu, "no_op": no_op, "cores": len(os.sched_getaffinity(0))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    figures = measure()
    slowest = max(figures["one_cu"], key=figures["one_cu"].get)
    missed = False
    for name, what, value in (
        ("clean", "everything, from nothing", figures["clean"]),
        ("one_cu", f"an edit of {slowest}", figures["one_cu"][slowest]),
        ("no_op", "nothing to do", figures["no_op"]),
    ):
        missed |= value > BARS[name]
        verdict = "MISSED" if value > BARS[name] else "ok"
        print(f"{what:<32} {value:6.2f} s   bar {BARS[name]:4.0f} s   {verdict}")
    print(f"on {figures['cores']} cores")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
