"""Errors told by confidence, and risk against coverage: against scikit-learn and definitions written out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from bayesian_lora_kernels.calibration import error_auroc, ood_auroc, risk_coverage
from bayesian_lora_kernels.plots import risk_coverage_diagram

RIGHT, WRONG = 0, 1


def predictions(confidence: list[float] | Tensor, right: list[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Three classes, of which the first is predicted with the confidence asked for."""
    sure = torch.as_tensor(confidence, dtype=torch.float64)
    rest = (1 - sure) / 2
    return torch.stack([sure, rest, rest], dim=-1), 1 - torch.as_tensor(right)


def random_predictions(n: int, levels: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, labels, confidence, right; with `levels`, only that many different confidences."""
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.4 + 0.6 * torch.rand(n, generator=generator, dtype=torch.float64)
    if levels is not None:
        confidence = 0.4 + 0.6 * torch.randint(1, levels + 1, (n,), generator=generator).double() / levels
    right = (torch.rand(n, generator=generator, dtype=torch.float64) < confidence**1.5).long()
    return *predictions(confidence, right), confidence, right


@pytest.mark.parametrize("levels", [None, 5])
def test_aurocs_are_scikit_learns(levels):
    metrics = pytest.importorskip("sklearn.metrics")
    probs, labels, confidence, right = random_predictions(400, levels)
    expected = metrics.roc_auc_score(1 - right, 1 - probs.max(dim=-1).values)
    assert 0.55 < expected < 0.95
    assert error_auroc(probs, labels) == pytest.approx(expected, abs=1e-12)
    inside, outside = confidence[:150], confidence[150:]
    foreign = [0] * 150 + [1] * 250
    assert ood_auroc(inside, outside) == pytest.approx(metrics.roc_auc_score(foreign, confidence), abs=1e-12)


def test_auroc_counts_pairs_of_wrong_and_right():
    probs, labels = predictions([0.9, 0.8, 0.8, 0.5], [1, 0, 1, 0])
    # wrong at 0.8 and 0.5, right at 0.9 and 0.8: of four pairs three are in order and one is a tie
    assert error_auroc(probs, labels) == 3.5 / 4
    assert error_auroc(*predictions([0.9, 0.5], [1, 0])) == 1
    assert error_auroc(*predictions([0.9, 0.5], [0, 1])) == 0
    assert error_auroc(*predictions([0.7] * 4, [0, 1, 1, 0])) == 0.5


def test_confidences_that_one_minus_them_would_round_together():
    tiny = 1e-17
    probs = torch.tensor([[tiny, 1 - 2 * tiny], [2 * tiny, 1.0]], dtype=torch.float64)
    assert error_auroc(probs, torch.tensor([1, 0])) == 0.5  # float64 holds 1 for both
    close = torch.tensor([[0.5 + 2**-53, 0.5 - 2**-53], [0.5, 0.5]], dtype=torch.float64)
    assert error_auroc(close, torch.tensor([0, 1])) == 1


@pytest.mark.parametrize("right", [[1, 1, 1], [0, 0, 0]])
def test_nothing_to_tell_apart(right):
    assert math.isnan(error_auroc(*predictions([0.9, 0.8, 0.7], right)))


def test_large_auroc_is_exact():
    n = 200_000  # ranks are sums beyond float32
    assert ood_auroc(torch.zeros(n), torch.ones(n)) == 1
    assert ood_auroc(torch.zeros(n), torch.zeros(n)) == 0.5


def test_risk_coverage_without_ties_is_the_loop():
    probs, labels, confidence, right = random_predictions(60)
    curve = risk_coverage(probs, labels)
    order = sorted(range(60), key=lambda i: -float(confidence[i]))
    expected = [sum(1 - int(right[i]) for i in order[:k]) / k for k in range(1, 61)]
    assert curve.risk.tolist() == pytest.approx(expected, abs=1e-12)
    assert curve.coverage.tolist() == pytest.approx([k / 60 for k in range(1, 61)])
    assert curve.risk.dtype == curve.coverage.dtype == torch.float64
    assert curve.area == pytest.approx(sum(expected) / 60, abs=1e-12)
    assert float(curve.risk[-1]) == pytest.approx(float((1 - right.double()).mean()))


def test_risk_coverage_with_ties_is_the_mean_over_their_orders():
    confidence, right = [0.9, 0.7, 0.7, 0.7, 0.5, 0.5], [0, 1, 0, 1, 1, 0]
    curves = []
    for order in itertools.permutations(range(6)):
        if [confidence[i] for i in order] == confidence:
            curves.append([sum(1 - right[i] for i in order[:k]) / k for k in range(1, 7)])
    assert len(curves) == 12
    expected = torch.tensor(curves, dtype=torch.float64).mean(dim=0)
    torch.testing.assert_close(risk_coverage(*predictions(confidence, right)).risk, expected)


def test_order_of_examples_does_not_matter():
    probs, labels, *_ = random_predictions(80, levels=4)
    other = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    for metric in (error_auroc, lambda p, y: risk_coverage(p, y).area):
        assert metric(probs[other], labels[other]) == pytest.approx(metric(probs, labels), abs=1e-12)


def test_sure_of_errors_costs_more():
    good, bad = predictions([0.9, 0.8, 0.6], [1, 1, 0]), predictions([0.9, 0.8, 0.6], [0, 1, 1])
    assert risk_coverage(*good).area == pytest.approx(1 / 9)
    assert risk_coverage(*bad).area == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize("metric", [error_auroc, risk_coverage])
def test_bad_arguments(metric):
    with pytest.raises(ValueError, match=r"probs: expected shape \[N, C\]"):
        metric(torch.ones(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels: expected indices in 0\.\.1, got 2 in row 0"):
        metric(torch.tensor([[0.5, 0.5]]), torch.tensor([2]))


def test_diagram_shows_the_curves():
    pytest.importorskip("matplotlib")
    probs, labels, *_ = random_predictions(80)
    methods = {f"method {i}": probs.roll(i, dims=0) for i in range(8)}
    figure = risk_coverage_diagram(methods, labels, title="Comments")
    (axes,) = figure.axes
    assert axes.get_title() == "Comments"
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 8
    for line, text, (name, values) in zip(lines, texts, methods.items(), strict=True):
        curve = risk_coverage(values, labels)
        assert text == f"{name}\nAURC {curve.area:.3f}"
        assert line.get_ydata().tolist() == curve.risk.tolist()
        assert line.get_xdata().tolist() == curve.coverage.tolist()
        assert axes.get_ylim()[1] >= curve.risk[curve.coverage >= 0.05].max()


def test_nothing_in_the_diagram_overlaps():
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    probs, labels, *_ = random_predictions(80)
    figure = risk_coverage_diagram({"MAP": probs, "a method of a long name": probs}, labels, title="Comments")
    FigureCanvasAgg(figure).draw()
    (axes,), (legend,) = figure.axes, figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
    assert figure.bbox.contains(*legend.get_window_extent().max)


def test_diagram_of_perfect_and_of_no_methods():
    pytest.importorskip("matplotlib")
    figure = risk_coverage_diagram({"perfect": predictions([0.9, 0.8], [1, 1])[0]}, torch.tensor([0, 0]))
    low, high = figure.axes[0].get_ylim()
    assert low < 0 < high
    with pytest.raises(ValueError, match="probs: expected at least one method, got none"):
        risk_coverage_diagram({}, torch.tensor([0]))
