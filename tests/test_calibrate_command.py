"""`blk calibrate`, and what `blk fit`, `blk evaluate` and `blk predict` make of it."""

from __future__ import annotations

import errno
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import test_commands
import torch
from test_commands import CHOICES, PROMPTS, blk, by_hand, error_of, padded, predicted, read_lines, write_data

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.calibration import expected_calibration_error, negative_log_likelihood
from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.posterior import storage
from bayesian_lora_kernels.predictive import calibrate as engine

made, place, fitted = test_commands.made, test_commands.place, test_commands.fitted

HELD_OUT = [f"{colour} {kind} Answer :" for colour in ("red", "blue", "green green") for kind in ("fish", "bird tree")]
HELD_OUT = [*HELD_OUT, *(f"tree {prompt}" for prompt in HELD_OUT)]
HELD_OUT_LABELS = [0, 1, 2, 0, 1, 2, 0, 0, 2, 1, 1, 0]


@pytest.fixture
def held_out(fitted: Path) -> Path:
    write_data(fitted / "held.jsonl", HELD_OUT, HELD_OUT_LABELS)
    return fitted


def engine_itself(made: Path, labels: Sequence[int] = HELD_OUT_LABELS) -> LaplaceLoRA:
    laplace = by_hand(made).optimize_prior_precision()
    batch = padded(HELD_OUT, "left")
    return laplace.calibrate([{**batch, "labels": torch.tensor(labels)}], progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def description(folder: Path = Path("adapter")) -> dict[str, Any]:
    return json.loads((folder / "laplace.json").read_text())


def command_in(text: str) -> list[str]:
    """The command at the end of the one line that speaks of calibration."""
    (line,) = [line for line in text.splitlines() if "not calibrated" in line]
    return shlex.split(line[line.index("blk calibrate") :])


@pytest.mark.parametrize("batch_size", ["1", "5"])
def test_it_is_what_the_engine_says(made: Path, held_out: Path, capsys: Any, batch_size: str) -> None:
    truth = engine_itself(made)
    calibration = truth.calibration
    assert calibration is not None
    capsys.readouterr()  # how far loading was
    assert blk("calibrate", "--batch-size", batch_size, "--json", "c.json", data="held.jsonl") == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(Path("c.json").read_text())
    assert (result["n_examples"], result["grid_points"], result["choices"]) == (12, 195, CHOICES)
    assert result["effective_points"] == pytest.approx(calibration.effective_points, rel=1e-3)
    assert f"effective grid points  {result['effective_points']['pairwise']:.1f} (pairwise), " in out
    logits, labels = truth.predict(padded(HELD_OUT, "right"), differences=True), torch.tensor(HELD_OUT_LABELS)
    rows = {"map": "MAP", "laplace": "Laplace (pairwise, calibrated with 12 labels)"}
    for key, name in rows.items():
        probs = logits.probs("map" if key == "map" else "pairwise")
        assert result[key]["nll"] == pytest.approx(negative_log_likelihood(probs, labels), abs=1e-4)
        assert result[key]["ece"] == pytest.approx(expected_calibration_error(probs, labels), abs=1e-4)
        numbers = f"{result[key]['nll']:.4f}  {result[key]['ece']:.4f}"
        assert re.search(f"{re.escape(name)} +{numbers}", out)
    assert "the calibration was made with these labels, so they do not judge it" in out

    logits = truth.predict(padded(PROMPTS, "right"), differences=True)
    for options, method, calibrated in (
        ([], "pairwise", True),
        (["--method", "scalar"], "scalar", True),
        (["--uncalibrated"], "pairwise", False),
        (["--uncalibrated", "--method", "scalar"], "scalar", False),
        (["--method", "probit"], "probit", False),
    ):
        assert blk("predict", *options, "--json", "p.jsonl") == 0
        expected = logits.probs(method, calibrated=calibrated)
        torch.testing.assert_close(predicted("p.jsonl")["laplace"], expected, atol=1e-5, rtol=1e-4)
        assert capsys.readouterr().err == ""
    assert float((logits.probs("pairwise") - logits.probs("pairwise", calibrated=False)).abs().max()) > 1e-3


@pytest.mark.parametrize("method", ["pairwise", "scalar"])
def test_evaluate_uses_it(made: Path, held_out: Path, capsys: Any, method: str) -> None:
    labels = torch.tensor(test_commands.LABELS)
    logits = engine_itself(made).predict(padded(PROMPTS, "right"), differences=True)
    found = {}
    assert blk("calibrate", data="held.jsonl") == 0
    for options, calibrated in ((["--plot", "diagram.svg"], True), (["--uncalibrated"], False)):
        capsys.readouterr()
        assert blk("evaluate", "--method", method, *options, "--json", "e.json") == 0
        out, err = capsys.readouterr()
        assert err == ""
        result = json.loads(Path("e.json").read_text())
        assert result["calibration_labels"] == (12 if calibrated else None)
        assert f"Laplace ({method},\n" in out
        assert f" {'calibrated with 12 labels' if calibrated else 'uncalibrated'})\n" in out
        probs = logits.probs(method, calibrated=calibrated)
        assert result["laplace"]["nll"] == pytest.approx(negative_log_likelihood(probs, labels), abs=1e-4)
        found[calibrated] = result
    assert found[True]["map"] == found[False]["map"]
    assert found[True]["laplace"]["nll"] != pytest.approx(found[False]["laplace"]["nll"], abs=1e-3)
    assert Path("diagram.svg").read_text().startswith("<?xml")


def test_nothing_else_of_the_posterior_changes(held_out: Path) -> None:
    before, tensors = description(), {p.name: p.read_bytes() for p in Path("adapter").glob("*.safetensors")}
    assert before["calibration"] is None
    assert blk("calibrate", data="held.jsonl") == 0
    after = description()
    assert after["calibration"]["n_labels"] == 12
    changed = {"calibration", "sha256"}
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    assert {p.name: p.read_bytes() for p in Path("adapter").glob("*.safetensors")} == tensors


def test_another_time_replaces_and_a_fit_starts_afresh(made: Path, held_out: Path) -> None:
    write_data(Path("other.jsonl"), HELD_OUT, HELD_OUT_LABELS[::-1])
    assert blk("calibrate", data="held.jsonl") == 0
    first = description()["calibration"]
    assert blk("calibrate", data="other.jsonl") == 0
    second = description()["calibration"]
    assert second["weights"] != first["weights"]
    truth = engine_itself(made, HELD_OUT_LABELS[::-1]).calibration
    assert truth is not None
    torch.testing.assert_close(
        torch.tensor(second["weights"]["pairwise"]).double(), truth.weights["pairwise"], atol=1e-5, rtol=1e-3
    )
    assert blk("fit") == 0
    assert description()["calibration"] is None


def test_a_bfloat16_base_does_not_spoil_the_posterior(held_out: Path) -> None:
    assert blk("calibrate", "--dtype", "bfloat16", data="held.jsonl") == 0
    assert description()["calibration"]["n_labels"] == 12
    assert blk("predict") == 0


@pytest.mark.parametrize("at", ["tensors", "description", "last step"])
def test_a_write_that_fails_leaves_the_posterior_as_it_was(
    held_out: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    assert blk("calibrate", data="held.jsonl") == 0
    write_data(Path("other.jsonl"), HELD_OUT, HELD_OUT_LABELS[::-1])
    before = contents(Path("adapter"))

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if at == "last step":
            true = storage.os.replace
            patch.setattr(storage.os, "replace", lambda a, b: full() if str(b).endswith("laplace.json") else true(a, b))
        else:
            patch.setattr(storage, "write_tensors" if at == "tensors" else "write_text", full)
        message = error_of(capsys, "calibrate", "--json", "c.json", data="other.jsonl")
    assert "No space left on device" in message
    assert contents(Path("adapter")) == before
    assert not Path("c.json").exists()
    assert blk("predict") == 0


def test_a_hint_that_can_be_followed(held_out: Path, capsys: Any) -> None:
    for command in ("predict", "evaluate"):
        capsys.readouterr()
        assert blk(command) == 0
        out, err = capsys.readouterr()
        assert err.startswith("hint: these probabilities are not calibrated; held-out labels (from 10 on) do that: ")
        assert err.count("\n") == 1
        assert "hint" not in out
        assert "uncalibrated)" in out
        for options in (["--uncalibrated"], ["--method", "mc"], ["--method", "probit"]):
            assert blk(command, *options) == 0
            assert capsys.readouterr().err == ""
    assert command_in(err) == command_in(Path("fit.out").read_text())
    assert run_with(command_in(err), "held.jsonl") == 0
    capsys.readouterr()
    assert blk("evaluate") == 0
    assert capsys.readouterr().err == ""


def test_the_hint_of_a_posterior_elsewhere(made: Path, held_out: Path, capsys: Any) -> None:
    elsewhere = ["--posterior", "with space"]
    base = str(made / "base")
    assert blk("fit", "--out", "with space", "--base", base) == 0
    assert (told := command_in(capsys.readouterr().out))[-4:] == [*elsewhere, "--base", base]
    before = contents(Path("adapter"))
    assert run_with(told, "held.jsonl") == 0
    assert "written to             with space/laplace.json" in capsys.readouterr().out
    assert contents(Path("adapter")) == before
    assert description(Path("with space"))["calibration"]["n_labels"] == 12
    assert blk("evaluate", *elsewhere) == 0
    assert capsys.readouterr().err == ""
    assert blk("evaluate") == 0
    assert "hint: " in capsys.readouterr().err


def run_with(command: list[str], data: str) -> int:
    assert command[:2] == ["blk", "calibrate"]
    return main([data if word == "HELDOUT.jsonl" else word for word in [*command[1:], "--device", "cpu"]])


def test_few_labels(held_out: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(Path("few.jsonl"), HELD_OUT[:9], HELD_OUT_LABELS[:9])
    assert blk("calibrate", data="few.jsonl") == 0
    assert capsys.readouterr().err == "warning: few.jsonl: 9 labels say little; 10 do, a hundred are good\n"
    write_data(Path("few.jsonl"), HELD_OUT[:10], HELD_OUT_LABELS[:10])
    assert blk("calibrate", data="few.jsonl") == 0
    assert capsys.readouterr().err == ""


def test_what_the_engine_logs_is_a_warning(held_out: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "EDGE", 0.0)
    assert blk("calibrate", data="held.jsonl") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6  # three ends of the grid, two methods
    assert all(line.startswith("warning: calibrate: ") for line in lines)


def test_bad_input(held_out: Path, capsys: Any) -> None:
    before = contents(Path("adapter"))
    write_data(Path("bad.jsonl"), HELD_OUT, [1] * len(HELD_OUT))
    message = error_of(capsys, "calibrate", data="bad.jsonl")
    assert message == "blk calibrate: bad.jsonl: expected labels of at least 2 of the choices, all 12 are 'B'\n"
    write_data(Path("bad.jsonl"), HELD_OUT, HELD_OUT_LABELS[:3])
    assert 'bad.jsonl:4: no "label"' in error_of(capsys, "calibrate", data="bad.jsonl")
    write_data(Path("bad.jsonl"), HELD_OUT, ["D"] * len(HELD_OUT))
    assert 'label "D" is not among the choices' in error_of(capsys, "calibrate", data="bad.jsonl")
    assert "gone.jsonl: no such file" in error_of(capsys, "calibrate", data="gone.jsonl")
    assert "this is the file of examples" in error_of(capsys, "calibrate", "--json", "held.jsonl", data="held.jsonl")
    message = error_of(capsys, "calibrate", data="held.jsonl", choices=["B", "A", "C"])
    assert "the posterior in adapter was fitted for 'A' 'B' 'C', in this order" in message
    for folder, said in (
        ("nowhere", "no such folder; expected a folder that blk fit wrote into"),
        (".", "no posterior (laplace.json) in it; run blk fit first"),
    ):
        assert f"{folder}: {said}" in error_of(capsys, "calibrate", "--posterior", folder, data="held.jsonl")
    message = error_of(capsys, "calibrate", "--posterior", "held.jsonl", data="held.jsonl")
    assert "--posterior held.jsonl: held.jsonl is a file, expected a folder" in message
    assert contents(Path("adapter")) == before
    assert not Path("nowhere").exists()
    path = next(Path("adapter").glob("laplace-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged" in error_of(capsys, "calibrate", data="held.jsonl")
    Path("adapter/laplace.json").unlink()
    assert "adapter: no posterior" in error_of(capsys, "calibrate", data="held.jsonl")


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        ("calibrate", ["must not be among those that the adapter was trained on", "HELDOUT.jsonl", "--posterior"]),
        ("predict", ["logit_std", "less the mean of the choices' logits", "default: pairwise", "--uncalibrated"]),
        ("evaluate", ["default: pairwise", "--uncalibrated"]),
    ],
)
def test_help(capsys: Any, command: str, texts: list[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(text in shown for text in texts)


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_columns_of_two_choices(place: Path, capsys: Any, calibrated: bool) -> None:
    """Their titles are wider than they are."""
    two = CHOICES[:2]
    write_data(Path("two.jsonl"), HELD_OUT, [i % 2 for i in range(len(HELD_OUT))])
    assert blk("fit", choices=two, data="two.jsonl") == 0
    if calibrated:
        assert blk("calibrate", choices=two, data="two.jsonl") == 0
    capsys.readouterr()
    assert blk("predict", "--json", "p.jsonl", choices=two, data="two.jsonl") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + len(HELD_OUT)
    bars = {tuple(i for i, character in enumerate(line) if character == "|") for line in lines}
    assert len(bars) == 1
    assert [title.strip() for title in lines[0].split("|")] == ["", "", "Laplace (pairwise,", "std of the logit"]
    second = "calibrated with 12 labels)" if calibrated else "uncalibrated)"
    assert [title.strip() for title in lines[1].split("|")] == ["", "MAP", second, "less their mean"]
    for row, line in zip(read_lines("p.jsonl"), lines[3:], strict=True):
        assert sum(row["laplace"].values()) == pytest.approx(1)
        a, b = row["logit_std"].values()
        assert a == pytest.approx(b, rel=1e-4)  # half the difference, either way
        assert line.split("|")[3].split() == [f"{a:.3f}", f"{b:.3f}"]
