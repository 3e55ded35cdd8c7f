"""`--json` of every command that the parser knows: what was printed, and with `-` nothing else on stdout."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_commands
from test_commands import CHOICES

from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.commands.parser import build_parser
from bayesian_lora_kernels.demo import run as demo

made, place, fitted = test_commands.made, test_commands.place, test_commands.fitted
(COMMANDS,) = (action.choices for action in build_parser()._actions if action.dest == "command")
JOB = ["--choices", *CHOICES, "--device", "cpu"]
# A new command needs a line here.
ARGUMENTS: dict[str, list[str]] = {
    "demo": ["--quick", "--out", "out"],
    "doctor": ["--adapter", "adapter", "--batch-size", "2", "--length", "4", "--device", "cpu"],
    "bench": ["--quick", "--device", "cpu"],
    "fit": ["adapter", "data.jsonl", *JOB, "--out", "other", "--per-module"],
    "calibrate": ["adapter", "data.jsonl", *JOB],
    "evaluate": ["adapter", "data.jsonl", *JOB],
    "compare": ["adapter", "data.jsonl", "held.jsonl", "test.jsonl", *JOB, "--methods", "kfac"],
    "predict": ["adapter", "data.jsonl", *JOB],
    "score": ["adapter", "text.txt", "--device", "cpu"],
    "inspect": ["adapter"],
}
# What is worked out for the reader from what the document has.
DERIVED = re.compile(r"\(.* per example\)|\(from 10 on\)|\S+ [kMGT]?B")
NUMBER = re.compile(r"(?<![\w.-])-?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?(?![\w.])")


@pytest.fixture
def files(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands read. The demo takes long: tests/test_cli.py has one, here its numbers are others."""
    document = {"command": "demo", "numbers": [i / 8 for i in range(8)]}
    monkeypatch.setattr(demo, "run_demo", lambda *_: (document, [" ".join(map(str, document["numbers"]))]))
    for name in ("held", "test"):
        (fitted / f"{name}.jsonl").write_text((fitted / "data.jsonl").read_text())
    (fitted / "text.txt").write_text("red fish Answer : A")
    return fitted


def numbers(value: Any) -> Iterator[float]:
    """All of a document, with those in its texts."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from numbers(key)
            yield from numbers(one)
    elif isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, str):
        yield from (float(found.replace(",", "")) for found in NUMBER.findall(value))
    elif isinstance(value, int | float):
        yield float(value)


def loaded(text: str, lines: bool) -> Any:
    read = [json.loads(line, parse_constant=pytest.fail) for line in (text.splitlines() if lines else [text])]
    return read if lines else read[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_document_has_what_was_printed(files: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([name, *ARGUMENTS[name], "--json", "result.json"]) == 0
    printed = capsys.readouterr().out
    document = loaded(Path("result.json").read_text(), name == "predict")
    if name != "predict":
        assert document["command"] == name
    known = [scale * x for x in numbers(document) for scale in (1, 100, 1000)]  # percent, milliseconds
    shown = NUMBER.findall(DERIVED.sub("", printed))
    assert len(shown) > 5
    for text in shown:
        value, digits = float(text.replace(",", "")), re.split("e", text)[0].replace(",", "").lstrip("-")
        unit = 10.0 ** -len(digits.partition(".")[2])
        unit *= 10.0 ** int(text.split("e")[1]) if "e" in text else 1
        assert any(abs(value - one) <= 0.5001 * unit for one in known), f"{text} of\n{printed}"
    assert main([name, *ARGUMENTS[name], "--json", "-"]) == 0
    again = loaded(capsys.readouterr().out, name == "predict")  # and nothing else
    assert len(again) == len(document) if name == "predict" else again.keys() == document.keys()
    assert not Path("-").exists()
