"""The weights at which a posterior was measured, its own and the frozen ones beside them; where a model has them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from bayesian_lora_kernels.model import fingerprint, names
from bayesian_lora_kernels.model.sharding import sharing, whole
from bayesian_lora_kernels.posterior import storage
from bayesian_lora_kernels.processes import ALONE


@dataclass(frozen=True)
class MeasuredWeights:
    """What a posterior stands on, taken when it was measured.

    Attributes:
        digest: of the posterior's own parameters; None if their values are not at hand (on the meta device).
        versions: of the same parameters, which tell at no cost that nobody wrote to them, by identity: a parameter that
            FSDP shards has two.
        values: of the same parameters if the model is sharded: nothing else needs its other processes then.
        base: of the frozen weights, as `fingerprint.take` gives it; None if an adapter was merged into them.
    """

    digest: str | None
    versions: dict[str, dict[int, int]]
    values: dict[str, Tensor] | None
    base: tuple[Tensor, dict[str, Any]] | None

    @staticmethod
    def of(model: nn.Module, parameters: Mapping[str, Tensor]) -> MeasuredWeights:
        """Those of a model, with the parameters that the posterior covers."""
        sharded = sharing(model) is not ALONE
        at_hand = all(fingerprint.at_hand(p) for p in parameters.values())
        base = None if fingerprint.merged(model) else fingerprint.take(model, parameters.values())
        values = {name: whole(p) for name, p in parameters.items()} if sharded else None
        digest = adapter_digest(values or parameters) if at_hand else None
        return MeasuredWeights(digest, {name: dict([_version(p)]) for name, p in parameters.items()}, values, base)

    def check_unchanged(self, parameters: Mapping[str, Tensor], what: str) -> None:
        """Whether the posterior's parameters are still what they were.

        Raises:
            ValueError: if they are not.
        """
        versions = {name: _version(p) for name, p in parameters.items()}
        known = all((key, self.versions.get(name, {}).get(key)) == (key, n) for name, (key, n) in versions.items())
        if known or self.digest is None:
            return
        if adapter_digest(parameters) != self.digest:
            raise ValueError(
                f"{what}: the weights of the posterior have changed since it was measured (further training, or other "
                "weights loaded); call fit(loader) again"
            )
        for name, (key, n) in versions.items():
            self.versions.setdefault(name, {})[key] = n


def adapter_digest(parameters: Mapping[str, Tensor]) -> str:
    """The same whatever one adapter is called; several keep their names."""
    adapters = names.adapters_of(parameters)
    anonymous = {adapters[0]: ""} if len(adapters) == 1 else None
    canonical = names.unique_names(parameters, anonymous)
    return storage.adapter_digest({canonical[name]: whole(value) for name, value in parameters.items()})


def find_adapter(model: nn.Module, content: Mapping[str, Any]) -> tuple[names.Placement, bool]:
    """Where the file's layers are in the model, and whether their weights are those of the fit.

    Raises:
        ValueError: if they are not there, or if several adapters have these weights and not exactly one is active.
    """
    digest = storage.parameter_digest if content["version"] == 1 else adapter_digest
    modules = dict(model.named_modules())
    places = names.placements(model, list(content["layers"]))
    same = []
    for place in places:
        leaves = covered_by(model, content["layers"], place)
        parameters = {
            names.join(stored, leaf): getattr(modules[name], leaf)
            for stored, name in place.layers.items()
            for leaf in leaves[name]
        }
        if all(p is not None for p in parameters.values()) and digest(parameters) == content["adapter_sha256"]:
            same.append(place)
    active = {adapter for module in modules.values() for adapter in names.active_adapters(module) or []}
    if not same:
        return min(places, key=lambda place: (place.adapter not in active, bool(place.adapters))), False
    if len(same) > 1:
        chosen = [place for place in same if place.adapter in active]
        if len(chosen) != 1:
            raise ValueError(
                f"the adapters {', '.join(str(place.adapter) for place in same)} all have the weights that the "
                f"posterior was fitted to, and {len(chosen)} of them are active; activate one with "
                "model.set_adapter(name)"
            )
        same = chosen
    if same[0].adapter is not None and same[0].adapter not in active:
        warnings.warn(
            f"the posterior belongs to the adapter {same[0].adapter!r}, which is not active; call "
            f"model.set_adapter({same[0].adapter!r}) before predicting",
            stacklevel=3,
        )
    return same[0], True


def covered_by(
    model: nn.Module, layers: Mapping[str, Mapping[str, Any]], place: names.Placement
) -> dict[str, tuple[str, ...]]:
    """`{name in the model: which of weight and bias}`; format version 1 tells by the shape."""
    covers = {}
    for stored, name in place.layers.items():
        leaves = layers[stored].get("covers")
        if leaves is None:
            extra = layers[stored]["shape"][1] - cast(nn.Linear, model.get_submodule(name)).in_features
            leaves = {0: ("weight",), 1: ("weight", "bias")}.get(extra, ("bias",) if extra < 0 else ("weight",))
        covers[name] = tuple(leaves)
    return covers


def _version(parameter: Tensor) -> tuple[int, int]:
    return id(parameter), -1 if parameter.is_inference() else parameter._version
