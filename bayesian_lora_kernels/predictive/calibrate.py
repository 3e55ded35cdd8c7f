"""What held-out labels say of the level of the probabilities: a temperature that depends on the posterior variance.

Of the pairs (T, b) of a grid each gets a weight, its prior times the likelihood of the labels, and the probabilities of
all pairs are averaged. b multiplies the variances, T stands for all that they do not know of; b = 0 would be
temperature scaling. A weighted average needs few labels, and never asks for more than the grid has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.posterior.description import check_keys, is_int, is_object, optional
from bayesian_lora_kernels.predictive.probabilities import pairwise_log_probs, scalar_log_probs
from bayesian_lora_kernels.surroundings import in_own_surroundings

logger = logging.getLogger(__name__)

METHODS = {"pairwise": pairwise_log_probs, "scalar": scalar_log_probs}
LOG_FACTORS = (-7.0, 5.0, 13)  # first, last, how many
LOG_TEMPERATURES = (-1.4, 3.0, 15)
# Mean and standard deviation of the normal priors of ln b and ln T.
FACTOR_PRIOR = (-1.0, 2.5)
TEMPERATURE_PRIOR = (0.5, 1.0)
NEGLIGIBLE = 1e-9  # a weight that is left out: of 195, no probability changes by more than 2e-7
EDGE = 0.5  # of the weight: the grid is too small if so much is at an end of it


class Notice:
    """One line of the log, said once.

    Args:
        text: the line.
    """

    def __init__(self, text: str):
        self.text, self.said = text, False

    def say(self) -> None:
        """Log it at INFO, the first time."""
        if not self.said:
            self.said = True
            logger.info(self.text)


@dataclass
class LabelLikelihood:
    """What labels say of every pair (b, T) of the grid; that of several parts of the data adds up.

    Attributes:
        log_likelihood: `{method: [13, 15]}`, float64: of the labels, for every b and T.
        counts: `[C]`, how many labels there are of each class; None before the first.
        hits: how many labels are the most probable class.
        map_log_likelihood: of the labels, of the softmax of the means.
        folds: of how many folds of the training data these labels are; None: they were held out.
        report: what there is to say of the folds.
    """

    log_likelihood: dict[str, Tensor] = field(
        default_factory=lambda: {
            name: torch.zeros(LOG_FACTORS[2], LOG_TEMPERATURES[2], dtype=torch.float64, device="cpu")
            for name in METHODS
        }
    )
    counts: Tensor | None = None
    hits: int = 0
    map_log_likelihood: float = 0.0
    folds: int | None = None
    report: Mapping[str, Any] | None = None

    @in_own_surroundings
    def add(self, mean: Tensor, covariance: Tensor, labels: Tensor, scale: float) -> None:
        """Look at some labelled examples.

        Args:
            mean: `[N, C]`.
            covariance: `[N, C, C]`.
            labels: `[N]`, class indices.
            scale: `variance_scale` of the posterior that predicted them.
        """
        factors, temperatures = _grid()
        for name, formula in METHODS.items():
            for log_probs, rows, points in formula.on_grid(mean, covariance, temperatures, factors * scale):
                chosen = log_probs.gather(2, labels[rows].expand(len(log_probs), -1)[:, :, None])
                flat = self.log_likelihood[name].view(-1)
                flat[points] += chosen.sum(dim=(1, 2), dtype=torch.float64).cpu()
        counts = torch.bincount(labels, minlength=mean.shape[1]).cpu()
        self.counts = counts if self.counts is None else self.counts + counts
        self.hits += int((mean.argmax(dim=1) == labels).sum())
        chosen = mean.double().log_softmax(dim=1).gather(1, labels[:, None])
        self.map_log_likelihood += float(chosen.sum())

    def add_pairs(self, mean: Tensor, covariance: Tensor, labels: Tensor, scale: float) -> None:
        """Look at some pairs of answers, every second of them turned round.

        The likelihood does not see which answer is first; labels that were all of the first would say nothing of a
        classifier.

        Args:
            mean: `[N, 2]`.
            covariance: `[N, 2, 2]`.
            labels: `[N]`, 1 where the first is better, 0 where it is not.
            scale: see `add`.

        Raises:
            ValueError: for other labels.
        """
        if ((labels != 0) & (labels != 1)).any():
            raise ValueError("labels: expected pairs of which one is better, 0 or 1, to calibrate with, got a tie")
        turned = (torch.arange(len(mean), device=mean.device) + self.n_labels) % 2 == 1
        mean = torch.where(turned[:, None], mean.flip(1), mean)
        covariance = torch.where(turned[:, None, None], covariance.flip(1, 2), covariance)
        self.add(mean, covariance, ((labels == 0) ^ turned).long(), scale)

    @in_own_surroundings
    def __add__(self, other: LabelLikelihood) -> LabelLikelihood:
        tables = {name: table + other.log_likelihood[name] for name, table in self.log_likelihood.items()}
        counts = [one.counts for one in (self, other) if one.counts is not None]
        if len({len(one) for one in counts}) > 1:
            raise ValueError(f"label evidence: expected one number of classes, got {[len(one) for one in counts]}")
        return LabelLikelihood(
            tables,
            torch.stack(counts).sum(dim=0) if counts else None,
            self.hits + other.hits,
            self.map_log_likelihood + other.map_log_likelihood,
        )

    @property
    def n_labels(self) -> int:
        """How many labels were seen."""
        return 0 if self.counts is None else int(self.counts.sum())

    def as_json(self) -> dict[str, Any]:
        """What a file keeps."""
        return {
            "log_likelihood": {name: table.tolist() for name, table in self.log_likelihood.items()},
            "log_factors": list(LOG_FACTORS),
            "log_temperatures": list(LOG_TEMPERATURES),
            "counts": None if self.counts is None else self.counts.tolist(),
            "hits": self.hits,
            "map_log_likelihood": self.map_log_likelihood,
            "report": self.report,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LabelLikelihood:
        """What `as_json` gave.

        Raises:
            KeyError, TypeError, ValueError: if it cannot be that.
        """
        if content["log_factors"] != [*LOG_FACTORS] or content["log_temperatures"] != [*LOG_TEMPERATURES]:
            raise ValueError("it is of another grid of factors and temperatures")
        tables = {
            name: torch.tensor(content["log_likelihood"][name], dtype=torch.float64, device="cpu") for name in METHODS
        }
        if any(
            t.shape != (LOG_FACTORS[2], LOG_TEMPERATURES[2]) or not torch.isfinite(t).all() for t in tables.values()
        ):
            raise ValueError("log_likelihood: expected finite numbers, one for each pair of the grid")
        counts = None if content["counts"] is None else torch.tensor(content["counts"], dtype=torch.int64)
        return cls(tables, counts, int(content["hits"]), float(content["map_log_likelihood"]), report=content["report"])


@dataclass(frozen=True)
class Calibration:
    """Weights of temperatures and factors of the variance, over whose probabilities a prediction is averaged.

    Source: none in print; `docs/calibration.md` has the measurements.

    Attributes:
        weights: `{method: [13, 15]}`, float64: of every factor b and temperature T; their sum is 1.
        variance_scale: `sum_m l_m ||theta_m||^2 / P`, of the posterior that this belongs to: in the units of its prior,
            variances that do not depend on what the prior precision happens to be.
        n_labels: how many labels were seen.
        n_classes: C, what they were labels of.
        folds: how many folds of the training data they are from; None: they were held out.
        report: what `crossfit` has to say of the folds.
        outdated: why this no longer belongs to the posterior, None: it does.
    """

    weights: Mapping[str, Tensor]
    variance_scale: float
    n_labels: int
    n_classes: int
    folds: int | None = None
    report: Mapping[str, Any] | None = None
    outdated: str | None = None

    @classmethod
    def of(cls, evidence: LabelLikelihood, variance_scale: float) -> Calibration:
        """The weights that labels give, and a line at INFO that says how many there were.

        Raises:
            ValueError: for no labels, or labels of one class only.
        """
        if evidence.counts is None:
            raise ValueError("calibrate: expected labels, there are none")
        if len(seen := evidence.counts.nonzero().flatten()) < 2:
            raise ValueError(
                f"labels: expected at least two classes to calibrate with, all {int(evidence.counts.sum())} are class "
                f"{int(seen[0])}"
            )
        prior = _log_prior()
        weights = {}
        for name, table in evidence.log_likelihood.items():
            weights[name] = (table + prior).flatten().softmax(dim=0).view_as(table)
        counts = evidence.counts
        found = cls(weights, variance_scale, int(counts.sum()), len(counts), evidence.folds, evidence.report)
        logger.info(str(found))
        for name, table in weights.items():
            for share, what in (
                (table[:, 0].sum(), f"lowest temperature, {math.exp(LOG_TEMPERATURES[0]):.3g}"),
                (table[:, -1].sum(), f"highest temperature, {math.exp(LOG_TEMPERATURES[1]):.3g}"),
                (table[-1].sum(), f"largest factor of the variance, {math.exp(LOG_FACTORS[1]):.3g}"),
            ):
                if share > EDGE:
                    logger.warning(
                        f"calibrate: {share:.0%} of {name}'s weight is at the {what}; the labels ask for more"
                    )
        return found

    @property
    def effective_points(self) -> dict[str, float]:
        """`{method: 1 / sum of squared weights}`: over how many of the 195 pairs an average really goes."""
        return {name: float(1 / values.square().sum()) for name, values in self.weights.items()}

    @in_own_surroundings
    def probs(self, method: str, mean: Tensor, covariance: Tensor) -> Tensor:
        """Probabilities `[N, C]`, averaged over the pairs.

        Raises:
            RuntimeError: if this is outdated.
            ValueError: for more logits than the labels were of.
        """
        if self.outdated is not None:
            raise RuntimeError(
                f"probs: {self.outdated} since calibrate was called; call it again, or probs(calibrated=False)"
            )
        if mean.shape[1] > self.n_classes:
            raise ValueError(f"probs: expected at most the {self.n_classes} logits of calibrate, got {mean.shape[1]}")
        weights = self.weights[method].flatten()
        counted = weights > NEGLIGIBLE
        factors, temperatures = (each[counted] for each in _grid())
        weights = weights[counted].to(mean)
        total = torch.zeros_like(mean)
        scaled = factors * self.variance_scale
        for log_probs, rows, points in METHODS[method].on_grid(mean, covariance, temperatures, scaled):
            total[rows] += torch.einsum("g,gnc->nc", weights[points], log_probs.exp())
        return total / total.sum(dim=1, keepdim=True)

    def __str__(self) -> str:
        source = "held-out labels" if self.folds is None else f"labels of {self.folds} folds"
        points = ", ".join(f"{value:.1f} ({name})" for name, value in self.effective_points.items())
        return f"calibrated with {self.n_labels} {source}; effective number of grid points of 195: {points}"

    def as_json(self) -> dict[str, Any]:
        """What a file keeps."""
        return {
            "weights": {name: values.tolist() for name, values in self.weights.items()},
            "log_factors": list(LOG_FACTORS),
            "log_temperatures": list(LOG_TEMPERATURES),
            "variance_scale": self.variance_scale,
            "n_labels": self.n_labels,
            "n_classes": self.n_classes,
            "folds": self.folds,
            "report": self.report,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Calibration:
        """What `as_json` gave.

        Raises:
            ValueError: for a key that is missing or unknown, or a value that cannot be; it is named.
        """
        for key in content:
            if key not in _SAVED:
                raise ValueError(f"calibration.{key}: expected no such key")
        check_keys("calibration.", content, _SAVED)
        weights = {name: _weights(name, table) for name, table in content["weights"].items()}
        return cls(weights, *(content[key] for key in ("variance_scale", "n_labels", "n_classes", "folds", "report")))


_SAVED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "weights": (lambda v: is_object(v) and v.keys() == METHODS.keys(), f"one table of each of {[*METHODS]}"),
    "log_factors": (lambda v: v == [*LOG_FACTORS], f"{[*LOG_FACTORS]}"),
    "log_temperatures": (lambda v: v == [*LOG_TEMPERATURES], f"{[*LOG_TEMPERATURES]}"),
    "variance_scale": (lambda v: isinstance(v, float) and 0 <= v < math.inf, "a finite number, not negative"),
    "n_labels": (is_int(2), "a number of labels"),
    "n_classes": (is_int(2), "a number of classes"),
    "folds": (optional(is_int(2)), "null or a number of folds"),
    "report": (optional(is_object), "null or an object"),
}


def _weights(name: str, table: Any) -> Tensor:
    shape = LOG_FACTORS[2], LOG_TEMPERATURES[2]
    try:
        weights = torch.tensor(table, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        weights = torch.empty(0)
    if weights.shape != shape or not (weights >= 0).all() or not abs(float(weights.sum()) - 1) < 1e-6:
        raise ValueError(
            f"calibration.weights.{name}: expected {list(shape)} weights whose sum is 1, got {table!r:.80}"
        )
    return weights


def _grid() -> tuple[Tensor, Tensor]:
    """Factors and temperatures of all pairs, `[195]` float64; the temperature goes fastest."""
    b, t = (torch.linspace(*axis, dtype=torch.float64, device="cpu").exp() for axis in (LOG_FACTORS, LOG_TEMPERATURES))
    return b.repeat_interleave(len(t)), t.repeat(len(b))


def _log_prior() -> Tensor:
    """`[13, 15]`, up to a constant."""
    b, t = (torch.linspace(*axis, dtype=torch.float64, device="cpu") for axis in (LOG_FACTORS, LOG_TEMPERATURES))
    (mean_b, std_b), (mean_t, std_t) = FACTOR_PRIOR, TEMPERATURE_PRIOR
    return -0.5 * (((b - mean_b) / std_b).square()[:, None] + ((t - mean_t) / std_t).square()[None, :])
