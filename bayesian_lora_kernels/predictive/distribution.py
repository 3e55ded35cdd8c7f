"""What a prediction returns: a Gaussian over chosen logits, and class probabilities from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesian_lora_kernels.predictive.calibrate import Calibration, Notice
from bayesian_lora_kernels.predictive.probabilities import (
    bridge_log_probs,
    cholesky,
    orthonormal_contrasts,
    pairwise_log_probs,
    probit_log_probs,
    row_slices,
    sampled_probs,
    scalar_log_probs,
)
from bayesian_lora_kernels.surroundings import in_own_surroundings

FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pairwise": pairwise_log_probs,
    "scalar": scalar_log_probs,
    "probit": probit_log_probs,
    "bridge": bridge_log_probs,
}
PROBABILITY_METHODS = (*FORMULAS, "mc", "map")


class CovarianceWarning(UserWarning):
    """A covariance had to be changed to be usable."""


@dataclass(frozen=True)
class LogitPosterior:
    """`f ~ N(mean, covariance)` for every example of a batch.

    Attributes:
        mean: `[N, C]`, the logits at the MAP weights; less their mean over the classes, if `differences`.
        covariance: `[N, C, C]`, symmetric.
        indices: which of forward's logits these are, `[C]` or `[N, C]`; None: all, in order.
        classification: whether the logits belong to classes (then `probs` is there).
        differences: whether these are logits less their mean, whose sum is zero and has no variance.
        calibration: what held-out labels said of the level of the probabilities (`LaplaceLoRA.calibrate`), or None.
        notice: what `probs` has to say of a level that no label has seen, or None.
        noise_variance: of a new observation of a regression around its mean, 0-d; None for all else.
    """

    mean: Tensor
    covariance: Tensor
    indices: Tensor | None = None
    classification: bool = True
    differences: bool = False
    calibration: Calibration | None = None
    notice: Notice | None = None
    noise_variance: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """`[N, C]`, the diagonal of the covariance."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    @property
    def observation_variance(self) -> Tensor:
        """`[N, C]`, of a new observation of a regression: that of its mean, and the noise; of `differences`, of an
        observation less the mean of its outputs.

        Raises:
            ValueError: where there is no noise.
        """
        if self.noise_variance is None:
            raise ValueError("observation_variance: expected a regression, this posterior has no noise")
        share = 1 - 1 / self.mean.shape[1] if self.differences else 1  # of the noise, less its mean over the outputs
        return self.variance + share * self.noise_variance.to(self.variance)

    def difference(self, first: int = 0, second: int = 1) -> tuple[Tensor, Tensor]:
        """Mean and variance, `[N]` each, of one logit less another: of two rewards, the part that data know of.

        Raises:
            ValueError: if there are no two such logits.
        """
        if first == second or not all(0 <= i < self.mean.shape[1] for i in (first, second)):
            raise ValueError(
                f"difference: expected two of the logits 0 to {self.mean.shape[1] - 1}, got {first} and {second}"
            )
        c = self.covariance
        variance = c[:, first, first] + c[:, second, second] - c[:, first, second] - c[:, second, first]
        return self.mean[:, first] - self.mean[:, second], variance.clamp_min(0)

    @in_own_surroundings
    def scale_tril(self) -> Tensor:
        """`[N, C, C]` Cholesky factors, with the smallest jitter that makes every one of them exist.

        Raises:
            ValueError: if the covariance is not finite, or not positive semi-definite even with the largest jitter; of
                differences, whose covariance is singular.

        Warns:
            CovarianceWarning: if more than 1e-6 of the mean variance had to be added.
        """
        if self.differences:
            raise ValueError("scale_tril: logits less their mean have a singular covariance; predict them as they are")
        return _cholesky(self.covariance)

    @in_own_surroundings
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`[n, N, C]` joint samples of the logits."""
        if self.differences:
            basis = orthonormal_contrasts(self.mean.shape[1], self.mean)
            factor = basis @ _cholesky(basis.T @ self.covariance @ basis)
        else:
            factor = self.scale_tril()
        shape = n, len(self.mean), factor.shape[-1]
        noise = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + torch.einsum("ncd,snd->snc", factor, noise)

    @in_own_surroundings
    def probs(
        self,
        method: str = "pairwise",
        n_samples: int = 1024,
        generator: torch.Generator | None = None,
        calibrated: bool = True,
    ) -> Tensor:
        """Class probabilities `[N, C]` over the chosen logits.

        Args:
            method: `pairwise`, from the variance of every difference of two logits; `scalar`, from their mean, which
                keeps the most probable class; `probit`, the softmax of `mean / sqrt(1 + pi / 8 variance)`; `bridge`,
                the mean of the Dirichlet of the Laplace bridge; `mc`, the average of the softmax over samples of the
                logits (not the softmax of their average), by scrambled Sobol points; `map`, the softmax of the mean.
                None of them sees what all logits share. `probabilities.py` has the formulas.
            n_samples: for `mc`; best a power of two.
            generator: for `mc`; None: torch's global one.
            calibrated: whether `pairwise` and `scalar` use what `LaplaceLoRA.calibrate` found, if it was called; the
                others are never changed by it. For chosen logits the same weights apply to their differences.

        Raises:
            ValueError: for another method, a regression posterior, or less than one sample.
            RuntimeError: if prior or curvature changed since `calibrate` was called.
        """
        if not self.classification:
            raise ValueError("probs: expected classes, or two answers to compare, got a regression or single rewards")
        if method not in PROBABILITY_METHODS:
            raise ValueError(f"probs: expected a method of {PROBABILITY_METHODS}, got {method!r}")
        if n_samples < 1:
            raise ValueError(f"probs: expected n_samples >= 1, got {n_samples}")
        if method == "map":
            return self.mean.softmax(dim=-1)
        if calibrated and self.calibration is not None and method in self.calibration.weights:
            return self.calibration.probs(method, self.mean, self.covariance)
        if calibrated and self.calibration is None and self.notice is not None:
            self.notice.say()
        if method == "mc":
            return sampled_probs(self.mean, self.covariance, n_samples, generator)
        formula = FORMULAS[method]
        return torch.cat([formula(self.mean[i], self.covariance[i]) for i in row_slices(self.mean)]).exp()

    def distribution(self) -> torch.distributions.MultivariateNormal:
        """The same Gaussian as a `torch.distributions` object with batch shape `[N]`."""
        return torch.distributions.MultivariateNormal(self.mean, scale_tril=self.scale_tril())


def _cholesky(covariance: Tensor) -> Tensor:
    factor, jitter = cholesky(covariance)
    if jitter > 1e-6:
        warnings.warn(
            f"covariance: added {jitter:g} of the mean variance to its diagonal to decompose it",
            CovarianceWarning,
            stacklevel=4,
        )
    return factor
