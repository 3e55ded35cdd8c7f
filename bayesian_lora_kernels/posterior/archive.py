"""A posterior as named tensors and back: what `storage` puts on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.posterior.exact import ExactPosterior
from bayesian_lora_kernels.posterior.kronecker import Blocks, KroneckerFactors, KroneckerPosterior
from bayesian_lora_kernels.posterior.layerwise import LayerwisePosterior
from bayesian_lora_kernels.posterior.rows import RowStore

GRAM = "gram"


def pack(
    posterior: LayerwisePosterior | ExactPosterior, factors: Mapping[str, KroneckerFactors] | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """`({tensor name: tensor}, {layer: what JSON says of it})`. A factor that several layers share is there once."""
    if isinstance(posterior, ExactPosterior):
        rows = {f"{name}.rows": posterior.store.rows(name) for name in posterior.store.names}
        return {**rows, GRAM: posterior.gram}, {name: {"shape": list(s)} for name, s in posterior.shapes.items()}
    assert factors is not None
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    shared: dict[int, str] = {}
    for name, layer in posterior.layers.items():
        parts = {
            "basis_s": layer.basis_s,
            "basis_a": layer.basis_a,
            **layer.curvature._asdict(),
            "s": factors[name].s,
            "tail_s": factors[name].tail_s,
            "tail_a": factors[name].tail_a.clone(),  # layers with one input share it; safetensors wants each its own
        }
        tensors |= {f"{name}.{key}": value for key, value in parts.items()}
        owner = shared.setdefault(id(factors[name].a), name)
        if owner == name:
            tensors[f"{name}.a"] = factors[name].a
        layers[name] = {"shape": list(layer.shape), "input_factor": owner}
    return tensors, layers


def unpack(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Any]],
    devices: Mapping[str, torch.device],
) -> tuple[LayerwisePosterior | ExactPosterior, dict[str, KroneckerFactors] | None]:
    """The posterior, and the factors if it has them, with each layer on its device."""
    if GRAM in tensors:
        rows = {name: tensors[f"{name}.rows"] for name in layers}
        shapes = {name: (int(layer["shape"][0]), int(layer["shape"][1])) for name, layer in layers.items()}
        device = next(iter(devices.values()))
        return ExactPosterior(RowStore.of(rows), shapes, device, tensors[GRAM]), None
    posteriors, factors = {}, {}
    inputs = {owner: tensors[f"{owner}.a"] for owner in {layer["input_factor"] for layer in layers.values()}}
    for name, layer in layers.items():
        own = {
            key: tensors[f"{name}.{key}"].to(devices[name])
            for key in ("basis_s", "basis_a", *Blocks._fields, "s", "tail_s", "tail_a")
        }
        blocks = Blocks(*(own[key] for key in Blocks._fields))
        one = torch.ones((), dtype=torch.float64, device=devices[name])
        posteriors[name] = KroneckerPosterior(own["basis_s"], own["basis_a"], blocks, one)
        owner = layer["input_factor"]
        inputs[owner] = inputs[owner].to(devices[name])
        factors[name] = KroneckerFactors(inputs[owner], own["s"], own["tail_a"], own["tail_s"])
    return LayerwisePosterior(posteriors), factors
