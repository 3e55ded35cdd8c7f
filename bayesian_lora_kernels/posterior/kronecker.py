"""The Kronecker-factored Gaussian posterior over one weight matrix.

Everything is expressed in the eigenbases of the two factors. Each side keeps `k` orthonormal columns; what is left of
the space, its complement, carries one shared eigenvalue. A full factor simply has an empty complement. The weight space
thus splits into four blocks, and K-FAC and EKFAC differ only in the numbers that stand on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.posterior.prior import Prior, as_precision
from bayesian_lora_kernels.surroundings import in_own_surroundings

SMALL = 128  # a matrix that `ops.small_eigh` takes
BATCH_ELEMENTS = 2**25  # of factors that are decomposed together, in float64

Key = TypeVar("Key")


class Blocks(NamedTuple):
    """One number per eigendirection of the weight space, on its four blocks.

    With `k_s` kept columns for the output gradients and `k_a` for the inputs:

    - `kept [k_s, k_a]`: kept on both sides;
    - `rest_a [k_s]`: kept for S, shared over the complement of A;
    - `rest_s [k_a]`: kept for A, shared over the complement of S;
    - `rest []`: both complements.
    """

    kept: Tensor
    rest_a: Tensor
    rest_s: Tensor
    rest: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Blocks:
        """Apply `function` to each block."""
        return Blocks(*(function(block) for block in self))


@dataclass(frozen=True)
class KroneckerFactors:
    """The two factors of one module's curvature `A (x) S`, scaled as in docs/method.md: A a mean, S a sum.

    Attributes:
        a: input factor `[d_in, d_in]`, or `[d_in, k]`, k < d_in, with `a a^T` the low-rank estimate.
        s: output-gradient factor `[d_out, d_out]`, or `[d_out, k]` likewise.
        tail_a: 0-d, the eigenvalue that stands for every direction outside the k columns (0 for a full factor).
        tail_s: 0-d, likewise.
    """

    a: Tensor
    s: Tensor
    tail_a: Tensor
    tail_s: Tensor

    @in_own_surroundings
    def trace(self) -> Tensor:
        """Trace of `A (x) S`, tails included: 0-d float64."""
        return _factor_trace(self.a, self.tail_a) * _factor_trace(self.s, self.tail_s)


def _is_full(factor: Tensor) -> bool:
    return factor.shape[-2] == factor.shape[-1]


def _factor_trace(factor: Tensor, tail: Tensor) -> Tensor:
    factor = factor.double()
    if _is_full(factor):
        return factor.diagonal().sum()
    return factor.square().sum() + tail.double() * (factor.shape[0] - factor.shape[1])


class Eigenbasis(NamedTuple):
    """Kept eigenvectors `[d, k]`, their eigenvalues `[k]` in float64, and the complement's shared eigenvalue (0-d)."""

    vectors: Tensor
    values: Tensor
    tail: Tensor


def eigenbases(factors: Mapping[str, KroneckerFactors]) -> dict[str, tuple[Eigenbasis, Eigenbasis]]:
    """The eigendecompositions of S and A of every layer; layers with one input share that of A.

    Factors of one shape go through together.
    """
    pairs = [pair for f in factors.values() for pair in ((f.s, f.tail_s), (f.a, f.tail_a))]
    sides = {(id(factor), id(tail)): (factor, tail) for factor, tail in pairs}
    groups: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for key, (factor, _) in sides.items():
        groups.setdefault((factor.shape, factor.dtype, factor.device), []).append(key)
    found: dict[tuple[int, int], Eigenbasis] = {}
    for (shape, _, _), keys in groups.items():
        for part in in_batches(keys, math.prod(shape)):
            stacked, tails = (torch.stack([sides[key][side] for key in part]) for side in (0, 1))
            found |= zip(part, _eigenbases(stacked, tails), strict=True)
    return {name: (found[id(f.s), id(f.tail_s)], found[id(f.a), id(f.tail_a)]) for name, f in factors.items()}


def _eigenbases(factors: Tensor, tails: Tensor) -> list[Eigenbasis]:
    """Eigendecompositions of factors `[L, d, k]`, without the directions that are numerically zero.

    A factor made from fewer rows than its width has a null space whose basis is arbitrary; it becomes part of the
    complement, so that nothing computed later depends on that arbitrary choice.
    """
    wide, full = factors.double(), _is_full(factors)
    eps, tiny = torch.finfo(factors.dtype).eps, torch.finfo(torch.float64).tiny
    if full:
        values, vectors = descending_eigh((wide + wide.mT) / 2)
        # The rounding of the accumulation, not of this float64 decomposition, decides what is zero.
        rounding = eps
    else:
        norms = torch.linalg.vector_norm(wide, dim=1).clamp_min(tiny)  # [L, k]
        unit = wide / norms[:, None, :]  # scaled columns keep the small eigenvalues of a graded matrix accurate
        values, mixing = descending_eigh((unit.mT @ unit) * norms[:, :, None] * norms[:, None, :])
        vectors = (wide @ mixing) / values.clamp_min(tiny).sqrt()[:, None, :]
        rounding = eps**2
    kept = values > values.amax(dim=1, keepdim=True).clamp_min(0) * factors.shape[1] * rounding  # the first of them
    counts = kept.sum(dim=1).tolist()
    if not full:
        vectors = torch.linalg.qr(torch.where(kept[:, None, :], vectors, 0.0))[0]
    # A direction outside everything the factor saw has eigenvalue tail; for a full factor that is zero.
    columns = zip(vectors.to(factors.dtype).contiguous(), values, tails.double().clamp_min(0), counts, strict=True)
    return [Eigenbasis(q[:, :count].contiguous(), e[:count], tail) for q, e, tail, count in columns]


