"""How well a number tells two kinds apart, by how much that may be chance, and whether another number adds to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration import ood_auroc

RESAMPLES = 2000
RIDGE = 0.01  # twice the weight of the squared coefficients of scaled columns, so that separable data have a fit
STEPS = 50


class Interval(NamedTuple):
    """An estimate and the middle 95 % of its bootstrap resamples."""

    value: float
    low: float
    high: float


def bootstrap(statistic: Callable[..., float], *counts: int, seed: int = 0) -> Interval:
    """A statistic of rows and of rows drawn with replacement.

    Args:
        statistic: of indices `[count]` into each set of rows.
        counts: of rows in each set; the sets are drawn independently.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(count, (RESAMPLES, count), generator=generator) for count in counts]
    found = torch.tensor([statistic(*rows) for rows in zip(*draws, strict=True)], dtype=torch.float64)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(statistic(*map(torch.arange, counts)), low, high)


def auroc_of_pairs(lower: Tensor, higher: Tensor) -> Interval:
    """P(a random one of `higher` exceeds a random one of `lower`), both `[N]`; whole pairs are resampled."""
    return bootstrap(lambda rows: ood_auroc(lower[rows], higher[rows]), len(lower))


def auroc(lower: Tensor, higher: Tensor) -> Interval:
    """The same of two independent sets, `[N]` and `[M]`, each resampled by itself."""
    return bootstrap(lambda rows, others: ood_auroc(lower[rows], higher[others]), len(lower), len(higher))


def share_higher(lower: Tensor, higher: Tensor) -> Interval:
    """Share of pairs, both `[N]`, whose second number is the higher one; equal ones count half."""
    wins = (higher > lower).double() + 0.5 * (higher == lower).double()
    return bootstrap(lambda rows: float(wins[rows].mean()), len(wins))


def held_out_margins(rows: Tensor) -> Tensor:
    """Leave-one-out margins of a logistic regression, `[N]`.

    The model is P(row is as it is, and not its opposite) = sigmoid(row . w), with a small ridge. Of differences
    within pairs that is conditional logistic regression, in which whatever the two have in common drops out; of rows
    `y * (x, 1)` with y = 1 or -1 it is the ordinary one.

    Args:
        rows: `[N, K]`.
    """
    rows = rows.double()
    rows = rows / rows.square().mean(dim=0).sqrt().clamp_min(1e-12)
    keep = ~torch.eye(len(rows), dtype=torch.bool)
    return torch.stack([rows[i] @ _fit(rows[keep[i]]) for i in range(len(rows))])


def _fit(rows: Tensor) -> Tensor:
    """Maximum of the mean log-likelihood less the ridge, by Newton's method: it is concave."""
    w = rows.new_zeros(rows.shape[1])
    eye = torch.eye(len(w), dtype=rows.dtype)
    for _ in range(STEPS):
        wrong = torch.sigmoid(-(rows @ w))
        gradient = (rows * wrong[:, None]).mean(dim=0) - RIDGE * w
        hessian = (rows * (wrong * (1 - wrong))[:, None]).T @ rows / len(rows) + RIDGE * eye
        step = torch.linalg.solve(hessian, gradient)
        w = w + step
        if float(step.abs().max()) < 1e-10:
            break
    return w


def log_loss(margins: Tensor) -> Tensor:
    """`[N]`, in nats; log 2 is chance."""
    return torch.nn.functional.softplus(-margins)
