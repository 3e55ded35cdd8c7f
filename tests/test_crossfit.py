"""`crossfit`: calibration without held-out labels."""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
import os
import weakref
from collections import Counter, namedtuple
from dataclasses import make_dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from dense import relative
from torch import nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.crossfitting.folds import assign_folds, digest, labels_of, subset
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.reading import unweighted
from bayesian_lora_kernels.predictive.calibrate import Calibration, LabelLikelihood

N, CLASSES = 60, 3


def make_data(n: int = N, seed: int = 0, noise: float = 0.3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator)
    rule = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(9))
    labels = (x @ rule).argmax(1)
    random = torch.rand(n, generator=generator) < noise
    labels[random] = torch.randint(CLASSES, (n,), generator=generator)[random]
    return [{"x": x[i], "labels": labels[i]} for i in range(n)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None):
        logits = self.last(self.first(x).tanh())
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def fine_tune(examples, steps: int = 60) -> nn.Module:
    model = Net()
    x = torch.stack([example["x"] for example in examples])
    y = torch.stack([example["labels"] for example in examples])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


class Watched:
    """`fine_tune` that notes what it saw, and fails when it is told to."""

    def __init__(self, fail_at: int | None = None):
        self.seen: list[list[float]] = []
        self.fail_at = fail_at

    def __call__(self, examples):
        if len(self.seen) + 1 == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append([float(example["x"][0]) for example in examples])
        return fine_tune(examples)


SETTINGS = {"curvature": "exact", "progress": False}


@pytest.fixture(scope="module")
def crossed() -> blk.LaplaceLoRA:
    return blk.crossfit(fine_tune, make_data(), folds=3, **SETTINGS)


def test_it_is_what_the_folds_say_together(crossed):
    data = make_data()
    labels = [int(example["labels"]) for example in data]
    assigned = assign_folds(labels, 3, seed=0)
    expected = LabelLikelihood()
    for fold in range(3):
        inside = [e for e, f in zip(data, assigned, strict=True) if f == fold]
        outside = [e for e, f in zip(data, assigned, strict=True) if f != fold]
        laplace = blk.LaplaceLoRA(fine_tune(outside), curvature="exact")
        laplace.fit(torch.utils.data.DataLoader(outside, batch_size=5), progress=False).optimize_prior_precision()
        expected += laplace.label_likelihood(torch.utils.data.DataLoader(inside, batch_size=5), progress=False)
        report = crossed.calibration.report["folds"][fold]
        assert (report["n_train"], report["n_held_out"]) == (len(outside), len(inside))
        with torch.no_grad():
            logits = torch.stack([laplace.model(e["x"]) for e in inside])
        targets = torch.stack([e["labels"] for e in inside])
        assert abs(report["accuracy"] - float((logits.argmax(1) == targets).double().mean())) < 1e-12
        assert abs(report["nll_map"] - float(nn.functional.cross_entropy(logits, targets))) < 1e-5
        assert report["seconds_training"] > 0
        assert report["seconds_beyond"] > 0
    full = blk.LaplaceLoRA(fine_tune(data), curvature="exact")
    full.fit(torch.utils.data.DataLoader(data, batch_size=5), progress=False).optimize_prior_precision()
    full.calibrate(expected)
    assert (crossed.calibration.n_labels, crossed.calibration.folds) == (N, 3)
    for method in ("pairwise", "scalar"):
        assert relative(crossed.calibration.weights[method], full.calibration.weights[method]) < 1e-4
        batch = {"x": torch.stack([e["x"] for e in make_data(20, seed=1)])}
        found, truth = crossed.predict(batch).probs(method), full.predict(batch).probs(method)
        assert (found - truth).abs().max() < 1e-4


def test_weights_count_in_fits_only(crossed):
    data = [{**example, "weights": torch.tensor(1.0)} for example in make_data()]
    found = blk.crossfit(fine_tune, data, folds=3, **SETTINGS)
    for name, table in crossed.calibration.weights.items():
        assert relative(found.calibration.weights[name], table) < 1e-6
    doubled = [{**example, "weights": torch.tensor(2.0)} for example in make_data()]
    found = blk.crossfit(fine_tune, doubled, folds=2, prior_precision=1.0, **SETTINGS)
    assert found.calibration.n_labels == N
    assert found.log_likelihood == pytest.approx(2 * crossed.log_likelihood, rel=1e-6)


