"""How good probabilities are: confidence against accuracy, and what is wrong among the surest answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration.checks import DEFAULT_BINS
from bayesian_lora_kernels.calibration.reliability import ReliabilityBins, reliability_bins
from bayesian_lora_kernels.calibration.selective import risk_coverage
from bayesian_lora_kernels.plots.style import (
    BLUE,
    COLORS,
    DASHES,
    MUTED,
    NORMAL,
    PALE_BLUE,
    PALE_VERMILION,
    WIDTH,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

MOST_COLUMNS = 4  # panels side by side
PANEL = 2.4  # inches of one, if there is room
PARTS = {"accuracy": BLUE, "overconfident by": PALE_VERMILION, "underconfident by": PALE_BLUE}
FEW, HATCH = 10, "/////"  # bins of fewer examples are hatched: their accuracy says little
LEAST_COVERAGE = 0.05  # curves set the height of a risk-coverage panel from here on: few answers give wild shares


@styled()
def reliability_diagram(
    probs: Mapping[str, Tensor], labels: Tensor, *, bins: int = DEFAULT_BINS, title: str | None = None
) -> Figure:
    """A panel for each method: accuracy against confidence, and beneath how many examples have that confidence.

    Where a bar of accuracy ends below the mean confidence of its bin, the rest is drawn as overconfidence; where it
    goes above, that part is underconfidence. Bins of fewer than 10 examples are hatched.

    Args:
        probs: `{method: [N, C]}`, class probabilities.
        labels: `[N]`, class indices, the same for every method.
        bins: how many bins of equal width divide [0, 1].
        title: above all panels.

    Raises:
        TypeError, ValueError: for arguments other than those.
        ImportError: without matplotlib.
    """
    rows, columns = _grid(probs)
    figure = new_figure(_width(columns), 2.9 * rows + 0.5 + 0.3 * (title is not None))
    draw_reliability(figure, probs, labels, bins=bins, title=title)
    figure.legend(handles=_key(), loc="outside lower center", ncols=len(_key()) if columns > 2 else 3)
    return figure


@styled()
def reliability_diagrams(
    data: Mapping[str, tuple[Mapping[str, Tensor], Tensor]], *, bins: int = DEFAULT_BINS
) -> Figure:
    """The same for several data sets, one beneath the other.

    Args:
        data: `{title: (probs, labels)}`, as for `reliability_diagram`.
        bins: how many bins of equal width divide [0, 1].

    Raises:
        TypeError, ValueError: for arguments other than those.
        ImportError: without matplotlib.
    """
    if not data:
        raise ValueError("data: expected at least one row, got none")
    grids = [_grid(probs) for probs, _ in data.values()]
    heights, columns = [2.9 * rows + 0.3 for rows, _ in grids], max(columns for _, columns in grids)
    key = 0.35 if columns > 2 else 0.55
    figure = new_figure(_width(columns), sum(heights) + key)
    *parts, last = figure.subfigures(len(data) + 1, 1, squeeze=False, height_ratios=[*heights, key])[:, 0]
    for part, (title, (probs, labels)) in zip(parts, data.items(), strict=True):
        draw_reliability(part, probs, labels, bins=bins, title=title)
    last.legend(handles=_key(), loc="center", ncols=len(_key()) if columns > 2 else 3)
    return figure


@styled()
def draw_reliability(
    figure: FigureBase,
    probs: Mapping[str, Tensor],
    labels: Tensor,
    *,
    bins: int = DEFAULT_BINS,
    title: str | None = None,
) -> None:
    """Draw the panels of `reliability_diagram`, without its legend, into a figure or subfigure of matplotlib.

    Args:
        figure: takes the panels; best with `layout="constrained"`.
        probs: `{method: [N, C]}`, class probabilities.
        labels: `[N]`, class indices.
        bins: how many bins of equal width divide [0, 1].
        title: above all panels.

    Raises:
        TypeError, ValueError: for arguments other than those.
        ImportError: without matplotlib.
    """
    rows, columns = _grid(probs)
    binned = {name: reliability_bins(values, labels, bins) for name, values in probs.items()}
    axes = figure.subplots(2 * rows, columns, squeeze=False, sharex=True, sharey="row", height_ratios=[2.7, 1] * rows)
    most = max(float(one.count.max()) for one in binned.values())
    for i, (name, one) in enumerate(binned.items()):
        upper, lower = axes[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        _draw_accuracy(upper, one)
        _draw_counts(lower, one, most)
        upper.set_title(f"{name}\nECE {one.error:.3f}", fontsize=NORMAL)
        lower.set_xlabel("confidence")
        lower.tick_params(labelbottom=True)
    for i in range(len(binned), rows * columns):
        for unused in axes[-2:, i % columns]:
            unused.set_axis_off()
    for upper, lower in axes[:, 0].reshape(rows, 2):
        upper.set_ylabel("accuracy")
        lower.set_ylabel("examples")
    figure.align_ylabels(axes[:, 0])
    if title is not None:
        figure.suptitle(title)


@styled()
def risk_coverage_diagram(probs: Mapping[str, Tensor], labels: Tensor, *, title: str | None = None) -> Figure:
    """The share of wrong answers among those that a method is surest of: one panel, one curve for each method.

    The legend has the area under each curve. The panel is as high as the curves are from a coverage of 0.05 on; what
    goes higher to the left of that, where a share is of a few answers, is cut off.

    Args:
        probs: `{method: [N, C]}`, class probabilities.
        labels: `[N]`, class indices, the same for every method.
        title: above the panel.

    Raises:
        TypeError, ValueError: for arguments other than those.
        ImportError: without matplotlib.
    """
    _grid(probs)
    curves = {name: risk_coverage(values, labels) for name, values in probs.items()}
    figure = new_figure(6.4, 3.4)
    axes = figure.subplots()
    highest = max(float(curve.risk[curve.coverage >= LEAST_COVERAGE].max()) for curve in curves.values())
    for i, (name, curve) in enumerate(curves.items()):
        axes.plot(
            curve.coverage.numpy(),
            curve.risk.numpy(),
            color=COLORS[i % len(COLORS)],
            linestyle=DASHES[i % len(DASHES)],
            label=f"{name}\nAURC {curve.area:.3f}",
        )
    axes.set_xlim(0, 1)
    top = 1.05 * highest if highest > 0 else 1.0
    axes.set_ylim(-0.02 * top, top)  # a risk of zero is seen above the axis
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlabel("coverage: share of examples answered, the surest first")
    axes.set_ylabel("risk: share of wrong answers")
    # Beside the panel, where no curve can run through it.
    figure.legend(loc="outside right upper", handlelength=2.6, labelspacing=0.9)
    if title is not None:
        axes.set_title(title, fontweight="bold")
    return figure


def _grid(probs: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of panels."""
    if not probs:
        raise ValueError("probs: expected at least one method, got none")
    rows = math.ceil(len(probs) / MOST_COLUMNS)
    return rows, math.ceil(len(probs) / rows)


