"""The roofline: achieved operations per second against operations per byte, under this run's own roofs."""

from __future__ import annotations

import importlib.util

from .report import Report


def draw(report: Report) -> str:
    """Write kernels.png beside the report; returns its name, or why there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed; python -m benchmarks.gpu_report --plot DIR draws it elsewhere"
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    points: dict[str, list[tuple[float, float]]] = {}
    for row in report.rows:
        case = report.cases.get(row.case)
        if row.status == "measured" and case is not None and "matmul_share" in row.values:
            rate = case["flops"] / (row.values["us"] / 1e6)
            points.setdefault(row.provider, []).append((case["flops"] / case["bytes"], rate))
    if not points or not report.roofs:
        return "no plot: nothing was measured"
    bandwidth, most = report.roofs["bytes_per_second"], report.roofs["operations_per_second"]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    intensities = [x for pairs in points.values() for x, _ in pairs]
    low, high = min(intensities) / 2, max(*intensities, most / bandwidth) * 2
    axes.plot([low, most / bandwidth, high], [low * bandwidth, most, most], color="black", label="roofs of this run")
    for number, (provider, pairs) in enumerate(points.items()):
        axes.plot(*zip(*pairs, strict=True), "o^sDvP*X"[number % 8], label=provider, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axes.set_title(f"Kernels on {report.environment.get('device', 'an unknown device')}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize="small")
    path = report.folder / "kernels.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path.name
