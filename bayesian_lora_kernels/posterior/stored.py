"""The part of a file that is a curvature's: named tensors, checked and read as they are taken out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.posterior.tensor_file import CPU, DTYPES, TensorFile


@dataclass(frozen=True)
class Stored:
    """What `Curvature.pack` gave, as a file brings it back.

    Attributes:
        tensors: by their names in the file, where they stay until they are asked for.
        layers: `{layer in the file: what JSON says of it}`, its `shape` at least.
        names: `{layer in the file: layer in the model}`; they differ if an adapter has been renamed.
        devices: `{layer in the model: where its part goes}`.
    """

    tensors: TensorFile
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

    def sizes(self, name: str, shape: tuple[int | None, ...]) -> tuple[int, ...]:
        """The shape of a tensor of floats, of which nothing is read; None stands for any size.

        Raises:
            ValueError: if it is missing, or of another shape or kind.
        """
        wanted = f"a tensor {name} of shape [{', '.join('k' if size is None else str(size) for size in shape)}]"
        if name not in self.tensors:
            raise ValueError(f"expected {wanted}, there is none")
        found, dtype = self.tensors.shape(name), self.tensors.dtype(name)
        fits = len(found) == len(shape) and all(size in (None, n) for size, n in zip(shape, found, strict=True))
        if not fits or dtype not in DTYPES.values():
            raise ValueError(f"expected {wanted}, got {dtype} of shape {list(found)}")
        return found

    def tensor(
        self,
        name: str,
        shape: tuple[int | None, ...],
        device: torch.device = CPU,
        *,
        rows: slice | None = None,
        finite: bool = True,
    ) -> Tensor:
        """A tensor of floats, read onto a device.

        Args:
            name: in the file.
            shape: of the whole tensor; None stands for any size.
            device: where it goes.
            rows: those that are wanted; None: all.
            finite: whether its numbers must be finite.

        Raises:
            ValueError: if it is missing, of another shape or kind, or not finite.
        """
        self.sizes(name, shape)
        tensor = self.tensors.read(name, device, rows)
        if finite and not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: expected finite numbers")
        return tensor
