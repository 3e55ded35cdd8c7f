"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(command: list[str], folder: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What each prints, line by line.
PRINTED = {
    "quickstart": ["plain", "calibrated", "variance"],
    "reward_model": ["words as in training", "  the mean is", "other words", "  the mean is"],
    "trainer": ["{'train_runtime'", "{'laplace_effective_parameters'", "probabilities"],
}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    lines = run([sys.executable, str(EXAMPLES / f"{name}.py")], tmp_path).splitlines()
    started = [line for line in lines if not line.startswith(("[", "        ["))]
    assert [line[: len(start)] for line, start in zip(started, PRINTED[name], strict=True)] == PRINTED[name]
    assert not list(tmp_path.iterdir())


def test_accelerate_on_two_processes(tmp_path: Path) -> None:
    """All 320 examples count, once each; one of the two prints and saves."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = run([*torchrun, str(EXAMPLES / "accelerate_fit.py"), "folder"], tmp_path)
    assert re.fullmatch(r"320 examples, log evidence -\d+\.\d+\n", printed)
    assert len(list((tmp_path / "folder").iterdir())) == 2
