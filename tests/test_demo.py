"""The parts of the demo: its text, tokenizer, sets, training, methods and what it says about them."""

from __future__ import annotations

import ast
import dataclasses
import random

import pytest
import torch

from bayesian_lora_kernels.commands.doctor import TOLERANCE, examine, format_report
from bayesian_lora_kernels.demo import sentences
from bayesian_lora_kernels.demo.methods import NAMES, SETS, Outcome, compare_methods
from bayesian_lora_kernels.demo.report import conclusions, format_table
from bayesian_lora_kernels.demo.results import Run, Statistic, make_run, measure
from bayesian_lora_kernels.demo.sentences import Module, read_standard_library, words
from bayesian_lora_kernels.demo.settings import CLASSES, FOREIGN, DemoSettings, quick_settings
from bayesian_lora_kernels.demo.task import NO_ANSWER, Example, Task, make_batch, shuffled
from bayesian_lora_kernels.demo.tokenizer import build_tokenizer
from bayesian_lora_kernels.demo.training import add_lora, class_logits, fine_tune, make_base_model, train_base_model
from bayesian_lora_kernels.laplace import LaplaceLoRA

SETTINGS = quick_settings()


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
    for name, size in sizes.items():
        answers = [example.answer for example in getattr(one, name)]
        assert answers == sorted([i for i in range(len(CLASSES)) for _ in range(size)])
    assert len(one.foreign) == SETTINGS.foreign
    sets = [{e.tokens for e in getattr(one, name)} for name in ("train", "held_out", "test")]
    assert len(set.union(*sets)) == sum(map(len, sets))
    pretrained = {e.tokens for e in task.base_examples}
    for name in ("train", "held_out", "test", "shift", "foreign"):
        shared = [e for e in getattr(one, name) if e.tokens in pretrained]
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
    many = [Example((2, *range(3, 3 + n)), n) for n in range(1, 31)]
    seen = [int(label) for batch in shuffled(many, 4, random.Random(0)) for label in batch["labels"]]
    assert sorted(seen) == list(range(1, 31))
    assert seen != sorted(seen)


def test_padding_does_not_change_logits(tuned, task):
    model, splits, *_ = tuned
    examples = sorted(splits.test[:6], key=lambda e: len(e.tokens))
    with torch.no_grad():
        together = class_logits(model, make_batch(examples), task.class_token_ids)
        alone = torch.cat([class_logits(model, make_batch([e]), task.class_token_ids) for e in examples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_training_learns_and_freezes_the_base(tuned):
    model, _, losses, tuning, frozen = tuned
    assert len(losses) == SETTINGS.base.steps
    assert sum(losses[-5:]) < sum(losses[:5])
    assert tuning[-1] < 0.5 * tuning[0]
    state = model.base_model.model.state_dict()
    for name, value in frozen.items():
        where = name if name in state else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(state[where], value), name


def test_methods(tuned, task):
    model, splits, *_ = tuned
    order: list[str] = []
    outcomes = compare_methods(model, task, splits, SETTINGS, 0, order.append)
    assert order == list(NAMES.values())
    for method, outcome in outcomes.items():
        for name in SETS:
            assert outcome.probs[name].shape == (len(getattr(splits, name)), len(CLASSES))
        assert set(outcome.by_sampling) == (set() if method in ("map", "temperature") else set(SETS))
    map_test, scaled = outcomes["map"].probs["test"], outcomes["temperature"]
    assert torch.equal(map_test.argmax(-1), scaled.probs["test"].argmax(-1))
    powers = (map_test.double().log() / scaled.chosen).softmax(-1)
    torch.testing.assert_close(scaled.probs["test"].double(), powers, rtol=1e-3, atol=1e-5)
    # the posterior sits at the MAP weights and spreads the probabilities
    laplace = LaplaceLoRA(model, class_token_ids=task.class_token_ids).fit([make_batch(splits.train)], progress=False)
    mean = laplace.predict(make_batch(splits.test)).probs("map")
    torch.testing.assert_close(mean, map_test, rtol=1e-3, atol=1e-4)
    for curvature in ("kfac", "ekfac", "exact", "ekfac_labels"):
        assert outcomes[curvature].probs["test"].max(-1).values.mean() < map_test.max(-1).values.mean()
        assert outcomes[curvature].evidence is not None


def constant_run(seed: int, confidences: dict[str, float]) -> Run:
    """Two thirds of the answers are right, whatever the method; each method has its own confidence."""
    labels = torch.tensor([0, 0, 1])
    outcomes = {}
    for method, confidence in confidences.items():
        row = torch.tensor([confidence] + [(1 - confidence) / 3] * 3, dtype=torch.float64)
        outcomes[method] = Outcome(dict.fromkeys(SETS, row.expand(3, 4)), {}, None, None, 0.0)
    return Run(seed, {"test": labels, "shift": labels}, outcomes)


@pytest.mark.parametrize(
    ("scaled", "verdict"), [(0.66, "is better than all"), (0.97, "is worse than all"), (0.74, "lies among them")]
)
def test_conclusions_follow_the_numbers(scaled, verdict):
    confidences = {"map": 0.99, "temperature": scaled, "kfac": 0.7, "ekfac": 0.75, "exact": 0.8, "ekfac_labels": 0.9}
    results = measure([constant_run(0, confidences)])
    text = " ".join(conclusions(results, SETTINGS))
    assert text.count(verdict) == 4  # NLL and ECE, test and shift
    assert "ECE 0.033 to 0.133 (MAP 0.323)" in text
    assert text.count("and ECE 0.233") == 2  # with labels
    assert "by +0.0 to +0.0 points" in text
    assert "no method tells them apart well" in text


def test_table_has_means_and_errors():
    low = dict.fromkeys(NAMES, 0.7)
    results = measure([constant_run(0, low), constant_run(1, {**low, "map": 0.9})])
    mean, error = results["test"]["map"]["ece"].mean, results["test"]["map"]["ece"].standard_error
    assert mean == pytest.approx((0.9 - 2 / 3 + 0.7 - 2 / 3) / 2)
    assert error == pytest.approx(0.1)
    table = format_table(results, SETTINGS)
    assert f"{mean:.3f} ±0.100" in table
    assert all(name in table for name in NAMES.values())
    assert Statistic((1.0,)).standard_error is None
    assert "±" not in format_table(measure([constant_run(0, low)]), SETTINGS)


def test_run_keeps_labels(task):
    splits = task.splits(0)
    assert make_run(0, splits, {}).labels["test"].tolist() == [example.answer for example in splits.test]


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
