"""A posterior as a picture: the spectrum of its curvature, what the data determine in each layer, and the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration.plots import DASHES, INK, LINES, MUTED, empty_figure, save_figure, tidy
from bayesian_lora_kernels.posterior.curvature import Curvature

MOST_LINES = len(LINES)
POINTS = 2000  # of a spectrum
ZERO = 1e-12  # of the largest eigenvalue: what rounding leaves


def draw(curvature: Curvature, result: Mapping[str, Any], path: Path) -> None:
    """Up to three panels, in the format that the suffix says.

    Args:
        curvature: of the posterior.
        result: what `blk inspect` writes as JSON.
        path: of the picture.

    Raises:
        OSError: if it cannot be written.
    """
    independent, evidence = curvature.independent_layers, result["evidence"]
    panels = 1 + independent + (evidence is not None)
    figure = empty_figure(4.2 * panels, 3.6)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    groups = {"all modules": list(curvature.shapes)}
    if independent:
        most = sorted(result["kinds"], key=lambda one: -one["effective_parameters"])[:MOST_LINES]
        groups = {
            kind: names for kind, names in kinds(list(curvature.shapes)).items() if kind in {x["kind"] for x in most}
        }
    _spectra(axes.pop(0), curvature, groups, list(result["prior_precision"].values()))
    if independent:
        _determined(axes.pop(0), groups, {one["name"]: one["effective_parameters"] for one in result["layers"]})
    if evidence is not None:
        _evidence(axes.pop(0), evidence, list(result["prior_precision"].values()))
    handles = {
        label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if len(result["kinds"]) > len(groups) > 1:
        figure.suptitle(
            f"the {len(groups)} of {len(result['kinds'])} kinds of modules that the data determine most", fontsize=9
        )
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    save_figure(figure, path)


def kinds(names: Sequence[str]) -> dict[str, list[str]]:
    """Layers that play the same part in different blocks: `{q_proj.lora_A: [...], ...}`."""
    parts = [name.split(".") for name in names]
    if len({part[-1] for part in parts}) == 1 and all(len(part) > 1 for part in parts):  # the adapter's name
        parts = [part[:-1] for part in parts]
    found: dict[str, list[str]] = {}
    for name, part in zip(names, parts, strict=True):
        last = max((i for i, one in enumerate(part) if one.isdecimal()), default=-1)
        found.setdefault(".".join(part[last + 1 :][-2:]) or "layers", []).append(name)
    return found


def _spectra(axes: Any, curvature: Curvature, groups: Mapping[str, Sequence[str]], precisions: Sequence[float]) -> None:
    for i, (kind, names) in enumerate(groups.items()):
        values, counts = (x.cpu() for x in curvature.spectrum(names if curvature.independent_layers else None))
        rank, value = spectrum_line(values, counts)
        axes.plot(rank, value, color=LINES[i], linestyle=DASHES[i % len(DASHES)], linewidth=1.6, label=kind)
    axes.axhspan(min(precisions), max(precisions), color=MUTED, alpha=0.3, linewidth=0)
    axes.axhline(max(precisions), color=MUTED, linewidth=1, label="prior precision")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("eigenvalues, the largest first", fontsize=9)
    axes.set_title("curvature", fontsize=10, color=INK)
    tidy(axes)


def spectrum_line(values: Tensor, counts: Tensor) -> tuple[list[float], list[float]]:
    """A spectrum with multiplicities as a line: from the first place of each to its last, without what is zero."""
    order = values.argsort(descending=True)
    values, counts = values[order], counts[order]
    some = (values > ZERO * values[0]) & (counts > 0)
    values, last = values[some], counts[some].cumsum(0)
    first = last - counts[some] + 1
    if len(values) > POINTS:
        keep = torch.logspace(0, torch.log10(torch.tensor(float(len(values)))).item(), POINTS).long().unique() - 1
        values, first, last = values[keep], first[keep], last[keep]
    return torch.stack([first, last], 1).flatten().tolist(), values.repeat_interleave(2).tolist()


def _determined(axes: Any, groups: Mapping[str, Sequence[str]], effective: Mapping[str, float]) -> None:
    for i, (kind, names) in enumerate(groups.items()):
        places = list(range(len(names)))
        style = {"linestyle": DASHES[i % len(DASHES)], "marker": "o", "markersize": 3}
        axes.plot(places, [effective[name] for name in names], color=LINES[i], label=kind, **style)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block", fontsize=9)
    axes.set_title("parameters that the data determine", fontsize=10, color=INK)
    tidy(axes)


def _evidence(axes: Any, evidence: Mapping[str, Any], precisions: Sequence[float]) -> None:
    axes.plot(evidence["prior_precision"], evidence["log_evidence"], color=INK, linewidth=1.6)
    axes.plot(evidence["best_prior_precision"], evidence["best"], "o", color=LINES[1], markersize=5)
    if min(precisions) == max(precisions):
        axes.axvline(precisions[0], color=MUTED, linewidth=1)
    best, height = evidence["best"], evidence["best"] - evidence["log_evidence"][0]
    axes.set_ylim(
        max(best - 1.5 * height, min(evidence["log_evidence"])), best + 0.1 * height
    )  # on the right it falls without end
    axes.set_xscale("log")
    axes.set_xlabel("prior precision", fontsize=9)
    axes.set_title("log evidence, with its maximum", fontsize=10, color=INK)
    tidy(axes)
