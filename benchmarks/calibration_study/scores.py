"""How good probabilities are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration import (
    accuracy,
    expected_calibration_error,
    negative_log_likelihood,
    ood_auroc,
)

BINS = 15
HIGHER_IS_BETTER = {"nll": False, "ece": False, "ece_debiased": False, "error_auroc": True, "accuracy": True}
METRICS = tuple(HIGHER_IS_BETTER)


def scores(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Every metric; `error_auroc` is NaN if all predictions are right, or all wrong."""
    return {
        "nll": negative_log_likelihood(probs, labels),
        "ece": expected_calibration_error(probs, labels, BINS),
        "ece_debiased": debiased_calibration_error(probs, labels),
        "error_auroc": error_auroc(probs, labels),
        "accuracy": accuracy(probs, labels),
    }


def error_auroc(probs: Tensor, labels: Tensor) -> float:
    """How well the largest probability tells right predictions from wrong ones."""
    confidence, predicted = probs.double().max(dim=-1)
    right = predicted == labels
    if right.all() or not right.any():
        return math.nan
    return ood_auroc(1 - confidence[right], 1 - confidence[~right])


def debiased_calibration_error(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """ECE over bins with as many examples each, less an estimate of what chance adds to it; may be below zero.

    In a bin, the difference d of accuracy and mean confidence has a standard error s. Were d the true one, a normal
    sample of it would have E|d + s z| for its absolute value; what that has above |d| is the bias that is taken off.
    It is too little where d is all chance, so part of it stays with calibrated predictions.

    Source: Kumar, Liang, Ma 2019, "Verified uncertainty calibration", section 5 for the idea, theirs by sampling.
    """
    confidence, predicted = probs.double().max(dim=-1)
    right = (predicted == labels).double()
    order = confidence.argsort(stable=True)
    total = 0.0
    for part in order.tensor_split(min(bins, len(order))):
        share, count = float(right[part].mean()), len(part)
        gap = abs(share - float(confidence[part].mean()))
        error = math.sqrt(share * (1 - share) / count)
        expected = gap
        if error > 0:
            z = gap / error
            expected = error * math.sqrt(2 / math.pi) * math.exp(-z * z / 2) + gap * math.erf(z / math.sqrt(2))
        total += count * (2 * gap - expected)
    return total / len(order)


def labels_of(examples: list) -> Tensor:
    return torch.tensor([example.label for example in examples])
