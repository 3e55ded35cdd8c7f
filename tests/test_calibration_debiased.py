"""Calibration error of few examples, against definitions written out by hand and simulations of known truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from test_calibration_selective import predictions, random_predictions
from torch import Tensor

from bayesian_lora_kernels.calibration import (
    adaptive_calibration_error,
    calibration_error_interval,
    debiased_calibration_error,
    expected_calibration_error,
)

N, BINS = 300, 15


def simulate(accuracy: Callable[[Tensor], Tensor], times: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Data sets of confidences uniform in (1/2, 1) that are right as often as `accuracy` says."""
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for _ in range(times):
        confidence = 0.5 + 0.5 * torch.rand(N, generator=generator, dtype=torch.float64)
        right = torch.rand(N, generator=generator, dtype=torch.float64) < accuracy(confidence)
        sets.append(predictions(confidence, right.long()))
    return sets


def mean_of(metric: Callable[[Tensor, Tensor], float], sets: list[tuple[Tensor, Tensor]]) -> float:
    return sum(metric(probs, labels) for probs, labels in sets) / len(sets)


def test_adaptive_bins_hold_equally_many():
    probs, labels, confidence, right = random_predictions(103)
    order = confidence.argsort()
    expected, start = 0.0, 0
    for size in [7] * 13 + [6] * 2:
        part = order[start : start + size]
        expected += size / 103 * abs(float(right[part].double().mean() - confidence[part].mean()))
        start += size
    assert start == 103
    assert adaptive_calibration_error(probs, labels) == pytest.approx(expected, abs=1e-12)


def test_adaptive_hand_computed():
    probs, labels = predictions([0.9, 0.5, 0.8, 0.6], [1, 0, 0, 1])
    assert adaptive_calibration_error(probs, labels, bins=2) == pytest.approx((abs(1 - 1.1) + abs(1 - 1.7)) / 4)
    assert adaptive_calibration_error(probs, labels, bins=1) == pytest.approx(abs(2 - 2.8) / 4)
    # more bins than examples: each is alone
    assert adaptive_calibration_error(probs, labels, bins=9) == pytest.approx((0.1 + 0.5 + 0.8 + 0.4) / 4)


def test_adaptive_does_not_depend_on_the_order_of_ties():
    confidence, right = [0.9, 0.9, 0.9, 0.9, 0.6, 0.6], [1, 0, 1, 1, 0, 1]
    values = set()
    for order in itertools.permutations(range(6)):
        chosen = predictions([confidence[i] for i in order], [right[i] for i in order])
        values.add(round(adaptive_calibration_error(*chosen, bins=4), 12))
    # 3/4 right at 0.9 and 1/2 at 0.6, whichever bins they fall into
    assert values == {round((4 * 0.15 + 2 * 0.1) / 6, 12)}


def test_debiased_is_the_mean_over_pairs():
    probs, labels, confidence, right = random_predictions(90)
    gaps = right - confidence
    total = weight = 0.0
    for b in range(BINS):
        inside = [i for i in range(90) if b / BINS < confidence[i] <= (b + 1) / BINS]
        if len(inside) > 1:
            products = [float(gaps[i] * gaps[j]) for i in inside for j in inside if i != j]
            total += len(inside) * sum(products) / len(products)
            weight += len(inside)
    squared = total / weight
    expected = math.copysign(math.sqrt(abs(squared)), squared)
    assert abs(expected) > 0.01
    assert debiased_calibration_error(probs, labels) == pytest.approx(expected, abs=1e-12)


def test_debiased_is_ferro_and_frickers_where_confidences_are_equal():
    """Their correction of a bin: squared gap less accuracy (1 - accuracy) / (n - 1)."""
    probs, labels = predictions([0.9] * 20 + [0.6] * 30, [1] * 14 + [0] * 6 + [1] * 12 + [0] * 18)
    bins = [(20, 0.9, 0.7), (30, 0.6, 0.4)]
    squared = sum(n / 50 * ((p - a) ** 2 - a * (1 - a) / (n - 1)) for n, p, a in bins)
    assert debiased_calibration_error(probs, labels) == pytest.approx(math.sqrt(squared), abs=1e-12)


def test_debiased_of_bins_with_one_example():
    assert math.isnan(debiased_calibration_error(*predictions([0.9], [1])))
    assert math.isnan(debiased_calibration_error(*predictions([0.9, 0.5], [1, 0])))
    alone = debiased_calibration_error(*predictions([0.9, 0.9, 0.9], [0, 0, 1]))
    assert debiased_calibration_error(*predictions([0.9, 0.9, 0.9, 0.5], [0, 0, 1, 0])) == pytest.approx(alone)


def test_perfect_calibration_is_near_zero_without_the_bias():
    sets = simulate(lambda confidence: confidence, 400)
    assert mean_of(expected_calibration_error, sets) == pytest.approx(0.052, abs=0.004)
    assert mean_of(adaptive_calibration_error, sets) > 0.05
    found = torch.tensor([debiased_calibration_error(*one) for one in sets], dtype=torch.float64)
    assert abs(float(found.mean())) < 0.012  # -0.006 and noise: the docstring says so
    assert float(found.min()) < -0.02  # not cut off
    squares = found * found.abs()
    assert abs(float(squares.mean())) < 3 * float(squares.std()) / math.sqrt(len(sets))


