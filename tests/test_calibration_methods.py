"""The study of methods: each against an independent computation, lines of runs, resumption, the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from bayesian_lora_kernels import LaplaceLoRA, crossfit
from bayesian_lora_kernels.calibration import ood_auroc, temperature_scale
from benchmarks.calibration.files import write_tensors
from benchmarks.calibration.methods import __main__ as study
from benchmarks.calibration.methods import baselines, gym, laplace, report, tfb
from benchmarks.calibration.methods.case import SETS, Case, Outcome, measured, mutual_information
from benchmarks.calibration.methods.registry import METHODS, REFERENCE
from benchmarks.calibration.methods.runs import Runs, StudyError, record
from benchmarks.calibration.scores import labels_of
from benchmarks.calibration.tasks import COMPARED, Example, Splits, Training, make_task
from benchmarks.calibration.tasks.causal import Llama, NextToken
from benchmarks.calibration.tasks.task import MissingPackage, cpu_seconds, logits_of, set_lora_dropout


class Symbols(NextToken):
    """Which of two symbols is more frequent? A tiny Llama says so by its next token."""

    name, n_classes, training = "symbols", 2, Training(epochs=3, learning_rate=2e-2, batch_size=8)
    class_token_ids = (4, 5)
    last_layer = r".*\.layers\.1\..*"
    batch_size = 16
    llama = Llama(vocabulary=8, width=16, layers=2, heads=2)

    def make(self, seed):
        generator = torch.Generator().manual_seed(seed)
        texts = torch.randint(2, 4, (112, 7), generator=generator)
        labels = ((texts == 3).sum(1) > 3).long()
        examples = [
            Example(tuple(text[: 5 + i % 3].tolist()), label, str(i))
            for i, (text, label) in enumerate(zip(texts, labels.tolist(), strict=True))
        ]
        foreign = [Example((6, 7, 6, 7, i % 8), 0, f"foreign {i}") for i in range(12)]
        return Splits(examples[:40], examples[40:72], examples[72:92], examples[92:], foreign)

    def build(self, seed):
        weights = dict(self.llama.make().state_dict())
        return self.llama.adapted(weights, seed, ["q_proj", "v_proj"], rank=2)


@pytest.fixture
def case(tmp_path):
    return Case(Symbols(tmp_path), 0)


def batch_of(case, name):
    return case.task.collate(getattr(case.splits, name))


def plain_logits(case, model, name):
    """By the whole model on texts one by one, without padding."""
    rows = []
    with torch.no_grad():
        for example in getattr(case.splits, name):
            rows.append(model(torch.tensor([example.content])).logits[0, -1, list(case.task.class_token_ids)])
    return torch.stack(rows).double()


def test_left_padding_changes_nothing(case):
    found = logits_of(case.task, case.model, case.splits.test)
    torch.testing.assert_close(found, plain_logits(case, case.model, "test"), rtol=1e-4, atol=1e-5)


def test_temperatures(case):
    model = case.model
    held_out, test = (plain_logits(case, model, name) for name in ("held_out", "test"))
    labels = torch.tensor([example.label for example in case.splits.held_out])
    temperature = temperature_scale(held_out, labels)
    outcome = METHODS[REFERENCE].run(case)
    torch.testing.assert_close(outcome.probs["test"], (test / temperature).softmax(1), rtol=1e-3, atol=1e-4)
    assert outcome.facts["temperature"] == pytest.approx(temperature, rel=1e-2)
    torch.testing.assert_close(METHODS["MAP"].run(case).probs["test"], test.softmax(1), rtol=1e-3, atol=1e-4)
    assert set(outcome.seconds) == {"labels", "predict"}
    assert not outcome.mutual_information


def test_dropout_is_in_training_and_in_the_passes(case):
    outcome = baselines.dropout(case)
    path = case.task.tuned(case.splits.train, 0, baselines.DROPOUT)
    assert path.exists()
    assert path != case.task.tuned(case.splits.train, 0)
    model = case.task.fine_tune(case.splits.train, 0, baselines.DROPOUT).train()
    torch.manual_seed(0)
    passes = []
    for _ in range(baselines.PASSES):
        with torch.no_grad():
            parts = [case.task.logits(model, batch) for batch in case.task.batches(case.splits.test)]
        passes.append(torch.cat(parts).double().softmax(1))
    torch.testing.assert_close(outcome.probs["test"], torch.stack(passes).mean(0))
    assert (torch.stack(passes).std(0) > 0).all()
    assert (outcome.mutual_information["test"] > 0).all()
    assert outcome.seconds["fine-tuning"] == cpu_seconds(path)
    with torch.no_grad():
        model.eval()
        set_lora_dropout(model, 0.0)
        certain = logits_of(case.task, model, case.splits.test)
        torch.testing.assert_close(logits_of(case.task, model, case.splits.test), certain, rtol=0, atol=0)


def test_ensemble(case):
    members = [case.task.fine_tune(case.splits.train, seed) for seed in (0, 1000, 2000, 3000, 4000)]
    probs = torch.stack([plain_logits(case, member, "test").softmax(1) for member in members])
    outcome = baselines.ensemble(case)
    torch.testing.assert_close(outcome.probs["test"], probs.mean(0), rtol=1e-3, atol=1e-4)
    paths = [case.task.tuned(case.splits.train, seed) for seed in (1000, 2000, 3000, 4000)]
    assert outcome.seconds["fine-tuning"] == pytest.approx(sum(map(cpu_seconds, paths)))
    # the information: sum p(member) p(label | member) log of their quotient to the mean
    expected = (probs * (probs / probs.mean(0)).log()).sum(-1).mean(0)
    torch.testing.assert_close(outcome.mutual_information["test"], expected, rtol=1e-3, atol=1e-5)
    calibrated = baselines.ensemble(case, by_labels=True)
    held_out = torch.stack([plain_logits(case, member, "held_out").softmax(1) for member in members]).mean(0)
    temperature = temperature_scale(held_out.log(), case.labels("held_out"))
    torch.testing.assert_close(
        calibrated.probs["test"], (probs.mean(0).log() / temperature).softmax(1), rtol=1e-2, atol=1e-3
    )
    assert calibrated.seconds["labels"] > 0


@pytest.mark.parametrize("kind", laplace.KINDS)
def test_laplace(case, kind):
    task = case.task
    fresh = LaplaceLoRA(case.model, class_token_ids=task.class_token_ids, **laplace.settings(kind, case))
    fresh.fit(task.batches(case.splits.train), progress=False).optimize_prior_precision()
    assert len(fresh.layers) == (4 if kind == "last layer" else 8)
    assert fresh.config.tail == (kind != "published")
    prediction = fresh.predict(batch_of(case, "test"))
    method = "mc" if kind == "published" else "pairwise"
    expected = prediction.probs(method, 2**16, torch.Generator().manual_seed(3))
    outcome = laplace.evidence(kind, case)
    torch.testing.assert_close(outcome.probs["test"].float(), expected, rtol=5e-3, atol=2e-3)
    samples = prediction.sample(2**14, torch.Generator().manual_seed(4)).double().softmax(-1)
    torch.testing.assert_close(outcome.mutual_information["test"], mutual_information(samples), rtol=0.15, atol=2e-3)
    fresh.calibrate(task.batches(case.splits.held_out), progress=False)
    expected = fresh.predict(batch_of(case, "test")).probs()
    outcome = laplace.by_labels(kind, case)
    torch.testing.assert_close(outcome.probs["test"].float(), expected, rtol=1e-3, atol=1e-4)
    assert set(outcome.seconds) == {"fit", "labels", "predict"}
    assert not outcome.mutual_information


def test_a_posterior_is_fitted_once(case, monkeypatch):
    first = laplace.evidence("ekfac", case)
    monkeypatch.setattr(laplace, "LaplaceLoRA", None)
    again = laplace.evidence("ekfac", Case(Symbols(case.task.cache), 0))
    for name in SETS:
        torch.testing.assert_close(again.probs[name], first.probs[name], rtol=0, atol=0)
    assert again.seconds == first.seconds
    with pytest.raises(TypeError):
        laplace.evidence("ekfac", Case(Symbols(case.task.cache), 1))


def test_tfb_s_noise_has_one_scale_behind_b_and_is_gone_afterwards(case):
    model, sigma = case.model, 0.05
    before = {name: value.clone() for name, value in model.named_parameters()}
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    product, u = (b @ a).detach(), torch.linalg.svd(b.detach(), full_matrices=False)[0]
    generator, moved = torch.Generator().manual_seed(0), []
    for _ in range(400):
        with tfb.noisy(model, sigma, generator):
            moved.append(((b @ a).detach() - product).clone())
    delta = torch.stack(moved)
    torch.testing.assert_close(u @ (u.T @ delta), delta, rtol=1e-3, atol=1e-5)  # within the columns of B
    assert float((u.T @ delta).std()) == pytest.approx(sigma, rel=0.03)
    with pytest.raises(KeyError), tfb.noisy(model, sigma, generator):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_tfb_takes_the_largest_noise_that_the_loss_tolerates(case):
    assert tfb.bisect(lambda sigma: sigma < 0.0123) == pytest.approx(0.0123, rel=0.08)
    sigma = tfb.largest_tolerated(case.task, case.model, case.splits.train, 0)
    labels = torch.tensor([example.label for example in case.splits.train])

    def loss(probs):
        return float(-probs[torch.arange(len(labels)), labels].log().mean())

    plain = loss(plain_logits(case, case.model, "train").softmax(1))
    changes = [
        abs(loss(tfb.sampled(case.task, case.model, case.splits.train, each, 0).mean(0)) / plain - 1)
        for each in (sigma, 1.08 * sigma)
    ]
    assert changes[0] <= tfb.TOLERANCE < changes[1]
    outcome = METHODS["TFB"].run(case)
    expected = tfb.sampled(case.task, case.model, case.splits.test, sigma, 0).mean(0)
    torch.testing.assert_close(outcome.probs["test"], expected)


def test_bayesadapt_s_laplace_and_its_scale(case, monkeypatch):
    monkeypatch.setattr(gym, "SAMPLES", 2**15)
    outcomes = {scale: gym.run(scale, case) for scale in gym.SCALES}
    fresh = LaplaceLoRA(case.model, class_token_ids=case.task.class_token_ids, curvature="kfac", rank=None)
    fresh.fit(case.task.batches(case.splits.train), progress=False).optimize_prior_precision()
    expected = fresh.predict(batch_of(case, "test")).probs("mc", 2**16, torch.Generator().manual_seed(3))
    corrected, published = outcomes["correct"], outcomes["published"]
    torch.testing.assert_close(corrected.probs["test"].float(), expected, rtol=0, atol=0.01)
    assert corrected.facts["prior precision"] == pytest.approx(float(fresh.prior_precision), rel=1e-4)
    # seven tokens or fewer: a curvature that is up to seven times too large
    ratio = published.facts["prior precision"] / corrected.facts["prior precision"]
    assert 1.05 < ratio < 7
    assert (published.mutual_information["test"] < corrected.mutual_information["test"]).all()


def test_folds(case):
    task, train = case.task, case.splits.train
    fresh = crossfit(
        lambda part: task.fine_tune(part, 0),
        train,
        2,
        collate=task.collate,
        batch_size=16,
        labels=[example.label for example in train],
        groups=[example.source for example in train],
        class_token_ids=task.class_token_ids,
        curvature="exact",
        progress=False,
    )
    outcome = laplace.crossfitted("exact", case)
    expected = fresh.predict(batch_of(case, "test"), differences=True).probs()
    torch.testing.assert_close(outcome.probs["test"].float(), expected, rtol=1e-3, atol=1e-4)
    halves = [cpu_seconds(path) for path in (task.cache / task.name).glob("tuned-*")]
    whole = cpu_seconds(task.tuned(train, 0))
    assert outcome.seconds["fine-tuning"] == pytest.approx(sum(halves) - whole)
    assert [fold["n_train"] for fold in outcome.facts["folds"]] == [20, 20]


def test_what_things_cost():
    kept = []
    _, cost = measured(lambda: kept.append(torch.ones(2**24)))  # 64 MiB
    assert math.isnan(cost.mib) or 60 < cost.mib < 90
    assert cost.seconds >= 0
    assert measured(lambda: 3)[0] == 3


def test_mutual_information():
    sure = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    assert float(mutual_information(sure)) == pytest.approx(math.log(2))
    assert float(mutual_information(torch.full((5, 1, 2), 0.5))) == 0


def test_seconds_of_older_files_are_refused(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"seconds": "3.0"})
    with pytest.raises(ValueError, match=r"expected its cpu_seconds.*another folder for --cache"):
        cpu_seconds(tmp_path / "a.safetensors")


def test_autocast_is_another_model(case):
    plain = case.task.tuned(case.splits.train, 0)
    case.task.autocast = True
    assert case.task.tuned(case.splits.train, 0) != plain
    assert case.fine_tuned()[0].training is False


def test_a_line(case):
    probs = {"test": torch.tensor([[0.9, 0.1]] * 20), "shift": torch.tensor([[0.4, 0.6]] * 20)}
    probs["foreign"] = torch.tensor([[0.6, 0.4]] * 10 + [[0.95, 0.05]] * 2)
    information = {"test": torch.arange(20.0), "foreign": torch.arange(12.0) + 5}
    outcome = Outcome(probs, information, {"fit": 1.0}, mib=2.0, facts={"x": 1})
    line = json.loads(json.dumps(record(case, "MAP", outcome, case.settings, {}), allow_nan=False))
    labels = labels_of(case.splits.test)
    assert line["scores"]["test"]["accuracy"] == pytest.approx(float((labels == 0).double().mean()))
    assert line["scores"]["foreign"]["entropy"] == pytest.approx(10 / 12)
    assert line["scores"]["foreign"]["mutual information"] == pytest.approx(ood_auroc(*information.values()))
    assert line["settings"]["sizes"] == {"train": 40, "held_out": 32, "test": 20, "shift": 20, "foreign": 12}
    assert (
        record(case, "MAP", replace(outcome, mutual_information={}), {}, {})["scores"]["foreign"]["mutual information"]
        is None
    )


def test_run_go_on_and_refuse(tmp_path, monkeypatch, capsys):
    made = []

    def make(name, cache, ratings):
        made.append(name)
        return Symbols(cache)

    monkeypatch.setattr(study, "make_task", make)
    command = ["--out", str(tmp_path), "--task", "stdlib", "--seeds", "2", "--cache", str(tmp_path / "kept")]
    assert study.main([*command, "--method", "MAP", "--method", REFERENCE]) == 0
    lines = (tmp_path / study.RUNS).read_text().splitlines()
    assert [(run["seed"], run["method"]) for run in map(json.loads, lines)] == [
        (seed, name) for seed in (0, 1) for name in ("MAP", REFERENCE)
    ]
    assert study.main([*command, "--method", "MAP", "--method", "last layer, labels"]) == 0
    after = (tmp_path / study.RUNS).read_text().splitlines()
    assert after[:4] == lines  # what was finished is as it was
    assert len(after) == 6
    assert {path.name for path in tmp_path.iterdir()} >= {"report.md", "report.json", "report.png"}
    # two lines were lost with the machine: they are done again, with the same numbers
    (tmp_path / study.RUNS).write_text("\n".join(after[:4]) + "\n")
    assert study.main([*command, "--method", "last layer, labels"]) == 0
    again = [json.loads(line)["scores"] for line in (tmp_path / study.RUNS).read_text().splitlines()]
    assert again == [json.loads(line)["scores"] for line in after]
    capsys.readouterr()
    monkeypatch.setattr(Symbols, "training", replace(Symbols.training, epochs=1))
    assert study.main([*command, "--method", "MAP"]) == 1
    assert "symbols, seed 0, MAP: made with training = {'epochs': 3" in capsys.readouterr().err
    assert study.main([*command, "--fine-tune-only"]) == 0
    assert "symbols 1: " in capsys.readouterr().out
    with (tmp_path / study.RUNS).open("a") as file:
        file.write('{"task": "symb')
    assert study.main([*command, "--method", "MAP"]) == 1
    assert f"{study.RUNS}, line 7: expected a run as JSON" in capsys.readouterr().err


def test_other_settings_are_refused(tmp_path):
    runs = Runs(tmp_path / "runs.jsonl")
    runs.add({"task": "a", "seed": 0, "method": "MAP", "settings": {"passes": 20, "seeds": [1, 2]}})
    again = Runs(tmp_path / "runs.jsonl")
    assert again.has("a", 0, "MAP", {"passes": 20, "seeds": (1, 2)})
    assert not again.has("a", 1, "MAP", {"passes": 10})
    assert not again.has("a", 0, "MC dropout", {"passes": 10})
    with pytest.raises(
        StudyError, match=r"a, seed 0, MAP: made with passes = 20, now asked for 10; use another folder"
    ):
        again.has("a", 0, "MAP", {"passes": 10, "seeds": [1, 2]})


def test_tasks_that_need_a_file_say_so(tmp_path):
    with pytest.raises(MissingPackage, match="expected --ratings FILE; get it with pip download"):
        make_task("sentiment-minilm", tmp_path).make(0)
    assert len({make_task(name, tmp_path).name for name in COMPARED}) == len(COMPARED)


def line(task, seed, method, nll, aurc=0.1, information=None):
    scores = {"accuracy": 1 - nll / 4, "nll": nll, "ece": nll / 10, "brier": nll / 5, "error_auroc": None, "aurc": aurc}
    foreign = {"entropy": 0.7, "mutual information": information}
    environment = {"python": "3", "torch": "2", "transformers": "5", "peft": "0"}
    return {
        "task": task,
        "seed": seed,
        "method": method,
        "scores": {"test": scores, "shift": scores, "foreign": foreign},
        "seconds": {"fit": 2.0 + seed},
        "mib": 10.0,
        "settings": {"sizes": {"train": 3}},
        "environment": environment,
    }


LINES = [
    line("a", 0, REFERENCE, 1.0),
    line("a", 1, REFERENCE, 1.2),
    line("b", 0, REFERENCE, 0.5),
    line("a", 0, "exact, labels", 0.9, 0.3, 0.8),
    line("a", 1, "exact, labels", 1.0, 0.1, 0.6),
    line("b", 0, "exact, labels", 0.6),
    line("b", 1, "exact, labels", 9.0),  # without a partner
    line("a", 0, "MAP", 2.0),
]


def test_differences_are_paired():
    found = report.against_reference(LINES, "exact, labels", "test", "nll")
    assert found.mean == pytest.approx((-0.1 - 0.2 + 0.1) / 3)
    assert found.error == pytest.approx(torch.tensor([-0.1, -0.2, 0.1]).std().item() / 3**0.5)
    assert (found.better, found.count) == (pytest.approx(2 / 3), 3)
    assert report.against_reference(LINES, "exact, labels", "test", "accuracy").better == pytest.approx(2 / 3)
    # smaller areas are better
    assert report.against_reference(LINES, "exact, labels", "test", "aurc").better == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert report.against_reference(LINES, "exact, labels", "test", "error_auroc").count == 0


def test_report(tmp_path):
    page = report.as_markdown(LINES)
    assert "| exact, labels | +0.017 ± 0.022 (2/3) | -0.067 ± 0.088 (2/3) |" in page
    assert "Models: 2 of a, 2 of b." in page
    assert "nan" not in page
    numbers = json.loads(json.dumps(report.summary(LINES), allow_nan=False))
    own = numbers["tasks"]["a"]["exact, labels"]
    assert own["test"]["nll"]["mean"] == pytest.approx(0.95)
    assert own["foreign"]["mutual information"]["mean"] == pytest.approx(0.7)
    assert own["less temperature scaling"]["shift"]["nll"]["mean"] == pytest.approx(-0.15)
    assert own["seconds"]["fit"]["mean"] == 2.5
    assert numbers["tasks"]["a"]["MAP"]["test"]["nll"]["standard_error"] is None
    assert list(numbers["all"]) == ["MAP", REFERENCE, "exact, labels"]


def test_picture():
    pytest.importorskip("matplotlib")
    first, second = report.draw(LINES).axes
    assert (first.get_title(), second.get_title()) == ("a (2 models)", "b (2 models)")
    handles, names = first.get_legend_handles_labels()
    assert names == ["test", "shift"]
    for (line, _, bars), split in zip(handles, names, strict=True):
        drawn = dict(zip([text.get_text() for text in first.get_yticklabels()][::-1], line.get_xdata(), strict=True))
        own = [one for one in LINES if one["task"] == "a"]
        wanted = {name: report.against_reference(own, name, split, "nll").mean for name in ("MAP", "exact, labels")}
        assert drawn == pytest.approx(wanted)
        error = report.against_reference(own, "exact, labels", split, "nll").error
        (segments,) = (one.get_segments() for one in bars)
        assert segments[1][1, 0] - segments[1][0, 0] == pytest.approx(2 * error)
    assert drawn["exact, labels"] == pytest.approx(-0.15)
