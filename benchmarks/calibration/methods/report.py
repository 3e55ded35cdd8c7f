"""Tables and a picture of what came out: plain functions on the lines of the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bayesian_lora_kernels.commands.compare import COLUMNS as TITLES
from bayesian_lora_kernels.plots.style import BLUE, MUTED, VERMILION, WIDTH, legend_below, new_figure, styled

from ..scores import HIGHER_IS_BETTER
from ..tables import Difference, or_none, paired, table
from .registry import METHODS, REFERENCE
from .runs import MEASURED, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOREIGN = {"entropy": "foreign: AUROC by entropy", "mutual information": "by mutual information"}
SECONDS = ("fine-tuning", "fit", "labels", "predict")
HIGHER = HIGHER_IS_BETTER | {"brier": False, "aurc": False}
COLORS = {"test": (BLUE, "o"), "shift": (VERMILION, "s")}
LINEAR = 0.05  # differences of NLL are drawn linearly up to it, then by their logarithm


def tasks_of(runs: Sequence[Run]) -> list[str]:
    """In the order in which they first appear."""
    return list(dict.fromkeys(run["task"] for run in runs))


def methods_of(runs: Sequence[Run]) -> list[str]:
    """That have a run, in the order of the registry."""
    there = {run["method"] for run in runs}
    return [name for name in METHODS if name in there]


def values(runs: Sequence[Run], method: str, *where: str) -> dict[tuple[str, int], float]:
    """`{(task, seed): number}` of a method, for instance at `"scores", "test", "nll"`; NaN where there is none."""
    found = {}
    for run in runs:
        if run["method"] == method:
            one: Any = run
            for key in where:
                one = None if one is None else one.get(key)
            found[run["task"], run["seed"]] = math.nan if one is None else float(one)
    return found


def mean(numbers: Sequence[float]) -> tuple[float, float]:
    """Of those that are defined, and its standard error; NaN without any, and of one."""
    found = paired(list(numbers), [0.0] * len(numbers), higher_is_better=False)
    return found.mean, found.error


def against_reference(runs: Sequence[Run], method: str, split: str, metric: str) -> Difference:
    """Of the models that have both."""
    ours, theirs = (values(runs, name, "scores", split, metric) for name in (method, REFERENCE))
    both = [key for key in ours if key in theirs]
    return paired([ours[key] for key in both], [theirs[key] for key in both], HIGHER[metric])


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Every number of the tables, for JSON."""

    def statistic(numbers: Sequence[float]) -> dict[str, float | None]:
        return dict(zip(("mean", "standard_error"), map(or_none, mean(numbers)), strict=True))

    def one(some: Sequence[Run], method: str) -> dict[str, Any]:
        result: dict[str, Any] = {
            split: {metric: statistic([*values(some, method, "scores", split, metric).values()]) for metric in metrics}
            for split, metrics in [*((split, TITLES) for split in MEASURED), ("foreign", FOREIGN)]
        }
        result["seconds"] = {name: statistic(_seconds(some, method, name)) for name in SECONDS}
        result["mib"] = statistic([*values(some, method, "mib").values()])
        if method != REFERENCE:
            result["less temperature scaling"] = {
                split: {
                    metric: {
                        name: or_none(number)
                        for name, number in vars(against_reference(some, method, split, metric)).items()
                    }
                    for metric in TITLES
                }
                for split in MEASURED
            }
        return result

    own = {task: [run for run in runs if run["task"] == task] for task in tasks_of(runs)}
    return {
        "tasks": {task: {name: one(some, name) for name in methods_of(some)} for task, some in own.items()},
        "all": {name: one(runs, name) for name in methods_of(runs)},
    }


def as_markdown(runs: Sequence[Run]) -> str:
    """A whole page."""
    tasks = tasks_of(runs)
    versions = {name: runs[-1]["environment"][name] for name in ("python", "torch", "transformers", "peft")}
    models = {task: {run["seed"] for run in runs if run["task"] == task} for task in tasks}
    lines = [
        "# Laplace-LoRA and what people use",
        "",
        "Written by `make study`, or `python -m benchmarks.calibration.methods --out FOLDER`, with "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}. What each task and method is, and "
        "the order in which things were done, is in the docstring of `benchmarks/calibration/methods`.",
        "",
        "Models: " + ", ".join(f"{len(seeds)} of {task}" for task, seeds in models.items()) + ".",
        "",
        "## All models against temperature scaling with the same labels",
        "",
        "Paired differences: mean ± standard error over models (how many of them are better; ties count half).",
    ]
    for split in MEASURED:
        lines += ["", f"### {split}", "", *_differences(runs, split)]
    for task in tasks:
        own = [run for run in runs if run["task"] == task]
        sizes = ", ".join(f"{size} {name}" for name, size in own[0]["settings"]["sizes"].items())
        lines += ["", f"## {task}", "", f"Mean ± standard error of {len(models[task])} models; {sizes}."]
        for split in MEASURED:
            lines += ["", f"### {task}, {split}", "", *_means(own, split)]
            lines += ["", "Less temperature scaling:", "", *_differences(own, split)]
        lines += ["", f"### {task}, foreign sentences and cost", "", *_foreign(own), "", *_cost(own)]
    lines += [
        "",
        "Seconds are of all cores together (CPU time), on a machine with other work: they say what is cheap and what "
        "is not, and are no benchmark. `fine-tuning` is that of further models, beyond the one that all methods share; "
        "`fit` includes the prior precision by the evidence; `labels` is what held-out labels or folds cost, without "
        "the folds' fine-tuning; `predict` is of test, shift and foreign sentences together. MiB is the peak of the "
        "resident set beyond the loaded model in the dearest of fit and predictions; fine-tuning is left out.",
    ]
    return "\n".join(lines) + "\n"


