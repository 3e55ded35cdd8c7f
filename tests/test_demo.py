"""The parts of the demo: its text, tokenizer, sets, training, methods and what it says about them."""

from __future__ import annotations

import ast
import copy
import dataclasses
import itertools
import random

import pytest
import torch

from bayesian_lora_kernels.calibration import temperature_scale
from bayesian_lora_kernels.commands.doctor import TOLERANCE, examine, format_report
from bayesian_lora_kernels.demo import sentences
from bayesian_lora_kernels.demo.methods import NAMES, Outcome, compare_methods
from bayesian_lora_kernels.demo.problem import NO_ANSWER, Example, make_batch, shuffled
from bayesian_lora_kernels.demo.report import conclusions, difference_tables, tables
from bayesian_lora_kernels.demo.results import Run, Statistic, differences, make_run, measure
from bayesian_lora_kernels.demo.sentences import Module, read_standard_library, words
from bayesian_lora_kernels.demo.settings import CLASSES, FOREIGN, DemoSettings, quick_settings
from bayesian_lora_kernels.demo.task import Task
from bayesian_lora_kernels.demo.tokenizer import build_tokenizer
from bayesian_lora_kernels.demo.training import add_lora, class_logits, fine_tune, make_base_model, train_base_model
from bayesian_lora_kernels.laplace import LaplaceLoRA

SETTINGS = quick_settings()
TITLES = {"test": "test: docstrings", "shift": "shift: comments"}


@pytest.fixture(scope="module")
def modules():
    return read_standard_library((*CLASSES, *FOREIGN, *(SETTINGS.modules or ())))


@pytest.fixture(scope="module")
def task(modules):
    return Task(modules, SETTINGS)


@pytest.fixture(scope="module")
def tuned(task):
    """A base model that took a few steps, and LoRA trained on it."""
    base = make_base_model(SETTINGS.base, len(task.tokenizer), task.tokenizer.pad_token_id, seed=0)
    losses: list[float] = []
    train_base_model(base, task.base_examples, SETTINGS.base, 0, lambda numbers: losses.append(numbers["text"]))
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = add_lora(base, SETTINGS.tuning, seed=0)
    splits = task.splits(0)
    tuning: list[float] = []
    fine_tune(
        model, task.class_token_ids, splits.train, SETTINGS.tuning, 0, lambda numbers: tuning.append(numbers["loss"])
    )
    return model, splits, losses, tuning, frozen


def test_words():
    assert words("The XMLParser's get_event_loop, 42!") == [
        "the", "xml", "parser", "'", "s", "get", "event", "loop", ",", "4", "2", "!",
    ]  # fmt: skip


def test_comments_are_not_lines_of_strings():
    source = '"""Doc.\n# no comment\n"""\nx = 1  # beside code\n# one\n#: two\ny = 2\n    # three\n'
    assert list(sentences._comments(source, ast.parse(source))) == ["one\ntwo", "three"]


def test_sentences_are_filtered():
    seen: set[tuple[str, ...]] = set()
    text = "Too short. The email package parses a long message.\n\n>>> this is code of a test here"
    found = sentences._new_sentences(text, "email", seen)
    assert found == [("the", "package", "parses", "a", "long", "message", ".")]
    assert sentences._new_sentences(text, "email", seen) == []  # each once


def test_standard_library(modules):
    assert list(modules) == sorted(modules)
    every = [s for m in modules.values() for documents in (m.docstrings, m.comments) for d in documents for s in d]
    assert len(every) == len(set(every))
    assert all(5 <= sum(word.isalpha() for word in sentence) <= 40 for sentence in every)
    for name in CLASSES:
        assert not any(
            name in s for documents in (modules[name].docstrings, modules[name].comments) for d in documents for s in d
        )


def test_tokenizer_is_the_same_every_time_and_knows_rare_words():
    texts = [["parse", "the", "header"]] * 5 + [["parsing", "headers"], ["unheard"]]
    one, two = (build_tokenizer(order, ["email"], 60, 12) for order in (texts, texts[::-1]))
    assert one.get_vocab() == two.get_vocab()
    assert len(one) <= 60
    assert len(one("email", add_special_tokens=False)["input_ids"]) == 1
    assert one.unk_token_id not in one("parsing unheard headers", add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match="expected more than"):
        build_tokenizer(texts, ["email"], 20, 5)


def test_full_settings_have_enough_text(modules):
    full = DemoSettings()
    for name in CLASSES:
        assert sum(map(len, modules[name].docstrings)) >= full.train + full.held_out + full.test
        assert sum(map(len, modules[name].comments)) >= full.shift


