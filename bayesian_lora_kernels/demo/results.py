"""Numbers of all runs: metrics of every method on every set, their mean and standard error, and paired differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration import PairedDifference, paired_difference, summary
from bayesian_lora_kernels.demo.methods import NAMES, Outcome
from bayesian_lora_kernels.demo.problem import Splits

COMPARED = ("nll", "ece", "accuracy", "error_auroc")  # with temperature scaling


@dataclass(frozen=True)
class Run:
    """One fine-tuning.

    Attributes:
        seed: of it.
        train: how many examples it had.
        held_out: how many more have labels.
        labels: of each measured set, `{set: [N]}`.
        outcomes: of each method.
        folds: their report.
    """

    seed: int
    train: int
    held_out: int
    labels: dict[str, Tensor]
    outcomes: dict[str, Outcome]
    folds: dict[str, Any]


def make_run(seed: int, splits: Splits, outcomes: dict[str, Outcome], folds: dict[str, Any]) -> Run:
    """Puts the labels of the measured sets beside the predictions."""
    labels = {name: torch.tensor([one.answer for one in examples]) for name, examples in splits.measured.items()}
    return Run(seed, len(splits.train), len(splits.held_out), labels, outcomes, folds)


@dataclass(frozen=True)
class Statistic:
    """One number in every run."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the runs in which it is defined; NaN without one."""
        return fmean(self._defined) if self._defined else math.nan

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None from a single run."""
        return stdev(self._defined) / math.sqrt(len(self._defined)) if len(self._defined) > 1 else None

    @property
    def _defined(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]


# {set: {method: {metric: statistic}}}
Results = dict[str, dict[str, dict[str, Statistic]]]


def measure(runs: Sequence[Run]) -> Results:
    """Accuracy, NLL, ECE and more on each set, and on the test set the AUROC against foreign examples, if there are."""
    results: Results = {}
    for name in runs[0].labels:
        results[name] = {}
        for method in NAMES:
            rows = []
            for run in runs:
                probs = run.outcomes[method].probs
                foreign = probs.get("foreign") if name == "test" else None
                rows.append(summary(probs[name], run.labels[name], foreign))
            results[name][method] = {key: Statistic(tuple(row[key] for row in rows)) for key in rows[0]}
    return results


def differences(results: Results) -> dict[str, dict[str, dict[str, PairedDifference]]]:
    """`{set: {method: {metric: difference to temperature scaling, run by run}}}`, of all other methods.

    Runs in which a metric is not defined, such as the AUROC of errors where there are none, do not count in it.
    """
    found: dict[str, dict[str, dict[str, PairedDifference]]] = {}
    for name, methods in results.items():
        found[name] = {method: {} for method in methods if method != "temperature"}
        for method, metric in itertools.product(found[name], COMPARED):
            pairs = zip(methods[method][metric].values, methods["temperature"][metric].values, strict=True)
            defined = [pair for pair in pairs if all(map(math.isfinite, pair))]
            if defined:
                found[name][method][metric] = paired_difference(*zip(*defined, strict=True))
    return found
