"""Checks a wheel as its users will meet it: python .ci/check_wheel.py dist/*.whl

Its name, whose tag setup.py gives it by the system symbols it asks for, its size, what is in it;
then it is installed into an empty folder and runs from there, away from the checkout.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MOST_BYTES = 20 << 20


def main(wheel: Path) -> None:
    name, _, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("simple_moe", "py3", "none"), wheel.name
    assert platform.startswith("manylinux_2_34_"), wheel.name
    size = wheel.stat().st_size
    assert size < MOST_BYTES, f"{size / 2**20:.1f} MB"
    files = set(zipfile.ZipFile(wheel).namelist())
    for wanted in ("__init__.py", "py.typed", "libsimple_moe.so", "flashinfer.py"):
        assert f"moe_ops/{wanted}" in files, f"{wanted} is not in the wheel"
    strays = [f for f in files if not f.startswith(("moe_ops/", "simple_moe-"))]
    assert not strays, f"not ours: {strays}"
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, wheel.resolve()], check=True)
        code = f"import moe_ops; assert moe_ops.__file__.startswith({folder!r}), moe_ops.__file__"
        environment = os.environ | {"PYTHONPATH": folder}
        for arguments in (["-c", code], ["-m", "moe_ops"]):
            subprocess.run(
                [sys.executable, *arguments], cwd=folder, env=environment, check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
    print(f"{wheel.name}: {size / 2**20:.1f} MB, all right")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
