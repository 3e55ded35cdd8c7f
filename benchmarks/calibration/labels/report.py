"""Tables and a picture of what came out: plain functions on the scores of the models.

A record is one model: `{"task", "seed", "scores": {split: {method: {number of labels, as text: {metric: value}}}}}`.
Methods that use no held-out label stand under "0", and are compared with temperature scaling for every number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bayesian_lora_kernels.plots.style import (
    BLUE,
    GREEN,
    MARKERS,
    MUTED,
    ORANGE,
    WIDTH,
    legend_below,
    new_figure,
    styled,
)

from ..scores import HIGHER_IS_BETTER, METRICS
from ..tables import Difference, difference, number, or_none, paired, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
SPLITS = ("test", "shift")
REFERENCE, AVERAGED = "temperature", "averaged temperatures"
DRAWN = {"laplace pairwise": BLUE, "laplace scalar": ORANGE, "laplace pairwise, 2 folds": GREEN}
TITLES = {
    "nll": "NLL",
    "ece": "ECE",
    "ece_adaptive": "adaptive ECE",
    "error_auroc": "error AUROC",
    "accuracy": "accuracy",
}


def value(record: Record, split: str, method: str, labels: int, metric: str) -> float:
    """One score; NaN if there is none."""
    found = record["scores"][split].get(method, {})
    one = found.get(str(labels), found.get("0"))
    return math.nan if one is None or one[metric] is None else float(one[metric])


def methods(records: Sequence[Record]) -> list[str]:
    """Of all records, in the order in which they first appear."""
    return list(dict.fromkeys(method for record in records for method in record["scores"][SPLITS[0]]))


def label_counts(records: Sequence[Record]) -> list[int]:
    return sorted({int(n) for record in records for n in record["scores"][SPLITS[0]].get(REFERENCE, {})})


def compare(
    records: Sequence[Record], split: str, method: str, labels: int, metric: str, reference: str = REFERENCE
) -> Difference:
    return paired(
        [value(record, split, method, labels, metric) for record in records],
        [value(record, split, reference, labels, metric) for record in records],
        HIGHER_IS_BETTER[metric],
    )


def compare_tasks(
    records: Sequence[Record], split: str, method: str, labels: int, metric: str, reference: str = REFERENCE
) -> Difference:
    """As `compare`, of the tasks' means: models of one task are not independent of each other."""
    tasks = sorted({record["task"] for record in records})
    own = [[record for record in records if record["task"] == task] for task in tasks]
    found = [compare(some, split, method, labels, metric, reference).mean for some in own]
    return paired(found, [0.0] * len(found), HIGHER_IS_BETTER[metric])


