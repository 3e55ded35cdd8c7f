"""A posterior: the spectra of its curvature and factors, what the data determine in each layer, and the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesian_lora_kernels.model.names import place
from bayesian_lora_kernels.plots.style import (
    BLUE,
    COLORS,
    INK,
    MUTED,
    VERMILION,
    WIDTH,
    legend_below,
    new_figure,
    styled,
)
from bayesian_lora_kernels.posterior.evidence import effective_parameters
from bayesian_lora_kernels.posterior.kronecker import Eigenbasis, eigenbases
from bayesian_lora_kernels.posterior.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 2000  # of a spectrum
ZERO = 1e-12  # of the largest eigenvalue: what rounding leaves
MOST_LABELS = 30  # of blocks under their bars
SIDES = {".lora_A": "-", ".lora_B": (0, (4, 1.5))}


@styled()
def posterior_diagram(
    posterior: Posterior,
    evidence: tuple[Tensor, Tensor] | None = None,
    *,
    best: tuple[float, float] | None = None,
) -> Figure:
    """All that can be seen of a posterior: `spectrum_diagram`, `factor_diagram`, `layer_diagram`, `evidence_diagram`.

    Factors are there for K-FAC and EKFAC, layers where the curvature leaves them independent, the evidence if given.

    Args:
        posterior: of the weights.
        evidence: prior precisions and the log evidence under each, both `[m]`.
        best: see `evidence_diagram`.

    Raises:
        ValueError: for an evidence of other shapes.
        ImportError: without matplotlib.
    """
    curvature = posterior.curvature
    factors, layers = curvature.factors is not None, curvature.independent_layers
    rows = [["spectrum"] if evidence is None else ["spectrum", "evidence"]]
    if factors:
        rows.insert(0, ["a", "s"])
    if layers:
        rows.append(["layers"])
    wide = max(map(len, rows))
    figure = new_figure(WIDTH if wide > 1 else 0.7 * WIDTH, 2.7 * len(rows) + 0.5)
    axes: dict[str, Any] = figure.subplot_mosaic([row * (wide // len(row)) for row in rows])
    colors = _module_colors(posterior)
    _draw_spectrum(axes["spectrum"], posterior, colors)
    if factors:
        _draw_factors(axes["a"], axes["s"], posterior, colors)
    if evidence is not None:
        used = _range(posterior)
        _draw_evidence(axes["evidence"], *evidence, best, used[0] if used[0] == used[1] else None)
    if layers:
        _draw_layers(axes["layers"], effective_parameters(posterior), colors)
    legend_below(figure, [axes[name] for name in ("layers", "a", "s", "spectrum", "evidence") if name in axes], 5)
    return figure


@styled()
def spectrum_diagram(posterior: Posterior) -> Figure:
    """Eigenvalues of the curvature, the largest first, beside the prior precision.

    Where an eigenvalue is above the prior precision the data determine its direction, below it the prior does.
    Independent layers of one kind are one line; a curvature that couples its layers is one line altogether.

    Raises:
        ImportError: without matplotlib.
    """
    figure = new_figure(0.7 * WIDTH, 3.2)
    _draw_spectrum(figure.subplots(), posterior, _module_colors(posterior))
    legend_below(figure, figure.axes, 3)
    return figure


@styled()
def factor_diagram(posterior: Posterior) -> Figure:
    """Eigenvalues of the Kronecker factors A and S of every layer, the largest first.

    A low-rank factor keeps some directions; its tail, one eigenvalue for all others, goes on as a dotted line.

    Raises:
        ValueError: for a curvature without Kronecker factors.
        ImportError: without matplotlib.
    """
    if posterior.curvature.factors is None:
        raise ValueError("factor_diagram: expected a curvature with Kronecker factors (kfac, ekfac), this one has none")
    figure = new_figure(WIDTH, 3.2)
    left, right = figure.subplots(1, 2)
    _draw_factors(left, right, posterior, _module_colors(posterior))
    legend_below(figure, figure.axes, 5)
    return figure


@styled()
def layer_diagram(posterior: Posterior) -> Figure:
    """The uncertainty of each layer: its effective number of parameters, `gamma = P - lambda tr(Sigma)`.

    That is also the layer's share of the predictive variance: `gamma = tr(F Sigma)`, the variance which the layer's
    posterior gives the logits of the fitted examples, summed over these, in units of what their likelihood resolves.
    Bars are of the blocks of the model, their parts of the modules in a block; the title has the sum.

    Raises:
        ValueError: for a curvature that couples its layers, whose parameters are not to be told apart.
        ImportError: without matplotlib.
    """
    if not posterior.curvature.independent_layers:
        raise ValueError(
            "layer_diagram: expected a curvature with independent layers (kfac, ekfac), this one couples them"
        )
    figure = new_figure(WIDTH, 3.0)
    _draw_layers(figure.subplots(), effective_parameters(posterior), _module_colors(posterior))
    legend_below(figure, figure.axes, 7)
    return figure


@styled()
def evidence_diagram(
    precisions: Tensor,
    log_evidence: Tensor,
    *,
    best: tuple[float, float] | None = None,
    used: float | None = None,
) -> Figure:
    """Log evidence against the prior precision, with its maximum, and the precision in use.

    Args:
        precisions: `[m]`, positive and rising.
        log_evidence: `[m]`, in nats, as `LaplaceLoRA.log_marginal_likelihood` gives it.
        best: precision and log evidence of the maximum; None: the highest point of the curve.
        used: the precision in use, if it is to be marked.

    Raises:
        ValueError: for tensors of other shapes.
        ImportError: without matplotlib.
    """
    figure = new_figure(0.7 * WIDTH, 3.0)
    _draw_evidence(figure.subplots(), precisions, log_evidence, best, used)
    legend_below(figure, figure.axes, 2)
    return figure


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


def _module(kind: str) -> str:
    """Of `q_proj.lora_A` the `q_proj`."""
    return kind.removesuffix(".lora_A").removesuffix(".lora_B")


def _module_colors(posterior: Posterior) -> dict[str, str]:
    """`{module: colour}`: the same in all panels; modules beyond the palette are grey."""
    modules = list(dict.fromkeys(_module(place(name)[1]) for name in posterior.curvature.shapes))
    return {module: COLORS[i] if i < len(COLORS) else MUTED for i, module in enumerate(modules)}


def _range(posterior: Posterior) -> tuple[float, float]:
    """The smallest and the largest prior precision."""
    found = [float(posterior.prior[name]) for name in posterior.curvature.shapes]
    return min(found), max(found)


def _draw_spectrum(axes: Any, posterior: Posterior, colors: Mapping[str, str]) -> None:
    curvature = posterior.curvature
    kinds: dict[str, list[str]] = {}
    for name in curvature.shapes if curvature.independent_layers else ():
        kinds.setdefault(place(name)[1], []).append(name)
    for kind, names in kinds.items():
        rank, value = spectrum_line(*(x.cpu() for x in posterior.spectrum(names)))
        axes.plot(rank, value, color=colors[_module(kind)], linestyle=_dashes(kind), linewidth=1.4)
    if not kinds:
        rank, value = spectrum_line(*(x.cpu() for x in posterior.spectrum()))
        axes.plot(rank, value, color=BLUE, label="all modules")
    low, high = _range(posterior)
    axes.axhspan(low, high, color=MUTED, alpha=0.3, linewidth=0)
    axes.axhline(high, color=INK, linewidth=1, linestyle=":", label="prior precision")
    axes.set(xscale="log", yscale="log", xlabel="direction, the largest first", ylabel="eigenvalue, nats / weight²")
    axes.set_title("curvature: above the prior, data decide")
    _name_sides(axes, kinds)


def _draw_factors(axes_a: Any, axes_s: Any, posterior: Posterior, colors: Mapping[str, str]) -> None:
    factors = posterior.curvature.factors
    assert factors is not None
    bases = eigenbases(factors)
    sides = (
        (axes_a, 1, "input factors A", "eigenvalue, input²"),
        (axes_s, 0, "output-gradient factors S", "eigenvalue, (nats / output)²"),
    )
    for axes, side, title, unit in sides:
        shares = []
        owners: dict[int, list[str]] = {}
        for name, pair in bases.items():
            owners.setdefault(id(pair[side]), []).append(name)
        for name, *others in owners.values():
            kind = place(name)[1]
            style = {"color": INK if others else colors[_module(kind)], "alpha": 0.6, "linewidth": 1}
            (rank, value), tail, share = _factor_line(bases[name][side], posterior.curvature.shapes[name][side])
            axes.plot(rank, value, linestyle=_dashes(kind), **style)
            if tail is not None:
                axes.plot(*tail, linestyle=(0, (1, 1)), **style)
                shares.append(share)
        axes.set(xscale="log", yscale="log", xlabel="direction, the largest first", ylabel=unit)
        axes.set_title(f"{title}{_tails(shares)}")
        if shares:
            axes.plot([], [], color=MUTED, linestyle=(0, (1, 1)), label="tail: all directions not kept")
        if any(others for _, *others in owners.values()):
            axes.plot([], [], color=INK, alpha=0.6, linewidth=1, label="shared by modules of one input")
    for module, color in colors.items():
        if color != MUTED:
            axes_a.plot([], [], color=color, linewidth=4, label=module)
    _name_sides(axes_a, {place(name)[1] for name in bases})


def _factor_line(
    basis: Eigenbasis, width: int
) -> tuple[tuple[list[float], list[float]], tuple[list[float], list[float]] | None, float]:
    """Kept eigenvalues; the tail, if there is one, over the directions outside; and its share of the trace."""
    values, tail = basis.values.double().cpu(), float(basis.tail)
    kept, rest = len(values), width - len(values)
    line = spectrum_line(values, torch.ones_like(values))
    if rest == 0 or tail <= 0:
        return line, None, 0.0
    return line, ([kept + 1, width], [tail, tail]), rest * tail / (rest * tail + float(values.sum()))


def _tails(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    low, high = min(shares), max(shares)
    return f"\ntails hold {low:.0%} to {high:.0%} of the trace"


def _draw_layers(axes: Any, effective: Mapping[str, float], colors: Mapping[str, str]) -> None:
    sums: dict[str, dict[str, float]] = {}  # of each module, by block
    blocks: dict[str, None] = {}
    for name, value in effective.items():
        block, kind = place(name)
        key = "other" if block is None else str(block)
        blocks[key] = None
        of_module = sums.setdefault(_module(kind), {})
        of_module[key] = of_module.get(key, 0.0) + value
    total, places = max(sum(effective.values()), 1e-12), list(range(len(blocks)))
    bottom = [0.0] * len(blocks)
    for module, by_block in sums.items():
        heights = [by_block.get(block, 0.0) for block in blocks]
        color = colors[module]
        label = module if color != MUTED else "other modules"
        axes.bar(places, heights, 0.8, bottom, color=color, edgecolor="white", linewidth=0.5, label=label)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    every = -(-len(blocks) // MOST_LABELS)
    axes.set_xticks(places[::every], list(blocks)[::every])
    axes.set(xlabel="block of the model", ylabel="effective parameters", xlim=(-0.6, len(blocks) - 0.4))
    axes.set_title(f"uncertainty per layer: {total:,.1f} parameters that the data determine")
    share = axes.secondary_yaxis("right", functions=(lambda x: 100 * x / total, lambda x: x * total / 100))
    share.set_ylabel("share of all, %")
    share.spines["right"].set_visible(True)


def _draw_evidence(
    axes: Any, precisions: Tensor, log_evidence: Tensor, best: tuple[float, float] | None, used: float | None
) -> None:
    if precisions.ndim != 1 or precisions.shape != log_evidence.shape or not len(precisions):
        raise ValueError(
            "evidence: expected precisions and log evidence of one shape [m], "
            f"got {list(precisions.shape)} and {list(log_evidence.shape)}"
        )
    x, y = precisions.detach().double().cpu(), log_evidence.detach().double().cpu()
    if best is None:
        best = float(x[y.argmax()]), float(y.max())
    axes.plot(x.tolist(), y.tolist(), color=INK)
    axes.plot(*best, "o", color=VERMILION, label=f"maximum: {best[1]:,.2f} nats at {best[0]:.3g}", linestyle="none")
    if used is not None:
        axes.axvline(used, color=BLUE, linewidth=1.2, linestyle="--", label=f"in use: {used:.3g}")
    # On the right it falls without end; on the left it ends at what the likelihood alone takes away.
    drop = best[1] - float(y[0])
    low = max(best[1] - 1.5 * drop, float(y.min()))
    axes.set_ylim(low, best[1] + 0.1 * max(best[1] - low, 1e-12))
    axes.set(xscale="log", xlabel="prior precision, 1 / weight²", ylabel="log evidence, nats")
    axes.set_title("evidence")


def _dashes(kind: str) -> Any:
    return next((dashes for side, dashes in SIDES.items() if kind.endswith(side)), "-")


def _name_sides(axes: Any, kinds: Iterable[str]) -> None:
    """What dashes mean, where there are both."""
    found = list(kinds)
    if all(any(kind.endswith(side) for kind in found) for side in SIDES):
        for side, dashes in SIDES.items():
            axes.plot([], [], color=MUTED, linestyle=dashes, label=side.removeprefix("."))
