"""From Gaussian logits to class probabilities, by what a softmax can see of them: differences of logits.

Adding one random variable to all logits changes nothing in any of these. For two classes `pairwise` and `scalar` are
MacKay's formula for the difference of the logits; a temperature and a factor of the variance say how much of either to
believe.

Sources: MacKay 1992, "The evidence framework applied to classification networks"; Hobbhahn, Kristiadi, Hennig 2022,
"Fast predictive uncertainty for classification with Bayesian deep networks".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# What is added to the diagonal, relative to its mean, until the Cholesky decomposition succeeds.
JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)
ROUNDING = 1e-4  # of the largest variance: what a negative eigenvalue may be
SLICE = 2**22  # numbers at once


@dataclass(frozen=True)
class TemperedFormula:
    """Log-probabilities that are a function of `x / sqrt(T^2 + pi/8 b v)`, for a temperature T and a factor b.

    Attributes:
        read: from mean `[N, C]` and covariance `[N, C, C]` to x and v, which do not depend on T and b.
        finish: from their quotient `[..., N, ...]` to log-probabilities `[..., N, C]`.
    """

    read: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    finish: Callable[[Tensor], Tensor]

    def __call__(self, mean: Tensor, covariance: Tensor, temperature: float = 1.0, factor: float = 1.0) -> Tensor:
        """`[N, C]`; T must be positive, and b = 0 is temperature scaling."""
        x, v = self.read(mean, covariance)
        return self.finish(x / (temperature**2 + math.pi / 8 * factor * v).sqrt())

    def on_grid(
        self, mean: Tensor, covariance: Tensor, temperatures: Tensor, factors: Tensor
    ) -> Iterator[tuple[Tensor, slice, slice]]:
        """Log-probabilities `[g, n, C]` of some examples at some of the pairs `[G]`, and which: a slice of either."""
        squared, scale = temperatures.to(mean).square(), math.pi / 8 * factors.to(mean)
        for rows in row_slices(mean, 16):
            x, v = self.read(mean[rows], covariance[rows])
            step = max(1, SLICE // x.numel())
            for points in (slice(i, i + step) for i in range(0, len(squared), step)):
                t, b = (each[points].reshape(-1, *[1] * v.ndim) for each in (squared, scale))
                yield self.finish(x / (t + b * v).sqrt()), rows, points


def _pairs(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    return mean[:, :, None] - mean[:, None, :], _variances_of_differences(covariance)


def _mean_of_pairs(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    c = mean.shape[1]
    variance = _variances_of_differences(covariance).sum(dim=(1, 2)) / max(c * (c - 1), 1)
    return _centred(mean), variance[:, None]


#: From the variance of every difference of two logits: `1 / p_k` is the sum over j of
#: `exp(-(f_k - f_j) / sqrt(T^2 + pi/8 b S_kj))`, with `S_kj` the variance of `f_k - f_j`; then divided by their sum.
pairwise_log_probs = TemperedFormula(_pairs, lambda scaled: (-(-scaled).logsumexp(dim=-1)).log_softmax(dim=-1))

#: From the mean v of these variances: the softmax of `f / sqrt(T^2 + pi/8 b v)`, which keeps the most probable class.
scalar_log_probs = TemperedFormula(_mean_of_pairs, lambda scaled: scaled.log_softmax(dim=-1))


def probit_log_probs(mean: Tensor, covariance: Tensor) -> Tensor:
    """`[N, C]`, the softmax of `f / sqrt(1 + pi/8 variance)`, both of the logits less their mean."""
    variance = differences_only(covariance).diagonal(dim1=1, dim2=2).clamp_min(0)
    return (_centred(mean) / (1 + math.pi / 8 * variance).sqrt()).log_softmax(dim=1)


def bridge_log_probs(mean: Tensor, covariance: Tensor) -> Tensor:
    """`[N, C]`, the mean of the Dirichlet that the Laplace bridge matches to the logits less their mean."""
    c = mean.shape[1]
    mean = _centred(mean)
    variance = differences_only(covariance).diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(mean.dtype).tiny)
    # log of exp(mean) / C^2 * sum exp(-mean), which overflows by itself
    spread = mean + (-mean).logsumexp(dim=1, keepdim=True) - 2 * math.log(c)
    constant = torch.full_like(spread, math.log(1 - 2 / c) if c > 2 else -math.inf)
    return (torch.logaddexp(constant, spread) - variance.log()).log_softmax(dim=1)


def sampled_probs(mean: Tensor, covariance: Tensor, n_samples: int, generator: torch.Generator | None) -> Tensor:
    """`[N, C]`, the average of the softmax over `n_samples` scrambled Sobol points, which all examples share.

    Args:
        mean: `[N, C]`.
        covariance: `[N, C, C]`.
        n_samples: of these, powers of two fill the space most evenly.
        generator: of the scrambling; None: torch's global one.

    Raises:
        ValueError: if a covariance is not finite or not positive semi-definite.
    """
    c = mean.shape[1]
    if c == 1:
        return torch.ones_like(mean)
    if not torch.isfinite(covariance).all():
        raise ValueError("covariance: expected finite numbers, got NaN or infinity")
    basis = orthonormal_contrasts(c, mean)
    # What is shared goes by subtraction first: a product in TF32 would not cancel it.
    values, vectors = torch.linalg.eigh(basis.T @ differences_only(covariance) @ basis)
    # Where logits share most of their variance, what is left of it after rounding need not be positive.
    least = -ROUNDING * covariance.diagonal(dim1=1, dim2=2).amax(dim=1)
    if (negative := values[:, 0] < least).any():
        raise ValueError(
            f"covariance: expected a positive semi-definite matrix, example {int(negative.nonzero()[0])} is not"
        )
    # The first Sobol dimensions are the most even; the largest eigenvalues, which come last, take them.
    factor = basis @ (vectors * values.clamp_min(0).sqrt()[:, None, :]).flip(2)  # [N, C, C - 1]
    device = mean.device if generator is None else generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    engine = torch.quasirandom.SobolEngine(c - 1, scramble=True, seed=seed)
    first = engine.quasi.double() / 2**engine.MAXBIT  # the engine's own is in the default dtype, which may be narrow
    total = torch.zeros_like(mean)
    step = max(1, SLICE // max(mean.numel(), 1))
    for start in range(0, n_samples, step):
        points = engine.draw(min(step, n_samples - start), dtype=torch.float64)  # multiples of 2^-30, from 0
        if start == 0:
            points[0] = first
        noise = math.sqrt(2) * torch.erfinv(2 * points + 2.0**-30 - 1)
        deviations = torch.einsum("ncd,sd->snc", factor, noise.to(mean))
        total += (mean + deviations).softmax(dim=-1).sum(dim=0)
    return total / n_samples


def contrasts(count: int, like: Tensor) -> Tensor:
    """`[C, C - 1]`, orthogonal columns that sum to zero: Helmert's (1, ..., 1, -k, 0, ..., 0).

    In the dtype and on the device of `like`; exact there, but for more than 257 classes in bfloat16, 2049 in float16.
    """
    columns = torch.ones(count, count - 1, dtype=torch.float64, device="cpu").triu()
    columns.diagonal(-1).copy_(-torch.arange(1.0, count, dtype=torch.float64, device="cpu"))
    return columns.to(like)


def orthonormal_contrasts(count: int, like: Tensor) -> Tensor:
    """The same, each divided by its norm."""
    columns = contrasts(count, like)
    return columns / columns.norm(dim=0)


def row_slices(mean: Tensor, at_once: int = 1) -> Iterator[slice]:
    """Examples whose `at_once` matrices `[C, C]` are few enough numbers."""
    step = max(1, SLICE // (at_once * mean.shape[1] ** 2))
    return (slice(i, i + step) for i in range(0, len(mean), step))


def differences_only(covariance: Tensor) -> Tensor:
    """`[N, C, C]`, of the logits less their mean."""
    half = covariance - covariance.mean(dim=2, keepdim=True)
    return half - half.mean(dim=1, keepdim=True)


def cholesky(covariance: Tensor) -> tuple[Tensor, float]:
    """`[N, C, C]` lower factors, and the smallest of `JITTERS` that makes every one of them exist.

    Raises:
        ValueError: if a covariance is not finite, or not positive semi-definite even with the largest jitter.
    """
    if not torch.isfinite(covariance).all():
        raise ValueError("covariance: expected finite numbers, got NaN or infinity")
    level = covariance.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(torch.finfo(covariance.dtype).tiny)
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    for jitter in JITTERS:
        factor, info = torch.linalg.cholesky_ex(covariance + (jitter * level)[:, None, None] * eye)
        if not info.any():
            return factor, jitter
    raise ValueError(
        f"covariance: expected a positive semi-definite matrix, example {int(info.nonzero()[0])} is not, even with "
        f"{JITTERS[-1]:g} of the mean variance added to its diagonal"
    )


def _centred(mean: Tensor) -> Tensor:
    return mean - mean.mean(dim=1, keepdim=True)


def _variances_of_differences(covariance: Tensor) -> Tensor:
    """`[N, C, C]`, of `f_k - f_j`."""
    variance = covariance.diagonal(dim1=1, dim2=2)
    return (variance[:, :, None] + variance[:, None, :] - 2 * covariance).clamp_min(0)
