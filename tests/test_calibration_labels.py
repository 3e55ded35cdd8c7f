"""The study of calibration: its splits, its models, its arithmetic."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.calibration import temperature_scale
from benchmarks.calibration.files import write_json
from benchmarks.calibration.labels import __main__ as study
from benchmarks.calibration.labels import baselines, method, report
from benchmarks.calibration.scores import scores
from benchmarks.calibration.tasks import NAMES, Example, Splits, Training, majority, make_task, packages
from benchmarks.calibration.tasks.causal import Llama
from benchmarks.calibration.tasks.cities import folded
from benchmarks.calibration.tasks.task import MissingPackage, Task, drawn, imported, shares


def make_or_skip(name, folder):
    try:
        task = make_task(name, folder)
        return task, task.make(0), task.make(1)
    except MissingPackage as error:
        pytest.skip(str(error))


@pytest.fixture
def tiny(tmp_path):
    """`majority` with a model that takes no time."""
    task = make_task("majority", tmp_path)
    task.llama = Llama(vocabulary=task.llama.vocabulary, width=16, layers=1, heads=2, steps=2)
    task.training = Training(epochs=2, learning_rate=1e-2)
    return task


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "packages" else n for n in NAMES])
def test_splits_do_not_leak(name, tmp_path):
    task, splits, others = make_or_skip(name, tmp_path)
    parts = [splits.train, splits.held_out, splits.test, splits.shift]
    assert len(splits.held_out) == 100
    assert all(len(part) >= 150 for part in (splits.train, splits.test, splits.shift))
    contents = [example.content for part in (*parts, splits.foreign) for example in part]
    assert len(set(contents)) == len(contents)
    train, held_out, test, shift = ({example.source for example in part} for part in parts)
    assert not train & held_out
    assert not train & test
    assert not held_out & test
    assert not shift & (train | held_out)
    for part in parts:
        assert {example.label for example in part} == set(range(task.n_classes))
    assert task.make(0) == splits
    assert others.train != splits.train


def test_noise_is_in_every_split(tmp_path):
    clean, noisy = (make_task(name, tmp_path) for name in ("majority", "majority-noisy"))
    grouping = majority.groups_of(majority.RULES)
    for task, noise in ((clean, 0), (noisy, 0.25)):
        splits = task.make(0)
        for part in (splits.train, splits.held_out, splits.test, splits.shift):
            wrong = 0
            for example in part:
                groups = [grouping[token - majority.FIRST_SYMBOL] for token in example.content[1:-1]]
                counts = [groups.count(group) for group in range(3)]
                wrong += counts.index(max(counts)) != example.label
            assert abs(wrong / len(part) - noise) <= 3 * (noise * (1 - noise) / len(part)) ** 0.5


def test_fine_tuning_is_a_function_of_examples_and_seed(tiny, tmp_path):
    splits = tiny.make(0)
    model = tiny.fine_tune(splits.train[:12], 0)
    batch = tiny.collate(splits.test[:5])
    logits = tiny.logits(model, batch)
    assert logits.shape == (5, 3)
    assert not model.training
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2  # base and adapter
    torch.testing.assert_close(tiny.logits(tiny.fine_tune(splits.train[:12], 0), batch), logits, rtol=0, atol=0)
    assert sorted(tmp_path.rglob("*.safetensors")) == files
    files[0 if "tuned" in files[0].name else 1].unlink()
    torch.testing.assert_close(tiny.logits(tiny.fine_tune(splits.train[:12], 0), batch), logits)
    assert not torch.allclose(tiny.logits(tiny.fine_tune(splits.train[12:24], 0), batch), logits)
    assert not torch.allclose(tiny.logits(tiny.fine_tune(splits.train[:12], 1), batch), logits)


@pytest.mark.parametrize("name", ["majority", "tumours"])
def test_models_are_served(name, tiny, tmp_path):
    task = tiny if name == "majority" else make_task(name, tmp_path)
    task.training = Training(epochs=1, learning_rate=1e-2)
    splits = task.make(0)
    model = task.fine_tune(splits.train[:16], 0)
    laplace = LaplaceLoRA(model, task.forward, task.class_token_ids)
    assert laplace.verify(task.collate(splits.train[:3])).ok
    mean = laplace.fit(task.batches(splits.train[:8], 4), progress=False).predict(task.collate(splits.test[:3])).mean
    torch.testing.assert_close(mean, task.logits(model, task.collate(splits.test[:3])).detach(), rtol=1e-4, atol=1e-4)


def test_a_missing_package_names_the_command():
    with pytest.raises(MissingPackage, match=r"no-such-package is not installed; run: pip install --no-deps -r .*txt"):
        imported("no_such_module_anywhere", "no-such-package")
    with pytest.raises(ValueError, match="task: expected one of diseases"):
        make_task("nothing", None)


def test_shares_and_draws():
    import random

    parts = shares((f"{i % 10}" for i in range(40)), (5, 2, 3), random.Random(0))
    assert [len(part) for part in parts] == [5, 2, 3]
    assert set().union(*parts) == {str(i) for i in range(10)}
    examples = [Example(i, 0, str(i % 4)) for i in range(20)]
    chosen = drawn(examples, 7, random.Random(0), per_source=2)
    assert len(chosen) == 7
    assert max([one.source for one in chosen].count(source) for source in "0123") == 2
    assert len(drawn(examples, 100, random.Random(0), per_source=2)) == 8


def test_sentences_and_comments():
    source = (
        '"""Return the values that are sorted in ascending order. Short one.\n\n    >>> code is not what we want.\n'
        '"""\n'
        "# the first line of a comment that\n# goes on in the second one\nx = 1  # beside some code that is left out\n"
        "# this one tells that numpy is the name of the package\n"
    )
    assert list(packages._sentences(source)) == ["Return the values that are sorted in ascending order."]
    assert list(packages._comments(source)) == ["the first line of a comment that goes on in the second one"]


