"""Storage for the rows of the exact Gauss-Newton matrix: on the device, on the host, or in memory-mapped files."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bayesian_lora_kernels.curvature.state import GrowingRows


class RowStore:
    """Per layer a matrix `[n, P]` that grows by rows and is read by column slices.

    Rows stay where they come from while they fit `budget` bytes there; a GPU's then move to the host, and the host's
    into one file per layer in a temporary folder, which disappears with the store.

    Args:
        budget: bytes per place (device, host).
        dtype: of the stored rows; None keeps what comes.
    """

    def __init__(self, budget: int, dtype: torch.dtype | None = None):
        self.budget = budget
        self.dtype = dtype
        self.place = "device"
        self.n_rows = 0
        self._bytes = 0
        self._widths: dict[str, int] = {}
        self._blocks: dict[str, list[Tensor]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def of(cls, rows: Mapping[str, Tensor]) -> RowStore:
        """A store that holds finished matrices, without copying them."""
        store = cls(budget=0)
        store._blocks = {name: [matrix] for name, matrix in rows.items()}
        store._widths = {name: matrix.shape[1] for name, matrix in rows.items()}
        store.n_rows = next((len(matrix) for matrix in rows.values()), 0)
        return store

    @property
    def names(self) -> list[str]:
        """The layers, in the order in which they came."""
        return list(self._widths)

    def width(self, name: str) -> int:
        """P of one layer."""
        return self._widths[name]

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Add the same number of rows `[m, P]` to every layer."""
        rows = {name: block.to(self.dtype or block.dtype) for name, block in rows.items()}
        self._bytes += sum(block.numel() * block.element_size() for block in rows.values())
        self.n_rows += len(next(iter(rows.values())))
        if self.place == "device" and all(block.device.type == "cpu" for block in rows.values()):
            self.place = "host"
        if self.place == "device" and self._bytes > self.budget:
            self.place = "host"
            self._blocks = {name: [block.cpu() for block in blocks] for name, blocks in self._blocks.items()}
        if self.place == "host" and self._bytes > self.budget:
            self.place = "file"
            self._folder = tempfile.TemporaryDirectory(prefix="blk-rows-")
            for name, blocks in self._blocks.items():
                for block in blocks:
                    self._write(name, block)
            self._blocks = {}
        for name, block in rows.items():
            self._widths.setdefault(name, block.shape[1])
            if self.place == "file":
                self._write(name, block)
                self._blocks.pop(name, None)  # the mapping of the shorter file
            else:
                self._blocks.setdefault(name, []).append(block if self.place == "device" else block.cpu())

    def since(self, start: int) -> dict[str, Tensor]:
        """The rows of every layer from one on, wherever they lie."""
        found = {}
        for name in self.names:
            blocks = [self.rows(name)] if self.place == "file" else self._blocks[name]
            ends = itertools.accumulate(map(len, blocks))
            late = [b[max(start - end, -len(b)) :] for b, end in zip(blocks, ends, strict=True) if start < end]
            found[name] = torch.cat(late)
        return found

    def state(self) -> GrowingRows:
        """See `Stateful`."""
        return GrowingRows(self.n_rows, self.since)

    def restore(self, state: Iterable[Mapping[str, Tensor]]) -> None:
        """See `Stateful`."""
        for block in state:
            self.append(block)

    join = restore

    def rows(self, name: str, columns: slice = slice(None)) -> Tensor:
        """`[n, columns]` of one layer, wherever it lies."""
        if self.place == "file" and name not in self._blocks:
            self._blocks[name] = [self._map(name)]
        blocks = [block[:, columns] for block in self._blocks[name]]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / str(self.names.index(name))

    def _write(self, name: str, block: Tensor) -> None:
        self.dtype = block.dtype
        with open(self._path(name), "ab") as file:
            file.write(block.cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def _map(self, name: str) -> Tensor:
        assert self.dtype is not None
        count = self.n_rows * self.width(name)
        mapped = torch.from_file(os.fspath(self._path(name)), shared=True, size=count, dtype=self.dtype)
        return mapped.reshape(self.n_rows, self.width(name))
