"""Calls out of order or out of range: refused with a clear message, and the model and its posterior stay usable."""

from __future__ import annotations

import pytest
import torch
from models import llama, mlp
from snapshot import untouched

import bayesian_lora_kernels as blk

X, Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 1, 0])


@pytest.fixture(scope="module")
def fitted():
    case = llama()
    return case, blk.LaplaceLoRA(case.model, **case.arguments).fit([case.batch()], progress=False)


ALL_FALSE = {"attention_mask": torch.tensor([[1] * 6, [0] * 6, [1] * 6, [1] * 6])}
PREDICT = {
    "more than there are": ({}, 4, ValueError, r"outputs: expected 1 to 3 most probable logits, got 4"),
    "none": ({}, 0, ValueError, r"outputs: expected 1 to 3 most probable logits, got 0"),
    "a bool": ({}, True, TypeError, r"outputs: expected None, an int, .* got a bool"),
    "index too large": ({}, [0, 3], ValueError, r"outputs: expected indices from 0 to 2, got 0 to 3"),
    "negative index": ({}, torch.tensor([-1]), ValueError, r"outputs: expected indices from 0 to 2, got -1 to -1"),
    "floats": (
        {},
        torch.tensor([0.0]),
        ValueError,
        r"outputs: expected integers \[C\] or \[4, C\], got torch.float32 \[1\]",
    ),
    "no index": ({}, torch.zeros(0, dtype=torch.long), ValueError, r"outputs: expected integers .* \[0\]"),
    "three dims": ({}, torch.zeros(1, 1, 1).long(), ValueError, r"outputs: expected integers .* \[1, 1, 1\]"),
    "rows": (
        {},
        torch.zeros(3, 2).long(),
        ValueError,
        r"outputs: expected one row for each of 4 examples, got \[3, 2\]",
    ),
    "text": ({}, "all", (TypeError, ValueError), r"outputs: .*'all'"),
    "ragged": ({}, [[0], [1, 2]], ValueError, r"sequence of length 1"),
    "rows of a list": ({}, [[0, 1]] * 5, ValueError, r"outputs: expected one row for each of 4 examples, got \[5, 2\]"),
    "a mask of all False": (
        ALL_FALSE,
        None,
        ValueError,
        r"attention_mask: .* example 1 of the batch has a mask of all Fal",
    ),
}


@pytest.mark.parametrize("name", PREDICT)
def test_predict(name, fitted):
    case, laplace = fitted
    changes, outputs, error, message = PREDICT[name]
    before = laplace.predict(case.batch()).covariance
    with untouched(case.model), pytest.raises(error, match=message):
        laplace.predict({**case.batch(), **changes}, outputs=outputs)
    assert torch.equal(laplace.predict(case.batch()).covariance, before)


def test_fit_with_a_mask_of_all_false_keeps_the_earlier_fit(fitted):
    case, laplace = fitted
    before = float(laplace.log_marginal_likelihood())
    with untouched(case.model), pytest.raises(ValueError, match=r"batch 1: attention_mask: .*example 1 of the batch"):
        laplace.fit([case.batch(), {**case.batch(), **ALL_FALSE}], progress=False)
    assert float(laplace.log_marginal_likelihood()) == before


def test_labels_of_tokens_together_with_class_ids(fitted):
    case, laplace = fitted
    batch = case.batch()
    with untouched(case.model), pytest.raises(ValueError, match=r"labels: expected class indices \[N\] together with"):
        laplace.fit([{**batch, "labels": batch["input_ids"]}], progress=False)


BEFORE_FIT = {
    "predict": lambda laplace: laplace.predict((X, Y)),
    "log_marginal_likelihood": lambda laplace: laplace.log_marginal_likelihood(),
    "optimize_prior_precision": lambda laplace: laplace.optimize_prior_precision(),
    "sample_weights": lambda laplace: laplace.sample_weights(1),
    "save_pretrained": lambda laplace: laplace.save_pretrained("/nowhere"),
    "factors": lambda laplace: laplace.factors,
    "posterior": lambda laplace: laplace.posterior,
    "n_examples": lambda laplace: laplace.n_examples,
    "log_likelihood": lambda laplace: laplace.log_likelihood,
}


