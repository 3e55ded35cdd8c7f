"""Kronecker-factored curvature, layer by layer: K-FAC, and EKFAC with eigenvalues of its own.

Sources: Martens, Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature"; George et al.
2018, "Fast approximate natural gradient descent in a Kronecker factored eigenbasis".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.curvature.eigenvalues import EigenvalueSums
from bayesian_lora_kernels.curvature.factors import KroneckerSums
from bayesian_lora_kernels.curvature.passes import Passes
from bayesian_lora_kernels.model.jacobians import Jacobians
from bayesian_lora_kernels.posterior.curvature import Curvature, joined_spectra, register
from bayesian_lora_kernels.posterior.kronecker import (
    Blocks,
    Eigenbasis,
    KroneckerDecomposition,
    KroneckerFactors,
    KroneckerPosterior,
    eigenbases,
    kronecker_eigenvalues,
    under_prior,
)
from bayesian_lora_kernels.posterior.prior import Prior
from bayesian_lora_kernels.posterior.stored import Stored
from bayesian_lora_kernels.processes import Processes

ROUNDING = 1e-3  # of the square of a length in a file's eigenbasis


@register("kfac")
class KroneckerCurvature(Curvature):
    """`A (x) S` of every layer, in the eigenbases of the two factors.

    Args:
        layers: `{layer: A (x) S, or what is put in its place, decomposed}`.
        factors: `{layer: A and S}`; layers with one input share the tensor of their A.
    """

    whole_jacobians: ClassVar[bool] = False
    of_all_processes: ClassVar[bool] = True
    factors: Mapping[str, KroneckerFactors]

    def __init__(self, layers: Mapping[str, KroneckerDecomposition], factors: Mapping[str, KroneckerFactors]):
        self._layers, self.factors = dict(layers), dict(factors)

    @classmethod
    def measure(cls, data: Passes) -> KroneckerCurvature:
        """One pass for the factors."""
        factors = cls.measure_factors(data)
        factors, bases = _agreed(data.processes, factors, eigenbases(factors))
        values = cls.measure_eigenvalues(data, factors, bases)
        layers = {}
        for layer in data.layers:
            s, a = bases[layer.name]
            layers[layer.name] = KroneckerDecomposition(s.vectors, a.vectors, values[layer.name])
        return cls(layers, factors)

    @classmethod
    def measure_factors(cls, data: Passes) -> dict[str, KroneckerFactors]:
        """A as a mean over tokens, S as a sum over the data set."""
        sums = KroneckerSums(data.config)
        for index, recorded in data.captures("curvature", [sums]):
            data.check_clear(index)
            sums.add_inputs(recorded.inputs, data.checks, f" in batch {index}", recorded.batch.weights)
            for part, gradients in data.backward(recorded):
                sums.add_gradients(gradients, part.inputs, data.checks, f" in batch {index}")
        sums.reduce(data.processes, data.layers)
        factors = cls.finish_factors(sums, data.n_examples)
        data.check_called(factors)
        return factors

    @classmethod
    def finish_factors(cls, sums: KroneckerSums, n_examples: int) -> dict[str, KroneckerFactors]:
        """The factors on their scale, from what was summed over the data."""
        return sums.factors()

    @classmethod
    def measure_eigenvalues(
        cls,
        data: Passes,
        factors: Mapping[str, KroneckerFactors],
        bases: Mapping[str, tuple[Eigenbasis, Eigenbasis]],
    ) -> dict[str, Blocks]:
        """The curvature's eigenvalues in the bases of S and A: here the products of theirs."""
        return kronecker_eigenvalues(bases)

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """See `Curvature`."""
        return {name: one.shape for name, one in self._layers.items()}

    def spectrum(self, layers: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """See `Curvature`."""
        return joined_spectra([self._layers[name].spectrum() for name in layers or self._layers])

    def prepare(self, prior: Prior) -> dict[str, KroneckerPosterior]:
        """The Gaussian of every layer."""
        return under_prior(self._layers, prior)

    def covariance(self, jacobians: Jacobians, prior: Prior, prepared: Mapping[str, KroneckerPosterior]) -> Tensor:
        """The sum over layers of their contractions, one grouped operation per device."""
        devices: dict[torch.device, list[tuple[Tensor, Tensor, KroneckerPosterior, Tensor | None]]] = {}
        for name in jacobians.inputs:
            a, g, mask = jacobians.contraction(name)
            devices.setdefault(a.device, []).append((a, g, prepared[name], mask))
        sums = []
        for parts in devices.values():
            a_, g_, posteriors, masks = (list(column) for column in zip(*parts, strict=True))
            sums.append(ops.grouped_jacobian_covariance(a_, g_, posteriors, masks=masks))
        return torch.stack([one.to(sums[0].device) for one in sums]).sum(dim=0)

    def sample(
        self, n: int, prior: Prior, prepared: Mapping[str, KroneckerPosterior], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `Curvature`."""
        return {name: layer.sample(n, generator) for name, layer in prepared.items()}

    def root(
        self,
        vectors: Mapping[str, Tensor],
        prior: Prior,
        prepared: Mapping[str, KroneckerPosterior],
        transpose: bool = False,
    ) -> dict[str, Tensor]:
        """See `Curvature`: symmetric, in the dtype of the vectors."""
        return {name: prepared[name].apply(torch.rsqrt, v) for name, v in vectors.items()}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """A factor that several layers share is there once, under the name of the first of them, its `input_factor`."""
        tensors: dict[str, Tensor] = {}
        described: dict[str, dict[str, Any]] = {}
        shared: dict[int, str] = {}
        for name, one in self._layers.items():
            factors = self.factors[name]
            parts = {
                "basis_s": one.basis_s,
                "basis_a": one.basis_a,
                **one.curvature._asdict(),
                "s": factors.s,
                "tail_s": factors.tail_s,
                "tail_a": factors.tail_a,
            }
            owner = shared.setdefault(id(factors.a), name)
            if owner == name:
                parts["a"] = factors.a
            tensors |= {f"{name}.{key}": value for key, value in parts.items()}
            described[name] = {"input_factor": owner}
        return tensors, described

    @classmethod
    def unpack(cls, stored: Stored) -> KroneckerCurvature:
        """See `Curvature`."""
        layers, factors, inputs = {}, {}, {}
        for name, description in stored.layers.items():
            device, (d_out, d_in) = stored.device(name), stored.shape(name)
            owner = description.get("input_factor")
            if not isinstance(owner, str) or owner not in stored.layers:
                raise ValueError(f"layers.{name}.input_factor: expected the name of one of the layers, got {owner!r}")
            if stored.shape(owner)[1] != d_in:
                raise ValueError(
                    f"{owner}.a: expected the input factor of {name}, of {d_in} rows, got {stored.shape(owner)[1]}"
                )
            if owner not in inputs:
                inputs[owner] = stored.tensor(f"{owner}.a", (d_in, None), device)
            inputs[owner] = inputs[owner].to(device)
            basis_s = stored.tensor(f"{name}.basis_s", (d_out, None), device)
            basis_a = stored.tensor(f"{name}.basis_a", (d_in, None), device)
            for key, basis in (("basis_s", basis_s), ("basis_a", basis_a)):
                if not _is_orthonormal(basis):
                    raise ValueError(f"{name}.{key}: expected orthonormal columns")
            k_s, k_a = basis_s.shape[1], basis_a.shape[1]
            sizes: tuple[tuple[int, ...], ...] = ((k_s, k_a), (k_s,), (k_a,), ())  # of the four blocks
            blocks = {
                key: stored.tensor(f"{name}.{key}", size, device)
                for key, size in zip(Blocks._fields, sizes, strict=True)
            }
            for key, block in blocks.items():
                if (block < 0).any():
                    raise ValueError(f"{name}.{key}: expected eigenvalues of a curvature, none of them negative")
            s = stored.tensor(f"{name}.s", (d_out, None), device)
            tail_s, tail_a = (stored.tensor(f"{name}.{key}", (), device) for key in ("tail_s", "tail_a"))
            found = stored.names[name]
            layers[found] = KroneckerDecomposition(basis_s, basis_a, Blocks(**blocks))
            factors[found] = KroneckerFactors(inputs[owner], s, tail_a, tail_s)
        return cls(layers, factors)


def _is_orthonormal(basis: Tensor) -> bool:
    """Whether the columns are, as far as their effect on one random vector tells."""
    generator = torch.Generator("cpu").manual_seed(0)
    probe = torch.randn(basis.shape[1], dtype=torch.float64, device="cpu", generator=generator)
    square = float((basis.double() @ probe.to(basis.device)).square().sum())
    return abs(square - float(probe @ probe)) <= ROUNDING * float(probe @ probe)


@register("ekfac")
class EigenvalueCorrectedCurvature(KroneckerCurvature):
    """K-FAC's eigenbases, with the curvature's own eigenvalues along them, from a second pass."""

    passes: ClassVar[int] = 2

    @classmethod
    def measure_eigenvalues(
        cls,
        data: Passes,
        factors: Mapping[str, KroneckerFactors],
        bases: Mapping[str, tuple[Eigenbasis, Eigenbasis]],
    ) -> dict[str, Blocks]:
        """Second moments of the gradients along the bases."""
        sums = EigenvalueSums(bases, factors, data.config.tail)
        for _, recorded in data.captures("eigenvalues", [sums], weight_gradients=True):
            for _, gradients in data.backward(recorded, weight_gradients=list(bases)):
                sums.add(gradients)
        sums.reduce(data.processes)
        return sums.eigenvalues()


def _agreed(
    processes: Processes, factors: Mapping[str, KroneckerFactors], bases: Mapping[str, tuple[Eigenbasis, Eigenbasis]]
) -> tuple[dict[str, KroneckerFactors], dict[str, tuple[Eigenbasis, Eigenbasis]]]:
    """The same on all processes, although these decompose for themselves."""
    tensors = [
        tensor
        for name, one in factors.items()
        for tensor in (one.a, one.s, one.tail_a, one.tail_s, *bases[name][0], *bases[name][1])
    ]
    same = iter(processes.agree(tensors))
    found_factors, found_bases = {}, {}
    for name in factors:
        found_factors[name] = KroneckerFactors(*islice(same, 4))
        found_bases[name] = Eigenbasis(*islice(same, 3)), Eigenbasis(*islice(same, 3))
    return found_factors, found_bases
