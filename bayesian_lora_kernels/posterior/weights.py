"""The weights at which a posterior was measured: its own, and the frozen ones beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bayesian_lora_kernels.model import fingerprint, names
from bayesian_lora_kernels.posterior import storage


@dataclass(frozen=True)
class MeasuredWeights:
    """What a posterior stands on, taken when it was measured.

    Attributes:
        digest: of the posterior's own parameters; None if their values are not at hand (sharded).
        versions: of the same parameters, which tell at no cost that nobody wrote to them.
        base: of the frozen weights, as `fingerprint.take` gives it; None if an adapter was merged into them.
    """

    digest: str | None
    versions: dict[str, tuple[int, int]]
    base: tuple[Tensor, dict[str, Any]] | None

    @staticmethod
    def of(model: nn.Module, parameters: Mapping[str, Tensor]) -> MeasuredWeights:
        """Those of a model, with the parameters that the posterior covers."""
        at_hand = all(fingerprint.at_hand(p) for p in parameters.values())
        base = None if fingerprint.merged(model) else fingerprint.take(model, parameters.values())
        return MeasuredWeights(adapter_digest(parameters) if at_hand else None, _versions(parameters), base)

    def check_unchanged(self, parameters: Mapping[str, Tensor], what: str) -> None:
        """Whether the posterior's parameters are still what they were.

        Raises:
            ValueError: if they are not.
        """
        if self.versions == _versions(parameters) or self.digest is None:
            return
        if adapter_digest(parameters) != self.digest:
            raise ValueError(
                f"{what}: the weights of the posterior have changed since it was measured (further training, or other "
                "weights loaded); call fit(loader) again"
            )
        self.versions.update(_versions(parameters))


def adapter_digest(parameters: Mapping[str, Tensor]) -> str:
    """The same whatever one adapter is called; several keep their names."""
    adapters = names.adapters_of(parameters)
    anonymous = {adapters[0]: ""} if len(adapters) == 1 else None
    canonical = names.unique_names(parameters, anonymous)
    return storage.adapter_digest({canonical[name]: value for name, value in parameters.items()})


def _versions(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (id(p), -1 if p.is_inference() else p._version) for name, p in parameters.items()}
