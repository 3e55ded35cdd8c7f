"""What needs logits and held-out labels only: temperature scaling, plain and averaged over temperatures."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bayesian_lora_kernels.calibration import temperature_scale
from bayesian_lora_kernels.predictive import calibrate

# The same temperatures and the same prior as the package's calibration.
LOG_TEMPERATURES = torch.linspace(*calibrate.LOG_TEMPERATURES, dtype=torch.float64)
PRIOR_MEAN, PRIOR_SD = calibrate.TEMPERATURE_PRIOR  # of ln T
NAMES = ("temperature", "averaged temperatures")


def log_posterior(logits: Tensor, labels: Tensor) -> Tensor:
    """`[G]`, of the temperatures on the grid, given held-out labels; up to a constant."""
    tempered = logits.double()[None] / LOG_TEMPERATURES.exp()[:, None, None]
    chosen = tempered.log_softmax(dim=-1).gather(-1, labels[None, :, None].expand(len(tempered), -1, 1))
    prior = -((LOG_TEMPERATURES - PRIOR_MEAN) / PRIOR_SD).square() / 2
    return chosen.sum(dim=(1, 2)) + prior


def scaled(held_out: Tensor, labels: Tensor, logits: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`{method: {split: [N, C]}}`, probabilities for the logits of each split.

    Args:
        held_out: `[M, C]`, logits of the held-out examples.
        labels: `[M]`, theirs.
        logits: `{split: [N, C]}`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # every label predicted right: T is at its limit
        plain = temperature_scale(held_out, labels)
    posterior = log_posterior(held_out, labels)
    weights = posterior.softmax(dim=0)

    def averaged(values: Tensor) -> Tensor:
        tempered = values.double()[None] / LOG_TEMPERATURES.exp()[:, None, None]
        return torch.einsum("g,gnc->nc", weights, tempered.softmax(dim=-1))

    return {
        "temperature": {split: (values.double() / plain).softmax(dim=-1) for split, values in logits.items()},
        "averaged temperatures": {split: averaged(values) for split, values in logits.items()},
    }
