"""Calibration against definitions written out by hand and against scikit-learn."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesian_lora_kernels import calibration
from bayesian_lora_kernels.calibration import (
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    ood_auroc,
    predictive_entropy,
    reliability_bins,
    summary,
    temperature_scale,
)
from bayesian_lora_kernels.plots import reliability_diagram, reliability_diagrams, risk_coverage_diagram, save_figure


def random_predictions(n: int = 200, c: int = 4, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + c)
    logits = scale * torch.randn(n, c, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial((logits / 1.7).softmax(dim=-1), 1, generator=generator).squeeze(-1)


HAND = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]])
HAND_LABELS = torch.tensor([0, 1, 1, 1])


def test_hand_computed():
    assert accuracy(HAND, HAND_LABELS) == pytest.approx(0.75)
    assert negative_log_likelihood(HAND, HAND_LABELS) == pytest.approx(-math.log(0.9 * 0.2 * 0.7 * 0.55) / 4, rel=1e-6)
    assert brier_score(HAND, HAND_LABELS) == pytest.approx(2 * (0.01 + 0.64 + 0.09 + 0.2025) / 4, rel=1e-5)
    # every example alone in its bin of width 1/15
    assert expected_calibration_error(HAND, HAND_LABELS) == pytest.approx((0.1 + 0.8 + 0.3 + 0.45) / 4, rel=1e-5)
    # two bins: all confidences lie above 0.5
    assert expected_calibration_error(HAND, HAND_LABELS, bins=2) == pytest.approx(abs(0.75 - 2.95 / 4), abs=1e-6)


def test_ece_is_the_loop_over_bins():
    logits, labels = random_predictions()
    probs = logits.softmax(dim=-1).numpy()
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels.numpy()
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected > 0.05
    assert expected_calibration_error(torch.from_numpy(probs), labels) == pytest.approx(expected, abs=1e-12)


def test_values_on_edges_belong_to_the_bin_below():
    probs = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.75, 0.25]], dtype=torch.float64)
    assert reliability_bins(probs, torch.zeros(3, dtype=torch.long), bins=4).count.tolist() == [0, 1, 1, 1]


def test_against_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = random_predictions()
    probs = logits.softmax(dim=-1)
    assert negative_log_likelihood(probs, labels) == pytest.approx(metrics.log_loss(labels, probs), rel=1e-12)
    assert accuracy(probs, labels) == metrics.accuracy_score(labels, probs.argmax(dim=-1))
    two, binary = random_predictions(c=2)
    probs = two.softmax(dim=-1)
    assert brier_score(probs, binary) == pytest.approx(2 * metrics.brier_score_loss(binary, probs[:, 1]), rel=1e-12)


def test_auroc_counts_pairs():
    inside, outside = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0.4, 0.8, 1.0])
    pairs = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()
    assert ood_auroc(inside, outside) == pytest.approx(float(pairs.mean()))
    assert ood_auroc(outside, inside) == pytest.approx(1 - float(pairs.mean()))


def test_entropy():
    probs = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]])
    torch.testing.assert_close(predictive_entropy(probs), torch.tensor([math.log(4), 0.0], dtype=torch.float64))


def test_temperature_is_the_best_of_a_fine_grid():
    logits, labels = random_predictions()
    grid = np.exp(np.linspace(-3, 3, 6001))
    losses = [float(torch.nn.functional.cross_entropy(logits / t, labels)) for t in grid]
    best = grid[int(np.argmin(losses))]
    temperature = temperature_scale(logits, labels)
    assert 1.2 < temperature < 2.5
    assert temperature == pytest.approx(best, rel=2e-3)
    assert temperature_scale(3 * logits, labels) == pytest.approx(3 * temperature, rel=1e-9)


@pytest.mark.parametrize(("labels", "limit"), [([0, 1], 1e-3), ([1, 0], 1e3)])
def test_no_best_temperature(labels, limit):
    with pytest.warns(RuntimeWarning, match="no best temperature"):
        assert temperature_scale(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor(labels)) == limit


def test_underflow_is_not_infinity():
    probs = torch.tensor([[1.0, 0.0]])
    assert negative_log_likelihood(probs, torch.tensor([1])) == pytest.approx(87.34, abs=0.01)


def test_summary():
    logits, labels = random_predictions()
    probs = logits.softmax(dim=-1)
    foreign = (logits / 4).softmax(dim=-1)
    result = summary(probs, labels, foreign)
    new = ["ece_adaptive", "ece_debiased", "error_auroc", "aurc"]
    assert list(result) == ["accuracy", "nll", "ece", "brier", *new, "ood_auroc"]
    assert result["ece"] == expected_calibration_error(probs, labels)
    assert result["ece_adaptive"] == calibration.adaptive_calibration_error(probs, labels)
    assert result["ece_debiased"] == calibration.debiased_calibration_error(probs, labels)
    assert result["error_auroc"] == calibration.error_auroc(probs, labels)
    assert result["aurc"] == calibration.risk_coverage(probs, labels).area
    five = summary(probs, labels, bins=5)
    assert five["ece_debiased"] == calibration.debiased_calibration_error(probs, labels, bins=5)
    assert five["ece_adaptive"] == calibration.adaptive_calibration_error(probs, labels, bins=5)
    assert result["ood_auroc"] > 0.8
    assert "ood_auroc" not in summary(probs, labels)


def test_summary_of_perfect_predictions_and_of_one():
    perfect = summary(torch.eye(3), torch.arange(3))
    assert (perfect["accuracy"], perfect["aurc"], perfect["ece_debiased"]) == (1, 0, 0)
    assert math.isnan(perfect["error_auroc"])
    one = summary(HAND[:1], HAND_LABELS[:1])
    assert math.isnan(one["ece_debiased"])
    assert one["ece_adaptive"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("probs", "labels", "error", "message"),
    [
        ([[0.5, 0.5]], [0], TypeError, "expected a tensor"),
        (torch.tensor([[1, 0]]), torch.tensor([0]), TypeError, "floating-point"),
        (torch.tensor([0.5, 0.5]), torch.tensor([0]), ValueError, r"expected shape \[N, C\]"),
        (torch.empty(0, 2), torch.empty(0, dtype=torch.long), ValueError, "at least one example"),
        (torch.tensor([[0.5, 0.6]]), torch.tensor([0]), ValueError, "sum to 1"),
        (torch.tensor([[0.5, 0.5], [1.5, -0.5]]), torch.tensor([0, 0]), ValueError, "row 1"),
        (torch.tensor([[math.nan, 0.5]]), torch.tensor([0]), ValueError, "finite"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]), TypeError, "integer"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]), ValueError, r"expected shape \[1\]"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), ValueError, r"indices in 0\.\.1, got 2"),
    ],
)
@pytest.mark.parametrize("metric", [accuracy, negative_log_likelihood, expected_calibration_error, brier_score])
def test_bad_arguments(metric, probs, labels, error, message):
    with pytest.raises(error, match=message):
        metric(probs, labels)


def test_bad_bins_and_scores():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        expected_calibration_error(HAND, HAND_LABELS, bins=0)
    with pytest.raises(TypeError, match="positive int"):
        expected_calibration_error(HAND, HAND_LABELS, bins=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one score"):
        ood_auroc(torch.empty(0), torch.ones(2))
    with pytest.raises(TypeError, match=r"ood_scores: expected a tensor \[N\], got list"):
        ood_auroc(torch.ones(2), [1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"scores: expected real numbers, got torch\.complex64"):
        ood_auroc(torch.ones(2, dtype=torch.complex64), torch.ones(2))
    with pytest.raises(ValueError, match="scores: expected finite numbers, got NaN or infinity at index 1"):
        ood_auroc(torch.tensor([0.0, math.nan]), torch.ones(2))
    with pytest.raises(ValueError, match="expected 2 classes"):
        summary(HAND, HAND_LABELS, torch.full((2, 4), 0.25))


def test_missing_matplotlib_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (reliability_diagram, risk_coverage_diagram):
        with pytest.raises(ImportError, match="pip install matplotlib"):
            draw({"MAP": HAND}, HAND_LABELS)


def test_diagram_shows_the_bins(tmp_path):
    pytest.importorskip("matplotlib")
    logits, labels = random_predictions()
    probs = {"sharp": (3 * logits).softmax(dim=-1), "flat": (logits / 3).softmax(dim=-1)}
    figure = reliability_diagram(probs, labels, title="both")
    upper, lower = figure.axes[:2], figure.axes[2:]
    for axes, counts, (name, values) in zip(upper, lower, probs.items(), strict=True):
        one = reliability_bins(values, labels)
        assert axes.get_title() == f"{name}\nECE {one.error:.3f}"
        assert [bar.get_height() for bar in counts.patches] == one.count.tolist()
        full = one.count > 0
        tops: dict[float, float] = {}
        for bar in axes.patches:
            tops[bar.get_x()] = max(tops.get(bar.get_x(), 0.0), bar.get_y() + bar.get_height())
        highest = torch.maximum(one.accuracy, one.confidence)[full]
        assert list(tops.values()) == pytest.approx(highest.tolist())
    save_figure(figure, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_rows_of_diagrams():
    pytest.importorskip("matplotlib")
    figure = reliability_diagrams({"a": ({"x": HAND}, HAND_LABELS), "b": ({"x": HAND, "y": HAND}, HAND_LABELS)})
    assert [len(row.axes) for row in figure.subfigs] == [2, 4, 0]
    with pytest.raises(ValueError, match="at least one"):
        reliability_diagrams({})


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figure = reliability_diagram({"MAP": HAND}, HAND_LABELS)
    with pytest.raises(ValueError, match="expected a suffix among"):
        save_figure(figure, tmp_path / "plot.nonsense")

    def breaks(file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", breaks)
    (tmp_path / "plot.png").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, tmp_path / "plot.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("plot.png", b"old")]


def test_import_leaves_matplotlib_and_sklearn_alone():
    code = f"import sys, {calibration.__name__}; print([m for m in ('matplotlib', 'sklearn') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