def test_splits(task, modules):
    one, again, other = task.splits(3), task.splits(3), task.splits(4)
    assert one == again
    assert one.train != other.train
    sizes = {"train": SETTINGS.train, "held_out": SETTINGS.held_out, "test": SETTINGS.test, "shift": SETTINGS.shift}
    parts = {"train": one.train, "held_out": one.held_out, **one.measured}
    for name, size in sizes.items():
        answers = [example.answer for example in parts[name]]
        assert answers == sorted([i for i in range(len(CLASSES)) for _ in range(size)])
    assert len(one.foreign) == SETTINGS.foreign
    sets = [{e.tokens for e in getattr(one, name)} for name in ("train", "held_out", "test")]
    assert len(set.union(*sets)) == sum(map(len, sets))
    documents = [{e.document for e in getattr(one, name)} for name in ("train", "held_out", "test")]
    assert all(len(first & second) <= len(CLASSES) for first, second in itertools.pairwise(documents))  # cut at the end
    pretrained = {e.tokens for e in task.base_examples}
    for examples in (*parts.values(), one.foreign):
        shared = [e for e in examples if e.tokens in pretrained]
        assert len(shared) <= 1  # distinct sentences may be cut to the same tokens


def test_too_little_text_is_said(modules):
    with pytest.raises(RuntimeError, match=r"email: expected .* docstring sentences in this Python, got 0"):
        Task({**modules, "email": Module("email")}, SETTINGS)


