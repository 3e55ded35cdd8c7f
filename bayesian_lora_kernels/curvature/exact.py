"""The exact Gauss-Newton matrix of all layers together, in function space.

With R the rows `L_n^T J_n` of all training examples, `F = R^T R`; nothing larger than the Gram matrix `R R^T` is ever
decomposed. Evidence for every prior precision then costs nothing more than its eigenvalues.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.curvature.passes import Passes
from bayesian_lora_kernels.curvature.rows import RowStore
from bayesian_lora_kernels.model.jacobians import Jacobians
from bayesian_lora_kernels.model.memory import default_budget
from bayesian_lora_kernels.posterior.curvature import Curvature, register
from bayesian_lora_kernels.posterior.prior import Prior
from bayesian_lora_kernels.posterior.stored import Stored
from bayesian_lora_kernels.posterior.tensor_file import Columns

SLICE_BYTES = 128 * 2**20
GRAM = "gram"
ROUNDING = 1e-6  # of the inner products of rows in a file


@register("exact")
class FunctionSpaceCurvature(Curvature):
    """`R^T R`, with R the rows of all training examples.

    Attributes:
        gram: `R R^T [n, n]` float64.
        eigenvalues: of it, `[n]` ascending.
        eigenvectors: of it, `[n, n]`.

    Args:
        store: the rows, per layer `[n, d_out * d_in]` in row-major order of the weight.
        shapes: `{layer: (d_out, d_in)}`.
        device: where to compute.
        gram: `R R^T`, if known already.

    Raises:
        ValueError: if the Gram matrix is not finite.
    """

    independent_layers: ClassVar[bool] = False

    def __init__(
        self,
        store: RowStore,
        shapes: Mapping[str, tuple[int, int]],
        device: torch.device,
        gram: Tensor | None = None,
    ):
        self.store = store
        self.device = device
        self._shapes = dict(shapes)
        self.gram = self._gram_of(self.store.names, None) if gram is None else gram.to(device)
        if not torch.isfinite(self.gram).all():
            raise ValueError("the Gram matrix of the Gauss-Newton rows is not finite; keep the rows in a wider dtype")
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(self.gram)
        self.eigenvalues = self.eigenvalues.clamp_min(0)

    @classmethod
    def measure(cls, data: Passes) -> FunctionSpaceCurvature:
        """One pass for the rows."""
        store = RowStore(data.memory_budget, data.config.row_dtype)
        for gradients in data.weight_gradients("rows", [store]):
            store.append({layer.name: gradients[layer.name].flatten(start_dim=1) for layer in data.layers})
        return cls(store, {layer.name: layer.shape for layer in data.layers}, data.device)

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """See `Curvature`."""
        return self._shapes

    def spectrum(self, layers: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """See `Curvature`: `[n + 1]`, of all layers; the last is the null space's."""
        total = sum(self.n_parameters.values())
        n = len(self.eigenvalues)
        # More rows than weights: the surplus eigenvalues of the Gram matrix are zero and are no directions of weights.
        values = self.eigenvalues[max(n - total, 0) :]
        values = torch.cat([values, values.new_zeros(1)])
        multiplicity = torch.ones_like(values)
        multiplicity[-1] = max(total - n, 0)
        return values, multiplicity

    def logdet(self, prior: Prior) -> Tensor:
        """See `Curvature`."""
        base = torch.stack([prior[name].to(self.device).log() * p for name, p in self.n_parameters.items()]).sum()
        if prior.shared is not None:
            return base + torch.log1p(self.eigenvalues / prior.shared.to(self.device)).sum()
        scaled = sum(gram / prior[name].to(self.device) for name, gram in self.layer_grams.items())
        assert isinstance(scaled, Tensor)
        return base + torch.linalg.slogdet(torch.eye(len(scaled), dtype=scaled.dtype, device=self.device) + scaled)[1]

    @cached_property
    def layer_grams(self) -> dict[str, Tensor]:
        """Each layer's own `R R^T`, `[n, n]` float64."""
        return {name: self._gram_of([name], None) for name in self.store.names}

    def covariance(self, jacobians: Jacobians, prior: Prior, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """See `Curvature`: float64.

        `Sigma = D - D R^T (I + R D R^T)^-1 R D` with D the inverse prior precisions.
        """
        n, c = jacobians.shape
        own = torch.zeros(n, c, c, dtype=torch.float64, device=self.device)
        cross = torch.zeros(n * c, self.store.n_rows, dtype=torch.float64, device=self.device)
        names = self.store.names
        variances = torch.stack([prior[name] for name in names]).to(self.device).reciprocal()
        weights = dict(zip(names, variances.unbind(), strict=True))
        for name in names:
            flat = jacobians.matrix(name).reshape(n * c, -1)
            weight = weights[name]
            for columns, rows in self._slices(name):
                j = flat[:, columns].to(self.device, torch.float64)
                cross += (j @ rows.mT) * weight
                by_example = j.reshape(n, c, -1)
                own += (by_example @ by_example.mT) * weight
        values, vectors = prepared
        projected = (cross @ vectors).reshape(n, c, -1)
        own -= (projected / (1 + values)) @ projected.mT
        return (own + own.mT) / 2

    def sample(
        self, n: int, prior: Prior, prepared: tuple[Tensor, Tensor], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `Curvature`: float64.

        With `Z` white and D the inverse prior precisions, `D^1/2 (I - M^T g(M M^T) M) Z`, M = R D^1/2, has covariance
        Sigma for `g(e) = (1 - (1 + e)^-1/2) / e`.
        """
        noise = {
            name: torch.randn(n, p, generator=generator, dtype=torch.float64, device=self.device)
            for name, p in self.n_parameters.items()
        }
        scale = {name: prior[name].to(self.device).rsqrt() for name in self._shapes}
        inner = torch.zeros(self.store.n_rows, n, dtype=torch.float64, device=self.device)
        for name in self.store.names:
            for columns, rows in self._slices(name):
                inner += rows @ noise[name][:, columns].mT * scale[name]
        values, vectors = prepared
        # (1 - (1 + e)^-1/2) / e without cancellation at e = 0
        root = (1 + values).sqrt()
        gain = 1 / (root * (1 + root))
        correction = vectors @ (gain[:, None] * (vectors.mT @ inner))
        result = {}
        for name, shape in self._shapes.items():
            sample = noise[name].clone()
            for columns, rows in self._slices(name):
                sample[:, columns] -= correction.mT @ rows * scale[name]
            result[name] = (sample * scale[name]).reshape(n, *shape)
        return result

    def prepare(self, prior: Prior) -> tuple[Tensor, Tensor]:
        """The eigendecomposition of `R D R^T`, D the inverse prior precisions."""
        if prior.shared is not None:
            return self.eigenvalues / prior.shared.to(self.device), self.eigenvectors
        if "layer_grams" in self.__dict__:  # known already: cheaper than going over the rows
            grams = [gram / prior[name].to(gram.device) for name, gram in self.layer_grams.items()]
            weighted = torch.stack(grams).sum(0)
        else:
            weighted = self._gram_of(self.store.names, prior)
        values, vectors = torch.linalg.eigh(weighted)
        return values.clamp_min(0), vectors

    def pack(self) -> tuple[dict[str, Tensor | Columns], dict[str, dict[str, Any]]]:
        """See `Curvature`."""
        tensors: dict[str, Tensor | Columns] = {GRAM: self.gram}
        for name in self.store.names:
            tensors[f"{name}.rows"] = Columns(self.store.width(name), partial(self.store.rows, name))
        return tensors, {}

    @classmethod
    def unpack(cls, stored: Stored) -> FunctionSpaceCurvature:
        """See `Curvature`."""
        n, _ = stored.sizes(GRAM, (None, None))
        if n == 0:
            raise ValueError(f"{GRAM}: expected at least one row")
        shapes = {name: stored.shape(layer) for layer, name in stored.names.items()}
        device = next(iter(stored.devices.values()))
        gram = stored.tensor(GRAM, (n, n), device)
        store = RowStore(default_budget(device))
        probe = torch.randn(n, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
        sums: dict[str, Tensor] = {}  # of the rows, each times its number of the probe
        step = max(SLICE_BYTES // (8 * sum(map(math.prod, shapes.values()))), 1)
        for start in range(0, n, step):
            block, rows = {}, slice(start, min(start + step, n))
            for layer, name in stored.names.items():
                shape = n, math.prod(shapes[name])
                found = block[name] = stored.tensor(f"{layer}.rows", shape, stored.device(layer), rows=rows)
                sums[name] = sums.get(name, 0) + probe[rows].to(found.device) @ found.double()
            store.append(block)
        square, probe = sum(float(one.square().sum()) for one in sums.values()), probe.to(device)
        if not (math.isfinite(square) and math.isclose(square, float(probe @ gram @ probe), rel_tol=ROUNDING)):
            raise ValueError(f"{GRAM}: expected the inner products of the rows")
        return cls(store, shapes, device, gram)

    def _gram_of(self, names: list[str], prior: Prior | None) -> Tensor:
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
