"""Is one model better than another, beyond chance? Metrics of both over the same seeds or examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration.checks import check_count, check_scores, seeded

EXACT_UP_TO = 16  # pairs: 2^16 ways to choose their signs
_AT_ONCE = 2**20  # random signs in memory


@dataclass(frozen=True)
class PairedDifference:
    """Ours less theirs, pair by pair.

    Attributes:
        mean: of the differences.
        standard_error: of that mean; None from a single pair.
        share_lower: the share of pairs in which ours is strictly lower.
        p_value: two-sided, of the sign-flip test.
        n: how many pairs.
    """

    mean: float
    standard_error: float | None
    share_lower: float
    p_value: float
    n: int


def paired_difference(
    ours: Tensor | Sequence[float], theirs: Tensor | Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Compare a metric of two methods over pairs, such as the same seeds, or the same examples of one test set.

    The p-value is the share of all choices of signs for the differences whose sum is at least as far from zero as the
    one that was seen; it assumes that without a difference between the methods either sign was as likely. It is exact
    for up to 16 pairs that differ. With more, signs are drawn, and it is `(1 + as far) / (1 + drawn)`. It cannot be
    smaller than 2 / 2^n: five pairs never reach 0.05.

    Source: Fisher 1935, "The design of experiments", section 21; drawn signs: Phipson, Smyth 2010, "Permutation
    p-values should never be zero".

    Args:
        ours: `[n]`, the metric of one method.
        theirs: `[n]`, of the other; what has the same index is a pair.
        resamples: how many choices of signs are drawn, if not all are counted.
        seed: of the draws; the global random numbers are left alone.

    Raises:
        TypeError, ValueError: for arguments other than those, for no pair, and numbers that are not finite.
    """
    left, right = _numbers(ours, "ours"), _numbers(theirs, "theirs")
    if len(left) != len(right):
        raise ValueError(f"theirs: expected {len(left)} numbers, one for each of ours, got {len(right)}")
    difference = left - right
    n = len(difference)
    return PairedDifference(
        mean=float(difference.mean()),
        standard_error=float(difference.std()) / math.sqrt(n) if n > 1 else None,
        share_lower=float((difference < 0).double().mean()),
        p_value=_sign_flips(difference[difference != 0], check_count(resamples, "resamples"), seeded(seed)),
        n=n,
    )


def _sign_flips(difference: Tensor, resamples: int, generator: torch.Generator) -> float:
    """The two-sided p-value; differences of zero are left out before, as their sign changes nothing."""
    n = len(difference)
    far = float(difference.sum().abs() - 1e-12 * difference.abs().sum())
    if n <= EXACT_UP_TO:
        signs = (torch.arange(2**n, device="cpu")[:, None] >> torch.arange(n, device="cpu")) & 1
        return float((((2 * signs - 1).double() @ difference).abs() >= far).double().mean())
    reached, rows = 0, max(1, _AT_ONCE // n)
    for start in range(0, resamples, rows):
        signs = torch.randint(2, (min(rows, resamples - start), n), generator=generator, device="cpu")
        reached += int((((2 * signs - 1).double() @ difference).abs() >= far).sum())
    return (1 + reached) / (1 + resamples)


def _numbers(values: Tensor | Sequence[float], name: str) -> Tensor:
    if isinstance(values, Tensor):
        return check_scores(values, name)
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a tensor or sequence of numbers [n], got {values!r:.60}") from error
    return check_scores(numbers, name)
