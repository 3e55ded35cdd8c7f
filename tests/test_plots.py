"""Pictures: the numbers that are drawn, against where they come from; and that nothing covers anything."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bayesian_lora_kernels import LaplaceLoRA, calibration, plots
from bayesian_lora_kernels.model.names import place
from bayesian_lora_kernels.plots import style
from bayesian_lora_kernels.posterior.evidence import effective_parameters

matplotlib = pytest.importorskip("matplotlib")

INPUTS = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


@pytest.fixture(scope="module")
def fits() -> dict[str, LaplaceLoRA]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(12, 3)).double()
    batches = [(INPUTS, torch.arange(40) % 3)]
    found = {}
    for curvature in ("ekfac", "exact"):
        laplace = LaplaceLoRA(model, curvature=curvature, rank=4, rank_threshold=6)
        found[curvature] = laplace.fit(batches, progress=False).optimize_prior_precision()
    return found


def overlaps(figure: Any) -> list[str]:
    """Pairs of panels, with their labels, or a legend and a panel, that share room; and what runs out of the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    parts: list[Any] = [axes for axes in figure.axes if axes.axison]
    boxes = {f"panel {i}": axes.get_tightbbox() for i, axes in enumerate(parts)}
    figures = [figure, *figure.subfigs]
    boxes |= {f"legend {i}": one.get_window_extent() for i, one in enumerate(x for f in figures for x in f.legends)}
    found = [f"{a}, {b}" for a, b in itertools.combinations(boxes, 2) if _common(boxes[a], boxes[b]) > 1]
    return found + [name for name, box in boxes.items() if box.x0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y0 < -1]


def _common(a: Any, b: Any) -> float:
    """The smaller side of what two boxes share, in pixels."""
    return min(min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0))


def labelled(axes: Any) -> dict[str, Any]:
    handles, names = axes.get_legend_handles_labels()
    return dict(zip(names, handles, strict=True))


def test_bars_of_layers_are_effective_parameters(fits: dict[str, LaplaceLoRA]) -> None:
    """Each bar against `P - lambda tr(Sigma)` of the layer's dense posterior, their sum against the title."""
    posterior = fits["ekfac"].posterior
    figure = plots.layer_diagram(posterior)
    axes = figure.axes[0]
    wanted = {}
    for name, p in posterior.curvature.n_parameters.items():
        dense = posterior[name].to_dense()
        wanted[place(name)] = p - float(posterior.prior[name] * torch.linalg.inv(dense).trace())
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2"]
    drawn = {}
    for module, bars in labelled(axes).items():
        drawn |= {(block, module): bar.get_height() for block, bar in enumerate(bars) if bar.get_height()}
    assert drawn == pytest.approx(wanted)
    assert f"{sum(wanted.values()):,.1f} parameters" in axes.get_title()
    for block in (0, 1, 2):
        top = max(bar.get_y() + bar.get_height() for bar in axes.patches if round(bar.get_center()[0]) == block)
        assert top == pytest.approx(sum(value for (b, _), value in wanted.items() if b == block))
    with pytest.raises(ValueError, match="couples them"):
        plots.layer_diagram(fits["exact"].posterior)


def test_effective_parameters_are_the_predictive_variance_of_the_fitted_examples(fits: dict[str, LaplaceLoRA]) -> None:
    """What `layer_diagram` says of them: `gamma = tr(F Sigma)`, the logits' variances as the likelihood weighs them."""
    laplace = fits["exact"]
    predicted = laplace.predict((INPUTS,))
    p = predicted.mean.softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    variance = (fisher @ predicted.covariance).diagonal(dim1=1, dim2=2).sum()
    assert sum(effective_parameters(laplace.posterior).values()) == pytest.approx(float(variance), rel=1e-6)


