"""The posterior under the exact Gauss-Newton matrix of all layers together, in function space.

With R the rows `L_n^T J_n` of all training examples, `F = R^T R`; nothing larger than the Gram matrix `R R^T` is ever
decomposed. Evidence for every prior precision then costs nothing more than its eigenvalues.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.posterior.kronecker import identity_of
from bayesian_lora_kernels.posterior.rows import RowStore

SLICE_BYTES = 128 * 2**20


class ExactPosterior:
    """Gaussian over the weights of several layers with precision `R^T R + diag(prior precision)`.

    Args:
        store: the rows, per layer `[n, d_out * d_in]` in row-major order of the weight.
        shapes: `{layer: (d_out, d_in)}`.
        device: where to compute.
        gram: `R R^T [n, n]` float64, if known already.

    Raises:
        ValueError: if the Gram matrix is not finite.
    """

    def __init__(
        self,
        store: RowStore,
        shapes: Mapping[str, tuple[int, int]],
        device: torch.device,
        gram: Tensor | None = None,
    ):
        self.store = store
        self.device = device
        self.shapes = dict(shapes)
        self._layer_grams: dict[str, Tensor] = {}
        self._recent: tuple[tuple[Any, ...], Mapping[str, Tensor], tuple[Tensor, Tensor]] | None = None
        self.gram = self._gram_of(self.store.names, None) if gram is None else gram.to(device)
        if not torch.isfinite(self.gram).all():
            raise ValueError("the Gram matrix of the Gauss-Newton rows is not finite; keep the rows in a wider dtype")
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(self.gram)
        self.eigenvalues = self.eigenvalues.clamp_min(0)

    @property
    def n_parameters(self) -> dict[str, int]:
        """Weights per layer."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the curvature and their multiplicities, `[n + 1]` float64; the last is the null space's."""
        total = sum(self.n_parameters.values())
        n = len(self.eigenvalues)
        # More rows than weights: the surplus eigenvalues of the Gram matrix are zero and are no directions of weights.
        values = self.eigenvalues[max(n - total, 0) :]
        values = torch.cat([values, values.new_zeros(1)])
        multiplicity = torch.ones_like(values)
        multiplicity[-1] = max(total - n, 0)
        return values, multiplicity

    def logdet(self, prior: Mapping[str, Tensor]) -> Tensor:
        """Log-determinant of the precision, 0-d float64, differentiable in the prior precisions."""
        base = torch.stack([prior[name].to(self.device).log() * p for name, p in self.n_parameters.items()]).sum()
        shared = shared_precision(prior)
        if shared is not None:
            return base + torch.log1p(self.eigenvalues / shared.to(self.device)).sum()
        scaled = sum(gram / prior[name].to(self.device) for name, gram in self.layer_grams().items())
        assert isinstance(scaled, Tensor)
        return base + torch.linalg.slogdet(torch.eye(len(scaled), dtype=scaled.dtype, device=self.device) + scaled)[1]

    def layer_grams(self) -> dict[str, Tensor]:
        """Each layer's own `R R^T`, `[n, n]` float64; made on first use and kept."""
        if not self._layer_grams:
            self._layer_grams = {name: self._gram_of([name], None) for name in self.store.names}
        return self._layer_grams

    def covariance(self, jacobians: Mapping[str, Tensor], prior: Mapping[str, Tensor]) -> Tensor:
        """`J Sigma J^T`, `[N, C, C]` float64, from `{layer: [N, C, d_out, d_in]}`.

        `Sigma = D - D R^T (I + R D R^T)^-1 R D` with D the inverse prior precisions.
        """
        n, c = next(iter(jacobians.values())).shape[:2]
        own = torch.zeros(n, c, c, dtype=torch.float64, device=self.device)
        cross = torch.zeros(n * c, self.store.n_rows, dtype=torch.float64, device=self.device)
        for name, jacobian in jacobians.items():
            flat = jacobian.reshape(n * c, -1)
            weight = 1 / prior[name].to(self.device)
            for columns, rows in self._slices(name):
                j = flat[:, columns].to(self.device, torch.float64)
                cross += (j @ rows.mT) * weight
                by_example = j.reshape(n, c, -1)
                own += (by_example @ by_example.mT) * weight
        values, vectors = self._inner(prior)
        projected = (cross @ vectors).reshape(n, c, -1)
        own -= (projected / (1 + values)) @ projected.mT
        return (own + own.mT) / 2

    def sample(
        self, n: int, prior: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Zero-mean samples of the weights' deviations, `{layer: [n, d_out, d_in]}` float64.

        With `Z` white and D the inverse prior precisions, `D^1/2 (I - M^T g(M M^T) M) Z`, M = R D^1/2, has covariance
        Sigma for `g(e) = (1 - (1 + e)^-1/2) / e`.
        """
        noise = {
            name: torch.randn(n, p, generator=generator, dtype=torch.float64, device=self.device)
            for name, p in self.n_parameters.items()
        }
        scale = {name: prior[name].to(self.device).rsqrt() for name in self.shapes}
        inner = torch.zeros(self.store.n_rows, n, dtype=torch.float64, device=self.device)
        for name in self.store.names:
            for columns, rows in self._slices(name):
                inner += rows @ noise[name][:, columns].mT * scale[name]
        values, vectors = self._inner(prior)
        # (1 - (1 + e)^-1/2) / e without cancellation at e = 0
        root = (1 + values).sqrt()
        gain = 1 / (root * (1 + root))
        correction = vectors @ (gain[:, None] * (vectors.mT @ inner))
        result = {}
        for name, shape in self.shapes.items():
            sample = noise[name].clone()
            for columns, rows in self._slices(name):
                sample[:, columns] -= correction.mT @ rows * scale[name]
            result[name] = (sample * scale[name]).reshape(n, *shape)
        return result

    def _inner(self, prior: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Eigendecomposition of `R D R^T`; that of the last prior is kept."""
        shared = shared_precision(prior)
        if shared is not None:
            return self.eigenvalues / shared.to(self.device), self.eigenvectors
        key = identity_of(prior)
        if key is not None and self._recent is not None and self._recent[0] == key:
            return self._recent[2]
        values, vectors = torch.linalg.eigh(self._weighted_gram(prior))
        if key is not None:
            self._recent = key, dict(prior), (values.clamp_min(0), vectors)
        return values.clamp_min(0), vectors

    def _weighted_gram(self, prior: Mapping[str, Tensor] | None) -> Tensor:
        if prior is not None and self._layer_grams:
            return torch.stack([gram / prior[name].to(gram.device) for name, gram in self._layer_grams.items()]).sum(0)
        return self._gram_of(self.store.names, prior)

    def _gram_of(self, names: list[str], prior: Mapping[str, Tensor] | None) -> Tensor:
        total: Tensor | None = None
        for name in names:
            scale = 1.0 if prior is None else 1.0 / float(prior[name])
            for _, rows in self._slices(name):
                if total is None:
                    total = rows.new_zeros(self.store.n_rows, self.store.n_rows)
                ops.outer_product(rows.mT, scale=scale, out=total)
        assert total is not None
        return total

    def _slices(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Column slices of one layer's rows, in float64 and small enough to be held beside everything else."""
        width = self.store.width(name)
        step = max(SLICE_BYTES // (8 * max(self.store.n_rows, 1)), 1)
        for start in range(0, width, step):
            columns = slice(start, min(start + step, width))
            yield columns, self.store.rows(name, columns).to(self.device, torch.float64)


def shared_precision(prior: Mapping[str, Tensor]) -> Tensor | None:
    """The one prior precision that all layers have, or None if they differ."""
    values = list(prior.values())
    first = values[0]
    if all(value is first for value in values):
        return first
    if any(value.requires_grad for value in values):
        return None  # even if they are equal by chance: each wants its own gradient
    return first if all(float(value) == float(first) for value in values) else None
