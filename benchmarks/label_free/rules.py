"""From held-out or leave-one-out logits to probabilities: a temperature, or averaged (T, b) of the pairwise formula."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration import summary, temperature_scale
from bayesian_lora_kernels.predictive.probabilities import pairwise_log_probs

LOG_B = torch.linspace(-7, 5, 13, dtype=torch.float64)
LOG_T = torch.linspace(-1.4, 3, 15, dtype=torch.float64)


def temperature(logits: Tensor, labels: Tensor) -> float:
    """Of the largest likelihood, within the range of the grid: all labels may be right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = temperature_scale(logits, labels)
    return min(max(found, math.exp(LOG_T[0])), math.exp(LOG_T[-1]))


def weights(mean: Tensor, covariance: Tensor, labels: Tensor) -> Tensor:
    """`[13, 15]`, sum 1: prior times likelihood of the labels. `covariance` has the factor z in it."""
    logs = torch.empty(len(LOG_B), len(LOG_T), dtype=torch.float64)
    for i, b in enumerate(LOG_B.tolist()):
        for j, t in enumerate(LOG_T.tolist()):
            log_probs = pairwise_log_probs(mean, covariance, math.exp(t), math.exp(b))
            prior = -((b + 1) ** 2) / (2 * 2.5**2) - (t - 0.5) ** 2 / 2
            logs[i, j] = log_probs.gather(1, labels[:, None]).sum() + prior
    return (logs - logs.logsumexp((0, 1))).exp()


def averaged(mean: Tensor, covariance: Tensor, weight: Tensor) -> Tensor:
    """Probabilities `[N, C]`, averaged over the grid."""
    probs = torch.zeros_like(mean)
    for i, b in enumerate(LOG_B.tolist()):
        for j, t in enumerate(LOG_T.tolist()):
            if float(weight[i, j]) > 1e-9:
                probs += weight[i, j] * pairwise_log_probs(mean, covariance, math.exp(t), math.exp(b)).exp()
    return probs / probs.sum(1, keepdim=True)


def measured(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """NLL, ECE, accuracy."""
    numbers = summary(probs.clamp_min(1e-12) / probs.clamp_min(1e-12).sum(1, keepdim=True), labels)
    return {key: numbers[key] for key in ("nll", "ece", "accuracy")}
