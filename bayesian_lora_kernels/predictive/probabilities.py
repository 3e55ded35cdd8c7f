"""From Gaussian logits to class probabilities, by what a softmax can see of them: differences of logits.

Adding one random variable to all logits changes nothing. For two classes both formulas are MacKay's for the difference
of the logits; a temperature and a factor of the variance say how much of either to believe.

Source: MacKay 1992, "The evidence framework applied to classification networks".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pairwise_log_probs(mean: Tensor, covariance: Tensor, temperature: float = 1.0, factor: float = 1.0) -> Tensor:
    """`[N, C]`, from the variance of every difference of two logits.

    `1 / p_k` is the sum over j of `exp(-(f_k - f_j) / sqrt(T^2 + pi/8 b S_kj))`, with `S_kj` the variance of
    `f_k - f_j`; the probabilities are then divided by their sum.

    Args:
        mean: `[N, C]`.
        covariance: `[N, C, C]`.
        temperature: T, positive.
        factor: b, of the variances; 0 leaves temperature scaling.
    """
    differences = mean[:, :, None] - mean[:, None, :]
    scaled = differences / _width(_variances_of_differences(covariance), temperature, factor)
    return (-(-scaled).logsumexp(dim=2)).log_softmax(dim=1)


def scalar_log_probs(mean: Tensor, covariance: Tensor, temperature: float = 1.0, factor: float = 1.0) -> Tensor:
    """`[N, C]`, from the mean variance of a difference of two logits, which never changes the most probable class.

    The softmax of `f / sqrt(T^2 + pi/8 b v)`, v the mean of the variances of all differences.

    Args:
        mean: `[N, C]`.
        covariance: `[N, C, C]`.
        temperature: T, positive.
        factor: b, of the variance; 0 leaves temperature scaling.
    """
    c = mean.shape[1]
    variance = _variances_of_differences(covariance).sum(dim=(1, 2)) / max(c * (c - 1), 1)
    return (mean / _width(variance[:, None], temperature, factor)).log_softmax(dim=1)


def _variances_of_differences(covariance: Tensor) -> Tensor:
    """`[N, C, C]`, of `f_k - f_j`."""
    variance = covariance.diagonal(dim1=1, dim2=2)
    return (variance[:, :, None] + variance[:, None, :] - 2 * covariance).clamp_min(0)


def _width(variance: Tensor, temperature: float, factor: float) -> Tensor:
    return torch.sqrt(temperature**2 + math.pi / 8 * factor * variance)