@pytest.mark.parametrize("kind", ["mapping", "dataclass", "named tuple", "pair"])
def test_batches_without_their_weights(kind):
    columns = {"input_ids": torch.ones(2, 3).long(), "labels": torch.tensor([0, 1]), "weights": torch.ones(2)}
    batch = {
        "mapping": columns,
        "dataclass": make_dataclass("Columns", columns)(**columns),
        "named tuple": namedtuple("Columns", columns)(**columns),
        "pair": ({key: columns[key] for key in ("input_ids", "weights")}, columns["labels"]),
    }[kind]
    found = Batch.of(unweighted(batch), torch.device("cpu"))
    assert found.weights is None
    assert torch.equal(found.labels, columns["labels"])
    assert torch.equal(found.inputs["input_ids"], columns["input_ids"])
    assert Batch.of(batch, torch.device("cpu")).weights is not None


def test_every_example_is_held_out_once_and_never_trained_on_then():
    data, watched = make_data(), Watched()
    blk.crossfit(watched, data, folds=4, **SETTINGS)
    whole = Counter(float(example["x"][0]) for example in data)
    assert len(watched.seen) == 5
    assert Counter(watched.seen[-1]) == whole
    held_out: Counter[float] = Counter()
    for seen in watched.seen[:-1]:
        held_out += whole - Counter(seen)
    assert held_out == whole


def test_labels_that_mean_nothing_make_nearly_even_probabilities():
    """The model has learnt them by heart; its own training set would say that it is always right."""
    data = make_data(noise=1.0)
    laplace = blk.crossfit(lambda part: fine_tune(part, 300), data, folds=2, **SETTINGS)
    prediction = laplace.predict({"x": torch.stack([e["x"] for e in make_data(50, seed=1)])})
    entropy = float(torch.special.entr(prediction.probs()).sum(1).mean())
    assert entropy > 0.85 * math.log(CLASSES)
    assert float(torch.special.entr(prediction.probs("map")).sum(1).mean()) < 0.6 * math.log(CLASSES)


