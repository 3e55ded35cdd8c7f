"""Where the peers' own test files are, if they are on this machine; nothing of them is kept in this repository.

`BLK_PEER_SOURCES` names a folder with unpacked source distributions or checkouts, such as
`pip download --no-deps --no-binary :all: bayesian-lora==0.0.6` followed by `tar xzf` leaves, and a checkout
`Laplace` of laplace-torch, whose source distribution comes without its tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLE = "BLK_PEER_SOURCES"
ROOT = Path(__file__).parents[2]


def find(pattern: str) -> Path:
    """The file below the folder of sources that matches; skips the test if there is none."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"the peer's own test files are not here: {VARIABLE} names no folder (docs/migrating.md)")
    found = sorted(Path(folder).glob(pattern))
    if not found:
        pytest.skip(f"the peer's own test files are not here: nothing matches {folder}/{pattern}")
    return found[0]


def run(test_file: Path, plugin: str, *arguments: str) -> str:
    """Run a peer's test file, unmodified, under one of the plugins in this folder; returns what pytest printed.

    Raises:
        AssertionError: if pytest fails.
    """
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), str(test_file.parents[1])])
    settings = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", plugin]
    command = [sys.executable, "-m", "pytest", "-q", *settings, *arguments, str(test_file)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=test_file.parents[1],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
