"""`blk inspect`: what is in a posterior that `blk fit` wrote. The model is not needed, and not loaded."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.errors import as_input_errors, writing
from bayesian_lora_kernels.commands.job import check_fitted
from bayesian_lora_kernels.commands.parts import Facts, Part, Table
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature import CURVATURES
from bayesian_lora_kernels.model.names import place
from bayesian_lora_kernels.plots import posterior_diagram, save_figure
from bayesian_lora_kernels.posterior import storage
from bayesian_lora_kernels.posterior.curvature import Curvature
from bayesian_lora_kernels.posterior.evidence import effective_parameters, log_evidence, maximise_evidence
from bayesian_lora_kernels.posterior.noise import Residuals
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.posterior.prior import Prior
from bayesian_lora_kernels.posterior.stored import Stored

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVE = (-3.0, 1.5, 46)  # powers of ten about the best precision, and how many points
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Opened:
    """A posterior as its files have it.

    Attributes:
        curvature: of the data.
        prior: under which it was saved.
        square_norms: of the weights of each layer; None in files of old.
        content: the JSON.
    """

    curvature: Curvature
    prior: Prior
    square_norms: Mapping[str, Tensor] | None
    content: Mapping[str, Any]

    @property
    def posterior(self) -> Posterior:
        """Of the weights."""
        return Posterior(self.curvature, self.prior, self.noise_variance)

    @property
    def noise_variance(self) -> float:
        """Of a regression; 1 for all else."""
        return (self.content.get("noise") or {"variance": 1.0})["variance"]

    @property
    def log_likelihood(self) -> float | None:
        """Of the labels; None without labels."""
        at_unit_noise = self.content["log_likelihood"]
        if at_unit_noise is None or self.noise_variance == 1:
            return at_unit_noise
        residuals = Residuals.of(at_unit_noise, self.content["noise"]["targets"])
        return float(residuals.log_likelihood(torch.tensor(self.noise_variance, dtype=torch.float64)))


def run(args: Namespace) -> int:
    """Read, count, print, draw, write.

    Raises:
        InputError: for whatever the user has to put right.
    """
    opened = open_posterior(args.folder)
    content, counts = opened.content, opened.curvature.n_parameters
    effective = effective_parameters(opened.posterior)
    result = {
        "command": "inspect",
        "posterior": str(args.folder),
        "format_version": content["version"],
        **content["settings"],
        "n_examples": content["n_examples"],
        "n_modules": len(counts),
        "n_parameters": sum(counts.values()),
        "effective_parameters": sum(effective.values()),
        "log_likelihood": opened.log_likelihood,
        "prior_precision": content["prior_precision"],
        "calibrated": content.get("calibration") is not None,
        "evidence": _evidence(opened),
        "kinds": [_kind(opened, kind, names, effective) for kind, names in kinds(counts).items()],
        "layers": [
            {"name": name, "shape": list(shape), "effective_parameters": effective.get(name)}
            for name, shape in opened.curvature.shapes.items()
        ],
    }
    output.write_json(args.json, result)
    if args.plot is not None:
        with writing(args.plot, "--plot"):
            save_figure(_picture(opened, result["evidence"]), args.plot)
    drawn = [] if args.plot is None else ["", f"spectra, layers and evidence drawn in {args.plot}"]
    output.show(args, *_report(result), *drawn)
    return 0


def open_posterior(folder: Path) -> Opened:
    """What `save_pretrained` wrote, on the CPU.

    Raises:
        InputError: for a folder without a posterior, or a damaged one.
    """
    check_fitted(folder)
    with as_input_errors():
        tensors, content = storage.load(folder)
        layers = content["layers"]
        stored = Stored(tensors, layers, {name: name for name in layers}, dict.fromkeys(layers, CPU))
        curvature = CURVATURES[LaplaceConfig.from_json(content["settings"]).curvature].unpack(stored)
    norms = {name: layer.get("square_norm") for name, layer in layers.items()}
    known = all(isinstance(norm, float) for norm in norms.values())
    square_norms = {name: torch.tensor(norm, dtype=torch.float64) for name, norm in norms.items()} if known else None
    return Opened(curvature, Prior(content["prior_precision"]), square_norms, content)


def _kind(opened: Opened, kind: str, names: Sequence[str], effective: Mapping[str, float]) -> dict[str, Any]:
    counts = opened.curvature.n_parameters
    independent = opened.curvature.independent_layers
    return {
        "kind": kind,
        "n_modules": len(names),
        "n_parameters": sum(counts[name] for name in names),
        "trace": _trace(opened.posterior, names) if independent else None,
        "effective_parameters": sum(effective[name] for name in names) if independent else None,
    }


def kinds(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers that play the same part in different blocks: `{q_proj.lora_A: [...], ...}`."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(place(name)[1], []).append(name)
    return found


def _picture(opened: Opened, evidence: Mapping[str, Any] | None) -> Figure:
    if evidence is None:
        return posterior_diagram(opened.posterior)
    curve = torch.tensor(evidence["prior_precision"]), torch.tensor(evidence["log_evidence"])
    return posterior_diagram(opened.posterior, curve, best=(evidence["best_prior_precision"], evidence["best"]))


def _trace(posterior: Posterior, names: Sequence[str]) -> float:
    values, multiplicity = posterior.spectrum(names)
    return float((values * multiplicity).sum())


def _evidence(opened: Opened) -> dict[str, Any] | None:
    """The log evidence of one prior precision for all layers, about its maximum; None without labels or norms."""
    log_likelihood, norms = opened.log_likelihood, opened.square_norms
    if log_likelihood is None or norms is None:
        return None

    def of(prior: Prior) -> float:
        return float(log_evidence(log_likelihood, replace(opened.posterior, prior=prior), norms))

    best = maximise_evidence(opened.curvature, norms, False, opened.noise_variance).shared
    assert best is not None
    grid = (float(best) * torch.logspace(*CURVE, dtype=torch.float64)).tolist()
    return {
        "now": of(opened.prior),
        "best_prior_precision": float(best),
        "best": of(Prior(best)),
        "prior_precision": grid,
        "log_evidence": [of(Prior(value)) for value in grid],
    }


def _report(result: Mapping[str, Any]) -> list[Part]:
    evidence, n = result["evidence"], result["n_parameters"]
    lines = [
        ("posterior", f"{result['posterior']} (format version {result['format_version']})"),
        ("curvature", result["curvature"]),
        ("examples", f"{result['n_examples']:,}"),
        ("modules", f"{result['n_modules']}"),
        ("parameters", f"{n:,}, of which the data determine {_short(result['effective_parameters'])}"),
        ("prior precision", _range(list(result["prior_precision"].values()))),
    ]
    if result["log_likelihood"] is not None:
        lines.append(("log-likelihood", f"{result['log_likelihood']:.2f}"))
    if evidence is not None:
        best = f"the best is {evidence['best']:.2f}, at {evidence['best_prior_precision']:.4g}"
        lines.append(("log evidence", f"{evidence['now']:.2f}; of one precision for all modules {best}"))
    lines.append(("calibrated", "yes" if result["calibrated"] else "no: blk calibrate, from ten held-out labels on"))
    rows: list[tuple[str, ...]] = [("", "modules", "parameters", "determined", "trace of the curvature")]
    for kind in result["kinds"]:
        numbers = (kind["effective_parameters"], kind["trace"])
        rows.append((kind["kind"], str(kind["n_modules"]), f"{kind['n_parameters']:,}", *map(_short, numbers)))
    if result["kinds"][0]["trace"] is None:  # its layers are not to be told apart
        rows = [row[:3] for row in rows]
    return [Facts(lines), "", Table(rows)]


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if 0.05 <= abs(value) < 1e6 else f"{value:.3g}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, one for each module"