def _width(columns: int) -> float:
    return min(max(PANEL * columns + 0.6, 4.2), WIDTH)


def _key() -> list[Any]:
    """What the legend of reliability diagrams names."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        *(Patch(color=color, label=name) for color, name in zip(PARTS.values(), PARTS, strict=True)),
        Patch(facecolor="white", edgecolor=MUTED, hatch=HATCH, label=f"fewer than {FEW} examples"),
        Line2D([], [], linestyle="--", linewidth=1, color=MUTED, label="perfect"),
    ]


def _draw_accuracy(axes: Any, one: ReliabilityBins) -> None:
    """Bars of accuracy at the bins' places, and the gap to the mean confidence of each."""
    full = one.count > 0
    left, width = one.edges[:-1][full].tolist(), one.edges.diff()[full].tolist()
    common = torch.minimum(one.accuracy, one.confidence)
    parts = (
        (torch.zeros_like(common), common),
        (common, one.confidence - common),
        (common, one.accuracy - common),
    )
    for (bottom, height), color in zip(parts, PARTS.values(), strict=True):
        heights, bottoms = height[full].tolist(), bottom[full].tolist()
        bars = axes.bar(left, heights, width, bottoms, align="edge", color=color, edgecolor="white", linewidth=0.6)
        for bar, count in zip(bars, one.count[full].tolist(), strict=True):
            if count < FEW:
                bar.set(facecolor="white", edgecolor=color, hatch=HATCH)
    axes.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color=MUTED)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])


def _draw_counts(axes: Any, one: ReliabilityBins, most: float) -> None:
    from matplotlib.ticker import MaxNLocator

    left, width = one.edges[:-1].tolist(), one.edges.diff().tolist()
    axes.bar(left, one.count.tolist(), width, align="edge", color=MUTED, edgecolor="white", linewidth=0.6)
    axes.set_ylim(0, 1.08 * most)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
