"""A posterior as named tensors and back: what `storage` puts on disk."""

from __future__ import annotations

import math
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
    names: Mapping[str, str],
    devices: Mapping[str, torch.device],
    exact: bool,
) -> tuple[LayerwisePosterior | ExactPosterior, dict[str, KroneckerFactors] | None]:
    """The posterior, and the factors if it has them.

    Args:
        tensors: as from `pack`.
        layers: as from `pack`.
        names: `{layer in the file: layer in the model}`.
        devices: `{layer in the model: where its part goes}`.
        exact: whether it is an `ExactPosterior`.

    Raises:
        ValueError: for a tensor that is missing or of another shape; it is named.
    """
    shapes = {name: (int(layer["shape"][0]), int(layer["shape"][1])) for name, layer in layers.items()}
    if exact:
        gram = _tensor(tensors, GRAM, (None, None))
        n = len(gram)
        _tensor(tensors, GRAM, (n, n))
        rows = {names[name]: _tensor(tensors, f"{name}.rows", (n, math.prod(shapes[name]))) for name in layers}
        device = next(iter(devices.values()))
        return ExactPosterior(RowStore.of(rows), {names[name]: s for name, s in shapes.items()}, device, gram), None
    posteriors, factors = {}, {}
    inputs = {
        owner: _tensor(tensors, f"{owner}.a", (shapes[owner][1], None))
        for owner in {layer["input_factor"] for layer in layers.values()}
    }
    for name, layer in layers.items():
        device, owner, (d_out, d_in) = devices[names[name]], layer["input_factor"], shapes[name]
        basis_s = _tensor(tensors, f"{name}.basis_s", (d_out, None))
        basis_a = _tensor(tensors, f"{name}.basis_a", (d_in, None))
        k_s, k_a = basis_s.shape[1], basis_a.shape[1]
        sizes: tuple[tuple[int, ...], ...] = ((k_s, k_a), (k_s,), (k_a,), ())  # of the four blocks
        kept = [_tensor(tensors, f"{name}.{key}", size) for key, size in zip(Blocks._fields, sizes, strict=True)]
        s = _tensor(tensors, f"{name}.s", (d_out, None)).to(device)
        tail_s, tail_a = (_tensor(tensors, f"{name}.{key}", ()).to(device) for key in ("tail_s", "tail_a"))
        if shapes[owner][1] != d_in:
            raise ValueError(f"{owner}.a: expected the input factor of {name}, of {d_in} rows, got {shapes[owner][1]}")
        one = torch.ones((), dtype=torch.float64, device=device)
        posteriors[names[name]] = KroneckerPosterior(
            basis_s.to(device), basis_a.to(device), Blocks(*(block.to(device) for block in kept)), one
        )
        inputs[owner] = inputs[owner].to(device)
        factors[names[name]] = KroneckerFactors(inputs[owner], s, tail_a, tail_s)
    return LayerwisePosterior(posteriors), factors


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int | None, ...]) -> Tensor:
    """One of floats; None stands for any size."""
    tensor = tensors.get(name)
    wanted = f"a tensor {name} of shape [{', '.join('k' if size is None else str(size) for size in shape)}]"
    if tensor is None:
        raise ValueError(f"expected {wanted}, there is none")
    fits = tensor.ndim == len(shape) and all(size in (None, n) for size, n in zip(shape, tensor.shape, strict=True))
    if not fits or not tensor.is_floating_point():
        raise ValueError(f"expected {wanted}, got {tensor.dtype} of shape {list(tensor.shape)}")
    return tensor


def stored_values(tensors: Mapping[str, Tensor], name: str, count: int) -> Tensor:
    """A vector of `count` floats.

    Raises:
        ValueError: if it is missing or of another shape.
    """
    return _tensor(tensors, name, (count,))
