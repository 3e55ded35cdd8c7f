"""From held-out or leave-one-out logits to probabilities: a temperature, or averaged (T, b) of the pairwise formula."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from bayesian_lora_kernels.calibration import summary, temperature_scale
from bayesian_lora_kernels.predictive.calibrate import LOG_TEMPERATURES, Calibration, LabelLikelihood


def temperature(logits: Tensor, labels: Tensor) -> float:
    """Of the largest likelihood, within the range of the grid: all labels may be right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = temperature_scale(logits, labels)
    return min(max(found, math.exp(LOG_TEMPERATURES[0])), math.exp(LOG_TEMPERATURES[1]))


def weights(mean: Tensor, covariance: Tensor, labels: Tensor) -> Calibration:
    """Prior times likelihood of the labels, as the package has it. `covariance` has the factor z in it."""
    likelihood = LabelLikelihood()
    likelihood.add(mean, covariance, labels, 1.0)
    return Calibration.of(likelihood, 1.0)


def averaged(mean: Tensor, covariance: Tensor, weight: Calibration) -> Tensor:
    """Probabilities `[N, C]`, averaged over the grid."""
    return weight.probs("pairwise", mean, covariance)


def measured(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """NLL, ECE, accuracy."""
    numbers = summary(probs.clamp_min(1e-12) / probs.clamp_min(1e-12).sum(1, keepdim=True), labels)
    return {key: numbers[key] for key in ("nll", "ece", "accuracy")}