def test_spectrum_has_every_eigenvalue_once(fits: dict[str, LaplaceLoRA]) -> None:
    exact = fits["exact"].posterior
    (line, prior) = plots.spectrum_diagram(exact).axes[0].lines
    values, counts = exact.curvature.spectrum()
    wanted = values[(counts > 0) & (values > 1e-12 * values.max())].sort(descending=True).values
    assert line.get_ydata()[::2] == pytest.approx(wanted.tolist())
    assert list(line.get_xdata()[::2]) == list(range(1, len(wanted) + 1))
    assert prior.get_ydata()[0] == pytest.approx(float(exact.prior[next(iter(exact.curvature.shapes))]))
    ekfac = fits["ekfac"].posterior
    drawn = plots.spectrum_diagram(ekfac).axes[0].lines
    largest = [line.get_ydata()[0] for line in drawn if len(line.get_ydata()) > 2]
    spectra = {kind: ekfac.curvature.spectrum(names)[0] for kind, names in _kinds(ekfac.curvature.shapes).items()}
    assert largest == pytest.approx([float(values.max()) for values in spectra.values()])


def _kinds(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(place(name)[1], []).append(name)
    return found


def test_factors_and_their_tails(fits: dict[str, LaplaceLoRA]) -> None:
    """Kept eigenvalues against those of the dense factor, the tail up to the last direction, its share of the trace."""
    posterior = fits["ekfac"].posterior
    factors = posterior.curvature.factors
    assert factors is not None
    axes_a, axes_s = plots.factor_diagram(posterior).axes
    for axes, side in ((axes_a, "a"), (axes_s, "s")):
        lines = [line for line in axes.lines if len(line.get_xdata())]
        kept = iter(line for line in lines if len(line.get_xdata()) > 2)
        tails = iter(line for line in lines if len(line.get_xdata()) == 2)
        shares = []
        for one in factors.values():
            factor, tail = getattr(one, side), float(getattr(one, f"tail_{side}"))
            dense = factor @ factor.T if factor.shape[0] > factor.shape[1] else factor
            values = torch.linalg.eigvalsh(dense).flip(0)[: factor.shape[1]]
            drawn = next(kept).get_ydata()[::2]
            assert drawn == pytest.approx(values[: len(drawn)].tolist(), rel=1e-5)
            if tail > 0:
                line = next(tails)
                assert list(line.get_xdata()) == [factor.shape[1] + 1, factor.shape[0]]
                assert list(line.get_ydata()) == [tail, tail]
                rest = tail * (factor.shape[0] - factor.shape[1])
                shares.append(rest / (rest + float(dense.trace())))
        assert shares
        assert f"{min(shares):.0%} to {max(shares):.0%}" in axes.get_title()
    with pytest.raises(ValueError, match="this one has none"):
        plots.factor_diagram(fits["exact"].posterior)


def test_evidence_with_its_maximum(fits: dict[str, LaplaceLoRA]) -> None:
    laplace = fits["exact"]
    best = float(laplace.prior_precision)  # type: ignore[arg-type]
    precisions = best * torch.logspace(-2, 1, 31, dtype=torch.float64)
    curve = torch.stack([laplace.log_marginal_likelihood(x) for x in precisions])
    figure = plots.evidence_diagram(precisions, curve, used=2 * best)
    line, dot, used = figure.axes[0].lines
    assert line.get_ydata() == pytest.approx(curve.tolist())
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == pytest.approx((best, float(curve.max())))
    assert used.get_xdata()[0] == pytest.approx(2 * best)
    assert f"{best:.3g}" in dot.get_label()
    assert not overlaps(figure)
    with pytest.raises(ValueError, match=r"of one shape \[m\], got \[31\] and \[30\]"):
        plots.evidence_diagram(precisions, curve[1:])


@pytest.mark.parametrize("curvature", ["ekfac", "exact"])
def test_a_posterior_in_one_picture(curvature: str, fits: dict[str, LaplaceLoRA]) -> None:
    laplace = fits[curvature]
    precisions = torch.logspace(-2, 2, 9, dtype=torch.float64)
    curve = torch.stack([laplace.log_marginal_likelihood(x) for x in precisions])
    whole = plots.posterior_diagram(laplace.posterior, (precisions, curve))
    titles = {"ekfac": ["input", "output", "curvature", "evidence", "uncertainty"], "exact": ["curvature", "evidence"]}
    assert [axes.get_title().split()[0].rstrip(":") for axes in whole.axes] == [
        part.split("-")[0] if part != "output" else "output-gradient" for part in titles[curvature]
    ]
    assert not overlaps(whole)
    assert not overlaps(plots.posterior_diagram(laplace.posterior))


def test_gaussians_of_a_question() -> None:
    mean = torch.tensor([[0.2, 1.3, -1.5], [0.0, 0.1, -0.1]], dtype=torch.float64)
    std = torch.tensor([[0.5, 0.4, 0.6], [1.4, 1.7, 0.0]], dtype=torch.float64)
    probs = {"MAP": mean.softmax(-1), "Laplace": (mean / 2).softmax(-1)}
    figure = plots.logit_diagram(mean, std, probs, ["A", "B", "C"], answers=[0, None], titles=["line 3", "line 7"])
    (left, right), (second, _) = figure.axes[:2], figure.axes[2:]
    assert [text.get_text() for text in left.get_yticklabels()] == ["B", "A (answer)", "C"]
    assert (left.get_title("left"), second.get_title("left")) == ("line 3", "line 7")
    hills = [line for line in left.lines if len(line.get_xdata()) > 2]
    for line, (m, s) in zip(hills, ((1.3, 0.4), (0.2, 0.5), (-1.5, 0.6)), strict=True):
        x, y = (torch.tensor(values) for values in (line.get_xdata(), line.get_ydata()))
        height = hills.index(line) - y  # above the line that the choice has
        assert float(x[height.argmax()]) == pytest.approx(m, abs=1e-6)
        weights = height / height.sum()
        assert float((weights * (x - m) ** 2).sum().sqrt()) == pytest.approx(s, rel=0.02)
        assert (line.get_color() == style.GREEN) == (m == 0.2)
    widths = [bar.get_width() for bar in right.patches]
    order = [1, 0, 2]
    assert widths == pytest.approx([float(values[0, i]) for values in probs.values() for i in order])
    assert [text.get_text() for text in right.texts[:3]] == [f"{probs['MAP'][0, i]:.2f}" for i in order]
    assert not overlaps(figure)


def test_of_many_choices_the_answer_is_drawn() -> None:
    mean = torch.arange(20.0)[None]
    names = [f"choice {i}" for i in range(20)]
    figure = plots.logit_diagram(mean, torch.ones(1, 20), {"MAP": mean.softmax(-1)}, names, answers=[0])
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [f"choice {i}" for i in range(19, 12, -1)] + ["choice 0 (answer)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(7, 2)}, r"\[N, C\] of 1 to 6 questions, got \[7, 2\]"),
        ({"std": torch.zeros(1, 3)}, r"std: expected \[1, 2\], as mean is, got \[1, 3\]"),
        ({"std": torch.tensor([[1.0, -1.0]])}, "no negative standard deviation"),
        ({"probs": {}}, "one or two methods, got 0"),
        ({"names": ["A"]}, "names: expected 2, got 1"),
        ({"answers": [2]}, "indices below 2"),
        ({"titles": ["x", "y"]}, "titles: expected 1, got 2"),
    ],
)
def test_bad_questions(change: dict[str, Any], message: str) -> None:
    given = {"mean": torch.zeros(1, 2), "std": torch.ones(1, 2), "probs": {"MAP": torch.full((1, 2), 0.5)}}
    given |= {"names": ["A", "B"]} | change
    with pytest.raises(ValueError, match=message):
        plots.logit_diagram(**given)


