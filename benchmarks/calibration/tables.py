"""Paired differences over models, and tables of them in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Of a method and the reference, over models.

    Attributes:
        mean: of the differences.
        error: standard error of the mean; NaN for one model.
        better: share of the models for which the method is better; ties count half.
        count: of models.
    """

    mean: float
    error: float
    better: float
    count: int


def paired(values: Sequence[float], reference: Sequence[float], higher_is_better: bool) -> Difference:
    """Differences `value - reference` of the models that have both."""
    pairs = [(a, b) for a, b in zip(values, reference, strict=True) if not (math.isnan(a) or math.isnan(b))]
    if not pairs:
        return Difference(math.nan, math.nan, math.nan, 0)
    differences = [a - b for a, b in pairs]
    n, sign = len(pairs), 1 if higher_is_better else -1
    mean = sum(differences) / n
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1)) if n > 1 else math.nan
    better = sum(1.0 if sign * d > 0 else 0.5 if d == 0 else 0.0 for d in differences) / n
    return Difference(mean, spread / math.sqrt(n), better, n)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def difference(one: Difference) -> str:
    if one.count == 0:
        return "–"
    error = "" if math.isnan(one.error) else f" ± {one.error:.4f}"
    return f"{one.mean:+.4f}{error} ({one.better:.0%})"


def or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