@pytest.mark.parametrize("name", BEFORE_FIT)
def test_before_fit(name):
    laplace = blk.LaplaceLoRA(mlp().model)
    with pytest.raises(RuntimeError, match=rf"{name}: call fit\(loader\) first"):
        BEFORE_FIT[name](laplace)


def bad_prior(laplace):
    laplace.prior_precision = -1.0


AFTER_FIT = {
    "evidence of a bad prior": (lambda l: l.log_marginal_likelihood(0.0), ValueError, r"prior_precision: .*got 0.0"),
    "a bad prior": (bad_prior, ValueError, r"prior_precision: expected a finite positive number, got -1.0"),
    "method": (
        lambda l: l.optimize_prior_precision("cv"),
        ValueError,
        r"method: expected one of marglik, nll, got 'cv'",
    ),
    "no data": (
        lambda l: l.optimize_prior_precision("nll"),
        ValueError,
        r"val_loader: .* held-out labelled batches, got",
    ),
    "empty data": (
        lambda l: l.optimize_prior_precision("nll", val_loader=[]),
        ValueError,
        r"at least one batch, got none",
    ),
    "an iterator": (
        lambda l: l.optimize_prior_precision("nll", val_loader=iter([(X, Y)])),
        ValueError,
        r"val_loader: expected an iterable that can start again",
    ),
    "no labels": (
        lambda l: l.optimize_prior_precision("nll", val_loader=[(X, Y), X]),
        ValueError,
        r"val_loader: expected labels, batch 1 has none",
    ),
    "nll per module": (
        lambda l: l.optimize_prior_precision("nll", per_module=True, val_loader=[(X, Y)]),
        ValueError,
        r'per_module: expected method="marglik"',
    ),
    "no samples": (lambda l: l.sample_weights(0), ValueError, r"n: expected at least 1, got 0"),
    "NaN input": (lambda l: l.predict((X * float("nan"), Y)), ValueError, r"predict: the logits are not finite"),
    "no examples": (lambda l: l.predict((X[:0], Y[:0])), ValueError, r"predict: expected at least one example"),
    "method of probs": (
        lambda l: l.predict((X, Y)).probs("exact"),
        ValueError,
        r"probs: expected a method .*got 'exact'",
    ),
    "samples of probs": (
        lambda l: l.predict((X, Y)).probs(n_samples=0),
        ValueError,
        r"probs: expected n_samples >= 1, got 0",
    ),
}


@pytest.mark.parametrize("name", AFTER_FIT)
def test_after_fit(name):
    act, error, message = AFTER_FIT[name]
    model = mlp().model
    laplace = blk.LaplaceLoRA(model, prior_precision=2.0).fit([(X, Y)], progress=False)
    before = laplace.predict((X, Y)).covariance
    with untouched(model), pytest.raises(error, match=message):
        act(laplace)
    assert float(laplace.prior_precision) == 2.0
    assert torch.equal(laplace.predict((X, Y)).covariance, before)


def test_evidence_without_labels():
    laplace = blk.LaplaceLoRA(mlp().model).fit([(X, Y), (X, None)], progress=False)
    assert laplace.log_likelihood is None
    with pytest.raises(RuntimeError, match=r"log_marginal_likelihood: fit saw batches without labels"):
        laplace.log_marginal_likelihood()
    laplace.optimize_prior_precision()  # the likelihood is a constant there


def test_logits_of_every_token_cannot_be_predicted():
    case = mlp(tokens=3)
    forward = lambda m, b: m.last(m.body(b[0]))  # noqa: E731
    laplace = blk.LaplaceLoRA(case.model, forward=forward)
    laplace.fit([(torch.stack(case.examples), torch.zeros(5, 3, dtype=torch.long))], progress=False)
    with untouched(case.model), pytest.raises(ValueError, match=r"predict: expected .* \[N, C\], got \[5, 3, 3\]"):
        laplace.predict(case.batch())
