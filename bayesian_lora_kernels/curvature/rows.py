"""Storage for the rows of the exact Gauss-Newton matrix: on the device, on the host, or in a memory-mapped file."""

from __future__ import annotations

import itertools
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bayesian_lora_kernels.curvature.state import GrowingRows


class RowStore:
    """The rows of all layers side by side: a matrix `[n, P]` that grows by rows and is read by slices of columns.

    Layers of one width lie next to each other. Rows stay where they come from while they fit `budget` bytes there; a
    GPU's then move to the host, and the host's into a file in a temporary folder, which disappears with the store.

    Attributes:
        names: the layers, in the order of their columns.
        columns: `{layer: its columns}`.
        n_rows: n.
        place: `device`, `host` or `file`.

    Args:
        widths: `{layer: how many columns it has}`.
        budget: bytes per place (device, host).
        dtype: of the stored rows; None keeps what comes.
    """

    def __init__(self, widths: Mapping[str, int], budget: int, dtype: torch.dtype | None = None):
        self.names = sorted(widths, key=widths.__getitem__)
        self.budget = budget
        self.dtype = dtype
        self.place = "device"
        self.n_rows = 0
        self._widths = [widths[name] for name in self.names]
        self._edges = [0, *itertools.accumulate(self._widths)]
        self.columns = dict(zip(self.names, map(slice, self._edges, self._edges[1:]), strict=True))
        self._blocks: list[Tensor] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def of(cls, widths: Mapping[str, int], matrix: Tensor) -> RowStore:
        """A store that holds a finished matrix, its columns in the order of `names`, without copying it."""
        store = cls(widths, budget=0)
        store._blocks, store.n_rows = [matrix], len(matrix)
        return store

    @property
    def n_columns(self) -> int:
        """P of all layers together."""
        return self._edges[-1]

    def width(self, name: str) -> int:
        """P of one layer."""
        return self.columns[name].stop - self.columns[name].start

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Add the same number of rows `[m, P]` to every layer."""
        first = rows[self.names[0]]
        block = torch.cat([rows[name].to(first.device) for name in self.names], dim=1)
        block = block.to(self.dtype or block.dtype)
        self.n_rows += len(block)
        n_bytes = self.n_rows * self.n_columns * block.element_size()
        if self.place == "device" and (block.device.type == "cpu" or n_bytes > self.budget):
            self.place = "host"
            self._blocks = [known.cpu() for known in self._blocks]
        if self.place == "host" and n_bytes > self.budget:
            self.place = "file"
            self._folder = tempfile.TemporaryDirectory(prefix="blk-rows-")
            self._write(self._blocks)
        if self.place == "file":
            self._write([block])
            self._blocks = []  # they are in the file; a mapping is of the shorter file
        else:
            self._blocks.append(block if self.place == "device" else block.cpu())

    def since(self, start: int) -> dict[str, Tensor]:
        """The rows of every layer from one on, wherever they lie."""
        blocks = self._all_blocks()
        ends = itertools.accumulate(map(len, blocks))
        late = [b[max(start - end, -len(b)) :] for b, end in zip(blocks, ends, strict=True) if start < end]
        return dict(zip(self.names, torch.cat(late).split(self._widths, dim=1), strict=True))

    def state(self) -> GrowingRows:
        """See `Stateful`."""
        return GrowingRows(self.n_rows, self.since)

    def restore(self, state: Iterable[Mapping[str, Tensor]]) -> None:
        """See `Stateful`."""
        for block in state:
            self.append(block)

    def rows(self, name: str, columns: slice = slice(None)) -> Tensor:
        """`[n, columns]` of one layer, wherever it lies."""
        start, stop, _ = columns.indices(self.width(name))
        first = self.columns[name].start
        return self.read(slice(first + start, first + stop))

    def read(self, columns: slice) -> Tensor:
        """`[n, columns]`, columns of all layers together, wherever they lie."""
        blocks = [block[:, columns] for block in self._all_blocks()]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def slices(self, step: int) -> Iterator[slice]:
        """All columns, `step` at a time."""
        for start in range(0, self.n_columns, step):
            yield slice(start, min(start + step, self.n_columns))

    def slices_of_layers(self, step: int) -> Iterator[tuple[slice, slice]]:
        """All columns, `step` at a time or fewer, with the layers that they are of.

        These are several whole layers of one width, or a part of one layer.
        """
        start = 0
        while start < self.n_columns:
            first = bisect_right(self._edges, start) - 1
            width = self._widths[first]
            count = min(step // width, bisect_right(self._widths, width) - first)
            if count and start == self._edges[first]:
                last, stop = first + count, start + count * width
            else:
                last, stop = first + 1, min(start + step, self._edges[first + 1])
            yield slice(first, last), slice(start, stop)
            start = stop

    def cut(self, layers: Sequence[Tensor], columns: slice) -> Tensor:
        """Columns of one tensor `[..., P]` for each layer, in the order of `names`, as if they lay side by side."""
        found = []
        for index in range(bisect_right(self._edges, columns.start) - 1, len(layers)):
            start = self._edges[index]
            if start >= columns.stop:
                break
            found.append(layers[index][..., max(columns.start - start, 0) : columns.stop - start])
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _path(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "rows"

    def _write(self, blocks: Sequence[Tensor]) -> None:
        with open(self._path(), "ab") as file:
            for block in blocks:
                self.dtype = block.dtype
                file.write(block.cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def _all_blocks(self) -> list[Tensor]:
        if self.place == "file" and not self._blocks:
            self._blocks = [self._map()]
        return self._blocks

    def _map(self) -> Tensor:
        assert self.dtype is not None
        count = self.n_rows * self.n_columns
        mapped = torch.from_file(os.fspath(self._path()), shared=True, size=count, dtype=self.dtype)
        return mapped.reshape(self.n_rows, self.n_columns)