def test_saved_and_loaded(crossed, tmp_path):
    crossed.save_pretrained(tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(crossed.model, tmp_path)
    assert again.calibration.report == crossed.calibration.report
    assert again.calibration.folds == 3
    batch = {"x": torch.stack([e["x"] for e in make_data(20, seed=1)])}
    assert torch.equal(again.predict(batch).probs(), crossed.predict(batch).probs())
    assert "calibrated with 60 labels of 3 folds" in str(again.calibration)
    assert json.loads(json.dumps(crossed.calibration.report))["all"]["n_train"] == N


def test_finished_folds_are_kept(tmp_path, crossed):
    data, broken = make_data(), Watched(fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        blk.crossfit(broken, data, folds=3, folder=tmp_path, **SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fold-1-of-3.json", "fold-2-of-3.json"]
    watched = Watched()
    laplace = blk.crossfit(watched, data, folds=3, folder=tmp_path, **SETTINGS)
    assert len(watched.seen) == 2  # the third fold, and all
    for method in ("pairwise", "scalar"):
        assert torch.equal(laplace.calibration.weights[method], crossed.calibration.weights[method])
    assert len(laplace.calibration.report["folds"]) == 3


OTHERS = {
    "other inputs": {"dataset": make_data(seed=1)},
    "other labels": {"labels": [int(e["labels"]) for e in make_data()][::-1]},
    "another curvature": {"curvature": "kfac"},
    "another seed": {"seed": 3},
    "a prior": {"prior_precision": 1.0},
    "groups": {"groups": [i // 2 for i in range(N)]},
    "another training": {"fine_tune": lambda part: fine_tune(part, 61)},
    "another collator": {"collate": lambda part: torch.utils.data.default_collate([*part])},
}


@pytest.mark.parametrize("name", OTHERS)
def test_folds_of_other_data_are_refused(name, tmp_path):
    blk.crossfit(lambda part: fine_tune(part, 60), make_data(), folds=2, folder=tmp_path, **SETTINGS)
    call = {"fine_tune": lambda part: fine_tune(part, 60), "dataset": make_data(), **SETTINGS, **OTHERS[name]}
    with pytest.raises(ValueError, match=r"fold-1-of-2.json: cannot go on from this fold: it is of other data"):
        blk.crossfit(folds=2, folder=tmp_path, **call)


@pytest.mark.parametrize("damage", ["{", '{"format": 1}', "[]"])
def test_a_damaged_fold_is_refused(damage, tmp_path):
    (tmp_path / "fold-2-of-2.json").write_text(damage)
    with pytest.raises(ValueError, match=r"fold-2-of-2.json: cannot go on from this fold"):
        blk.crossfit(fine_tune, make_data(), folds=2, folder=tmp_path, **SETTINGS)


def test_evidence_as_json():
    evidence = LabelLikelihood()
    evidence.add(torch.randn(5, 3), torch.eye(3).expand(5, -1, -1), torch.tensor([0, 1, 2, 0, 1]), 0.5)
    content = json.loads(json.dumps(evidence.as_json()))
    again = LabelLikelihood.from_json(content)
    for name, table in evidence.log_likelihood.items():
        assert torch.equal(again.log_likelihood[name], table)
    assert (again.hits, again.map_log_likelihood) == (evidence.hits, evidence.map_log_likelihood)
    assert torch.equal(again.counts, evidence.counts)
    content["log_likelihood"]["scalar"][0][0] = math.nan
    with pytest.raises(ValueError, match="expected finite numbers"):
        LabelLikelihood.from_json(content)
    other = LabelLikelihood()
    other.add(torch.randn(5, 2), torch.eye(2).expand(5, -1, -1), torch.tensor([0, 1, 1, 0, 1]), 0.5)
    with pytest.raises(ValueError, match="expected one number of classes, got"):
        evidence + other


KEPT: list[nn.Module] = []


def keep_training(part):
    KEPT.append(KEPT[-1] if KEPT else fine_tune(part, 1))
    return KEPT[-1]


def fail_once(part):
    marker = Path(os.environ["BLK_TEST_MARKER"])
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return fine_tune(part)
    raise ValueError("the first fold")


@pytest.mark.slow
def test_processes_notice_a_model_that_comes_back_and_keep_what_is_finished(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="returned a model that it returned before"):
        blk.crossfit(keep_training, make_data(), folds=3, processes=2, **SETTINGS)
    monkeypatch.setenv("BLK_TEST_MARKER", str(tmp_path / "marker"))
    with pytest.raises(ValueError, match="the first fold"):
        blk.crossfit(fail_once, make_data(), folds=2, processes=2, folder=tmp_path / "folds", **SETTINGS)
    assert len(list((tmp_path / "folds").iterdir())) == 1


@pytest.mark.slow
def test_in_processes(crossed):
    laplace = blk.crossfit(fine_tune, make_data(), folds=3, processes=2, **SETTINGS)
    for method in ("pairwise", "scalar"):
        assert relative(laplace.calibration.weights[method], crossed.calibration.weights[method]) < 1e-4
    with pytest.raises(TypeError, match="fine_tune: expected a function that another process can import"):
        blk.crossfit(lambda part: fine_tune(part), make_data(), folds=3, processes=2, **SETTINGS)


def test_a_trainer(tmp_path, crossed):
    from transformers import Trainer, TrainingArguments

    made = []

    def trainer(part) -> Trainer:
        arguments = TrainingArguments(
            tmp_path, max_steps=20, learning_rate=0.03, report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="no", per_device_eval_batch_size=7, remove_unused_columns=False,
        )  # fmt: skip
        made.append(Trainer(model=Net(), args=arguments, train_dataset=part))
        return made[-1]

    laplace = blk.crossfit(trainer, make_data(), folds=2, **SETTINGS)
    assert [one.state.global_step for one in made] == [20, 20, 20]
    assert [len(one.train_dataset) for one in made] == [N // 2, N // 2, N]
    assert laplace.model is made[-1].model
    assert laplace.calibration.n_labels == N
    assert laplace.n_examples == N


class Noticed(nn.Module):
    """Notices the first input of every batch that it sees outside of training."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = Net(), []

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None):
        if not self.training:
            self.seen.append(x[:, 0].tolist())
        return self.net(x, labels)


def test_a_trainer_hands_over_the_right_examples_whatever_its_loaders_keep(tmp_path):
    """transformers keeps one evaluation loader, whatever it is asked for, if workers persist."""
    from transformers import Trainer, TrainingArguments

    made = []

    def trainer(part) -> Trainer:
        arguments = TrainingArguments(
            tmp_path, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
            eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=7, remove_unused_columns=False,
            dataloader_persistent_workers=True, dataloader_num_workers=1, dataloader_drop_last=True,
        )  # fmt: skip
        made.append(Trainer(model=Noticed(), args=arguments, train_dataset=part, eval_dataset=part[:8]))
        return made[-1]

    data = make_data(n=30)
    laplace = blk.crossfit(trainer, data, folds=2, check="off", **SETTINGS)
    everything = {float(example["x"][0]) for example in data}
    for fold, one in enumerate(made[:2]):
        inside = {float(example["x"][0]) for example in one.train_dataset}
        outside = everything - inside
        # evaluation during training, the fit, and at last the fold
        order = [x for batch in one.model.seen for x in batch]
        assert set(order[-len(outside) :]) == outside, fold
        assert set(order[: -len(outside)]) == inside, fold
    assert laplace.n_examples == laplace.calibration.n_labels == 30


def test_a_collator_that_loses_examples_is_noticed():
    with pytest.raises(RuntimeError, match="fit: expected batches of all 30 examples, got"):
        blk.crossfit(
            fine_tune,
            make_data(),
            collate=lambda part: torch.utils.data.default_collate(part[:5]),
            **SETTINGS,
        )


@pytest.mark.parametrize("collected", [True, False])
def test_models_do_not_pile_up(collected, monkeypatch):
    """Nor do they wait for the garbage collector: a fit leaves no cycle that holds the model."""
    alive, counts = weakref.WeakSet(), []
    if not collected:
        monkeypatch.setattr("gc.collect", lambda: 0)
        gc.disable()

    def counted(part):
        counts.append(len(alive))
        model = fine_tune(part, 2)
        alive.add(model)
        return model

    try:
        blk.crossfit(counted, make_data(), folds=5, **SETTINGS)
    finally:
        gc.enable()
    assert counts == [0] * 6


def test_a_model_that_comes_back_is_refused():
    model = Net()
    with pytest.raises(ValueError, match="fine_tune: returned a model that it returned before"):
        blk.crossfit(lambda part: model, make_data(), **SETTINGS)
    blk.crossfit(lambda part: copy.deepcopy(model), make_data(), **SETTINGS)


def test_the_evidence_is_asked_unless_there_is_a_prior(caplog):
    config = blk.LaplaceConfig(curvature="exact", prior_precision=0.7)
    with caplog.at_level(logging.INFO, logger="bayesian_lora_kernels"):
        tuned = blk.crossfit(fine_tune, make_data(), **SETTINGS)
        by_config = blk.crossfit(fine_tune, make_data(), config=config, progress=False)
    fixed = blk.crossfit(fine_tune, make_data(), prior_precision=0.7, **SETTINGS)
    kept = blk.crossfit(fine_tune, make_data(), config=config, optimize_prior_precision=False, progress=False)
    assert float(fixed.prior_precision) == float(kept.prior_precision) == 0.7
    assert float(tuned.prior_precision) == float(by_config.prior_precision) != 0.7
    assert "calibrated with 60 labels of 2 folds" in caplog.text


BAD = {
    "no function": ({"fine_tune": Net()}, None),
    "no model": (
        {"fine_tune": lambda part: 3},
        "fine_tune: expected it to return an nn.Module or a transformers.Trainer",
    ),
    "no data set": ({"dataset": iter([])}, "dataset: expected something with a length and indices"),
    "one fold": ({"folds": 1}, "folds: expected 2 to 60"),
    "too many folds": ({"folds": 61}, "folds: expected 2 to 60"),
    "folds of text": ({"folds": "2"}, "folds: expected an int"),
    "no processes": ({"processes": 0}, "processes: expected a positive int"),
    "a batch of none": ({"batch_size": 0}, "batch_size: expected a positive int"),
    "too few labels": ({"labels": [0, 1]}, "labels: expected one for each of 60 examples, got 2"),
    "one class": ({"labels": [0] * 60}, "labels: expected at least two classes, all 60 are 0"),
    "a class in one fold": ({"labels": [0, 1] * 29 + [0, 2]}, "all 1 examples of class 2 are in fold"),
    "a class in one group": (
        {"labels": [0] * 30 + [1] * 30, "groups": [0] * 30 + [1] * 30},
        "all 30 examples of class . are in fold 0 of 2",
    ),
    "few groups": ({"groups": [0] * 60}, "groups: expected at least 2, one for each fold, got 1"),
    "labels between classes": ({"labels": [0.9] * 30 + [1.0] * 30}, "labels: expected a class index, got 0.9"),
    "groups of lists": ({"groups": [[1], [2]] * 30}, r"groups: expected names or numbers, got \[.\] for example"),
    "groups that are missing": ({"groups": [math.nan, 1.0] * 30}, "groups: expected names or numbers, got nan"),
    "groups of few": ({"groups": [0]}, "groups: expected one for each of 60 examples, got 1"),
    "no labels": ({"dataset": [{"x": torch.zeros(5)}] * 60}, r"example 0; or pass labels="),
    "a regression": ({"likelihood": "regression"}, "crossfit: expected likelihood='classification'"),
    "an unknown setting": ({"curvatur": "exact"}, "curvatur: no such setting"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    change, message = BAD[name]
    call = {"fine_tune": fine_tune, "dataset": make_data(), **SETTINGS, **change}
    if message is None:
        call["fine_tune"], message = "fine_tune", "fine_tune: expected a callable"
    with pytest.raises((TypeError, ValueError), match=message):
        blk.crossfit(**call)


def test_nan_logits():
    def broken(part):
        model = fine_tune(part)
        with torch.no_grad():
            model.last.bias[0] = math.nan
        return model

    with pytest.raises(ValueError, match="not finite"):
        blk.crossfit(broken, make_data(), **SETTINGS)


# Folds.


@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("n", [37, 200])
def test_classes_are_spread_evenly(folds, n):
    generator = torch.Generator().manual_seed(n)
    labels = torch.multinomial(torch.tensor([0.6, 0.25, 0.1, 0.05]), n, replacement=True, generator=generator)
    labels[:8] = torch.tensor([3, 3, 3, 3, 3, 2, 2, 2])
    labels[8:16] = torch.tensor([2, 2, 1, 1, 1, 1, 1, 0])
    assigned = assign_folds(labels.tolist(), folds, seed=1)
    for c in range(4):
        counts = torch.bincount(assigned[labels == c], minlength=folds)
        assert counts.max() - counts.min() <= 1
    sizes = torch.bincount(assigned, minlength=folds)
    assert sizes.max() - sizes.min() <= 4
    assert torch.equal(assigned, assign_folds(labels.tolist(), folds, seed=1))
    assert not torch.equal(assigned, assign_folds(labels.tolist(), folds, seed=2))


def test_no_group_is_in_two_folds():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    groups = torch.randint(40, (300,), generator=generator)
    assigned = assign_folds(labels.tolist(), 4, groups.tolist())
    for group in groups.unique():
        assert len(assigned[groups == group].unique()) == 1
    for same in (groups, groups.numpy(), [f"author {g}" for g in groups.tolist()]):
        assert torch.equal(assigned, assign_folds(labels, 4, same))
    for c in range(3):
        counts = torch.bincount(assigned[labels == c], minlength=4)
        assert counts.min() > 0.6 * counts.max()


def test_parts_of_data_sets():
    class Selecting:
        def select(self, indices):
            return ["selected", indices]

    tensors = torch.utils.data.TensorDataset(torch.arange(4), torch.arange(4) * 2)
    assert subset(Selecting(), [1, 2]) == ["selected", [1, 2]]
    assert subset((5, 6, 7), [2, 0]) == [7, 5]
    assert [x.item() for x, _ in subset(tensors, [3, 1])] == [3, 1]
    assert labels_of(tensors) == [0, 2, 4, 6]
    assert labels_of([{"label": 3}, {"labels": torch.tensor(1)}]) == [3, 1]
    for example in ({"label": "yes"}, {"label": 0.5}, {"x": 1}, torch.zeros(2), {"label": None}):
        with pytest.raises(ValueError, match=r"expected a class (index|under)"):
            labels_of([example])


def closed(number):
    return lambda: number


def test_a_digest_sees_every_value():
    values = [
        1, 1.0, "1", b"1", True, None, [1], [[1]], [1, 1], {"a": 1}, {"b": 1}, {"a": 2}, torch.ones(2),
        torch.ones(1, 2), torch.ones(2, dtype=torch.int64), torch.zeros(2), torch.tensor(1.0), torch.zeros(0),
        Path("a"), Path("b"), {1, 2}, {1, 3}, np.array(["a"]), np.array(["b"]), complex(1, 2), complex(1, 3),
        lambda x: x + 1, lambda x: x + 2, lambda x: x - 1, partial(fine_tune, steps=1), partial(fine_tune, steps=2),
        closed(1), closed(2),
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest(np.int64(3)) == digest(3) != digest(np.int64(4))
    assert digest(iter([1, 2])) == digest([1, 2])
    assert digest(torch.ones(2)) == digest(torch.ones(2).numpy()) == digest(torch.ones(4)[::2])


def test_a_calibration_says_where_it_is_from(crossed):
    content = crossed.calibration.as_json()
    assert Calibration.from_json(content).report == crossed.calibration.report
