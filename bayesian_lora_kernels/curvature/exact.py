"""The exact Gauss-Newton matrix of all layers together, in function space.

With R the rows `L_n^T J_n` of all training examples, `F = R^T R`; nothing larger than the Gram matrix `R R^T` is ever
decomposed. Evidence for every prior precision then costs nothing more than its eigenvalues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

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
from bayesian_lora_kernels.processes import OtherProcessError

# Rows that are widened to float64 at a time: on a GPU few launches count, on a CPU what its caches hold.
SLICE_BYTES = 128 * 2**20
CPU_SLICE_BYTES = 4 * 2**20
GRAM = "gram"
ROUNDING = 1e-6  # of the inner products of rows in a file

Columnwise = Callable[[slice], Tensor]


class Prepared(NamedTuple):
    """What a prior makes of the rows: with D the inverse prior precisions, the eigendecomposition of `R D R^T`."""

    variances: Tensor  # D: of each layer, in the order of the rows' columns, or 0-d
    values: Tensor
    vectors: Tensor


@register("exact")
class FunctionSpaceCurvature(Curvature):
    """`R^T R`, with R the rows of all training examples.

    Attributes:
        gram: `R R^T [n, n]` float64.
        eigenvalues: of it, `[n]` ascending.
        eigenvectors: of it, `[n, n]`.

    Args:
        store: the rows, of each layer in row-major order of its weight.
        shapes: `{layer: (d_out, d_in)}`.
        device: where to compute.
        gram: `R R^T`, if known already.

    Raises:
        ValueError: if the Gram matrix is not finite.
    """

    independent_layers: ClassVar[bool] = False
    of_all_processes: ClassVar[bool] = True
    _in_step = False

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
        self.processes = store.processes
        self.gram = self._gram() if gram is None else gram.to(device)
        if not torch.isfinite(self.gram).all():
            raise ValueError("the Gram matrix of the Gauss-Newton rows is not finite; keep the rows in a wider dtype")
        values, vectors = torch.linalg.eigh(self.gram)
        self.gram, self.eigenvalues, self.eigenvectors = self.processes.agree([self.gram, values.clamp_min(0), vectors])

    @classmethod
    def measure(cls, data: Passes) -> FunctionSpaceCurvature:
        """One pass for the rows."""
        shapes = {layer.name: layer.shape for layer in data.layers}
        widths = {name: math.prod(shape) for name, shape in shapes.items()}
        store = RowStore(widths, data.memory_budget, data.config.row_dtype)
        for gradients in data.weight_gradients("rows", [store]):
            store.append({name: gradients[name].flatten(start_dim=1) for name in widths})
        return cls(store.spread(data.processes, data.device), shapes, data.device)

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
        precisions = self._precisions(prior)
        if prior.shared is not None:
            return self.store.n_columns * precisions.log() + torch.log1p(self.eigenvalues / precisions).sum()
        base = (precisions.log() * precisions.new_tensor([self.store.width(name) for name in self.store.names])).sum()
        scaled = torch.tensordot(precisions.reciprocal(), self.layer_grams, 1)
        return base + torch.linalg.slogdet(torch.eye(len(scaled), dtype=scaled.dtype, device=self.device) + scaled)[1]

    @cached_property
    def layer_grams(self) -> Tensor:
        """Each layer's own `R R^T`, `[layers, n, n]` float64, in the order of `store.names`."""
        n = self.store.n_rows
        grams = torch.zeros(len(self.store.names), n, n, dtype=torch.float64, device=self.device)
        for layers, columns in self.store.slices_of_layers(self._step()):
            rows, outs = self._rows(columns), grams[layers]
            if len(outs) == 1:
                ops.outer_product(rows.mT, out=outs[0])
            else:
                by_layer = rows.unflatten(1, (len(outs), -1)).transpose(0, 1)
                outs.baddbmm_(by_layer, by_layer.mT)
        self.processes.add(grams.unbind())
        return self.processes.agree([grams])[0]

    def covariance(self, jacobians: Jacobians, prior: Prior, prepared: Prepared) -> Tensor:
        """See `Curvature`: float64.

        `Sigma = D - D R^T (I + R D R^T)^-1 R D` with D the inverse prior precisions.
        """
        n, c = jacobians.shape
        own = torch.zeros(n, c, c, dtype=torch.float64, device=self.device)
        layers = [jacobians.matrix(name).flatten(start_dim=2).to(self.device) for name in self.store.names]
        variances = self._by_column(prepared.variances)

        def scaled(columns: slice) -> Tensor:  # every column comes by once
            j = self.store.cut(layers, columns).to(torch.float64)
            j_d = j * variances(columns)
            own.baddbmm_(j_d, j.mT)
            return j_d.flatten(end_dim=1)

        cross = self._products(n * c, scaled)
        assert cross is not None
        projected = (cross @ prepared.vectors).reshape(n, c, -1)
        own -= (projected / (1 + prepared.values)) @ projected.mT
        return (own + own.mT) / 2

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """See `Curvature`: a process that leaves goes on multiplying its columns for the others until all are there."""
        if self.processes.size == 1 or self._in_step:
            yield
            return
        self._in_step = True
        try:
            with self.processes.together():
                yield
                nothing = torch.empty(0, dtype=torch.float64, device=self.device)
                while self._products(None, lambda columns: nothing) is not None:
                    pass
        finally:
            self._in_step = False

    def sample(self, n: int, prior: Prior, prepared: Prepared, generator: torch.Generator | None) -> dict[str, Tensor]:
        """See `Curvature`: float64."""
        sample = self._rooted(self._noise(n, generator), prepared)
        if self.processes.size > 1:
            sample = torch.cat(self.processes.gather(sample.mT)).mT.contiguous()
        return self._by_layer(sample)

    def root(
        self, vectors: Mapping[str, Tensor], prior: Prior, prepared: Prepared, transpose: bool = False
    ) -> dict[str, Tensor]:
        """See `Curvature`: float64."""
        if self.processes.size > 1:
            raise ValueError(
                f"root: the rows of the exact curvature are spread over {self.processes.size} processes, and joint and "
                "influence run on one; fit on one process, or with curvature='kfac' or 'ekfac'"
            )
        flat = [vectors[name].flatten(start_dim=1).to(self.device, torch.float64) for name in self.store.names]
        return self._by_layer(self._rooted(torch.cat(flat, dim=1), prepared, transpose))

    def _rooted(self, vectors: Tensor, prepared: Prepared, transpose: bool = False) -> Tensor:
        """`B v` or `B^T v` in place of vectors `[n, columns]`, for the columns that this process holds.

        With D the inverse prior precisions and M = R D^1/2, `B = D^1/2 (I - M^T g(M M^T) M)` has `B B^T = Sigma` for
        `g(e) = (1 - (1 + e)^-1/2) / e`.
        """
        n, first = len(vectors), self.store.held.start
        scales = self._by_column(prepared.variances.sqrt())
        inner = torch.zeros(self.store.n_rows, n, dtype=torch.float64, device=self.device)
        for columns in self.store.slices(self._step(n)):
            here, scale = slice(columns.start - first, columns.stop - first), scales(columns)
            if transpose:
                vectors[:, here] *= scale
            inner.addmm_(self._rows(columns), (vectors[:, here] * scale).mT)
        self.processes.add([inner])
        # (1 - (1 + e)^-1/2) / e without cancellation at e = 0
        root = (1 + prepared.values).sqrt()
        gain = 1 / (root * (1 + root))
        correction = prepared.vectors @ (gain[:, None] * (prepared.vectors.mT @ inner))
        for columns in self.store.slices(self._step(n)):
            here, scale = slice(columns.start - first, columns.stop - first), scales(columns)
            vectors[:, here] -= correction.mT @ self._rows(columns) * scale
            if not transpose:
                vectors[:, here] *= scale
        return vectors

    def _by_layer(self, vectors: Tensor) -> dict[str, Tensor]:
        """Of all columns `[n, P]`, those of each layer."""
        return {name: vectors[:, self.store.columns[name]].unflatten(1, shape) for name, shape in self._shapes.items()}

    def prepare(self, prior: Prior) -> Prepared:
        """See `Curvature`."""
        variances = self._precisions(prior).reciprocal()
        if prior.shared is not None:
            return Prepared(variances, self.eigenvalues * variances, self.eigenvectors)
        if "layer_grams" in self.__dict__:  # known already: cheaper than going over the rows
            weighted = torch.tensordot(variances, self.layer_grams, 1)
        else:
            weighted = self._gram(self._by_column(variances.sqrt()))
        values, vectors = torch.linalg.eigh(weighted)
        return Prepared(variances, values.clamp_min(0), vectors)

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
        store = RowStore({name: math.prod(shape) for name, shape in shapes.items()}, default_budget(device))
        probe = torch.randn(n, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
        sums: dict[str, Tensor] = {}  # of the rows, each times its number of the probe
        step = max(SLICE_BYTES // (8 * store.n_columns), 1)
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

    def _gram(self, scales: Columnwise | None = None) -> Tensor:
        """`R R^T`, of columns that are scaled."""
        gram = torch.zeros(self.store.n_rows, self.store.n_rows, dtype=torch.float64, device=self.device)
        for columns in self.store.slices(self._step()):
            rows = self._rows(columns)
            ops.outer_product((rows if scales is None else rows * scales(columns)).mT, out=gram)
        self.processes.add(gram.split(1024))
        return gram

    def _products(self, count: int | None, of: Columnwise) -> Tensor | None:
        """`M R^T [count, n]`, of a matrix M of as many rows; each process may have another.

        Args:
            count: None: this process has none any more, and multiplies for others.
            of: a slice of columns to those of M, float64.

        Returns:
            None, once no process has any.
        """
        counts = self._meet("covariance", count)
        if all(one is None for one in counts):
            return None
        counts = [one or 0 for one in counts]
        total, n = sum(counts), self.store.n_rows
        cross = torch.zeros(total, n, dtype=torch.float64, device=self.device)
        for slices in self.store.rounds(self._step(total)):
            mine = slices[self.processes.rank]
            width = mine.stop - mine.start
            came = self.processes.exchange([of(x).reshape(-1) for x in slices], [one * width for one in counts])
            others = came[0] if len(came) == 1 else torch.cat(came)
            cross.addmm_(others.reshape(total, width), self._rows(mine).mT)
        parts = [part.reshape(-1) for part in cross.split(counts)]
        own = counts[self.processes.rank]
        came = self.processes.exchange(parts, [own * n] * self.processes.size)
        return torch.stack(came).sum(dim=0).reshape(own, n)

    def _noise(self, n: int, generator: torch.Generator | None) -> Tensor:
        """White, `[n, columns]`, for the columns that this process holds."""
        if self.processes.size == 1:
            noise = {
                name: torch.randn(n, p, generator=generator, dtype=torch.float64, device=self.device)
                for name, p in self.n_parameters.items()
            }
            return torch.cat([noise.pop(name) for name in self.store.names], dim=1)
        seed = torch.randint(2**62, (), generator=generator, device=self.device)
        (number, first), *others = self._meet("sample", [n, int(seed)])
        if any(other != number for other, _ in others):
            raise ValueError(f"sample: expected as many samples on all processes, got {number} and {others}")
        own = torch.Generator(self.device).manual_seed(self.processes.seed(first))
        held = self.store.held.stop - self.store.held.start
        return torch.randn(n, held, generator=own, dtype=torch.float64, device=self.device)

    def _meet(self, what: str, own: Any) -> list[Any]:
        """What every process brings along to something that takes all of them.

        Raises:
            OtherProcessError: if they are not at the same, on all of them.
        """
        said = self.processes.values([what, own])
        if any(other != what for other, _ in said):
            raise OtherProcessError(
                f"{what}: the rows of the exact curvature are spread over {self.processes.size} processes, all of "
                f"which must ask for it at once; they ask for {' and '.join(sorted({other for other, _ in said}))}"
            )
        return [value for _, value in said]

    def _precisions(self, prior: Prior) -> Tensor:
        """Of each layer, in the order of the rows' columns; 0-d if they are all the same."""
        if prior.shared is not None:
            return prior.shared.to(self.device)
        return torch.stack([prior[name] for name in self.store.names]).to(self.device)

    def _by_column(self, of_layers: Tensor) -> Columnwise:
        """What takes a slice of columns to the numbers of their layers."""
        if of_layers.ndim == 0:
            return lambda columns: of_layers
        each = [one.expand(self.store.width(x)) for x, one in zip(self.store.names, of_layers.unbind(), strict=True)]
        return lambda columns: self.store.cut(each, columns)

    def _step(self, beside: int = 0) -> int:
        """Columns at a time, of the rows and of `beside` other ones."""
        bound = CPU_SLICE_BYTES if self.device.type == "cpu" else SLICE_BYTES
        return max(bound // (8 * max(self.store.n_rows, beside, 1)), 1)

    def _rows(self, columns: slice) -> Tensor:
        return self.store.read(columns).to(self.device, torch.float64)
