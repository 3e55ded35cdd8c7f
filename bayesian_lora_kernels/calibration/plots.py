"""Reliability and risk-coverage diagrams. matplotlib is imported when one is drawn; its global state stays as it is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration.checks import DEFAULT_BINS
from bayesian_lora_kernels.calibration.reliability import ReliabilityBins, reliability_bins
from bayesian_lora_kernels.calibration.selective import risk_coverage

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

BAR, OVER, UNDER, INK, MUTED = "#4C78A8", "#F2A18B", "#A9C6E3", "#222222", "#888888"
# Okabe, Ito 2008, "Color universal design", darkest first and without yellow; dashes tell them apart in grey.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", (0, (6, 1.5)), (0, (2.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)))
LEAST_COVERAGE = 0.05  # curves set the height of a risk-coverage panel from here on: few answers give wild shares


def reliability_diagram(
    probs: Mapping[str, Tensor], labels: Tensor, *, bins: int = DEFAULT_BINS, title: str | None = None
) -> Figure:
    """One panel for each method, side by side: accuracy against confidence, and beneath how many examples there are.

    Args:
        probs: `{method: [N, C]}`, class probabilities.
        labels: `[N]`, class indices, the same for every method.
        bins: how many bins of equal width divide [0, 1].
        title: above all panels.

    Raises:
        TypeError, ValueError: for arguments other than those.
        ImportError: without matplotlib.
    """
    figure = _new_figure(columns=len(probs), rows=1)
    draw_reliability(figure, probs, labels, bins=bins, title=title)
    return figure


def reliability_diagrams(
    data: Mapping[str, tuple[Mapping[str, Tensor], Tensor]], *, bins: int = DEFAULT_BINS
) -> Figure:
    """The same for several data sets, one row for each.

    Args:
        data: `{title of the row: (probs, labels)}`, as for `reliability_diagram`.
        bins: how many bins of equal width divide [0, 1].

    Raises:
        TypeError, ValueError: for arguments other than those.
        ImportError: without matplotlib.
    """
    if not data:
        raise ValueError("data: expected at least one row, got none")
    figure = _new_figure(columns=max(len(probs) for probs, _ in data.values()), rows=len(data))
    rows = figure.subfigures(len(data), 1, squeeze=False)[:, 0]
    for row, (title, (probs, labels)) in zip(rows, data.items(), strict=True):
        draw_reliability(row, probs, labels, bins=bins, title=title)
    return figure


def draw_reliability(
    figure: FigureBase,
    probs: Mapping[str, Tensor],
    labels: Tensor,
    *,
    bins: int = DEFAULT_BINS,
    title: str | None = None,
) -> None:
    """Draw what `reliability_diagram` shows into a figure or subfigure of matplotlib.

    Args:
        figure: takes the panels; best with `layout="constrained"`.
        probs: `{method: [N, C]}`, class probabilities.
        labels: `[N]`, class indices.
        bins: how many bins of equal width divide [0, 1].
        title: above all panels.

    Raises:
        TypeError, ValueError: for arguments other than those.
    """
    if not probs:
        raise ValueError("probs: expected at least one method, got none")
    binned = {name: reliability_bins(values, labels, bins) for name, values in probs.items()}
    axes = figure.subplots(2, len(binned), squeeze=False, sharex=True, sharey="row", height_ratios=[3.2, 1])
    most = max(float(one.count.max()) for one in binned.values())
    for column, (name, one) in enumerate(binned.items()):
        _draw_accuracy(axes[0, column], one)
        _draw_counts(axes[1, column], one, most)
        axes[0, column].set_title(f"{name}\nECE {one.error:.3f}", fontsize=10, color=INK)
        axes[1, column].set_xlabel("confidence", fontsize=9)
    axes[0, 0].set_ylabel("accuracy", fontsize=9)
    axes[1, 0].set_ylabel("examples", fontsize=9)
    handles, names = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].legend(
        handles, names, loc="upper left", fontsize=7.5, framealpha=0.8, edgecolor="none", handlelength=1.2
    )
    figure.align_ylabels(axes[:, 0])
    if title is not None:
        figure.suptitle(title, fontsize=11, fontweight="bold", color=INK)


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
    if not probs:
        raise ValueError("probs: expected at least one method, got none")
    curves = {name: risk_coverage(values, labels) for name, values in probs.items()}
    figure = empty_figure(6.4, 3.6)
    axes = figure.subplots()
    highest = max(float(curve.risk[curve.coverage >= LEAST_COVERAGE].max()) for curve in curves.values())
    for i, (name, curve) in enumerate(curves.items()):
        axes.plot(
            curve.coverage.numpy(),
            curve.risk.numpy(),
            color=LINES[i % len(LINES)],
            linestyle=DASHES[i % len(DASHES)],
            linewidth=1.6,
            label=f"{name}\nAURC {curve.area:.3f}",
        )
    axes.set_xlim(0, 1)
    top = 1.05 * highest if highest > 0 else 1.0
    axes.set_ylim(-0.02 * top, top)  # a risk of zero is seen above the axis
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlabel("coverage: share of examples answered, the surest first", fontsize=9)
    axes.set_ylabel("risk: share of wrong answers", fontsize=9)
    tidy(axes)
    # Beside the panel, where no curve can run through it.
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=2.6, labelspacing=0.9)
    if title is not None:
        axes.set_title(title, fontsize=11, fontweight="bold", color=INK)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure, whole or not at all; the suffix of `path` says which format.

    Raises:
        ValueError: for a suffix that matplotlib does not know.
        OSError: if the folder cannot be written to.
    """
    path = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    suffix = path.suffix[1:].lower()
    if suffix not in formats:
        raise ValueError(f"{path}: expected a suffix among {', '.join(sorted(formats))}, got {path.suffix!r}")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format=suffix, dpi=dpi)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are its owner's alone
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _new_figure(columns: int, rows: int) -> Figure:
    return empty_figure(max(2.4 * columns + 0.6, 3.2), 3.9 * rows)


def empty_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("diagrams need matplotlib: pip install matplotlib") from error
    # A Figure of its own, not pyplot's: no window, no backend chosen, nothing kept alive.
    return Figure(figsize=(width, height), layout="constrained")


def _draw_accuracy(axes: Any, one: ReliabilityBins) -> None:
    """Bars of accuracy at the bins' places, and the gap to the mean confidence of each."""
    full = one.count > 0
    left, width = one.edges[:-1][full].numpy(), one.edges.diff()[full].numpy()
    right_share, sure = one.accuracy[full].numpy(), one.confidence[full].numpy()
    common = torch.minimum(one.accuracy, one.confidence)[full].numpy()
    axes.bar(left, common, width, align="edge", color=BAR, edgecolor="white", linewidth=0.6, label="accuracy")
    for above, color, name in (
        (sure - common, OVER, "overconfident by"),
        (right_share - common, UNDER, "underconfident by"),
    ):
        axes.bar(
            left, above, width, bottom=common, align="edge", color=color, edgecolor="white", linewidth=0.6, label=name
        )
    axes.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color=MUTED, label="perfect")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    tidy(axes)


def _draw_counts(axes: Any, one: ReliabilityBins, most: float) -> None:
    left, width = one.edges[:-1].numpy(), one.edges.diff().numpy()
    axes.bar(left, one.count.numpy(), width, align="edge", color=MUTED, edgecolor="white", linewidth=0.6)
    axes.set_ylim(0, 1.08 * most)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    tidy(axes)


def tidy(axes: Any) -> None:
    """Axes as all pictures here have them."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(labelsize=8, color=MUTED)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