def probabilities(methods: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(300, 3, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits).sample()
    return {f"method number {i}": ((1 + i) * logits).softmax(-1) for i in range(methods)}, labels


@pytest.mark.parametrize("methods", [1, 5])
def test_nothing_covers_the_bars_of_a_reliability_diagram(methods: int) -> None:
    probs, labels = probabilities(methods)
    figure = plots.reliability_diagram(probs, labels, title="A title")
    assert not overlaps(figure)
    assert len([axes for axes in figure.axes if axes.axison]) == 2 * methods
    assert not any(axes.get_legend() for axes in figure.axes)


def test_nothing_covers_the_bars_of_several_rows() -> None:
    probs, labels = probabilities(2)
    assert not overlaps(plots.reliability_diagrams({"one": (probs, labels), "two": (probs, labels)}))


def test_bins_of_few_examples_are_hatched() -> None:
    probs, labels = probabilities(1)
    upper, lower = plots.reliability_diagram(probs, labels).axes
    counts = {round(bar.get_x(), 6): bar.get_height() for bar in lower.patches}
    hatched = {round(bar.get_x(), 6): bar.get_hatch() is not None for bar in upper.patches}
    assert hatched == {x: counts[x] < 10 for x in hatched}
    assert set(hatched.values()) == {True, False}


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_a_picture_made_again_is_the_same_file(suffix: str, tmp_path: Path) -> None:
    probs, labels = probabilities(2)
    for name, settings in (("a", {}), ("b", {"svg.hashsalt": "other", "axes.facecolor": "black", "font.size": 30})):
        with matplotlib.rc_context(settings):
            before = dict(matplotlib.rcParams)
            plots.save_figure(plots.risk_coverage_diagram(probs, labels), tmp_path / f"{name}.{suffix}")
            assert dict(matplotlib.rcParams) == before
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def lab(color: torch.Tensor) -> torch.Tensor:
    """CIELAB under D65 of linear RGB."""
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = ((to_xyz @ color) / torch.tensor([0.9505, 1.0, 1.089])).clamp_min(1e-6) ** (1 / 3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def linear(color: str) -> torch.Tensor:
    value = torch.tensor(list(bytes.fromhex(color[1:]))) / 255
    return torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("blindness", ["none", *BLINDNESS])
def test_the_palette_is_told_apart_by_everyone(blindness: str) -> None:
    seen = torch.tensor(BLINDNESS.get(blindness, torch.eye(3).tolist()))
    colors = [lab((seen @ linear(color)).clamp(0, 1)) for color in (*style.COLORS, "#ffffff")]
    assert min(float((a - b).norm()) for a, b in itertools.combinations(colors, 2)) > 12


def test_no_other_file_has_colours_of_its_own() -> None:
    root = Path(__file__).parents[1]
    files = [
        file for folder in ("bayesian_lora_kernels", "benchmarks", "docs") for file in (root / folder).rglob("*.py")
    ]
    color = re.compile(r"[\"']#[0-9A-Fa-f]{6}[\"']")
    found = [str(file.relative_to(root)) for file in files if color.search(file.read_text(encoding="utf-8"))]
    assert found == ["bayesian_lora_kernels/plots/style.py"]


def test_curves_and_their_errors() -> None:
    curves = {"random": torch.tensor([0.5, 0.7, 0.8]), "informed": torch.tensor([0.5, 0.8, 0.9])}
    errors = {"informed": torch.tensor([0.1, 0.05, 0.02])}
    figure = plots.curve_diagram([16, 28, 40], curves, x_label="labels", y_label="accuracy", errors=errors)
    drawn = labelled(figure.axes[0])
    for name, values in curves.items():
        line, _, bars = drawn[name]
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([16, 28, 40], pytest.approx(values.tolist()))
        lengths = [segment[1, 1] - segment[0, 1] for one in bars for segment in one.get_segments()]
        assert lengths == (pytest.approx((2 * errors[name]).tolist()) if name in errors else [])
    assert not overlaps(figure)
    with pytest.raises(ValueError, match=r"informed: expected \[2\] numbers, as x has, got \[3\]"):
        plots.curve_diagram([1, 2], {"informed": curves["informed"]}, x_label="x", y_label="y")
    with pytest.raises(ValueError, match="errors: expected methods of"):
        plots.curve_diagram([1, 2, 3], {"informed": curves["informed"]}, x_label="x", y_label="y", errors=curves)


def test_diagrams_have_their_old_names_too() -> None:
    assert calibration.reliability_diagram is plots.reliability_diagram
    assert calibration.save_figure is plots.save_figure
    with pytest.raises(AttributeError, match="no attribute 'pie_chart'"):
        calibration.pie_chart  # noqa: B018
