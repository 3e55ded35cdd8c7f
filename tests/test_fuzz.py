"""A share of `make fuzz`, what it found, and whether it finds anything."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.run import run
from fuzz.targets import Target, targets

from bayesian_lora_kernels.posterior import storage
from bayesian_lora_kernels.posterior.tensor_file import TensorFile

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="damaged files are read in a process of their own")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


def test_damaged_files_are_refused_or_whole(
    made: list[Target], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fuzz.run.targets", lambda scratch: made)
    status = run(Path(), 150, seed=11)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert printed.out.startswith("150 damaged files in ")


def as_it_says(path: Path) -> str:
    return str(json.loads((path.parent / "laplace.json").read_text())["tensors"]["sha256"])


def without_a_name(*_: Any) -> None:
    raise OSError("no")


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a checksum that is not compared": (storage, "_file_digest", as_it_says),
    "memory that no file needs": (TensorFile, "read", lambda *_, **__: torch.zeros(2 * 10**8)),
    "an error of another kind": (storage, "check_description", lambda *_: {}["x"]),
    "an error that names no file": (storage, "check_description", without_a_name),
    "a crash": (storage, "check_description", lambda *_: os._exit(3)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(
    name: str, made: list[Target], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the reading code, each planted."""
    monkeypatch.setattr("fuzz.run.targets", lambda scratch: made)
    monkeypatch.setattr(*FAULTS[name])
    assert run(Path(), 10, seed=3) == 1
    assert " 0 findings" not in capsys.readouterr().out
