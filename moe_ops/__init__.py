"""A fused Mixture-of-Experts layer for PyTorch."""

from . import _library, reference

_library.load()

from . import _autograd, _ops  # noqa: E402, F401 (they register)
from ._functional import (  # noqa: E402
    combine,
    fused_moe,
    grouped_gemm,
    grouped_gemm_wgrad,
    sort_by_expert,
    topk_route,
)
from .modules import FusedMoE  # noqa: E402

__version__ = _library.build_info()["version"]
__all__ = [
    "FusedMoE",
    "combine",
    "fused_moe",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "reference",
    "sort_by_expert",
    "topk_route",
]
