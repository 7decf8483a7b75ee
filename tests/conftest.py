"""Shared by all tests: one thread a process, and the pulled models."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports torch or numba: threads that fight for a core make every test many times slower.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

# Timing never decides a test; the seed of a failure is printed so that it can be run again. CI tries the same
# examples every time, so that a run says something about the change; other runs try new ones.
settings.register_profile("sharewell", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("sharewell"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "sharewell")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, pulled when the cache lacks it."""
    from sharewell.models import resolve_model

    return resolve_model("smollm2", progress=False)