@styled()
def draw(runs: Sequence[Run]) -> Figure:
    """NLL less that of temperature scaling, for every task: means over models with standard errors."""
    tasks = tasks_of(runs)
    names = [name for name in methods_of(runs) if name != REFERENCE]
    rows, columns = math.ceil(len(tasks) / 2), min(2, len(tasks))
    figure = new_figure(WIDTH, 0.9 + rows * (0.6 + 0.22 * len(names)))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel, task in zip(panels.flat, tasks, strict=False):
        own = [run for run in runs if run["task"] == task]
        panel.axvline(0, color=MUTED, linewidth=1, linestyle="--")
        for offset, (split, (color, marker)) in zip((0.17, -0.17), COLORS.items(), strict=True):
            found = [against_reference(own, name, split, "nll") for name in names]
            panel.errorbar(
                [one.mean for one in found],
                [len(names) - 1 - place + offset for place in range(len(names))],
                xerr=[0.0 if math.isnan(one.error) else one.error for one in found],
                fmt=marker,
                markersize=5,
                color=color,
                capsize=3,
                label=split,
            )
        panel.set_xscale("symlog", linthresh=LINEAR, linscale=1.5)
        ticks = [-0.5, -0.05, -0.025, 0, 0.025, 0.05, 0.5]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_yticks(range(len(names)), names[::-1])
        seeds = len({run["seed"] for run in own})
        panel.set_title(f"{task} ({seeds} model{'s' * (seeds > 1)})")
    for panel in [*panels.flat][len(tasks) :]:
        panel.set_axis_off()
    for panel in panels[-1]:
        panel.set_xlabel("NLL less that of temperature scaling\n(left is better; logarithmic beyond ±0.05)")
    legend_below(figure, panels.flat)
    return figure


def _means(runs: Sequence[Run], split: str) -> list[str]:
    rows = []
    for name in methods_of(runs):
        found = [mean([*values(runs, name, "scores", split, metric).values()]) for metric in TITLES]
        rows.append([name, *(_with_error(*one) for one in found)])
    return table(["method", *TITLES.values()], rows)


def _differences(runs: Sequence[Run], split: str) -> list[str]:
    rows = []
    for name in methods_of(runs):
        if name != REFERENCE:
            found = [against_reference(runs, name, split, metric) for metric in TITLES]
            rows.append([name, *(_difference(one) for one in found)])
    return table(["method", *TITLES.values()], rows)


def _foreign(runs: Sequence[Run]) -> list[str]:
    rows = []
    for name in methods_of(runs):
        found = [mean([*values(runs, name, "scores", "foreign", score).values()]) for score in FOREIGN]
        rows.append([name, *(_with_error(*one) for one in found)])
    return table(["method", *FOREIGN.values()], rows)


def _cost(runs: Sequence[Run]) -> list[str]:
    rows = []
    for name in methods_of(runs):
        seconds = [mean(_seconds(runs, name, part))[0] for part in SECONDS]
        mib = mean([*values(runs, name, "mib").values()])[0]
        rows.append([name, *(f"{one:.1f}" for one in seconds), "–" if math.isnan(mib) else f"{mib:.0f}"])
    return table(["method", *(f"{part}, s" for part in SECONDS), "MiB"], rows)


def _seconds(runs: Sequence[Run], method: str, part: str) -> list[float]:
    """Nothing where a method has no such part."""
    return [0.0 if math.isnan(one) else one for one in values(runs, method, "seconds", part).values()]


def _with_error(value: float, error: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def _difference(one: Difference) -> str:
    if one.count == 0:
        return "–"
    error = "" if math.isnan(one.error) else f" ± {one.error:.3f}"
    return f"{one.mean:+.3f}{error} ({one.better * one.count:g}/{one.count})"
