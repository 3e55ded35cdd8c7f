"""Confidence against accuracy, bin by bin: what ECE sums up and the reliability diagram draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration.checks import DEFAULT_BINS, check_count, check_labels, check_probs


@dataclass(frozen=True)
class ReliabilityBins:
    """Examples sorted into equal-width bins `(edge_i, edge_i+1]` of their confidence; zero counts to the first.

    Attributes:
        edges: `[bins + 1]`, from 0 to 1.
        count: `[bins]`, int64, examples in each bin.
        confidence: `[bins]`, the mean largest probability; NaN in an empty bin.
        accuracy: `[bins]`, the share of right answers; NaN in an empty bin.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error: mean over examples of their bin's |accuracy - confidence|."""
        gaps = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return float((gaps * self.count).sum() / self.count.sum())


def reliability_bins(probs: Tensor, labels: Tensor, bins: int = DEFAULT_BINS) -> ReliabilityBins:
    """Sort examples by their confidence, the largest probability.

    Args:
        probs: `[N, C]`, class probabilities.
        labels: `[N]`, class indices.
        bins: how many bins of equal width divide [0, 1].

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    confidence, right = confidence_and_right(probs, labels)
    index = bin_index(confidence, bins)
    count = torch.bincount(index, minlength=bins)
    return ReliabilityBins(
        edges=_edges(bins),
        count=count,
        confidence=torch.bincount(index, weights=confidence, minlength=bins) / count,
        accuracy=torch.bincount(index, weights=right, minlength=bins) / count,
    )


def confidence_and_right(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`[N]` twice, float64: the largest probability, and 1 where its class is the label, else 0.

    Args:
        probs: `[N, C]`, class probabilities.
        labels: `[N]`, class indices.

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    values = check_probs(probs)
    targets = check_labels(labels, *values.shape)
    confidence, predicted = values.max(dim=-1)
    return confidence, (predicted == targets).double()


def bin_index(confidence: Tensor, bins: int) -> Tensor:
    """`[N]`, int64: the bin of equal width that each confidence `[N]` falls into.

    Raises:
        TypeError, ValueError: for `bins` other than a positive int.
    """
    # right=False: a value on an edge belongs to the bin below it
    return (torch.bucketize(confidence, _edges(bins), right=False) - 1).clamp(0, bins - 1)


def _edges(bins: int) -> Tensor:
    return torch.linspace(0, 1, check_count(bins, "bins") + 1, dtype=torch.float64, device="cpu")
