"""Settings that every test shares."""

from __future__ import annotations

import os

# Read when torch loads OpenMP. The models here are tiny: threads that spin while they wait for each other make a test
# of a second take ten as soon as the cores are busy with something else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import importlib.util

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Kernels run in Triton's interpreter only in a process that was started for it: Triton reads the variable once."""
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    elif os.environ.get("TRITON_INTERPRET") != "1":
        reason = "runs in a process with TRITON_INTERPRET=1: make test-interpret"
    else:
        return
    for item in items:
        if item.get_closest_marker("interpret"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Every test starts from the same global generator, whatever ran before it."""
    torch.manual_seed(0)
