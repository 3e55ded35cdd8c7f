"""Temperature scaling: the baseline that needs held-out labels."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from bayesian_lora_kernels.calibration.checks import check_labels, check_matrix

LOWEST, HIGHEST = 1e-3, 1e3


def temperature_scale(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 for which `softmax(logits / T)` gives held-out labels the largest likelihood.

    The likelihood is concave in 1/T, so bisection of its derivative finds the one maximum.

    Source: Guo, Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks".

    Args:
        logits: `[N, C]`, of examples that the model was not trained on.
        labels: `[N]`, their class indices.

    Returns:
        T, between 0.001 and 1000.

    Raises:
        TypeError, ValueError: for arguments other than those.

    Warns:
        RuntimeWarning: if the likelihood still grows at one of those limits (every label predicted right, or
            predictions worse than a guess), so that there is no best temperature.
    """
    values = check_matrix(logits, "logits")
    targets = check_labels(labels, *values.shape)
    values = values - values.gather(-1, targets[:, None])

    def slope(temperature: float) -> float:
        """Derivative of the mean negative log-likelihood in 1/T; it grows with 1/T."""
        return float(((values / temperature).softmax(dim=-1) * values).sum(dim=-1).mean())

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if slope(LOWEST) <= 0 or slope(HIGHEST) >= 0:
        limit = HIGHEST if slope(HIGHEST) >= 0 else LOWEST
        warnings.warn(
            f"temperature_scale: no best temperature in [{LOWEST:g}, {HIGHEST:g}]; the held-out likelihood of "
            f"{len(values)} examples still grows at {limit:g}",
            RuntimeWarning,
            stacklevel=2,
        )
        return limit
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) < 0 else (middle, high)
    return math.exp((low + high) / 2)
