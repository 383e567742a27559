"""Profiles for hypothesis, and the devices that the suite runs on."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

_common = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same examples in every run: a failure in CI is not gone in the next.
settings.register_profile("quick", max_examples=25, derandomize=True, database=None, **_common)
settings.register_profile("long", max_examples=2000, print_blob=True, **_common)
# `pytest --hypothesis-profile long` wins over the environment.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]


@pytest.fixture(params=DEVICES, scope="session")
def device(request) -> str:
    """Every test that asks for it runs on the CPU, and on CUDA where there is one."""
    return request.param


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture
def fresh_compiler():
    """torch.compile with empty caches, so that what a test counts is its own."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
