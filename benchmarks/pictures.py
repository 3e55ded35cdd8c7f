"""The docs' pictures that come from committed results: `make pictures`, or `python -m benchmarks.pictures`.

Speed and memory, the kernels' estimated and measured times, the soak, the two studies of calibration, BayesAdapt's
Laplace. The same results make the same files. A GPU's measurements are taken where `benchmarks.gpu_report` left them:
results/*/kernels.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bayesian_lora_kernels.plots.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    PALE_BLUE,
    SMALL,
    VERMILION,
    WIDTH,
    legend_below,
    new_figure,
    save_figure,
    styled,
)

from . import soak
from .bayes_adapt import report as bayes_adapt
from .calibration.labels import report as labels
from .calibration.methods import report as methods
from .calibration.methods.runs import Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CPU = RESULTS / "cpu-2026-11"
OTHERS = ("bayesian_lora:", "laplace-lora:")
PLAIN = "training step"
NAMES = {"the same by this package": "bayesian_lora's interface here: predict"}
OURS = ("triton", "native")  # providers of gpu_report
ERROR = 0.3  # of an estimate


@styled()
def speed_and_memory(content: Mapping[str, Any]) -> Figure:
    """Median seconds and peak memory of one batch, from the JSON of `benchmarks.smollm2`."""
    results = dict(sorted(content["results"].items(), key=lambda one: (one[0] != PLAIN, "fit" not in one[0])))
    places = list(range(len(results)))
    colors = [MUTED if n == PLAIN else VERMILION if n.startswith(OTHERS) else BLUE for n in results]
    seconds = [median(one["seconds"]) for one in results.values()]
    mib = [one["peak_bytes"] / 2**20 for one in results.values()]
    figure = new_figure(WIDTH, 0.28 * len(results) + 1.1)
    left, right = figure.subplots(1, 2, sharey=True)
    low, high = ([pick(one["seconds"]) for one in results.values()] for pick in (min, max))
    for axes, values, ends, form in ((left, seconds, high, "{:.2f} s"), (right, mib, mib, "{:,.0f} MiB")):
        axes.barh(places, values, 0.72, color=colors)
        axes.axvline(values[list(results).index(PLAIN)], color=INK, linewidth=0.8, linestyle=":")
        for place, value, end in zip(places, values, ends, strict=True):
            text = axes.annotate(form.format(value), (end, place), (3, 0), textcoords="offset points", va="center")
            text.set(fontsize=SMALL, bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5})
        axes.set_xlim(0, 1.3 * max(values))
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    left.hlines(places, low, high, color=INK, linewidth=1)
    left.set_yticks(places, [NAMES.get(name, name) for name in results])
    left.invert_yaxis()
    left.tick_params(axis="y", length=0)
    left.set_xlabel("median seconds of a batch; line: all rounds")
    right.set_xlabel("peak memory beyond model and data, MiB")
    for color, name in ((BLUE, "this package"), (VERMILION, "other packages"), (MUTED, "a training step")):
        left.barh([0], [0], color=color, label=name)
    legend_below(figure, [left])
    return figure


@styled()
def kernel_times(estimated: Mapping[str, Any], measured: Mapping[str, float], gpu: str) -> Figure:
    """Microseconds of one call of every case: floor, target, estimate, and what was measured, as far as it was.

    Args:
        estimated: `cases` of the JSON of `benchmarks.roofline`.
        measured: `{case: microseconds}` on that GPU; cases that are not in it have no mark.
        gpu: its name there. Floors and targets are of the H100, and left out for others.
    """
    cases = sorted((name for name in estimated if gpu in estimated[name]), key=lambda name: estimated[name][gpu]["us"])
    places = list(range(len(cases)))
    figure = new_figure(WIDTH, 0.36 * len(cases) + 1.2)
    axes = figure.subplots()
    times = [estimated[name][gpu]["us"] for name in cases]
    axes.barh(
        places,
        [2 * ERROR * time for time in times],
        0.5,
        [(1 - ERROR) * time for time in times],
        color=PALE_BLUE,
        label=f"estimate, ± {ERROR:.0%}",
    )
    axes.plot(times, places, "o", color=BLUE, markerfacecolor="white", label="estimate")
    if gpu == "H100":
        floors = [estimated[name]["floor_us"] for name in cases]
        axes.plot(floors, places, "|", color=INK, markersize=11, markeredgewidth=1.4, label="floor: memory, arithmetic")
        targets = {i: t for i, name in enumerate(cases) if (t := estimated[name]["target_us"]) is not None}
        axes.plot(list(targets.values()), list(targets), "D", color=GREEN, markersize=4, label="target")
    found = {i: measured[name] for i, name in enumerate(cases) if name in measured}
    if found:
        axes.plot(list(found.values()), list(found), "s", color=VERMILION, label="measured")
    said = f"{len(found)} of {len(cases)} cases measured" if found else "nothing measured yet"
    axes.set_title(f"{gpu}: estimated without one; {said}")
    axes.set_yticks(places, [name.replace(" ", "\n", 1) for name in cases])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set(xscale="log", xlabel="time of one call, microseconds")
    axes.grid(axis="x")
    legend_below(figure, [axes], 5)
    return figure


def measured_times(gpu: str) -> dict[str, float]:
    """`{case: microseconds}` of the package's own providers, from the newest results of such a GPU."""
    for path in sorted(RESULTS.glob("*/kernels.json"), reverse=True):
        content = json.loads(path.read_text(encoding="utf-8"))
        if gpu in str(content["environment"].get("device", "")):
            return {
                row["case"]: row["values"]["us"]
                for row in content["rows"]
                if row["status"] == "measured" and row["provider"] in OURS
            }
    return {}


def main() -> None:
    def read(name: str) -> Any:
        return json.loads((CPU / name).read_text(encoding="utf-8"))

    docs = ROOT / "docs"
    save_figure(speed_and_memory(read("smollm2.json")), docs / "speed-and-memory.svg")
    estimated = json.loads((RESULTS / "roofline.json").read_text(encoding="utf-8"))["cases"]
    save_figure(kernel_times(estimated, measured_times("H100"), "H100"), docs / "kernel-times.svg")
    save_figure(soak.draw(read("soak.json")["readings"]), docs / "soak.svg")
    save_figure(labels.draw(read("calibration-study-exact.json")), docs / "calibration-study.svg")
    save_figure(methods.draw(Runs(CPU / "calibration-methods.jsonl").all), docs / "calibration-methods.svg")
    save_figure(bayes_adapt.draw(read("bayes-adapt.json")["points"]), docs / "bayes-adapt.svg")


if __name__ == "__main__":
    main()
