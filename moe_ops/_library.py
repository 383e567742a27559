"""The compiled library: found, loaded, asked what it is."""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path

import torch

PATH = Path(__file__).parent / "libsimple_moe.so"
_WHAT_TO_RUN = "run `pip install --no-build-isolation -e .` in a checkout, or reinstall simple-moe"


def load() -> None:
    """Registers torch.ops.simple_moe.*.

    Raises:
        ImportError: the library isn't there, or isn't one that this torch can load.
    """
    if not PATH.exists():
        raise ImportError(f"simple_moe's compiled library is missing ({PATH}): {_WHAT_TO_RUN}")
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        raise ImportError(
            f"simple_moe's compiled library can't be loaded ({error}). It needs torch >= 2.10, this"
            f" is {torch.__version__}: {_WHAT_TO_RUN}"
        ) from error
    build_info()  # Any library can be loaded: this one says what it is.


@functools.cache
def build_info() -> dict:
    """version, torch_target, cuda_targets, cuda_version, backends and path of the library."""
    try:
        function = ctypes.CDLL(str(PATH)).simple_moe_build_info
    except AttributeError as error:
        raise ImportError(f"{PATH} isn't simple_moe's library: {_WHAT_TO_RUN}") from error
    function.restype = ctypes.c_char_p
    return json.loads(function().decode()) | {"path": str(PATH)}