def test_batches():
    examples = [Example((2, 5, 6), 1), Example((2, 7), NO_ANSWER)]
    batch = make_batch(examples)
    assert batch["input_ids"].tolist() == [[2, 5, 6], [0, 2, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["labels"].tolist() == [1, NO_ANSWER]
    right = make_batch(examples, pad=9, left=False)
    assert right["input_ids"].tolist() == [[2, 5, 6], [2, 7, 9]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    many = [Example((2, *range(3, 3 + n)), n) for n in range(1, 31)]
    seen = [example.answer for group in shuffled(many, 4, random.Random(0)) for example in group]
    assert sorted(seen) == list(range(1, 31))
    assert seen != sorted(seen)


def test_padding_does_not_change_logits(tuned, task):
    model, splits, *_ = tuned
    examples = sorted(splits.test[:6], key=lambda e: len(e.tokens))
    with torch.no_grad():
        together = class_logits(model, make_batch(examples), task.class_token_ids)
        right = class_logits(model, make_batch(examples, left=False), task.class_token_ids)
        alone = [model(input_ids=torch.tensor([e.tokens])).logits[:, -1, list(task.class_token_ids)] for e in examples]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_training_learns_and_freezes_the_base(tuned):
    model, _, losses, tuning, frozen = tuned
    assert len(losses) == SETTINGS.base.steps
    assert sum(losses[-5:]) < sum(losses[:5])
    assert tuning[-1] < 0.5 * tuning[0]
    state = model.base_model.model.state_dict()
    for name, value in frozen.items():
        where = name if name in state else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(state[where], value), name


class Fixed:
    """A problem whose model is what it is, whatever it is trained on."""

    question = "?"

    def __init__(self, model, task):
        self.seconds, self.titles = {}, {"test": "test", "shift": "shift"}
        self.model, self.class_token_ids, self.classes = model, task.class_token_ids, CLASSES
        self.predict_batch_size = SETTINGS.predict_batch_size
        self.parts: list[list[Example]] = []

    def splits(self, seed):
        raise AssertionError("they are given")

    def fine_tune(self, examples, seed, progress):
        self.parts.append(list(examples))
        return copy.deepcopy(self.model)

    def batch(self, examples):
        return make_batch(examples)

    def as_json(self):
        return {}


def test_methods(tuned, task):
    model, splits, *_ = tuned
    problem = Fixed(model, task)
    outcomes, folds = compare_methods(problem, splits, 0)
    assert list(outcomes) == list(NAMES)
    parts = [len(part) for part in problem.parts]
    one, other = ({example.document for example in part} for part in problem.parts[:2])
    assert not one & other  # no docstring is in both folds
    assert parts[:-1] == [fold["n_train"] for fold in folds["folds"]]
    assert parts[-1] == len(splits.train) == sum(fold["n_held_out"] for fold in folds["folds"])
    for outcome in outcomes.values():
        assert {name: probs.shape for name, probs in outcome.probs.items()} == {
            name: (len(examples), len(CLASSES))
            for name, examples in {**splits.measured, "foreign": splits.foreign}.items()
        }
    map_test, scaled = outcomes["map"].probs["test"], outcomes["temperature"]
    with torch.no_grad():
        logits = {
            name: class_logits(model, make_batch(getattr(splits, name)), task.class_token_ids)
            for name in ("test", "held_out")
        }
    torch.testing.assert_close(map_test, logits["test"].softmax(-1), rtol=1e-3, atol=1e-4)
    labels = torch.tensor([example.answer for example in splits.held_out])
    assert scaled.chosen["temperature"] == pytest.approx(temperature_scale(logits["held_out"], labels), rel=1e-3)
    powers = (logits["test"].double() / scaled.chosen["temperature"]).softmax(-1)
    torch.testing.assert_close(scaled.probs["test"].double(), powers, rtol=1e-3, atol=1e-5)
    # an average over temperatures keeps the most probable class, and is what a brute-force average is
    ladder = torch.linspace(-1.4, 3, 15, dtype=torch.float64).exp()
    fit = torch.stack(
        [(logits["held_out"].double() / t).log_softmax(-1)[range(len(labels)), labels].sum() for t in ladder]
    )
    weights = (fit - (ladder.log() - 0.5).square() / 2).softmax(0)
    average = sum(w * (logits["test"].double() / t).softmax(-1) for w, t in zip(weights, ladder, strict=True))
    torch.testing.assert_close(outcomes["averaged"].probs["test"].double(), average, rtol=1e-3, atol=1e-5)
    # the same posterior through the public calls
    for method, curvature in (("labels", "exact"), ("ekfac_labels", "ekfac")):
        laplace = LaplaceLoRA(model, class_token_ids=task.class_token_ids, curvature=curvature)
        laplace.fit([make_batch(splits.train)], progress=False).optimize_prior_precision()
        plain = laplace.predict(make_batch(splits.test)).probs()
        laplace.calibrate([make_batch(splits.held_out)], progress=False)
        expected = laplace.predict(make_batch(splits.test)).probs()
        torch.testing.assert_close(outcomes[method].probs["test"], expected, rtol=1e-2, atol=1e-3)
        if method == "labels":
            torch.testing.assert_close(outcomes["evidence"].probs["test"], plain, rtol=1e-2, atol=1e-3)


def constant_run(seed: int, confidences: dict[str, float], sets: tuple[str, ...] = ("test", "shift", "foreign")) -> Run:
    """Two thirds of the answers are right, whatever the method; each method has its own confidence."""
    labels = torch.tensor([0, 0, 1])
    outcomes = {}
    for method, confidence in confidences.items():
        row = torch.tensor([confidence] + [(1 - confidence) / 3] * 3, dtype=torch.float64)
        outcomes[method] = Outcome(dict.fromkeys(sets, row.expand(3, 4)), {}, 0.0)
    return Run(seed, 9, 32, {name: labels for name in sets if name != "foreign"}, outcomes, {})


def test_conclusions_follow_the_numbers():
    confidences = {**dict.fromkeys(NAMES, 0.9), "map": 0.99, "temperature": 0.8, "labels": 0.7, "evidence": 0.5}
    text = " ".join(conclusions(measure([constant_run(0, confidences)]), 32))
    assert text.count("ECE 0.323 as fine-tuned") == text.count("ECE 0.133 by temperature scaling with 32 labels") == 2
    assert text.count("ECE 0.033 by Laplace with the same labels") == 2
    assert text.count("Laplace with the same labels is better in NLL and better in ECE") == 2
    assert text.count("Laplace without them is no better in NLL and no better in ECE") == 2
    assert "by +0.0 to +0.0 points" in text
    assert "no method tells them apart well" in text


def test_differences_are_paired():
    runs = [constant_run(seed, {**dict.fromkeys(NAMES, 0.7), "map": m}) for seed, m in enumerate((0.9, 0.8))]
    results = measure(runs)
    found = differences(results)["test"]["map"]["ece"]
    assert found.mean == pytest.approx(0.15)
    assert found.standard_error == pytest.approx(0.05)
    assert (found.share_lower, found.n) == (0, 2)
    assert "temperature" not in differences(results)["test"]
    table = "\n\n".join(map(str, difference_tables(results)))
    assert "+0.150 ±0.050 (0/2)" in table
    assert "test, less temperature scaling" in table


def test_table_has_means_and_errors():
    low = dict.fromkeys(NAMES, 0.7)
    results = measure([constant_run(0, low), constant_run(1, {**low, "map": 0.9})])
    mean, error = results["test"]["map"]["ece"].mean, results["test"]["map"]["ece"].standard_error
    assert mean == pytest.approx((0.9 - 2 / 3 + 0.7 - 2 / 3) / 2)
    assert error == pytest.approx(0.1)
    table = "\n\n".join(map(str, tables(results, TITLES)))
    assert f"{mean:.3f} ±0.100" in table
    assert all(name in table for name in NAMES.values())
    assert Statistic((1.0,)).standard_error is None
    assert "±" not in "".join(map(str, tables(measure([constant_run(0, low)]), TITLES)))


def test_run_keeps_labels(task):
    splits = task.splits(0)
    assert make_run(0, splits, {}, {}).labels["test"].tolist() == [example.answer for example in splits.test]


def test_doctor_passes_and_notices_a_fault(monkeypatch):
    report = examine()
    assert report["ok"]
    assert len(report["checks"]) == 2
    original = LaplaceLoRA.log_marginal_likelihood
    monkeypatch.setattr(LaplaceLoRA, "log_marginal_likelihood", lambda self: original(self) * (1 + 10 * TOLERANCE))
    broken = examine()
    assert [check["passed"] for check in broken["checks"]] == [False, True]
    assert not broken["ok"]
    assert "FAIL  evidence" in format_report(broken)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SETTINGS.train = 1  # type: ignore[misc]
