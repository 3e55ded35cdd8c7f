"""The posterior over the weights of a model: a curvature and a prior."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.model.jacobians import Jacobians
from bayesian_lora_kernels.posterior.curvature import Curvature
from bayesian_lora_kernels.posterior.kronecker import KroneckerPosterior
from bayesian_lora_kernels.posterior.prior import Prior, as_precision, has_derivative
from bayesian_lora_kernels.surroundings import in_own_surroundings


@dataclass(frozen=True, eq=False)
class Posterior(Mapping[str, KroneckerPosterior]):
    """Gaussian around the MAP weights, of precision `curvature / noise variance + prior precision`; it never changes.

    As a mapping, `{module name: its own Gaussian}`, where the curvature leaves modules independent. What follows from
    the two values is computed once, when it is first needed.

    Attributes:
        curvature: of the data.
        prior: over the same modules.
        noise_variance: of a regression, 0-d float64; 1 for all that has none.

    Raises:
        ValueError: for a prior over other modules.
    """

    curvature: Curvature
    prior: Prior
    noise_variance: float | Tensor = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prior", self.prior.over(list(self.curvature.shapes)))
        object.__setattr__(self, "noise_variance", as_precision(self.noise_variance, name="noise_variance").clone())

    @property
    def _noise(self) -> Tensor | None:
        """None, where it changes nothing, derivatives among that."""
        noise = self.noise_variance
        assert isinstance(noise, Tensor)
        return None if float(noise.detach()) == 1 and not has_derivative(noise) else noise

    @cached_property
    def _scaled(self) -> Prior:
        """That under which the posterior at unit noise has this one's precision times the noise variance."""
        return self.prior if self._noise is None else self.prior.times(self._noise)

    @cached_property
    @in_own_surroundings
    def prepared(self) -> Any:
        """See `Curvature.prepare`."""
        with torch.inference_mode(False):
            return self.curvature.prepare(self._scaled)

    @cached_property
    @in_own_surroundings
    def logdet(self) -> Tensor:
        """Log-determinant of the precision, 0-d float64, with the gradient of the prior precision if it has one."""
        with torch.inference_mode(False):
            logdet = self.curvature.logdet(self._scaled)
            if self._noise is None:
                return logdet
            return logdet - sum(self.curvature.n_parameters.values()) * self._noise.log().to(logdet.device)

    def spectrum(self, layers: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the curvature at this noise, and their multiplicities, as `Curvature.spectrum`."""
        values, multiplicity = self.curvature.spectrum(layers)
        return values if self._noise is None else values / self._noise.to(values.device), multiplicity

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """See `Curvature.in_step`; what covariances need is computed before, on all processes."""
        if self.curvature.processes.size > 1:
            _ = self.prepared
        with self.curvature.in_step():
            yield

    @in_own_surroundings
    def covariance(self, jacobians: Jacobians) -> Tensor:
        """`J Sigma J^T [N, C, C]`, in float32 or float64."""
        covariance = self.curvature.covariance(jacobians, self._scaled, self.prepared)
        return covariance if self._noise is None else covariance * self._noise.to(covariance)

    @in_own_surroundings
    def sample(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Zero-mean samples of the weights' deviations from the MAP, `{module: [n, d_out, d_in]}`."""
        return self._noisy(self.curvature.sample(n, self._scaled, self.prepared, generator))

    @in_own_surroundings
    def root(self, vectors: Mapping[str, Tensor], transpose: bool = False) -> dict[str, Tensor]:
        """`B v`, or `B^T v`, for a square root B of Sigma, `B B^T = Sigma`; see `Curvature.root`."""
        return self._noisy(self.curvature.root(vectors, self._scaled, self.prepared, transpose))

    def _noisy(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the posterior at unit noise, times the root of the noise variance."""
        noise = self._noise
        return found if noise is None else {name: x * noise.sqrt().to(x) for name, x in found.items()}

    def solve(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`Sigma v`: the inverse of the precision, times vectors of weights `{module: [n, d_out, d_in]}`."""
        return self.root(self.root(vectors, transpose=True))

    def __getitem__(self, module: str) -> KroneckerPosterior:
        found, noise = self._by_module()[module], self._noise
        if noise is None:
            return found
        blocks = found.curvature.map(lambda block: block / noise.to(block.device))
        return replace(found, curvature=blocks, prior_precision=self.prior[module].to(found.prior_precision.device))

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_module())

    def __len__(self) -> int:
        return len(self._by_module())

    def _by_module(self) -> Mapping[str, KroneckerPosterior]:
        if not isinstance(self.prepared, Mapping):
            raise RuntimeError(
                f"posterior: {type(self.curvature).__name__} has no Gaussian for each module; use the methods of the "
                "whole (logdet, covariance, sample)"
            )
        return self.prepared
