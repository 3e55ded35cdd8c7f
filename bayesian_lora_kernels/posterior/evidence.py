"""The log marginal likelihood of a Laplace approximation, and the prior precision that maximises it.

    log p(y | X) = log p(y | X, theta) - lambda / 2 ||theta||^2 + P / 2 log lambda - 1 / 2 logdet(F + lambda I)

Source: MacKay 1992, "Bayesian interpolation"; Immer et al. 2021, "Scalable marginal likelihood estimation".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bayesian_lora_kernels.posterior.exact import ExactPosterior
from bayesian_lora_kernels.posterior.layerwise import LayerwisePosterior

Posterior = LayerwisePosterior | ExactPosterior

LOG_RANGE = (math.log(1e-8), math.log(1e12))
GRID = 33
# Each round keeps two of the 32 intervals: 8 rounds narrow the range by 16^8.
ROUNDS = 8


class PriorPrecisionWarning(UserWarning):
    """The evidence has no maximum inside the range that was searched."""


def log_evidence(
    log_likelihood: float,
    posterior: Posterior,
    square_norms: Mapping[str, Tensor],
    prior: Mapping[str, Tensor],
) -> Tensor:
    """Log marginal likelihood, 0-d float64, differentiable in the prior precisions.

    Args:
        log_likelihood: of the labels at the MAP weights, summed over the data set.
        posterior: of the weights.
        square_norms: `{layer: ||theta||^2}` of the MAP weights.
        prior: `{layer: prior precision}`, 0-d each.
    """
    n_parameters = posterior.n_parameters
    device = next(iter(prior.values())).device
    log_prior = torch.stack(
        [
            0.5 * n_parameters[name] * precision.to(device).log()
            - 0.5 * precision.to(device) * square_norms[name].to(device)
            for name, precision in prior.items()
        ]
    ).sum()
    return log_likelihood + log_prior - 0.5 * posterior.logdet(prior).to(device)


def maximise_evidence(posterior: Posterior, square_norms: Mapping[str, Tensor], per_module: bool) -> dict[str, float]:
    """`{layer: prior precision}` of the largest evidence, one for all layers or one each.

    With independent layers or one precision this is a search in one variable over the eigenvalues. The exact
    posterior couples its layers: MacKay's fixed point `lambda <- gamma / ||theta||^2` then starts from the shared
    optimum.

    Warns:
        PriorPrecisionWarning: if the maximum lies at the end of the range, for instance because all weights are zero.
    """
    names = list(posterior.n_parameters)
    if per_module and isinstance(posterior, LayerwisePosterior):
        return {name: _maximise_shared(*posterior.spectrum([name]), float(square_norms[name]), name) for name in names}
    total = float(sum(float(norm) for norm in square_norms.values()))
    shared = _maximise_shared(*posterior.spectrum(), total, "the model")
    if not per_module:
        return dict.fromkeys(names, shared)
    assert isinstance(posterior, ExactPosterior)
    return _fixed_point(posterior, square_norms, dict.fromkeys(names, shared))


def _maximise_shared(values: Tensor, multiplicity: Tensor, square_norm: float, where: str) -> float:
    def negative(log_precision: Tensor) -> Tensor:
        precision = log_precision.exp().to(values.device)
        # P log(lambda) - logdet = -sum log(1 + eig / lambda)
        logdet = torch.stack([(torch.log1p(values / one) * multiplicity).sum() for one in precision])
        return (0.5 * precision * square_norm + 0.5 * logdet).cpu()

    return math.exp(minimise_on_grid(negative, where))


def minimise_on_grid(function: Callable[[Tensor], Tensor], where: str, rounds: int = ROUNDS, grid: int = GRID) -> float:
    """Minimum of a function of one log-precision over `LOG_RANGE`, by grids that close in on the best point.

    Args:
        function: `[m]` log-precisions -> `[m]` values.
        where: what is tuned, for the warning.
        rounds: how many grids.
        grid: points of each grid.
    """
    low, high = LOG_RANGE
    best = low
    for _ in range(rounds):
        points = torch.linspace(low, high, grid, dtype=torch.float64)
        index = int(function(points).nan_to_num(nan=math.inf).argmin())
        best = float(points[index])
        low, high = float(points[max(index - 1, 0)]), float(points[min(index + 1, grid - 1)])
    if min(best - LOG_RANGE[0], LOG_RANGE[1] - best) < 1e-3:
        warnings.warn(
            f"the best prior precision of {where} lies at the end of the searched range, {math.exp(best):.3g}: its "
            "weights may all be zero, or the data say nothing about them",
            PriorPrecisionWarning,
            stacklevel=3,
        )
    return best


def _fixed_point(
    posterior: ExactPosterior, square_norms: Mapping[str, Tensor], prior: dict[str, float], steps: int = 1000
) -> dict[str, float]:
    low, high = (math.exp(bound) for bound in LOG_RANGE)
    for _ in range(steps):
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in prior.items()}
        gamma = posterior.effective_dimensions(tensors)
        new = {}
        for name, norm in square_norms.items():
            new[name] = min(max(float(gamma[name]) / max(float(norm), 1e-300), low), high)
        change = max(abs(math.log(new[name] / prior[name])) for name in prior)
        prior = new
        if change < 1e-7:
            break
    return prior
