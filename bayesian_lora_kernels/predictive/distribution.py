"""What a prediction returns: a Gaussian over chosen logits, and class probabilities from it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesian_lora_kernels.predictive.probabilities import pairwise_log_probs, scalar_log_probs
from bayesian_lora_kernels.surroundings import in_own_surroundings

PROBABILITY_METHODS = ("mc", "pairwise", "scalar", "probit", "bridge", "map")
DIFFERENCES = {"pairwise": pairwise_log_probs, "scalar": scalar_log_probs}
# What is added to the diagonal, relative to its mean, until the Cholesky decomposition succeeds.
JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)


class CovarianceWarning(UserWarning):
    """A covariance had to be changed to be usable."""


@dataclass(frozen=True)
class LogitPosterior:
    """`f ~ N(mean, covariance)` for every example of a batch.

    Attributes:
        mean: `[N, C]`, the logits at the MAP weights.
        covariance: `[N, C, C]`, symmetric.
        indices: which of forward's logits these are, `[C]` or `[N, C]`; None: all, in order.
        classification: whether the logits belong to classes (then `probs` is there).
    """

    mean: Tensor
    covariance: Tensor
    indices: Tensor | None = None
    classification: bool = True

    @property
    def variance(self) -> Tensor:
        """`[N, C]`, the diagonal of the covariance."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    @in_own_surroundings
    def scale_tril(self) -> Tensor:
        """`[N, C, C]` Cholesky factors, with the smallest jitter that makes every one of them exist.

        Raises:
            ValueError: if the covariance is not finite, or not positive semi-definite even with the largest jitter.

        Warns:
            CovarianceWarning: if more than 1e-6 of the mean variance had to be added.
        """
        if not torch.isfinite(self.covariance).all():
            raise ValueError("covariance: expected finite numbers, got NaN or infinity")
        level = self.variance.mean(dim=-1).clamp_min(torch.finfo(self.covariance.dtype).tiny)
        eye = torch.eye(self.covariance.shape[-1], dtype=self.covariance.dtype, device=self.covariance.device)
        for jitter in JITTERS:
            factor, info = torch.linalg.cholesky_ex(self.covariance + (jitter * level)[:, None, None] * eye)
            if not info.any():
                if jitter > 1e-6:
                    warnings.warn(
                        f"covariance: added {jitter:g} of the mean variance to its diagonal to decompose it",
                        CovarianceWarning,
                        stacklevel=2,
                    )
                return factor
        raise ValueError(
            f"covariance: expected a positive semi-definite matrix, example {int(info.nonzero()[0])} is not, even with "
            f"{JITTERS[-1]:g} of the mean variance added to its diagonal"
        )

    @in_own_surroundings
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`[n, N, C]` joint samples of the logits."""
        noise = torch.randn((n, *self.mean.shape), generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + torch.einsum("ncd,snd->snc", self.scale_tril(), noise)

    @in_own_surroundings
    def probs(self, method: str = "mc", n_samples: int = 1024, generator: torch.Generator | None = None) -> Tensor:
        """Class probabilities `[N, C]` over the chosen logits.

        Args:
            method: `mc`, the average of the softmax over samples of the logits (not the softmax of their average);
                `pairwise` and `scalar`, which see the variances of differences of logits only (`probabilities.py`);
                `probit`, the softmax of `mean / sqrt(1 + pi / 8 variance)` (MacKay 1992); `bridge`, the mean of the
                Dirichlet of the Laplace bridge (Hobbhahn et al. 2022); `map`, the softmax of the mean.
            n_samples: for `mc`.
            generator: for `mc`; None: torch's global one.

        Raises:
            ValueError: for another method, a regression posterior, or less than one sample.
        """
        if not self.classification:
            raise ValueError("probs: expected a classification posterior, this one is of a regression")
        if method == "map":
            return self.mean.softmax(dim=-1)
        if method == "probit":
            return (self.mean / (1 + math.pi / 8 * self.variance).sqrt()).softmax(dim=-1)
        if method in DIFFERENCES:
            return DIFFERENCES[method](self.mean, self.covariance).exp()
        if method == "bridge":
            return self._bridge()
        if method != "mc":
            raise ValueError(f"probs: expected a method of {PROBABILITY_METHODS}, got {method!r}")
        if n_samples < 1:
            raise ValueError(f"probs: expected n_samples >= 1, got {n_samples}")
        total = torch.zeros_like(self.mean)
        factor = self.scale_tril()
        step = max(1, 2**22 // max(self.mean.numel(), 1))
        for start in range(0, n_samples, step):
            shape = (min(step, n_samples - start), *self.mean.shape)
            noise = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
            total += (self.mean + torch.einsum("ncd,snd->snc", factor, noise)).softmax(dim=-1).sum(dim=0)
        return total / n_samples

    def _bridge(self) -> Tensor:
        """Dirichlet whose logits' Gaussian, conditioned on summing to zero, is this one's."""
        c = self.mean.shape[-1]
        row = self.covariance.sum(dim=-1)
        total = row.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
        mean = self.mean - row * self.mean.sum(dim=-1, keepdim=True) / total
        variance = (self.variance - row.square() / total).clamp_min(torch.finfo(row.dtype).tiny)
        # log of exp(mean) / C^2 * sum exp(-mean), which overflows by itself
        spread = mean + (-mean).logsumexp(dim=-1, keepdim=True) - 2 * math.log(c)
        constant = torch.full_like(spread, math.log(1 - 2 / c) if c > 2 else -math.inf)
        log_alpha = torch.logaddexp(constant, spread) - variance.log()
        return log_alpha.softmax(dim=-1)

    def distribution(self) -> torch.distributions.MultivariateNormal:
        """The same Gaussian as a `torch.distributions` object with batch shape `[N]`."""
        return torch.distributions.MultivariateNormal(self.mean, scale_tril=self.scale_tril())
