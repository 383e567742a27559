"""A fused Mixture-of-Experts layer for PyTorch."""

import importlib

from . import _library, reference

_library.load()

from . import _autograd, _ops  # noqa: F401 (they register)
from ._functional import (
    combine,
    fused_moe,
    grouped_gemm,
    grouped_gemm_wgrad,
    sort_by_expert,
    topk_route,
)
from .flashinfer import ActivationType, cutlass_fused_moe
from .modules import FusedMoE

__version__ = _library.build_info()["version"]
__all__ = [
    "ActivationType",
    "FusedMoE",
    "combine",
    "cutlass_fused_moe",
    "fused_moe",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "reference",
    "sort_by_expert",
    "topk_route",
]


def __getattr__(name: str):
    """moe_ops.transformers, when it is asked for: it needs transformers."""
    if name == "transformers":
        return importlib.import_module(".transformers", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
