"""The benchmark beside BayesAdapt: lengths and padding are what they say, and the scale goes with them."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.bayes_adapt import __main__ as sweep
from benchmarks.bayes_adapt import methods, report
from benchmarks.bayes_adapt.filled import FIRST_FILLER, LENGTHS, Filled, of_length
from benchmarks.bayes_adapt.points import CORRECTED, EXACT, LABELS, THERE, Point, measure
from benchmarks.calibration.methods.registry import METHODS
from benchmarks.calibration.tasks import make_task
from benchmarks.calibration.tasks.causal import Llama
from benchmarks.calibration.tasks.task import Training, logits_of


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Filled, "llama", Llama(vocabulary=Filled.llama.vocabulary, width=16, layers=1, heads=2, steps=3, batch_size=4)
    )
    monkeypatch.setattr(Filled, "training", Training(epochs=2, learning_rate=1e-2))
    monkeypatch.setattr("benchmarks.bayes_adapt.filled.TRAIN", 24)
    monkeypatch.setattr("benchmarks.bayes_adapt.filled.HELD_OUT", 12)
    monkeypatch.setattr("benchmarks.bayes_adapt.filled.TEST", 20)
    return Filled(tmp_path)


def test_the_content_is_the_same_whatever_the_length_and_padding_changes_no_logit(task):
    examples = task.make(0).train
    for tokens in (16, 64):
        longer = of_length(examples, [tokens])
        assert [len(one.content) for one in longer] == [tokens] * len(examples)
        assert [one.content[-16:] for one in longer] == [one.content for one in examples]
        assert all(min(one.content[:-16], default=FIRST_FILLER) >= FIRST_FILLER for one in longer)
        assert longer == of_length(examples, [tokens])
    assert [len(one.content) for one in of_length(examples, LENGTHS)][:6] == [*LENGTHS, LENGTHS[0]]
    model = task.fine_tune(of_length(examples, LENGTHS), 0)
    plain = logits_of(task, model, of_length(examples, [32]))
    task.columns = 128
    assert task.collate(of_length(examples, [32]))["input_ids"].shape[1] == 128
    torch.testing.assert_close(logits_of(task, model, of_length(examples, [32])), plain, rtol=1e-3, atol=1e-4)


def test_a_point(task):
    splits = task.make(0)
    model = task.fine_tune(of_length(splits.train, LENGTHS), 0)
    rows = {columns: measure(task, model, splits, Point(0, 32, columns), None) for columns in (32, 128)}
    for columns, own in rows.items():
        # K-FAC errs by itself, but not by a factor of the tokens
        assert own[CORRECTED]["trace / exact"] == pytest.approx(1, abs=0.4)
        ratio = own[THERE]["trace / exact"] / own[CORRECTED]["trace / exact"]
        assert ratio == pytest.approx(32, rel=1e-3) if columns == 32 else ratio > 64
        assert own[THERE]["variance"] < own[CORRECTED]["variance"]
    for name in (EXACT, LABELS, "MAP", "temperature scaling"):
        assert rows[128][name] == pytest.approx(rows[32][name], rel=2e-2), name


def test_the_sweep_goes_on_and_reports(task, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "points", lambda seed: [Point(seed, 16, 16), Point(seed, 16, 32)])
    measured = []

    def fake(task, model, splits, point, checkout):
        measured.append(point)
        return {name: {"nll": 1.0 + point.seed, "accuracy": 0.5} for name in (THERE, "MAP")}

    monkeypatch.setattr(sweep, "measure", fake)
    command = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path)]
    assert sweep.main([*command, "--report-only"]) == 1
    assert sweep.main([*command, "--seeds", "1"]) == 0
    assert sweep.main([*command, "--seeds", "2"]) == 0
    assert measured == [Point(seed, 16, columns) for seed in (0, 1) for columns in (16, 32)]
    found = json.loads((tmp_path / "out" / sweep.RESULTS).read_text())["points"]
    assert report.statistic(found, 16, 16, THERE, "nll") == (1.5, pytest.approx(0.5))
    page = (tmp_path / "out" / "lengths.md").read_text()
    assert "## NLL\n\n| tokens, in columns of a batch if there is padding | 16 | 16 in 32 |" in page
    assert f"| {THERE} | 1.500 ± 0.500 | 1.500 ± 0.500 |" in page
    assert (tmp_path / "out" / "lengths.svg").stat().st_size > 1000


def test_the_list_of_methods_is_of_the_study(tmp_path, monkeypatch):
    assert set(methods.METHODS) <= set(METHODS)
    assert make_task("choices-smollm2", tmp_path).letters == ("A", "B")
    asked = []
    monkeypatch.setattr(methods, "study", lambda arguments: asked.append(arguments) or 0)
    assert methods.main(["--out", "folder", "--task", "stdlib"]) == 0
    assert asked[0][:4] == ["--out", "folder", "--task", "stdlib"]
    assert asked[0].count("--task") == 1
    assert asked[0].count("--method") == len(methods.METHODS)
