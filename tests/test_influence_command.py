"""`blk influence`: what it writes is what the package says of the same batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_commands
import torch
from test_calibrate_command import HELD_OUT, HELD_OUT_LABELS
from test_commands import CHOICES, LABELS, PROMPTS, by_hand, padded, write_data

import bayesian_lora_kernels
from bayesian_lora_kernels.cli import main

made, place, fitted = test_commands.made, test_commands.place, test_commands.fitted


def blk(*options: str, data: str = "data.jsonl", queries: str = "held.jsonl") -> int:
    return main(["influence", "adapter", data, queries, "--device", "cpu", "--choices", *CHOICES, *options])


def test_it_is_what_the_package_says(made: Path, fitted: Path, capsys: Any) -> None:
    write_data(fitted / "held.jsonl", HELD_OUT, HELD_OUT_LABELS)
    laplace = by_hand(made).optimize_prior_precision()
    train = [{**padded(PROMPTS, "left"), "labels": torch.tensor(LABELS)}]
    queries = [{**padded(HELD_OUT, "left"), "labels": torch.tensor(HELD_OUT_LABELS)}]
    expected = bayesian_lora_kernels.influence(laplace, train, queries, progress=False)
    capsys.readouterr()
    assert blk("--batch-size", "5", "--top", "2", "--json", "i.json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(Path("i.json").read_text())
    found = torch.tensor(result["scores"], dtype=torch.float64)
    assert found.shape == (len(HELD_OUT), len(PROMPTS))
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert (result["train_lines"], result["curvature"]) == (list(range(1, len(PROMPTS) + 1)), "kfac")
    first = next(line for line in out.splitlines() if line.startswith("1 "))
    best = int(expected[0].argmin())
    assert f"{best + 1} ({result['scores'][0][best]:+.3g})" in first
    damped = bayesian_lora_kernels.influence(laplace, train, queries, damping=7.0, progress=False)
    assert blk("--damping", "7", "--json", "i.json") == 0
    found = torch.tensor(json.loads(Path("i.json").read_text())["scores"], dtype=torch.float64)
    assert torch.allclose(found, damped, rtol=1e-3, atol=1e-3 * float(damped.abs().max()))


def test_what_is_wrong(made: Path, fitted: Path, capsys: Any) -> None:
    write_data(fitted / "held.jsonl", HELD_OUT[:2], HELD_OUT_LABELS[:2])
    assert blk(data="held.jsonl") == 0
    assert "the posterior was fitted to" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        blk("--damping", "-1")
    assert "expected a positive number" in capsys.readouterr().err
    assert blk(queries="none.jsonl") == 2
