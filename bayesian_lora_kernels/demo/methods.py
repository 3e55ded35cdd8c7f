"""The methods that the demo compares, each with its predictions of every set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.calibration import temperature_scale
from bayesian_lora_kernels.crossfitting.crossfit import crossfit
from bayesian_lora_kernels.demo.settings import DemoSettings
from bayesian_lora_kernels.demo.task import Example, Splits, Task, in_order, make_batch
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
SETS = ("test", "shift", "foreign")
FOLDS = 2

FineTune = Callable[[Sequence[Example]], nn.Module]


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
    fine_tune: FineTune,
    task: Task,
    splits: Splits,
    settings: DemoSettings,
    seed: int,
    watch: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Every method of `NAMES` on one fine-tuned model, and the report of its folds.

    Args:
        fine_tune: makes a model from a part of the training examples.
        task: for its tokens.
        splits: `train` is what fine-tuning and curvature see, `held_out` the labels that temperatures and
            `same labels` see; the rest is predicted.
        settings: sizes.
        seed: of the folds and the curvature.
        watch: is told the name of a method when its turn comes.
    """
    labels = torch.tensor([example.answer for example in splits.held_out])
    options: dict[str, Any] = {"class_token_ids": task.class_token_ids, "seed": seed}

    watch(NAMES["folds"])
    start = perf_counter()
    laplace = crossfit(
        fine_tune,
        splits.train,
        FOLDS,
        collate=make_batch,
        batch_size=settings.predict_batch_size,
        labels=[example.answer for example in splits.train],
        groups=[example.document for example in splits.train],
        curvature="exact",
        progress=False,
        **options,
    )
    folds = laplace.calibration
    assert folds is not None
    assert folds.report is not None
    predicted = {name: _predict(laplace, getattr(splits, name), settings) for name in (*SETS, "held_out")}
    outcomes = {"folds": _calibrated(predicted, folds, start)}

    watch(NAMES["labels"])
    start = perf_counter()
    outcomes["labels"] = _calibrated(predicted, _by_labels(laplace, predicted["held_out"], labels), start)

    watch(NAMES["evidence"])
    start = perf_counter()
    precision = float(laplace.prior[laplace.layers[0].name])
    probs = {name: predicted[name].probs(calibrated=False) for name in SETS}
    outcomes["evidence"] = Outcome(probs, {"prior precision": precision}, perf_counter() - start)

    watch(NAMES["map"])
    probs = {name: predicted[name].probs("map") for name in SETS}
    outcomes["map"] = Outcome(probs, {}, 0.0)

    watch(NAMES["temperature"])
    start = perf_counter()
    temperature = temperature_scale(predicted["held_out"].mean, labels)
    probs = {name: (predicted[name].mean / temperature).softmax(dim=1) for name in SETS}
    outcomes["temperature"] = Outcome(probs, {"temperature": temperature}, perf_counter() - start)

    watch(NAMES["averaged"])
    start = perf_counter()
    # The same grid, prior and average as the posterior gets; without variances only the temperatures are left.
    certain = {name: replace(one, covariance=torch.zeros_like(one.covariance)) for name, one in predicted.items()}
    outcomes["averaged"] = _calibrated(certain, _by_labels(laplace, certain["held_out"], labels), start)

    watch(NAMES["ekfac_labels"])
    start = perf_counter()
    ekfac = LaplaceLoRA(laplace.model, curvature="ekfac", **options)
    ekfac.fit(in_order(splits.train, settings.predict_batch_size), progress=False).optimize_prior_precision()
    approximate = {name: _predict(ekfac, getattr(splits, name), settings) for name in (*SETS, "held_out")}
    outcomes["ekfac_labels"] = _calibrated(approximate, _by_labels(ekfac, approximate["held_out"], labels), start)
    return {name: outcomes[name] for name in NAMES}, dict(folds.report)


def _predict(laplace: LaplaceLoRA, examples: Sequence[Example], settings: DemoSettings) -> LogitPosterior:
    batches = in_order(examples, settings.predict_batch_size)
    parts = [laplace.predict(batch, differences=True) for batch in batches]
    return replace(
        parts[0], mean=torch.cat([p.mean for p in parts]), covariance=torch.cat([p.covariance for p in parts])
    )


def _by_labels(laplace: LaplaceLoRA, held_out: LogitPosterior, labels: Tensor) -> Calibration:
    """What `laplace.calibrate` finds, of predictions that are there already."""
    evidence = LabelLikelihood()
    evidence.add(held_out.mean, held_out.covariance, labels, laplace.variance_scale)
    return Calibration.of(evidence, laplace.variance_scale)


def _calibrated(predicted: dict[str, LogitPosterior], calibration: Calibration, start: float) -> Outcome:
    probs = {name: replace(predicted[name], calibration=calibration).probs() for name in SETS}
    points = {"effective number of grid points": calibration.effective_points["pairwise"]}
    return Outcome(probs, points, perf_counter() - start)
