"""Numbers of all runs: metrics of every method on every set, their mean and standard error, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration import PairedDifference, paired_difference, summary
from bayesian_lora_kernels.demo.methods import NAMES, Outcome
from bayesian_lora_kernels.demo.task import Splits

MEASURED = ("test", "shift")
COMPARED = ("nll", "ece", "accuracy", "error_auroc")  # with temperature scaling


@dataclass(frozen=True)
class Run:
    """One fine-tuning: its seed, the labels `{set: [N]}`, each method's outcome and the report of the folds."""

    seed: int
    labels: dict[str, Tensor]
    outcomes: dict[str, Outcome]
    folds: dict[str, Any]


def make_run(seed: int, splits: Splits, outcomes: dict[str, Outcome], folds: dict[str, Any]) -> Run:
    """Puts the labels of the measured sets beside the predictions."""
    labels = {name: torch.tensor([example.answer for example in getattr(splits, name)]) for name in MEASURED}
    return Run(seed, labels, outcomes, folds)


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


def measure(runs: Sequence[Run]) -> Results:
    """Accuracy, NLL, ECE and more on both sets, and on the test set the AUROC against the foreign sentences."""
    results: Results = {}
    for name in MEASURED:
        results[name] = {}
        for method in NAMES:
            rows = []
            for run in runs:
                probs = run.outcomes[method].probs
                foreign = probs["foreign"] if name == "test" else None
                rows.append(summary(probs[name], run.labels[name], foreign))
            results[name][method] = {key: Statistic(tuple(row[key] for row in rows)) for key in rows[0]}
    return results


def differences(results: Results) -> dict[str, dict[str, dict[str, PairedDifference]]]:
    """`{set: {method: {metric: difference to temperature scaling, run by run}}}`, of all other methods."""
    return {
        name: {
            method: {key: paired_difference(row[key].values, methods["temperature"][key].values) for key in COMPARED}
            for method, row in methods.items()
            if method != "temperature"
        }
        for name, methods in results.items()
    }
