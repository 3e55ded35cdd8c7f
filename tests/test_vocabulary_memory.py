"""Peak memory at a vocabulary of real size, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read as Linux keeps it"),
]


def test_peaks_at_128256_tokens(tmp_path):
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.vocabulary_report", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    costs = json.loads(path.read_text())["costs"]
    assert (costs["vocabulary"], costs["examples"], costs["samples"]) == (128_256, 16, 64)
    allowed = 3 * costs["result MiB"] + costs["head MiB"]
    assert costs["probs: peak / result"] * costs["result MiB"] < allowed
    assert costs["variance: peak / result"] * costs["result MiB"] < allowed
    assert costs["statistics: peak / result"] * costs["result MiB"] < costs["[N, S, V] MiB"] / 5
    longer, shorter = costs["score of 512 tokens: peak MiB"], costs["score of 128 tokens: peak MiB"]
    assert longer < costs["512 V numbers, MiB"]
    assert longer < shorter + 60  # hidden states and attention; not the 188 MiB of T V more numbers
