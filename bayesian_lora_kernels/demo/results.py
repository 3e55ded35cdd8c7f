"""Numbers of all runs: metrics of every method on every set, their mean and standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration import summary
from bayesian_lora_kernels.demo.methods import NAMES, Outcome
from bayesian_lora_kernels.demo.task import Splits

MEASURED = ("test", "shift")


@dataclass(frozen=True)
class Run:
    """One fine-tuning: its seed, the labels `{set: [N]}` and each method's outcome."""

    seed: int
    labels: dict[str, Tensor]
    outcomes: dict[str, Outcome]


def make_run(seed: int, splits: Splits, outcomes: dict[str, Outcome]) -> Run:
    """Puts the labels of the measured sets beside the predictions."""
    labels = {name: torch.tensor([example.answer for example in getattr(splits, name)]) for name in MEASURED}
    return Run(seed, labels, outcomes)


@dataclass(frozen=True)
class Statistic:
    """One number in every run."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the runs."""
        return fmean(self.values)

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None from a single run."""
        return stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else None


# {set: {method: {metric: statistic}}}
Results = dict[str, dict[str, dict[str, Statistic]]]


def measure(runs: Sequence[Run], by_sampling: bool = False) -> Results:
    """Accuracy, NLL, ECE and Brier on both sets, and on the test set the AUROC against the foreign sentences.

    Args:
        runs: at least one.
        by_sampling: judges the Monte-Carlo probabilities, of the methods that have them.
    """
    results: Results = {}
    for name in MEASURED:
        results[name] = {}
        for method in NAMES:
            rows = []
            for run in runs:
                outcome = run.outcomes[method]
                probs: Mapping[str, Tensor] = outcome.by_sampling if by_sampling else outcome.probs
                if probs:
                    foreign = probs["foreign"] if name == "test" else None
                    rows.append(summary(probs[name], run.labels[name], foreign))
            if rows:
                results[name][method] = {key: Statistic(tuple(row[key] for row in rows)) for key in rows[0]}
    return results
