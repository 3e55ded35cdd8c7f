"""The posterior of a whole model when layers are independent: one Kronecker posterior each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.posterior.kronecker import KroneckerPosterior, identity_of


class LayerwisePosterior:
    """Independent Gaussians over the layers' weights.

    Args:
        layers: `{layer: its posterior}`; the prior precision inside counts for nothing here, methods take their own.
    """

    def __init__(self, layers: Mapping[str, KroneckerPosterior]):
        self.layers = dict(layers)
        self._recent: tuple[tuple[Any, ...], Mapping[str, Tensor], dict[str, KroneckerPosterior]] | None = None

    def with_prior(self, prior: Mapping[str, Tensor]) -> dict[str, KroneckerPosterior]:
        """The layers' posteriors under the given prior precisions.

        Those of the last prior without gradients are kept: a loop of predictions prepares them once.
        """
        key = identity_of(prior)
        if key is not None and self._recent is not None and self._recent[0] == key:
            return dict(self._recent[2])
        layers = {name: layer.with_prior(prior[name]) for name, layer in self.layers.items()}
        if key is not None:
            self._recent = key, dict(prior), layers
        return dict(layers)

    @property
    def n_parameters(self) -> dict[str, int]:
        """Weights per layer."""
        return {name: math.prod(layer.shape) for name, layer in self.layers.items()}

    def spectrum(self, names: list[str] | None = None) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the curvature and their multiplicities, `[m]` float64, of all layers or some."""
        spectra = [self.layers[name].spectrum() for name in names or self.layers]
        device = spectra[0][0].device
        return (
            torch.cat([values.to(device) for values, _ in spectra]),
            torch.cat([multiplicity.to(device) for _, multiplicity in spectra]),
        )

    def logdet(self, prior: Mapping[str, Tensor]) -> Tensor:
        """Log-determinant of the precision, 0-d float64, differentiable in the prior precisions."""
        terms = [layer.logdet() for layer in self.with_prior(prior).values()]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def sample(
        self, n: int, prior: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Zero-mean samples of the weights' deviations, `{layer: [n, d_out, d_in]}`."""
        return {name: layer.sample(n, generator) for name, layer in self.with_prior(prior).items()}