def in_batches(keys: Sequence[Key], elements: int) -> Iterator[Sequence[Key]]:
    """As many at a time as have `BATCH_ELEMENTS` together, if each has `elements`; at least one."""
    step = max(1, BATCH_ELEMENTS // max(1, elements))
    return (keys[start : start + step] for start in range(0, len(keys), step))


def descending_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of symmetric matrices `[L, n, n]`."""
    if matrices.shape[-1] <= SMALL:
        return ops.small_eigh(matrices)
    values, vectors = torch.linalg.eigh(matrices)
    return values.flip(-1), vectors.flip(-1)


def kronecker_eigenvalues(bases: Mapping[str, tuple[Eigenbasis, Eigenbasis]]) -> dict[str, Blocks]:
    """K-FAC's curvature eigenvalues: products of those of the factors S and A, in float64; of one size together."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, (s, a) in bases.items():
        groups.setdefault((len(s.values), len(a.values), s.values.device), []).append(name)
    found: dict[str, Blocks] = {}
    for names in groups.values():
        values_s, values_a = (torch.stack([bases[name][side].values for name in names]) for side in (0, 1))
        tails_s, tails_a = (torch.stack([bases[name][side].tail for name in names]) for side in (0, 1))
        kept = values_s[:, :, None] * values_a[:, None, :]
        blocks = (kept, values_s * tails_a[:, None], values_a * tails_s[:, None], tails_s * tails_a)
        found |= zip(names, map(Blocks, *(block.unbind() for block in blocks)), strict=True)
    return {name: found[name] for name in bases}


def decomposed(factors: Mapping[str, KroneckerFactors]) -> dict[str, KroneckerDecomposition]:
    """`A (x) S` of every layer in its eigenbases."""
    bases = eigenbases(factors)
    values = kronecker_eigenvalues(bases)
    return {name: KroneckerDecomposition(s.vectors, a.vectors, values[name]) for name, (s, a) in bases.items()}


def under_prior(layers: Mapping[str, KroneckerDecomposition], prior: Prior) -> dict[str, KroneckerPosterior]:
    """The posterior of every layer, with the precisions of all of them computed together."""
    found = {}
    devices = dict.fromkeys(layer.basis_a.device for layer in layers.values())
    for device in devices:
        here = {name: layer for name, layer in layers.items() if layer.basis_a.device == device}
        numbers = torch.stack([prior[name] for name in here]).to(device)
        blocks = [block.reshape(-1) for layer in here.values() for block in layer.curvature]
        sizes = [block.numel() for block in blocks]
        of_layer = [sum(sizes[i : i + 4]) for i in range(0, len(sizes), 4)]
        repeats = torch.tensor(of_layer).to(device)
        sums = torch.cat(blocks) + numbers.repeat_interleave(repeats, output_size=sum(sizes))
        pieces = iter(sums.split(sizes))
        for (name, layer), number in zip(here.items(), numbers.unbind(), strict=True):
            posterior = found[name] = layer.with_prior(number)
            own = Blocks(*(next(pieces).reshape(block.shape) for block in layer.curvature))
            vars(posterior)["precision_blocks"] = own
    return {name: found[name] for name in layers}


@dataclass(frozen=True)
class KroneckerDecomposition:
    """The curvature of one weight matrix `W [d_out, d_in]` in the eigenbases of its two factors.

    Attributes:
        basis_s: `[d_out, k_s]` orthonormal columns.
        basis_a: `[d_in, k_a]` orthonormal columns.
        curvature: eigenvalues of the curvature on the four blocks, float64.
    """

    basis_s: Tensor
    basis_a: Tensor
    curvature: Blocks

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)`."""
        return self.basis_s.shape[0], self.basis_a.shape[0]

    @property
    def complement(self) -> tuple[int, int]:
        """Dimensions outside the kept columns, `(d_out - k_s, d_in - k_a)`."""
        return self.shape[0] - self.basis_s.shape[1], self.shape[1] - self.basis_a.shape[1]

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the curvature and their multiplicities, both `[m]` float64."""
        n_s, n_a = self.complement
        sizes = (1, n_a, n_s, n_s * n_a)
        present = [(block.reshape(-1), size) for block, size in zip(self.curvature, sizes, strict=True) if size]
        return (
            torch.cat([block for block, _ in present]),
            torch.cat([torch.full_like(block, size) for block, size in present]),
        )

    def with_prior(self, prior_precision: Tensor) -> KroneckerPosterior:
        """The posterior under a prior precision, 0-d float64 and positive."""
        return KroneckerPosterior(self.basis_s, self.basis_a, self.curvature, prior_precision.to(self.basis_a.device))


@dataclass(frozen=True)
class KroneckerPosterior(KroneckerDecomposition):
    """Gaussian over one weight matrix `W [d_out, d_in]` with precision `curvature + prior_precision * I`.

    The curvature is the sum over the data set of the negative log-likelihood's Gauss-Newton matrix; nothing is divided
    by the number of examples.

    Attributes:
        prior_precision: 0-d float64, positive; may require a gradient.
    """

    prior_precision: Tensor

    @classmethod
    @in_own_surroundings
    def from_factors(cls, factors: KroneckerFactors, prior_precision: float | Tensor) -> KroneckerPosterior:
        """Posterior with precision `A (x) S + prior_precision * I`.

        Raises:
            ValueError: if a factor is not a matrix, or the prior precision is not a positive number.
        """
        for name, factor in (("a", factors.a), ("s", factors.s)):
            if factor.ndim != 2 or factor.shape[1] > factor.shape[0]:
                raise ValueError(
                    f"KroneckerFactors.{name}: expected [d, d] or [d, k] with k < d, got {list(factor.shape)}"
                )
        (layer,) = decomposed({"": factors}).values()
        return layer.with_prior(as_precision(prior_precision, factors.a.device))

    @cached_property
    def precision_blocks(self) -> Blocks:
        """Eigenvalues of the posterior precision on the four blocks, float64."""
        return self.curvature.map(lambda block: block + self.prior_precision)

    def logdet(self) -> Tensor:
        """Log-determinant of the posterior precision: 0-d float64, differentiable in the prior precision."""
        values, multiplicity = self.spectrum()
        return ((values + self.prior_precision).log() * multiplicity).sum()

    @in_own_surroundings
    def apply(self, function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
        """`f(precision)` times each of `matrices [..., d_out, d_in]`, for a function of the eigenvalues.

        `torch.reciprocal` gives the covariance's action, `torch.rsqrt` its square root's.
        """
        dtype = matrices.dtype
        q_s, q_a = self.basis_s.to(dtype), self.basis_a.to(dtype)
        values = self.precision_blocks.map(lambda block: function(block).to(dtype))
        n_s, n_a = self.complement
        u = q_s.mT @ matrices  # [..., k_s, d_in]
        p = u @ q_a  # [..., k_s, k_a]
        result = q_s @ (values.kept * p) @ q_a.mT
        if n_a:
            u_rest = u - p @ q_a.mT
            result = result + q_s @ (values.rest_a[:, None] * u_rest)
        if n_s:
            v_rest = matrices @ q_a - q_s @ p
            result = result + (v_rest * values.rest_s) @ q_a.mT
        if n_s and n_a:
            result = result + values.rest * (matrices - q_s @ u - v_rest @ q_a.mT)
        return result

    @in_own_surroundings
    def covariance(self, j1: Tensor, j2: Tensor) -> Tensor:
        """`J1 Sigma J2^T`.

        Args:
            j1: `[n1, d_out, d_in]`, or `[n1, d_out * d_in]` in row-major order.
            j2: `[n2, ...]` likewise.

        Returns:
            `[n1, n2]` in the dtype of `j1`.

        Raises:
            ValueError: if a Jacobian does not have this posterior's shape.
        """
        size = math.prod(self.shape)
        for name, jacobian in (("j1", j1), ("j2", j2)):
            if jacobian.ndim < 2 or jacobian[0:1].numel() not in (0, size) or jacobian.ndim > 3:
                raise ValueError(
                    f"covariance: expected {name} of shape [n, {self.shape[0]}, {self.shape[1]}] or [n, {size}], "
                    f"got {list(jacobian.shape)}"
                )
        right = self.apply(torch.reciprocal, j2.reshape(-1, *self.shape))
        return j1.reshape(-1, size) @ right.reshape(-1, size).mT

    @in_own_surroundings
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`[n, d_out, d_in]` zero-mean samples of the weight's deviation from its MAP value."""
        noise = torch.randn((n, *self.shape), generator=generator, dtype=self.basis_a.dtype, device=self.basis_a.device)
        return self.apply(torch.rsqrt, noise)

    @in_own_surroundings
    def to_dense(self) -> Tensor:
        """Posterior precision of the row-major weight, `[d_out * d_in, d_out * d_in]` float64. For tests."""
        size = math.prod(self.shape)
        identity = torch.eye(size, dtype=torch.float64, device=self.basis_a.device).reshape(size, *self.shape)
        return self.apply(lambda block: block, identity).reshape(size, size)
