"""Paired differences against hand-made numbers, all choices of signs, and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from bayesian_lora_kernels.calibration import paired_difference

OURS, THEIRS = [0.30, 0.25, 0.40, 0.35, 0.50], [0.40, 0.35, 0.38, 0.60, 0.50]


def test_hand_computed():
    found = paired_difference(OURS, THEIRS)
    difference = [-0.10, -0.10, 0.02, -0.25, 0.0]
    mean = sum(difference) / 5
    assert found.mean == pytest.approx(mean)
    spread = math.sqrt(sum((d - mean) ** 2 for d in difference) / 4)
    assert found.standard_error == pytest.approx(spread / math.sqrt(5))
    assert found.share_lower == 3 / 5
    assert found.n == 5
    sums = [
        abs(sum(s * d for s, d in zip(signs, difference, strict=True)))
        for signs in itertools.product((-1, 1), repeat=5)
    ]
    assert found.p_value == sum(x >= abs(sum(difference)) - 1e-9 for x in sums) / 32


def test_exact_p_value_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 11, generator=generator, dtype=torch.float64).unbind()
    ours = ours - 0.5
    expected = stats.permutation_test(
        (ours.numpy(), theirs.numpy()), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    found = paired_difference(ours, theirs)
    assert found.p_value == pytest.approx(expected.pvalue, abs=1e-12)
    assert 0.01 < found.p_value < 0.9
    assert found.standard_error == pytest.approx(stats.sem((ours - theirs).numpy()))


def test_drawn_signs_come_near_the_normal_distribution():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(400, generator=generator, dtype=torch.float64) + 0.08
    found = paired_difference(difference, torch.zeros(400), resamples=20_000)
    z = float(difference.sum() / difference.square().sum().sqrt())
    assert 0.01 < found.p_value < 0.9
    assert found.p_value == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.012)


def test_drawn_signs_come_near_the_exact_ones(monkeypatch):
    exact = paired_difference(OURS * 3, THEIRS * 3).p_value  # twelve pairs that differ
    monkeypatch.setattr("bayesian_lora_kernels.calibration.comparison.EXACT_UP_TO", 2)
    monkeypatch.setattr("bayesian_lora_kernels.calibration.comparison._AT_ONCE", 1000)
    assert exact < 0.1
    assert paired_difference(OURS * 3, THEIRS * 3, resamples=20_000).p_value == pytest.approx(exact, abs=0.004)


def test_p_value_is_uniform_without_a_difference():
    generator = torch.Generator().manual_seed(0)
    values = [paired_difference(torch.randn(9, generator=generator), torch.zeros(9)).p_value for _ in range(2000)]
    for level in (0.1, 0.3, 0.6):
        assert sum(p <= level for p in values) / 2000 == pytest.approx(level, abs=0.035)


def test_extremes():
    single = paired_difference([1.0], [2.0])
    assert (single.mean, single.standard_error, single.share_lower, single.p_value, single.n) == (-1, None, 1, 1, 1)
    same = paired_difference([1, 2, 3], [1, 2, 3])
    assert (same.mean, same.standard_error, same.share_lower, same.p_value) == (0, 0, 0, 1)
    assert paired_difference([0.0] * 5, [1.0] * 5).p_value == 2 / 2**5
    assert paired_difference([0.0] * 16, [0.1] * 16).p_value == 2 / 2**16  # a tie with itself, in spite of rounding
    assert paired_difference([0.0] * 100, [1.0] * 100, resamples=999).p_value == 1 / 1000


def test_swapping_turns_the_sign():
    one, other = paired_difference(OURS, THEIRS), paired_difference(THEIRS, OURS)
    assert (other.mean, other.p_value) == (-one.mean, one.p_value)


def test_repeatable_and_leaves_the_global_generator():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 50, generator=generator).unbind()
    state = torch.get_rng_state()
    one = paired_difference(ours, theirs, resamples=500)
    assert torch.equal(torch.get_rng_state(), state)
    assert paired_difference(ours, theirs, resamples=500) == one
    assert paired_difference(ours, theirs, resamples=500, seed=1).p_value != one.p_value


def test_takes_tensors_lists_and_arrays():
    expected = paired_difference(OURS, THEIRS)
    assert paired_difference(torch.tensor(OURS, dtype=torch.float64), np.array(THEIRS)) == expected
    assert paired_difference([torch.tensor(x, dtype=torch.float64) for x in OURS], tuple(THEIRS)) == expected
    right = torch.tensor([True, False, True])
    assert paired_difference(right, ~right).mean == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("ours", "theirs", "error", "message"),
    [
        ([1.0, 2.0], [1.0], ValueError, "theirs: expected 2 numbers, one for each of ours, got 1"),
        ([], [], ValueError, r"ours: expected shape \[N\] with at least one score, got \[0\]"),
        ([[1.0]], [1.0], ValueError, r"ours: expected shape \[N\] with at least one score, got \[1, 1\]"),
        ([1.0], [math.nan], ValueError, "theirs: expected finite numbers, got NaN or infinity at index 0"),
        ("abc", [1.0], TypeError, "ours: expected a tensor or sequence of numbers"),
        ([1.0], ["a"], TypeError, r"theirs: expected a tensor or sequence of numbers \[n\], got \['a'\]"),
        ([1.0, [2.0]], [1.0], TypeError, "ours: expected a tensor or sequence of numbers"),
        (None, [1.0], TypeError, "ours: expected a tensor or sequence of numbers"),
        (torch.ones(1, dtype=torch.complex64), [1.0], TypeError, "ours: expected real numbers, got torch.complex64"),
    ],
)
def test_bad_arguments(ours, theirs, error, message):
    with pytest.raises(error, match=message):
        paired_difference(ours, theirs)


def test_bad_options():
    with pytest.raises(ValueError, match="resamples: expected at least 1, got 0"):
        paired_difference([1.0], [1.0], resamples=0)
    with pytest.raises(TypeError, match="seed: expected an int, got None"):
        paired_difference([1.0], [1.0], seed=None)  # type: ignore[arg-type]
