"""Settings that every test shares."""

from __future__ import annotations

import os

# Read when torch loads OpenMP. The models here are tiny: threads that spin while they wait for each other make a test
# of a second take ten as soon as the cores are busy with something else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Every test starts from the same global generator, whatever ran before it."""
    torch.manual_seed(0)
