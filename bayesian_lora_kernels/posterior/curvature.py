"""What every kind of curvature offers. A new kind is one subclass; nothing else needs to know of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from bayesian_lora_kernels.model.jacobians import Jacobians
from bayesian_lora_kernels.posterior.kronecker import KroneckerFactors
from bayesian_lora_kernels.posterior.prior import Prior
from bayesian_lora_kernels.posterior.stored import Stored
from bayesian_lora_kernels.posterior.tensor_file import Columns
from bayesian_lora_kernels.processes import ALONE, Processes

if TYPE_CHECKING:
    from bayesian_lora_kernels.curvature.passes import Passes

CURVATURES: dict[str, type[Curvature]] = {}  # by the names that `LaplaceLoRA(curvature=...)` and files know them under
Kind = TypeVar("Kind", bound="type[Curvature]")


class Curvature(ABC):
    """The Gauss-Newton matrix of the negative log-likelihood, summed over the data set, in some representation.

    It is what a fit measures, over the matrices `[d_out, d_in]` of some layers, and knows no prior: the precision of
    the posterior is the curvature plus the prior's. Shapes below are those of `{layer name: ...}` mappings. To add a
    kind, write a subclass under `@register("its name")`; CONTRIBUTING.md goes through the steps.

    Attributes:
        passes: how often `measure` goes over the data.
        masked: whether padding is left out of the inputs and gradients that are handed to `measure`.
        whole_jacobians: whether `covariance` wants every layer's Jacobian as `[N, C, d_out, d_in]`, rather than as what
            it is made of.
        independent_layers: whether no entry of the matrix couples two layers.
        of_all_processes: whether `measure` adds up over `Passes.processes`; if not, a fit of several is refused.
        factors: Kronecker factors of each layer, if there are any.
        processes: that a curvature is spread over, if none of them holds it by itself: all of them then ask for
            covariances `in_step`, and at once for everything else.
    """

    passes: ClassVar[int] = 1
    masked: ClassVar[bool] = True
    whole_jacobians: ClassVar[bool] = True
    independent_layers: ClassVar[bool] = True
    of_all_processes: ClassVar[bool] = False
    factors: Mapping[str, KroneckerFactors] | None = None
    processes: Processes = ALONE

    @classmethod
    @abstractmethod
    def measure(cls, data: Passes) -> Curvature:
        """Measure it at the current weights, by passes over the data."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """`(d_out, d_in)` of every layer, in the order of the model."""

    @abstractmethod
    def spectrum(self, layers: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Eigenvalues and their multiplicities, both `[m]` float64; of some layers, if these are independent."""

    @abstractmethod
    def covariance(self, jacobians: Jacobians, prior: Prior, prepared: Any) -> Tensor:
        """`J Sigma J^T [N, C, C]`, Sigma the inverse of this curvature plus the prior's precision."""

    def in_step(self) -> AbstractContextManager[None]:
        """Where each of `processes` may ask for covariances as often as it likes, or not at all; all of them come."""
        return nullcontext()

    @abstractmethod
    def sample(self, n: int, prior: Prior, prepared: Any, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Zero-mean samples of the weights' deviations from the MAP, `[n, d_out, d_in]`."""

    def root(
        self, vectors: Mapping[str, Tensor], prior: Prior, prepared: Any, transpose: bool = False
    ) -> dict[str, Tensor]:
        """`B v`, or `B^T v`, of vectors of weights `[n, d_out, d_in]`, with B a square root of Sigma: `B B^T = Sigma`.

        Raises:
            NotImplementedError: for a kind that does not have it.
            ValueError: for a curvature that is spread over processes.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected a method root(vectors, prior, prepared, transpose), which covariances "
            "across inputs and influence are made of"
        )

    @abstractmethod
    def pack(self) -> tuple[Mapping[str, Tensor | Columns], dict[str, dict[str, Any]]]:
        """What a file holds: `{"layer name.key": tensor}`, and what its JSON says of some layers beside their shape.

        A matrix that is too large to be had at once is given as `Columns`.
        """

    @classmethod
    @abstractmethod
    def unpack(cls, stored: Stored) -> Curvature:
        """The curvature that `pack` took apart.

        Raises:
            ValueError: for a tensor that is missing or of another shape (`Stored.tensor` raises it).
        """

    def prepare(self, prior: Prior) -> Any:  # noqa: B027 (a kind may need nothing)
        """What covariances and samples under this prior need, computed once for each posterior.

        A mapping `{layer: its Gaussian}`, if there is one for each, is what the posterior shows as its items.
        """

    def logdet(self, prior: Prior) -> Tensor:
        """Log-determinant of the posterior's precision, 0-d float64, differentiable in the prior precision."""
        terms = []
        for name in self.shapes:
            values, multiplicity = self.spectrum([name])
            terms.append(((values + prior[name].to(values.device)).log() * multiplicity).sum())
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    @property
    def n_parameters(self) -> dict[str, int]:
        """Weights of every layer."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}


def register(name: str) -> Callable[[Kind], Kind]:
    """A decorator under which a kind of curvature is known by a name from then on.

    Raises:
        ValueError: if another kind has this name.
    """

    def decorate(kind: Kind) -> Kind:
        if CURVATURES.setdefault(name, kind) is not kind:
            raise ValueError(f"register: {name!r} is the name of {CURVATURES[name].__name__} already")
        return kind

    return decorate


def joined_spectra(spectra: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Eigenvalues and multiplicities of independent layers as one spectrum."""
    device = spectra[0][0].device
    return (
        torch.cat([values.to(device) for values, _ in spectra]),
        torch.cat([multiplicity.to(device) for _, multiplicity in spectra]),
    )
