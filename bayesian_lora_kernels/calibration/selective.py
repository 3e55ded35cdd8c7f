"""Answers that may be withheld: how wrong those are that a model is surest of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration.reliability import confidence_and_right


@dataclass(frozen=True)
class RiskCoverage:
    """The share of wrong answers among the k that a model is surest of, for k = 1 to N.

    Attributes:
        coverage: `[N]`, float64, k / N.
        risk: `[N]`, float64, the share of wrong answers among those k.
    """

    coverage: Tensor
    risk: Tensor

    @property
    def area(self) -> float:
        """AURC, the area under the curve: the mean risk over k. Smaller is better."""
        return float(self.risk.mean())


def risk_coverage(probs: Tensor, labels: Tensor) -> RiskCoverage:
    """The risk-coverage curve, with examples in the order of their largest probability.

    Among examples of equal confidence the risk is what a random order of them gives on average, so that the order in
    which they come does not matter.

    Source: Geifman, El-Yaniv 2017, "Selective classification for deep neural networks"; the area: Geifman, Uziel,
    El-Yaniv 2019, "Bias-reduced uncertainty estimation for deep neural classifiers".

    Args:
        probs: `[N, C]`, class probabilities.
        labels: `[N]`, class indices.

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    _, right = by_confidence(probs, labels)
    taken = torch.arange(1, len(right) + 1, dtype=torch.float64, device="cpu")
    wrong = (1 - right).flip(0).cumsum(0)  # from the surest down
    return RiskCoverage(coverage=taken / len(right), risk=wrong / taken)


def by_confidence(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`[N]` twice, float64: confidence in rising order, and beside it the share of right answers at that confidence.

    Where no two confidences are equal the share is 1 or 0. Sums over it are what a random order of equal ones gives on
    average.

    Args:
        probs: `[N, C]`, class probabilities.
        labels: `[N]`, class indices.

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    confidence, right = confidence_and_right(probs, labels)
    levels, where, count = confidence.unique(return_inverse=True, return_counts=True)
    share = torch.bincount(where, weights=right) / count
    return levels.repeat_interleave(count), share.repeat_interleave(count)
