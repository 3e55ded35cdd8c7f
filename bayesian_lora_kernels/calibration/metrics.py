"""Numbers that judge class probabilities, in float64 whatever the input.

Where several predictions fall on the same largest probability, the first class counts as the prediction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration.checks import DEFAULT_BINS, check_labels, check_probs, check_scores
from bayesian_lora_kernels.calibration.debiased import adaptive_calibration_error, debiased_calibration_error
from bayesian_lora_kernels.calibration.reliability import confidence_and_right, reliability_bins
from bayesian_lora_kernels.calibration.selective import risk_coverage


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of examples whose most probable class is their label.

    Args:
        probs: `[N, C]`, class probabilities.
        labels: `[N]`, class indices.

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    values = check_probs(probs)
    targets = check_labels(labels, *values.shape)
    return float((values.argmax(dim=-1) == targets).double().mean())


def negative_log_likelihood(probs: Tensor, labels: Tensor) -> float:
    """Mean over examples of `-log p(label)`, in nats.

    A probability of zero counts as the smallest normal number of its dtype, so that a softmax that underflowed costs
    much (87 nats in float32) and not infinity.

    Args:
        probs: `[N, C]`, class probabilities.
        labels: `[N]`, class indices.

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    values = check_probs(probs)
    targets = check_labels(labels, *values.shape)
    chosen = values.gather(-1, targets[:, None]).squeeze(-1)
    return float(-chosen.clamp_min(torch.finfo(probs.dtype).tiny).log().mean())


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = DEFAULT_BINS) -> float:
    """ECE: mean over examples of |accuracy - mean confidence| in their bin of the largest probability.

    Source: Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks", equation 3.

    Args:
        probs: `[N, C]`, class probabilities.
        labels: `[N]`, class indices.
        bins: how many bins of equal width divide [0, 1].

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    return reliability_bins(probs, labels, bins).error


def brier_score(probs: Tensor, labels: Tensor) -> float:
    """Mean over examples of the squared distance between the probabilities and the one-hot label, in [0, 2].

    This is Brier's own, the sum over all classes; with two classes it is twice what some libraries call so.

    Args:
        probs: `[N, C]`, class probabilities.
        labels: `[N]`, class indices.

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    values = check_probs(probs)
    targets = check_labels(labels, *values.shape)
    one_hot = torch.nn.functional.one_hot(targets, values.shape[-1])
    return float((values - one_hot).square().sum(dim=-1).mean())


def predictive_entropy(probs: Tensor) -> Tensor:
    """`[N]`, float64: `-sum p log p` in nats, the usual score of how foreign an input is.

    Args:
        probs: `[N, C]`, class probabilities.

    Raises:
        TypeError, ValueError: for arguments other than that.
    """
    return torch.special.entr(check_probs(probs)).sum(dim=-1)


def ood_auroc(scores: Tensor, ood_scores: Tensor) -> float:
    """How well a score tells foreign inputs from the test set's: the area under the ROC curve.

    It is the probability that a foreign input has the larger score, ties counted half; 0.5 is chance.

    Args:
        scores: `[N]`, of the test set, such as `predictive_entropy`; larger means more foreign.
        ood_scores: `[M]`, of the foreign inputs.

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    return _auroc(check_scores(scores, "scores"), check_scores(ood_scores, "ood_scores"))


def error_auroc(probs: Tensor, labels: Tensor) -> float:
    """How well low confidence, `1 - largest probability`, tells wrong predictions from right ones: area under the ROC.

    It is the probability that a wrong prediction has the lower confidence, ties counted half; 0.5 is chance.

    Source: Hendrycks, Gimpel 2017, "A baseline for detecting misclassified and out-of-distribution examples".

    Args:
        probs: `[N, C]`, class probabilities.
        labels: `[N]`, class indices.

    Returns:
        The area; NaN where every prediction is right or every one wrong, so that there is nothing to tell apart.

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    confidence, right = confidence_and_right(probs, labels)
    return _auroc(-confidence[right == 1], -confidence[right == 0])


def summary(
    probs: Tensor, labels: Tensor, ood_probs: Tensor | None = None, bins: int = DEFAULT_BINS
) -> dict[str, float]:
    """The numbers for a table at once.

    Args:
        probs: `[N, C]`, class probabilities.
        labels: `[N]`, class indices.
        ood_probs: `[M, C]`, for foreign inputs; their entropy is compared with that of `probs`.
        bins: for `ece`, `ece_adaptive` and `ece_debiased`.

    Returns:
        `accuracy`, `nll`, `ece`, `brier`, `ece_adaptive`, `ece_debiased`, `error_auroc`, `aurc` (the area of
        `risk_coverage`), and, with `ood_probs`, `ood_auroc`. `error_auroc` is NaN where all predictions are right or
        all wrong, `ece_debiased` where no bin has two examples.

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    result = {
        "accuracy": accuracy(probs, labels),
        "nll": negative_log_likelihood(probs, labels),
        "ece": expected_calibration_error(probs, labels, bins),
        "brier": brier_score(probs, labels),
        "ece_adaptive": adaptive_calibration_error(probs, labels, bins),
        "ece_debiased": debiased_calibration_error(probs, labels, bins),
        "error_auroc": error_auroc(probs, labels),
        "aurc": risk_coverage(probs, labels).area,
    }
    if ood_probs is not None:
        check_probs(ood_probs, "ood_probs")
        if ood_probs.shape[-1] != probs.shape[-1]:
            raise ValueError(f"ood_probs: expected {probs.shape[-1]} classes, as in probs, got {ood_probs.shape[-1]}")
        result["ood_auroc"] = ood_auroc(predictive_entropy(probs), predictive_entropy(ood_probs))
    return result


def _auroc(lower: Tensor, higher: Tensor) -> float:
    """P(higher > lower) + P(equal) / 2: Mann and Whitney's U by midranks, as a share of pairs; NaN without pairs."""
    if 0 in (len(lower), len(higher)):
        return math.nan
    _, where, count = torch.cat([lower, higher]).unique(return_inverse=True, return_counts=True)
    midrank = count.cumsum(0) - (count - 1) / 2
    ranks = midrank.double()[where[len(lower) :]].sum()
    return float((ranks - len(higher) * (len(higher) + 1) / 2) / (len(lower) * len(higher)))
