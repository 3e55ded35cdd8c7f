"""A share of `make fuzz`, what it found, and whether it finds anything."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.run import run
from fuzz.targets import Target, targets
from models import mlp

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.commands.adapter import open_adapter
from bayesian_lora_kernels.commands.errors import InputError
from bayesian_lora_kernels.commands.tokens import tokenise_text
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
    "a checksum that is not compared": (storage, "file_digest", as_it_says),
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


# ---- what it found ---------------------------------------------------------------------------------------------------


class PanicException(BaseException):
    """As packages in Rust raise it, which is no Exception."""


def test_a_tokenizer_that_gives_up() -> None:
    class Tokenizer:
        is_fast = True

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise PanicException("index out of bounds")

    with pytest.raises(InputError, match="tokenizer: cannot be used: PanicException: index out of bounds"):
        tokenise_text(Tokenizer(), "red fish")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "adapter_config.json: cannot be read"),
        ('{"rank_pattern": [9]}', "adapter_config.json: rank_pattern: expected an object"),
        ('{"r": "9"}', "adapter_config.json: expected ranks of at most 2"),
    ],
)
def test_configurations_of_adapters(text: str, message: str, made: list[Target], tmp_path: Path) -> None:
    shutil.copytree(made[-1].whole, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        open_adapter(tmp_path / "adapter", str(tmp_path))


def test_weights_of_a_calibration_that_no_float_holds(tmp_path: Path) -> None:
    case = mlp()
    laplace = blk.LaplaceLoRA(case.model).fit(case.loader(2), progress=False)
    laplace.calibrate(case.loader(2), progress=False).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "laplace.json").read_text())
    content["calibration"]["weights"]["pairwise"][0][0] = 10**400
    content["sha256"] = storage.content_digest(content)
    (tmp_path / "laplace.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"calibration.weights.pairwise: expected \[13, 15\] weights"):
        blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)