def mean(records: Sequence[Record], split: str, method: str, labels: int, metric: str) -> float:
    """Over the models that have the score."""
    found = [value(record, split, method, labels, metric) for record in records]
    found = [number for number in found if not math.isnan(number)]
    return sum(found) / len(found) if found else math.nan


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Every number of the tables, for JSON."""
    tasks = sorted({record["task"] for record in records})

    def one(some: Sequence[Record], split: str, method: str, n: int, metric: str) -> dict[str, Any]:
        own = vars(compare(some, split, method, n, metric))
        over_tasks = vars(compare_tasks(some, split, method, n, metric))
        return {
            "mean": or_none(mean(some, split, method, n, metric)),
            "difference": {name: or_none(value) for name, value in own.items()},
            "tasks_difference": {name: or_none(value) for name, value in over_tasks.items()},
        }

    def numbers(some: Sequence[Record]) -> dict[str, Any]:
        return {
            split: {
                method: {
                    str(n): {metric: one(some, split, method, n, metric) for metric in METRICS}
                    for n in label_counts(records)
                }
                for method in methods(records)
            }
            for split in SPLITS
        }

    return {
        "models": len(records),
        "all": numbers(records),
        "tasks": {task: numbers([record for record in records if record["task"] == task]) for task in tasks},
    }


def as_markdown(records: Sequence[Record], command: str, versions: Mapping[str, str]) -> str:
    """A whole page."""
    tasks = sorted({record["task"] for record in records})
    most = max(label_counts(records))
    lines = [
        "# Calibration on fresh tasks",
        "",
        f"Written by `{command}` with {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        f"{len(records)} models of {len(tasks)} tasks: {', '.join(tasks)}. How the tasks came about, and in which "
        "order, is in the docstring of `benchmarks/calibration/labels`.",
        "",
        f"## Against temperature scaling with the same {most} labels",
        "",
        "Paired differences: mean ± standard error over models, in brackets the share of models for which the method "
        "is better (ties count half). Then the same with the means of the tasks in place of models.",
    ]
    for split in SPLITS:
        lines += ["", f"### {split}", "", *_differences(records, split, most, compare)]
        lines += ["", f"Over the {len(tasks)} tasks:", "", *_differences(records, split, most, compare_tasks)]
    lines += [
        "",
        f"## Against averaged temperatures with the same {most} labels",
        "",
        "Where all labels are predicted right, plain temperature scaling goes to its lowest temperature, and its NLL "
        "is off all scales then. Averaging over temperatures, with the prior that the package has, does not; it is the "
        "fairer of the two. The last column is the median over models of the difference in NLL to plain temperature "
        "scaling.",
    ]
    for split in SPLITS:
        lines += ["", f"### {split}", "", *_robust_differences(records, split, most)]
    lines += ["", "## Number of labels", "", "Mean NLL and ECE over models, and paired difference in NLL."]
    for split in SPLITS:
        lines += ["", f"### {split}", "", *_by_labels(records, split)]
    lines += ["", f"## Tasks, {most} labels"]
    for task in tasks:
        own = [record for record in records if record["task"] == task]
        lines += ["", f"### {task} ({len(own)} models)"]
        for split in SPLITS:
            lines += ["", split, "", *_means(own, split, most)]
    return "\n".join(lines) + "\n"


@styled()
def draw(records: Sequence[Record]) -> Figure:
    """NLL and ECE less those of averaged temperatures with as many labels: means over the models, standard errors.

    What is far off (plain fine-tuning, the evidence alone, plain temperature scaling with few labels) is left out.
    """
    figure = new_figure(WIDTH, 6.2)
    axes = figure.subplots(2, len(SPLITS), squeeze=False, sharex=True)
    counts = label_counts(records)
    for row, metric in enumerate(("nll", "ece")):
        for column, split in enumerate(SPLITS):
            panel = axes[row, column]
            panel.axhline(0, color=MUTED, linewidth=1, linestyle="--", label="averaged temperatures")
            for i, (method, color) in enumerate(DRAWN.items()):
                found = [compare(records, split, method, n, metric, AVERAGED) for n in counts]
                places = [n * 1.06 ** (i - 1) for n in counts]
                name = method if record_labels(records, method) else f"{method} (no held-out labels)"
                panel.errorbar(
                    places,
                    [one.mean for one in found],
                    [one.error for one in found],
                    fmt=f"{MARKERS[i]}-",
                    color=color,
                    capsize=3,
                    label=name,
                )
            panel.set_xscale("log")
            panel.set_xticks(counts, [str(n) for n in counts])
            panel.minorticks_off()
            panel.set_title(f"{TITLES[metric]}, {split}")
    for panel in axes[-1]:
        panel.set_xlabel("held-out labels")
    for panel in axes[:, 0]:
        panel.set_ylabel("difference (below 0 is better)")
    legend_below(figure, axes.flat, 2)
    return figure


def record_labels(records: Sequence[Record], method: str) -> bool:
    """Whether a method uses held-out labels."""
    return any(set(record["scores"][SPLITS[0]].get(method, {})) - {"0"} for record in records)


def _differences(records: Sequence[Record], split: str, labels: int, of: Callable[..., Difference]) -> list[str]:
    rows = []
    for method in methods(records):
        if method != REFERENCE:
            found = [of(records, split, method, labels, metric) for metric in METRICS]
            rows.append([method, *(difference(one) for one in found)])
    return table(["method", *(TITLES[metric] for metric in METRICS)], rows)


def _robust_differences(records: Sequence[Record], split: str, labels: int) -> list[str]:
    rows = []
    for method in methods(records):
        if method == AVERAGED:
            continue
        found = [compare(records, split, method, labels, metric, AVERAGED) for metric in METRICS]
        pairs = [
            value(record, split, method, labels, "nll") - value(record, split, REFERENCE, labels, "nll")
            for record in records
        ]
        rows.append([method, *(difference(one) for one in found), f"{statistics.median(pairs):+.4f}"])
    return table(["method", *(TITLES[metric] for metric in METRICS), "median, plain"], rows)


def _by_labels(records: Sequence[Record], split: str) -> list[str]:
    counts = label_counts(records)
    rows = []
    for method in methods(records):
        cells = [method]
        for n in counts:
            nll, ece = (mean(records, split, method, n, metric) for metric in ("nll", "ece"))
            cells.append(f"{number(nll)} / {number(ece)}")
            if method != REFERENCE:
                cells[-1] += f"; {difference(compare(records, split, method, n, 'nll'))}"
        rows.append(cells)
    return table(["method", *(f"{n} labels" for n in counts)], rows)


def _means(records: Sequence[Record], split: str, labels: int) -> list[str]:
    rows = []
    for method in methods(records):
        cells = [number(mean(records, split, method, labels, metric)) for metric in METRICS]
        against = "" if method == REFERENCE else difference(compare(records, split, method, labels, "nll"))
        rows.append([method, *cells, against])
    return table(["method", *(TITLES[metric] for metric in METRICS), "NLL against temperature"], rows)
