"""What the methods make of one model at one length of the prompt and one width of the batches."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.compat.laplace_lora import Laplace
from bayesian_lora_kernels.predictive.distribution import LogitPosterior

from ..calibration.labels.baselines import scaled
from ..calibration.methods.gym import SCALES, Wrapped, fitted, predicted
from ..calibration.scores import labels_of, scores
from ..calibration.tasks import Example, Splits
from ..calibration.tasks.task import logits_of
from ..trace_table import exact as exact_trace
from ..trace_table import kron_trace
from .filled import Filled, of_length

SAMPLES = 4096  # of the logits, for each example
THERE, CORRECTED, OWN = "Laplace of BayesAdapt", "the same, scale corrected", "BayesAdapt's own code"
EXACT, LABELS = "exact, evidence", "exact, labels"
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """Where the methods are measured.

    Attributes:
        seed: of data and model.
        tokens: of a prompt.
        columns: of a batch; more than `tokens` is padding.
    """

    seed: int
    tokens: int
    columns: int


def measure(task: Filled, model: nn.Module, splits: Splits, point: Point, checkout: Path | None) -> dict[str, Row]:
    """`{method: row}`: accuracy, NLL, ECE and Brier score on the test set, and what a fit found.

    Args:
        checkout: of BayesAdapt, whose own code is a further row; None: without it.
    """
    train, held_out, test = (of_length(part, [point.tokens]) for part in (splits.train, splits.held_out, splits.test))
    task.columns = point.columns
    try:
        logits, asked = logits_of(task, model, test), logits_of(task, model, held_out)
        by_labels = scaled(asked, labels_of(held_out), {"test": logits})["temperature"]["test"]
        rows = {"MAP": _scored(logits.softmax(1), test), "temperature scaling": _scored(by_labels, test)}
        batches, asked_batches, tested = task.batches(train), task.batches(held_out), task.batches(test)
        truth = sum(exact_trace(Wrapped(task, model), batch) for batch in batches)
        for name, scale in ((THERE, "published"), (CORRECTED, "correct")):
            la = fitted(task, model, batches, **SCALES[scale])
            trace = sum(float(factors.trace()) for factors in la.engine.factors.values())
            rows[name] = _of_posterior(predicted(la, tested), test, point.seed) | _found(la, trace / truth)
        la = fitted(task, model, batches, hessian_structure="full")
        rows[EXACT] = _of_posterior(predicted(la, tested), test, point.seed) | _found(la, 1.0)
        la.calibrate(asked_batches)
        rows[LABELS] = _scored(torch.cat([la.predict(batch).probs() for batch in tested]), test)
        if checkout is not None:
            rows[OWN] = _own_code(checkout, task, model, batches, tested, test, truth, point.seed)
        return rows
    finally:
        task.columns = 0


class _Loader(list[Any]):
    """Batches, with the data set that BayesAdapt asks for its length."""

    def __init__(self, batches: Sequence[Any], examples: int):
        super().__init__(batches)
        self.dataset = range(examples)


def _own_code(
    checkout: Path,
    task: Filled,
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    tested: Sequence[dict[str, Tensor]],
    test: Sequence[Example],
    truth: float,
    seed: int,
) -> Row:
    """`bayesadapt.laplace` with the settings of its configuration: 100 steps of Adam at 0.1 from 1."""
    sys.path.insert(0, str(checkout))
    try:
        from bayesadapt.laplace import Laplace as Theirs  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(checkout))
    wrapped = Wrapped(task, model)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        la = Theirs(wrapped, "classification", prior_precision=1.0, subset_of_weights="all", hessian_structure="kron")
        la.fit(_Loader(batches, sum(len(batch["labels"]) for batch in batches)))
        la.optimize_prior_precision(method="marglik", n_steps=100, lr=1e-1)
        parts = [la._glm_predictive_distribution(batch) for batch in tested]
    posterior = LogitPosterior(*(torch.cat(part) for part in zip(*parts, strict=True)))
    ratio = kron_trace(la.H_facs) / truth
    return _of_posterior(posterior, test, seed) | {"prior precision": float(la.prior_precision), "trace / exact": ratio}


def _found(la: Laplace, ratio: float) -> Row:
    return {"prior precision": float(la.prior_precision), "trace / exact": ratio}


def _of_posterior(posterior: LogitPosterior, test: Sequence[Example], seed: int) -> Row:
    """Averages of the softmax over samples of the logits, as BayesAdapt takes them."""
    probs = posterior.probs("mc", SAMPLES, generator=torch.Generator().manual_seed(seed), calibrated=False)
    variance = float(posterior.covariance.diagonal(dim1=1, dim2=2).mean())
    return _scored(probs, test) | {"variance": variance}


def _scored(probs: Tensor, test: Sequence[Example]) -> Row:
    found = scores(probs.double(), labels_of(list(test)))
    return {name: found[name] for name in ("accuracy", "nll", "ece", "brier")}
