"""`blk compare` says of each curvature what fit, calibrate and evaluate say one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_commands
import torch
from test_calibrate_command import HELD_OUT, HELD_OUT_LABELS
from test_commands import CHOICES, LABELS, PROMPTS, blk, by_hand, padded, write_data

from bayesian_lora_kernels.calibration import negative_log_likelihood, temperature_scale
from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.commands.compare import last_block
from bayesian_lora_kernels.commands.evaluate import METRICS

made, place = test_commands.made, test_commands.place
TEST = [f"blue {prompt}" for prompt in PROMPTS]


@pytest.fixture
def files(place: Path) -> Path:
    write_data(place / "held.jsonl", HELD_OUT, HELD_OUT_LABELS)
    write_data(place / "test.jsonl", TEST, LABELS)
    return place


def compare(*options: str) -> int:
    files = ["adapter", "data.jsonl", "held.jsonl", "test.jsonl"]
    return main(["compare", *files, "--device", "cpu", "--choices", *CHOICES, *options])


def test_it_is_what_the_commands_say_one_by_one(made: Path, files: Path, capsys: Any) -> None:
    before = {path.name: path.read_bytes() for path in Path("adapter").iterdir()}
    pictures = ["--plot", "r.png", "--plot-risk", "c.png"]
    assert compare("--methods", "kfac", "ekfac", "exact", "last", *pictures, "--json", "c.json") == 0
    assert {path.name: path.read_bytes() for path in Path("adapter").iterdir()} == before
    out = capsys.readouterr().out
    methods = json.loads(Path("c.json").read_text())["methods"]
    assert list(methods) == ["map", "temperature", "kfac", "ekfac", "exact", "last"]
    for curvature in ("kfac", "ekfac", "exact"):
        assert blk("fit", "--curvature", curvature) == 0
        assert blk("calibrate", data="held.jsonl") == 0
        assert blk("evaluate", "--json", "e.json", data="test.jsonl") == 0
        one = json.loads(Path("e.json").read_text())
        for key in METRICS:
            assert methods[curvature][key] == pytest.approx(one["laplace"][key], abs=1e-5)
            assert methods["map"][key] == pytest.approx(one["map"][key], abs=1e-5)
        assert f"{one['laplace']['nll']:.4f}" in out
    for name in ("r.png", "c.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")
    laplace = by_hand(made)
    held_out, test = (laplace.predict(padded(texts, "left")).mean for texts in (HELD_OUT, TEST))
    temperature = temperature_scale(held_out, torch.tensor(HELD_OUT_LABELS))
    nll = negative_log_likelihood((test / temperature).softmax(1), torch.tensor(LABELS))
    assert methods["temperature"]["nll"] == pytest.approx(nll, abs=1e-4)
    assert methods["last"]["nll"] != pytest.approx(methods["exact"]["nll"], abs=1e-6)


def test_wrong_files(files: Path, capsys: Any) -> None:
    def error(*arguments: str) -> str:
        assert main(["compare", "adapter", *arguments, "--choices", *CHOICES]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "held.jsonl: the same file as" in error("data.jsonl", "held.jsonl", "./held.jsonl")
    assert "none.jsonl" in error("data.jsonl", "none.jsonl", "test.jsonl")
    same = error("data.jsonl", "held.jsonl", "test.jsonl", "--json", "test.jsonl")
    assert "this is the file of test examples" in same
    write_data(Path("one.jsonl"), HELD_OUT[:3], [0, 0, 0])
    assert "labels of at least 2 of the choices" in error("data.jsonl", "one.jsonl", "test.jsonl")


def test_the_last_block() -> None:
    names = [f"model.layers.{i}.self_attn.{m}" for i in (2, 10) for m in "qv"]
    assert last_block([*names, "score"]) == ["model.layers.10.self_attn.q", "model.layers.10.self_attn.v", "score"]
    assert last_block(["first", "second"]) == ["first", "second"]