@pytest.mark.parametrize(
    ("name", "plain"),
    [("Łódź", "lodz"), ("Saint-Étienne", "saint-etienne"), ("Gießen", "giessen"), ("Москва", ""), ("Au", "")],
)
def test_folded_names(name, plain):
    assert folded(name) == plain


def test_temperature_baselines():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (400,))
    logits = 4 * (torch.nn.functional.one_hot(labels, 3) + torch.randn(400, 3)).double()
    found = baselines.scaled(logits, labels, {"test": logits[:7]})
    assert tuple(found) == baselines.NAMES
    temperature = temperature_scale(logits, labels)
    torch.testing.assert_close(found["temperature"]["test"], (logits[:7] / temperature).softmax(-1))
    # many labels: the prior hardly counts, and the posterior is narrow
    for name in baselines.NAMES:
        torch.testing.assert_close(found[name]["test"], found["temperature"]["test"], rtol=0, atol=0.02)
    # no label: the prior alone
    posterior = baselines.log_posterior(logits[:0], labels[:0])
    assert float(baselines.LOG_TEMPERATURES[posterior.argmax()]) == pytest.approx(0.5, abs=0.2)
    weights = posterior.softmax(0)
    assert float((weights * baselines.LOG_TEMPERATURES).sum()) == pytest.approx(0.5, abs=0.05)
    # a few labels, all right: plain scaling goes to its limit, the others do not
    few = baselines.scaled(torch.tensor([[3.0, 0, 0]]), torch.tensor([0]), {"test": torch.tensor([[0.1, 0, 0]])})
    assert float(few["temperature"]["test"][0, 0]) == pytest.approx(1)
    assert float(few["averaged temperatures"]["test"][0, 0]) < 0.5


def test_scores():
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]], dtype=torch.float64)
    found = scores(probs, torch.tensor([0, 0, 0, 1]))
    assert found["accuracy"] == 0.75
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.8) + math.log(0.4) + math.log(0.7)) / 4)
    assert found["error_auroc"] == 1
    assert math.isnan(scores(probs, torch.tensor([0, 0, 1, 1]))["error_auroc"])
    assert found["ece"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.3) / 4)  # one example in each bin


