"""A table and a picture of the sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bayesian_lora_kernels.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    SKY,
    VERMILION,
    WIDTH,
    legend_below,
    new_figure,
    styled,
)

from ..calibration.tables import paired, table
from .points import CORRECTED, EXACT, LABELS, OWN, THERE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "trace / exact": "Trace of the curvature over the exact one",
    "prior precision": "Prior precision",
    "variance": "Variance of a logit",
    "accuracy": "ACC",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
}
DIGITS = {"trace / exact": 2, "prior precision": 2, "variance": 2}
STYLES = {  # of a method: colour, marker, line
    "MAP": (BLACK, "x", ":"),
    "temperature scaling": (MUTED, "+", ":"),
    OWN: (ORANGE, "D", "None"),
    THERE: (VERMILION, "s", "-"),
    CORRECTED: (SKY, "^", "-"),
    EXACT: (BLUE, "o", "-"),
    LABELS: (GREEN, "v", "--"),
}
PANELS = (
    ("trace / exact", "trace / exact one"),
    ("prior precision", "prior precision"),
    ("nll", "NLL on the test set"),
)
Found = Mapping[str, Any]


def statistic(points: Sequence[Found], tokens: int, columns: int, method: str, name: str) -> tuple[float, float]:
    """Mean over models and its standard error; NaN where nothing is known."""
    rows = [one["methods"].get(method, {}) for one in points if (one["tokens"], one["columns"]) == (tokens, columns)]
    values = [row[name] for row in rows if name in row]
    found = paired(values, [0.0] * len(values), higher_is_better=False)
    return found.mean, found.error


def places(points: Sequence[Found]) -> list[tuple[int, int]]:
    """`(tokens, columns)` that were measured: without padding first."""
    there = {(one["tokens"], one["columns"]) for one in points}
    return sorted(there, key=lambda place: (place[0] != place[1], place))


def methods(points: Sequence[Found]) -> list[str]:
    return [name for name in STYLES if any(name in one["methods"] for one in points)]


def as_markdown(points: Sequence[Found]) -> str:
    lines = [
        "# Length of the prompt, padding, and the scale of the curvature",
        "",
        f"Written by `python -m benchmarks.bayes_adapt --out FOLDER`; means of "
        f"{len({one['seed'] for one in points})} models ± standard error. What was done is in docs/bayes-adapt.md.",
    ]
    where = places(points)
    head = [str(tokens) if tokens == columns else f"{tokens} in {columns}" for tokens, columns in where]
    for name, title in COLUMNS.items():
        rows = []
        for method in methods(points):
            found = [statistic(points, *place, method, name) for place in where]
            if not all(math.isnan(mean) for mean, _ in found):
                rows.append([method, *(_number(*one, DIGITS.get(name, 3)) for one in found)])
        lines += ["", f"## {title}", "", *table(["tokens, in columns of a batch if there is padding", *head], rows)]
    return "\n".join(lines) + "\n"


@styled()
def draw(points: Sequence[Found]) -> Figure:
    """Scale, prior and NLL against the length of the prompt (above) and against padding (below)."""
    from matplotlib.ticker import LogLocator

    figure = new_figure(WIDTH, 5.6)
    panels = figure.subplots(2, len(PANELS), squeeze=False)
    plain = [place for place in places(points) if place[0] == place[1]]
    wide = [place for place in places(points) if any(place[0] == one[0] != one[1] for one in places(points))]
    rows = ((plain, "tokens of a prompt"), (wide, "columns of a batch"))
    for across, (where, label) in zip(panels, rows, strict=True):
        for panel, (name, title) in zip(across, PANELS, strict=True):
            for method in methods(points):
                color, marker, line = STYLES[method]
                found = [statistic(points, *place, method, name) for place in where]
                if any(not math.isnan(mean) for mean, _ in found):
                    panel.errorbar(
                        [columns for _, columns in where],
                        [mean for mean, _ in found],
                        yerr=[0.0 if math.isnan(error) else error for _, error in found],
                        color=color,
                        marker=marker,
                        linestyle=line,
                        markersize=9 if method == OWN else 5,
                        fillstyle="none" if method == OWN else "full",
                        capsize=2,
                        label=method,
                    )
            panel.set_xscale("log", base=2)
            panel.set_xticks([columns for _, columns in where], [str(columns) for _, columns in where])
            if name != "nll":
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
            panel.set_title(title)
            panel.set_xlabel(label)
    legend_below(figure, panels.flat)
    return figure


def _number(mean: float, error: float, digits: int) -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