@pytest.mark.parametrize(
    ("accuracy", "truth"),
    [
        (lambda c: c - 0.1, 0.1),
        (lambda c: c - 0.2, 0.2),
        (lambda c: torch.where(c > 11 / 15, c - 0.3, c), math.sqrt((1 - 11 / 15) / 0.5) * 0.3),
    ],
)
def test_miscalibration_is_found(accuracy, truth):
    sets = simulate(accuracy, 300)
    assert mean_of(debiased_calibration_error, sets) == pytest.approx(truth, abs=0.01)
    found = torch.tensor([debiased_calibration_error(*one) for one in sets], dtype=torch.float64)
    squares = found * found.abs()
    assert abs(float(squares.mean()) - truth**2) < 3 * float(squares.std()) / math.sqrt(len(sets))


@pytest.mark.parametrize(
    ("accuracy", "truth", "least"),
    [
        (lambda c: c, 0.0, 0.92),
        (lambda c: c - 0.05, 0.05, 0.85),
        (lambda c: c - 0.2, 0.2, 0.88),
        # all of it in one bin, where the chance in the others widens too little: what the docstring says of it
        (lambda c: torch.where(c > 14 / 15, c - 0.3, c), 0.3 * 2 / 15, 0.70),
    ],
)
def test_intervals_cover_what_they_say(accuracy, truth, least):
    sets = simulate(accuracy, 120)
    found = [calibration_error_interval(*one, resamples=300) for one in sets]
    covered = sum(one.low <= truth + 1e-12 and truth <= one.high for one in found) / len(found)
    assert least <= covered
    assert sum(one.high - one.low for one in found) / len(found) < 0.12


def test_interval_against_exact_binomial_tails():
    """One bin: its ends are accuracies under which a tail of the binomial has 5 %."""
    n, right, sure = 40, 26, 0.9
    one = calibration_error_interval(
        *predictions([sure] * n, [1] * right + [0] * (n - right)), level=0.9, resamples=20_000
    )
    assert one.ece == pytest.approx(sure - right / n)
    for end, tail in ((one.low, range(right + 1)), (one.high, range(right, n + 1))):
        a = sure - end
        assert sum(math.comb(n, k) * a**k * (1 - a) ** (n - k) for k in tail) == pytest.approx(0.05, abs=0.006)


def test_interval_where_all_is_right_is_the_rule_of_three():
    one = calibration_error_interval(*predictions([0.9999] * 100, [1] * 100), resamples=4000)
    assert one.low == 0
    assert one.high == pytest.approx(1 - 0.025 ** (1 / 100), rel=0.05)


def test_interval_without_a_direction():
    # one right in two at 1/2: smoothed or not, no gap is seen
    one = calibration_error_interval(torch.full((2, 2), 0.5), torch.tensor([0, 1]))
    assert (one.ece, one.low) == (0, 0)
    assert one.high > 0.2


def test_interval_is_repeatable_and_leaves_the_global_generator():
    (probs, labels), *_ = simulate(lambda c: c - 0.1, 1)
    state = torch.get_rng_state()
    one = calibration_error_interval(probs, labels, resamples=200)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert calibration_error_interval(probs, labels, resamples=200) == one
    assert calibration_error_interval(probs.flip(0), labels.flip(0), resamples=200).low == pytest.approx(one.low)
    assert calibration_error_interval(probs, labels, resamples=200, seed=1) != one
    assert one.ece == pytest.approx(expected_calibration_error(probs, labels))
    assert one.level == 0.95
    narrow = calibration_error_interval(probs, labels, resamples=200, level=0.5)
    assert one.low < narrow.low < narrow.high < one.high


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": 1}, TypeError, r"level: expected a float in \(0, 1\), got 1"),
        ({"level": 1.5}, ValueError, r"level: expected a number in \(0, 1\), got 1.5"),
        ({"level": math.nan}, ValueError, r"level: expected a number in \(0, 1\), got nan"),
        ({"resamples": 0}, ValueError, "resamples: expected at least 1, got 0"),
        ({"resamples": 1.0}, TypeError, "resamples: expected a positive int, got 1.0"),
        ({"seed": "a"}, TypeError, "seed: expected an int, got 'a'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        calibration_error_interval(*predictions([0.9], [1]), **options)


@pytest.mark.parametrize("metric", [adaptive_calibration_error, debiased_calibration_error, calibration_error_interval])
def test_bad_arguments(metric):
    probs, labels = predictions([0.9], [1])
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        metric(probs, labels, 0)
    with pytest.raises(TypeError, match="bins: expected a positive int, got True"):
        metric(probs, labels, True)
    with pytest.raises(ValueError, match=r"labels: expected shape \[1\]"):
        metric(probs, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="probs: expected rows that sum to 1"):
        metric(probs * 2, labels)