class Points(Task):
    """Points in the plane and a perceptron: what `method.predict` asks of a task."""

    name, n_classes, training = "points", 3, Training(epochs=5, learning_rate=0.05)

    def make(self, seed):
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(200, 2, generator=generator)
        labels = (points.sum(1) + torch.randn(200, generator=generator)).sign().long() + 1
        labels[::5] = 1
        rows = zip(points.tolist(), labels.tolist(), strict=True)
        examples = [Example(tuple(x), y, str(i)) for i, (x, y) in enumerate(rows)]
        return Splits(examples[:60], examples[60:100], examples[100:150], examples[150:])

    def collate(self, examples):
        return {
            "input": torch.tensor([example.content for example in examples]),
            "labels": torch.tensor([example.label for example in examples]),
        }

    def build(self, seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


@pytest.mark.parametrize("curvature", ["exact", "ekfac"])
def test_the_packages_method(tmp_path, curvature):
    task = Points(tmp_path)
    splits = task.make(0)
    model = task.fine_tune(splits.train, 0)
    found = method.predict(task, splits, model, 0, (10, 40), curvature)
    laplace = LaplaceLoRA(model, curvature=curvature).fit(task.batches(splits.train), progress=False)
    laplace.optimize_prior_precision()
    (batch,) = task.batches(splits.test, 50)
    expected = {("laplace evidence", 0): laplace.predict(batch).probs()}
    for n in (10, 40):
        laplace.calibrate(task.batches(splits.held_out[:n]), progress=False)
        expected |= {(f"laplace {m}", n): laplace.predict(batch).probs(m) for m in method.METHODS}
    for (name, n), probs in expected.items():
        torch.testing.assert_close(found.probs[name][n]["test"].float(), probs, rtol=1e-3, atol=1e-5)
    folds = found.probs["laplace pairwise, 2 folds"][0]
    assert folds["shift"].shape == (50, 3)
    assert [fold["n_held_out"] for fold in found.facts["crossfit"]["folds"]] == [30, 30]
    assert found.tensors["test/covariance"].shape == (50, 3, 3)


def record(task, seed, shift=0.0):
    """Scores that can be reckoned with in one's head."""

    def one(nll):
        return {"nll": nll, "ece": nll / 10, "ece_adaptive": nll / 20, "error_auroc": None, "accuracy": 1 - nll / 4}

    by_split = {
        "map": {"0": one(2.0)},
        "temperature": {"10": one(1.2), "100": one(1.0)},
        "calibrated": {"10": one(1.0), "100": one(0.8 + shift)},
    }
    return {"task": task, "seed": seed, "scores": {"test": by_split, "shift": by_split}}


RECORDS = [record("a", 0), record("a", 1, 0.1), record("b", 0, 0.2), record("b", 1, 0.5)]


def test_paired_differences():
    found = report.compare(RECORDS, "test", "calibrated", 100, "nll")
    assert found.mean == pytest.approx((-0.2 - 0.1 + 0 + 0.3) / 4)
    assert found.error == pytest.approx(torch.tensor([-0.2, -0.1, 0.0, 0.3]).std().item() / 2)
    assert report.compare(RECORDS[:2], "test", "calibrated", 10, "nll").better == 1
    assert report.compare(RECORDS, "test", "map", 10, "nll").mean == pytest.approx(0.8)
    assert report.compare(RECORDS, "test", "map", 100, "accuracy").better == 0
    assert report.compare(RECORDS, "test", "calibrated", 100, "error_auroc").count == 0
    tie = report.paired([1.0, 2.0], [1.0, 3.0], higher_is_better=False)
    assert (tie.mean, tie.better, tie.count) == (-0.5, 0.75, 2)
    assert math.isnan(report.paired([1.0], [2.0], True).error)
    tasks = report.compare_tasks(RECORDS, "test", "calibrated", 100, "nll")
    assert (tasks.mean, tasks.error) == pytest.approx((0, 0.15))
    assert (tasks.better, tasks.count) == (0.5, 2)


def test_report(tmp_path):
    page = report.as_markdown(RECORDS, "command", {"python": "3"})
    assert "| map | +1.0000 ± 0.0000 (0%) |" in page
    assert "4 models of 2 tasks: a, b" in page
    assert "nan" not in page
    numbers = json.loads(json.dumps(report.summary(RECORDS), allow_nan=False))
    assert numbers["tasks"]["b"]["test"]["calibrated"]["100"]["nll"]["mean"] == pytest.approx(1.15)
    assert numbers["all"]["test"]["temperature"]["10"]["nll"]["difference"]["mean"] == 0


def test_picture(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "DRAWN", {"calibrated": "#000000"})
    monkeypatch.setattr(report, "AVERAGED", "temperature")
    panel = report.draw(RECORDS).axes[0]
    assert panel.get_title() == "NLL, test"
    handles, names = panel.get_legend_handles_labels()
    line, _, bars = handles[names.index("calibrated")]
    found = [report.compare(RECORDS, "test", "calibrated", n, "nll") for n in report.label_counts(RECORDS)]
    assert line.get_ydata() == pytest.approx([one.mean for one in found])
    lengths = [segment[1, 1] - segment[0, 1] for segment in bars[0].get_segments()]
    assert lengths == pytest.approx([2 * one.error for one in found])
    assert line.get_ydata()[-1] == pytest.approx((-0.2 - 0.1 + 0 + 0.3) / 4)


def test_run_and_go_on(tiny, tmp_path, monkeypatch, capsys):
    calls = []

    def predict(task, splits, model, seed, labels, curvature):
        calls.append(seed)
        probs = {split: torch.full((400, 3), 1 / 3) for split in report.SPLITS}
        return method.Found({"laplace": {0: probs}, "calibrated": dict.fromkeys(labels, probs)}, facts={"x": 1})

    monkeypatch.setattr(study, "make_task", lambda name, cache: tiny)
    monkeypatch.setattr(method, "predict", predict)
    command = ["--out", str(tmp_path), "--task", "majority", "--seeds", "2"]
    assert study.main(command) == 0
    assert study.main(command) == 0
    assert calls == [0, 1]
    found = json.loads((tmp_path / "models/majority-1.json").read_text())
    assert found["sizes"] == {"train": 300, "held_out": 100, "test": 400, "shift": 400}
    assert found["scores"]["test"]["laplace"]["0"]["nll"] == pytest.approx(math.log(3))
    assert set(found["scores"]["shift"]["temperature"]) == {"10", "25", "50", "100"}
    assert {path.name for path in tmp_path.iterdir()} >= {"report.md", "report.json", "report.png"}
    capsys.readouterr()
    assert study.main([*command, "--curvature", "ekfac"]) == 1
    assert "use another folder for --out" in capsys.readouterr().err
    assert study.main([*command, "--fine-tune-only"]) == 0
    assert "majority 0: " in capsys.readouterr().out


def test_files_are_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
