"""One number against another, for several methods: learning curves and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from bayesian_lora_kernels.plots.style import COLORS, DASHES, MARKERS, legend_below, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled()
def curve_diagram(
    x: Sequence[float],
    curves: Mapping[str, Tensor],
    *,
    x_label: str,
    y_label: str,
    errors: Mapping[str, Tensor] | None = None,
    title: str | None = None,
) -> Figure:
    """A curve for each method, with a mark at every number, and bars of its error if it has one.

    Args:
        x: `m` numbers.
        curves: `{method: [m]}`.
        x_label: what x is, with its unit.
        y_label: what the curves are, with their unit.
        errors: `{method: [m]}`, such as standard errors, of some methods or all.
        title: above the panel.

    Raises:
        ValueError: for curves or errors of another length, or errors of a method without a curve.
        ImportError: without matplotlib.
    """
    errors = errors or {}
    if unknown := errors.keys() - curves.keys():
        raise ValueError(f"errors: expected methods of {list(curves)}, got {sorted(unknown)}")
    for name, values in [*curves.items(), *errors.items()]:
        if list(values.shape) != [len(x)]:
            raise ValueError(f"{name}: expected [{len(x)}] numbers, as x has, got {list(values.shape)}")
    figure = new_figure(5.6, 3.4)
    axes = figure.subplots()
    for i, (name, values) in enumerate(curves.items()):
        axes.errorbar(
            list(x),
            values.tolist(),
            errors[name].tolist() if name in errors else None,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=DASHES[i % len(DASHES)],
            capsize=3,
            label=name,
        )
    axes.set(xticks=list(x), xlabel=x_label, ylabel=y_label)
    if title is not None:
        axes.set_title(title)
    legend_below(figure, [axes])
    return figure
