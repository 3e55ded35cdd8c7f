"""The roofline: achieved operations per second against operations per byte, under this run's own roofs."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from bayesian_lora_kernels.plots.style import COLORS, INK, MARKERS, WIDTH, legend_below, new_figure, save_figure, styled

from .report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "kernels.png"


def draw(report: Report) -> str:
    """Write kernels.png beside the report; returns its name, or why there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed; python -m benchmarks.gpu_report --plot DIR draws it elsewhere"
    figure = roofline(report)
    if figure is None:
        return "no plot: nothing was measured"
    save_figure(figure, report.folder / NAME)
    return NAME


@styled()
def roofline(report: Report) -> Figure | None:
    """A mark for each measured case of each provider; None without any."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in report.rows:
        case = report.cases.get(row.case)
        if row.status == "measured" and case is not None and "matmul_share" in row.values:
            rate = case["flops"] / (row.values["us"] / 1e6)
            points.setdefault(row.provider, []).append((case["flops"] / case["bytes"], rate))
    if not points or not report.roofs:
        return None
    bandwidth, most = report.roofs["bytes_per_second"], report.roofs["operations_per_second"]
    figure = new_figure(WIDTH, 5)
    axes = figure.subplots()
    intensities = [x for pairs in points.values() for x, _ in pairs]
    low, high = min(*intensities, most / bandwidth) / 2, max(*intensities, most / bandwidth) * 2
    axes.plot([low, most / bandwidth, high], [low * bandwidth, most, most], color=INK, label="roofs of this run")
    for i, (provider, pairs) in enumerate(points.items()):
        style = {"marker": MARKERS[i % len(MARKERS)], "color": COLORS[i % len(COLORS)], "alpha": 0.8}
        axes.plot(*zip(*pairs, strict=True), linestyle="none", label=provider, **style)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axes.set_title(f"kernels on {report.environment.get('device', 'an unknown device')}")
    legend_below(figure, [axes], 5)
    return figure
