"""The log marginal likelihood of a Laplace approximation, and the prior precision that maximises it.

    log p(y | X) = log p(y | X, theta) - lambda / 2 ||theta||^2 + P / 2 log lambda - 1 / 2 logdet(F + lambda I)

of a regression with its noise variance in the likelihood and in F.

Source: MacKay 1992, "Bayesian interpolation"; Immer et al. 2021, "Scalable marginal likelihood estimation".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bayesian_lora_kernels.posterior.curvature import Curvature
from bayesian_lora_kernels.posterior.noise import Residuals
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.posterior.prior import Prior

LOG_RANGE = (math.log(1e-8), math.log(1e12))
GRID = 33
# Each round keeps two of the 32 intervals: 8 rounds narrow the range by 16^8.
ROUNDS = 8
STEPS = 200


class PriorPrecisionWarning(UserWarning):
    """The evidence has no maximum inside the range that was searched."""


def log_evidence(log_likelihood: float | Tensor, posterior: Posterior, square_norms: Mapping[str, Tensor]) -> Tensor:
    """Log marginal likelihood, 0-d float64, differentiable in the prior precisions and the noise variance.

    Args:
        log_likelihood: of the labels at the MAP weights, summed over the data set.
        posterior: of the weights.
        square_norms: `{layer: ||theta||^2}` of the MAP weights.
    """
    prior, n_parameters = posterior.prior, posterior.curvature.n_parameters
    device = prior[next(iter(n_parameters))].device
    log_prior = torch.stack(
        [
            0.5 * n * prior[name].to(device).log() - 0.5 * prior[name].to(device) * square_norms[name].to(device)
            for name, n in n_parameters.items()
        ]
    ).sum()
    return log_likelihood + log_prior - 0.5 * posterior.logdet.to(device)


def effective_parameters(posterior: Posterior) -> dict[str, float]:
    """How many parameters of each layer the data determine, rather than the prior: `P - lambda tr(Sigma)`, in [0, P].

    Where the curvature couples its layers, there is the number of all together only, under the name `""`. Source:
    MacKay 1992.
    """
    prior, curvature = posterior.prior.detached(), posterior.curvature
    counts = curvature.n_parameters if curvature.independent_layers else {"": sum(curvature.n_parameters.values())}
    logs = torch.zeros(len(counts), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        factor = dict(zip(counts, logs.exp().unbind(), strict=True))
        scaled: Tensor | dict[str, Tensor]
        if prior.shared is not None and not curvature.independent_layers:
            scaled = prior.shared * factor[""].to(prior.shared.device)
        else:
            keys = {name: name if curvature.independent_layers else "" for name in curvature.shapes}
            scaled = {name: prior[name] * factor[key].to(prior[name].device) for name, key in keys.items()}
        logdet = replace(posterior, prior=Prior(scaled)).logdet
    (traces,) = torch.autograd.grad(logdet, logs)  # lambda d logdet / d lambda = lambda tr(Sigma)
    return {name: n - trace for (name, n), trace in zip(counts.items(), traces.tolist(), strict=True)}


def maximise_evidence(
    curvature: Curvature, square_norms: Mapping[str, Tensor], per_module: bool, noise_variance: float | Tensor = 1.0
) -> Prior:
    """The prior of the largest evidence, one precision for all layers or one each.

    With independent layers or one precision this is a search in one variable over the eigenvalues. Where the curvature
    couples its layers, a quasi-Newton search starts from the shared optimum.

    Warns:
        PriorPrecisionWarning: if the maximum lies at the end of the range, for instance because all weights are zero.
    """
    names, noise = list(curvature.shapes), float(noise_variance)
    if per_module and curvature.independent_layers:
        spectra = {name: curvature.spectrum([name]) for name in names}
        return Prior({n: _maximise_shared(*spectra[n], float(square_norms[n]), n, noise) for n in names})
    shared = _maximise_shared(*curvature.spectrum(), _total(square_norms), "the model", noise)
    if not per_module:
        return Prior(shared)
    return _climb(Posterior(curvature, Prior(shared), noise), square_norms)


def maximise_with_noise(
    curvature: Curvature, square_norms: Mapping[str, Tensor], per_module: bool, residuals: Residuals
) -> tuple[Prior, float]:
    """The prior and the noise variance of the largest evidence of a regression.

    For a precision r in units of the inverse noise variance (`posterior/noise.py`) the best variance is known: what is
    left of the targets, and r times what the weights take, per target, `(E + r ||theta||^2) / N`. With it the evidence
    is a function of r alone, `- N / 2 log(E + r ||theta||^2) + P / 2 log r - 1 / 2 logdet(F + r I)` and constants.

    Raises:
        ValueError: if the outputs are all of the targets, and all weights zero.

    Warns:
        PriorPrecisionWarning: as `maximise_evidence`.
    """
    error, targets = residuals
    if error + _total(square_norms) == 0:
        raise ValueError(
            "noise_variance: the outputs are the targets and the weights are zero, so that no noise is best"
        )

    def penalty(taken: Tensor) -> Tensor:
        return 0.5 * targets * (error + taken).log()

    where = "the model, times the noise variance,"
    prior = Prior(_maximise_shared(*curvature.spectrum(), _total(square_norms), where, penalty=penalty))
    if per_module:
        prior = _climb(Posterior(curvature, prior), square_norms, penalty)
    noise = (error + float(_taken(prior, square_norms))) / targets
    return prior.times(torch.tensor(1 / noise, dtype=torch.float64)), noise


def _total(square_norms: Mapping[str, Tensor]) -> float:
    return float(sum(float(norm) for norm in square_norms.values()))


def _taken(prior: Prior, square_norms: Mapping[str, Tensor]) -> Tensor:
    """The sum over layers of `lambda ||theta||^2`, 0-d on the CPU."""
    return torch.stack([(prior[n].to(norm.device) * norm).cpu() for n, norm in square_norms.items()]).sum()


def _half(taken: Tensor) -> Tensor:
    return 0.5 * taken


def _maximise_shared(
    values: Tensor,
    multiplicity: Tensor,
    square_norm: float,
    where: str,
    noise: float = 1.0,
    penalty: Callable[[Tensor], Tensor] = _half,
) -> float:
    values = values / noise

    def negative(log_precision: Tensor) -> Tensor:
        precision = log_precision.exp().to(values.device)
        # P log(lambda) - logdet = -sum log(1 + eig / lambda)
        logdet = torch.stack([(torch.log1p(values / one) * multiplicity).sum() for one in precision])
        return (penalty(precision * square_norm) + 0.5 * logdet).cpu()

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
    _warn_at_the_end(best, where)
    return best


def _warn_at_the_end(log_precision: float, where: str) -> None:
    if min(log_precision - LOG_RANGE[0], LOG_RANGE[1] - log_precision) < 1e-3:
        warnings.warn(
            f"the best prior precision of {where} lies at the end of the searched range, "
            f"{math.exp(log_precision):.3g}: its weights may all be zero, or the data say nothing about them",
            PriorPrecisionWarning,
            stacklevel=4,
        )


def _climb(start: Posterior, square_norms: Mapping[str, Tensor], penalty: Callable[[Tensor], Tensor] = _half) -> Prior:
    """Quasi-Newton in the log-precisions, from a posterior of one.

    MacKay's fixed point would need thousands of steps: its convergence is linear, and slow wherever the data determine
    only a small part of a layer.
    """
    names = list(start.curvature.shapes)
    values = [math.log(float(start.prior[name])) for name in names]
    logs = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logs], max_iter=STEPS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def precisions() -> dict[str, Tensor]:
        return dict(zip(names, logs.clamp(*LOG_RANGE).exp().unbind(), strict=True))

    def negative() -> Tensor:
        with torch.enable_grad():
            prior = Prior(precisions())
            value = -log_evidence(0.0, replace(start, prior=prior), square_norms)
            if penalty is not _half:
                taken = _taken(prior, square_norms).to(value.device)
                value = value - _half(taken) + penalty(taken)
        (logs.grad,) = torch.autograd.grad(value, logs)
        return value.detach()

    optimizer.step(negative)
    found = {name: float(value.detach()) for name, value in precisions().items()}
    for name, value in found.items():
        _warn_at_the_end(math.log(value), name)
    return Prior(found)
