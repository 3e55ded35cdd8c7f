"""The noise of a regression, of which a fit measures everything at variance 1.

At variance s the curvature is `F / s`, so that with `r = l s` for a prior precision l

    F / s + l = (F + r) / s,  logdet(F / s + l) = logdet(F + r) - P log s,

and nothing is measured again. Source: MacKay 1992, "Bayesian interpolation".
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Residuals(NamedTuple):
    """What the outputs of a regression miss of their targets.

    Attributes:
        square_error: sum of the squares.
        targets: how many there are; both count each as often as the weight of its example says.
    """

    square_error: float
    targets: float

    @classmethod
    def of(cls, log_likelihood: float, targets: float) -> Residuals:
        """From the log-likelihood at unit noise."""
        return cls(max(-2 * log_likelihood - targets * math.log(2 * math.pi), 0.0), targets)

    def log_likelihood(self, noise_variance: Tensor) -> Tensor:
        """Of the targets, 0-d float64, differentiable in the noise variance."""
        return -0.5 * (self.square_error / noise_variance + self.targets * (2 * math.pi * noise_variance).log())
