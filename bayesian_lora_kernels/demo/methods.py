"""The methods that the demo compares, each with its predictions of every set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayesian_lora_kernels.calibration import temperature_scale
from bayesian_lora_kernels.crossfitting.crossfit import crossfit
from bayesian_lora_kernels.demo.problem import Batch, Example, Problem, Splits
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.predictive.calibrate import Calibration, LabelLikelihood
from bayesian_lora_kernels.predictive.distribution import LogitPosterior

NAMES = {
    "map": "MAP",
    "temperature": "temperature scaling",
    "averaged": "averaged temperatures",
    "labels": "Laplace, same labels",
    "ekfac_labels": "Laplace EKFAC, same labels",
    "folds": "Laplace, no held-out labels",
    "evidence": "Laplace, evidence alone",
}
FOLDS = 2


@dataclass(frozen=True)
class Outcome:
    """One method's predictions.

    Attributes:
        probs: `{set: [N, C]}`.
        chosen: what was tuned, `{name: number}`.
        seconds: that it took beyond what the methods before it had done.
    """

    probs: dict[str, Tensor]
    chosen: dict[str, float]
    seconds: float


def compare_methods(
    problem: Problem, splits: Splits, seed: int, progress: bool = False
) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Every method of `NAMES` on one fine-tuned model, and the report of its folds.

    Args:
        problem: fine-tunes the model, on all training examples and on parts of them.
        splits: `train` is what fine-tuning and curvature see, `held_out` the labels that temperatures and
            `same labels` see; the rest is predicted.
        seed: of fine-tuning, the folds and the curvature.
        progress: whether to show progress bars.
    """
    asked = {**splits.measured, **({"foreign": splits.foreign} if splits.foreign else {})}
    labels = torch.tensor([example.answer for example in splits.held_out])
    options: dict[str, Any] = {"class_token_ids": problem.class_token_ids, "seed": seed}

    documents = [example.document for example in splits.train]
    start = perf_counter()
    laplace = crossfit(
        partial(problem.fine_tune, seed=seed, progress=progress),
        splits.train,
        FOLDS,
        collate=problem.batch,
        batch_size=problem.predict_batch_size,
        labels=[example.answer for example in splits.train],
        groups=None if None in documents else documents,
        curvature="exact",
        progress=progress,
        **options,
    )
    folds = laplace.calibration
    assert folds is not None
    assert folds.report is not None
    predicted = _predict_all(laplace, problem, {**asked, "held_out": splits.held_out}, progress)
    outcomes = {"folds": _calibrated(predicted, folds, start)}

    start = perf_counter()
    outcomes["labels"] = _calibrated(predicted, _by_labels(laplace, predicted["held_out"], labels), start)

    start = perf_counter()
    precision = float(laplace.prior[laplace.layers[0].name])
    probs = {name: predicted[name].probs(calibrated=False) for name in asked}
    outcomes["evidence"] = Outcome(probs, {"prior precision": precision}, perf_counter() - start)

    probs = {name: predicted[name].probs("map") for name in asked}
    outcomes["map"] = Outcome(probs, {}, 0.0)

    start = perf_counter()
    temperature = temperature_scale(predicted["held_out"].mean, labels)
    probs = {name: (predicted[name].mean / temperature).softmax(dim=1) for name in asked}
    outcomes["temperature"] = Outcome(probs, {"temperature": temperature}, perf_counter() - start)

    start = perf_counter()
    # The same grid, prior and average as the posterior gets; without variances only the temperatures are left.
    certain = {name: replace(one, covariance=torch.zeros_like(one.covariance)) for name, one in predicted.items()}
    outcomes["averaged"] = _calibrated(certain, _by_labels(laplace, certain["held_out"], labels), start)

    start = perf_counter()
    ekfac = LaplaceLoRA(laplace.model, curvature="ekfac", **options)
    ekfac.fit(_batches(problem, splits.train), progress=progress).optimize_prior_precision()
    approximate = _predict_all(ekfac, problem, {**asked, "held_out": splits.held_out}, progress)
    outcomes["ekfac_labels"] = _calibrated(approximate, _by_labels(ekfac, approximate["held_out"], labels), start)
    return {name: outcomes[name] for name in NAMES}, dict(folds.report)


def _batches(problem: Problem, examples: Sequence[Example]) -> list[Batch]:
    size = problem.predict_batch_size
    return [problem.batch(examples[i : i + size]) for i in range(0, len(examples), size)]


def _predict_all(
    laplace: LaplaceLoRA, problem: Problem, sets: Mapping[str, Sequence[Example]], progress: bool
) -> dict[str, LogitPosterior]:
    """Of each set, in its order. Examples of similar length run together."""
    found = {}
    total = sum(map(len, sets.values()))
    with tqdm(total=total, desc="predictions", unit="example", leave=False, disable=not progress) as bar:
        for name, examples in sets.items():
            order = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
            means, covariances = [], []
            for batch in _batches(problem, [examples[i] for i in order]):
                part = laplace.predict(batch, differences=True)
                means.append(part.mean.cpu())
                covariances.append(part.covariance.cpu())
                bar.update(len(part.mean))
            back = torch.tensor(order).argsort()
            found[name] = replace(part, mean=torch.cat(means)[back], covariance=torch.cat(covariances)[back])
    return found


def _by_labels(laplace: LaplaceLoRA, held_out: LogitPosterior, labels: Tensor) -> Calibration:
    """What `laplace.calibrate` finds, of predictions that are there already."""
    evidence = LabelLikelihood()
    evidence.add(held_out.mean, held_out.covariance, labels, laplace.variance_scale)
    return Calibration.of(evidence, laplace.variance_scale)


def _calibrated(predicted: dict[str, LogitPosterior], calibration: Calibration, start: float) -> Outcome:
    asked = {name: one for name, one in predicted.items() if name != "held_out"}
    probs = {name: replace(one, calibration=calibration).probs() for name, one in asked.items()}
    points = {"effective number of grid points": calibration.effective_points["pairwise"]}
    return Outcome(probs, points, perf_counter() - start)
