"""The part of a file that is a curvature's: named tensors, checked as they are taken out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """What `Curvature.pack` gave, as a file brings it back.

    Attributes:
        tensors: by their names in the file, on the CPU.
        layers: `{layer in the file: what JSON says of it}`, its `shape` at least.
        names: `{layer in the file: layer in the model}`; they differ if an adapter has been renamed.
        devices: `{layer in the model: where its part goes}`.
    """

    tensors: Mapping[str, Tensor]
    layers: Mapping[str, Mapping[str, Any]]
    names: Mapping[str, str]
    devices: Mapping[str, torch.device]

    def shape(self, layer: str) -> tuple[int, int]:
        """`(d_out, d_in)` of a layer in the file."""
        d_out, d_in = self.layers[layer]["shape"]
        return int(d_out), int(d_in)

    def device(self, layer: str) -> torch.device:
        """Where the part of a layer in the file goes."""
        return self.devices[self.names[layer]]

    def tensor(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """A tensor of floats; None stands for any size.

        Raises:
            ValueError: if it is missing, or of another shape or kind.
        """
        tensor = self.tensors.get(name)
        wanted = f"a tensor {name} of shape [{', '.join('k' if size is None else str(size) for size in shape)}]"
        if tensor is None:
            raise ValueError(f"expected {wanted}, there is none")
        fits = tensor.ndim == len(shape) and all(size in (None, n) for size, n in zip(shape, tensor.shape, strict=True))
        if not fits or not tensor.is_floating_point():
            raise ValueError(f"expected {wanted}, got {tensor.dtype} of shape {list(tensor.shape)}")
        return tensor
