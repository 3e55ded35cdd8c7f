"""Storage for the rows of the exact Gauss-Newton matrix: where they come from, or in a memory-mapped file.

Of several processes each measures the rows of its own examples; at the end of the fit they change hands once, and from
then on each holds an equal share of the columns of all rows. What is summed over columns, as every product with the
rows is, each process then adds up over its own, with nothing to send but sums.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bayesian_lora_kernels.curvature.state import GrowingRows
from bayesian_lora_kernels.processes import ALONE, Processes

EXCHANGED_BYTES = 64 * 2**20  # of rows that change hands at a time


class RowStore:
    """The rows of all layers side by side: a matrix `[n, P]` that grows by rows and is read by slices of columns.

    Layers of one width lie next to each other. Rows stay where they come from while they fit `budget` bytes; beyond
    that all are in a file in a temporary folder, which disappears with the store.

    Attributes:
        names: the layers, in the order of their columns.
        columns: `{layer: its columns}`.
        n_rows: n.
        place: `device`, that of the rows, or `file`.
        processes: that hold columns of it.
        held: the columns that this one holds; all of them, unless the rows were spread.

    Args:
        widths: `{layer: how many columns it has}`.
        budget: bytes outside a file.
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
        self.processes = ALONE
        self.held = slice(0, self.n_columns)
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
        self._add(block)

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

    join = restore

    def spread(self, processes: Processes, device: torch.device) -> RowStore:
        """The rows of all processes, in no particular order, of which each process holds a share of the columns.

        This store hands its rows over, and is empty afterwards. They travel once: a process sends its own rows, but for
        the columns that it keeps, in rounds of 64 MiB.

        Args:
            processes: that call this at once, each with a store of the same layers.
            device: where a process' rows travel from, if it has none.

        Raises:
            ValueError: for more processes than columns.
        """
        if processes.size == 1:
            return self
        if self.n_columns < processes.size:
            raise ValueError(f"rows: expected a column for each of {processes.size} processes, got {self.n_columns}")
        own = self._all_blocks()
        said = processes.values(str(own[0].dtype).removeprefix("torch.") if own else None)
        dtype = functools.reduce(torch.promote_types, [getattr(torch, name) for name in said if name])
        whole = RowStore(dict(zip(self.names, self._widths, strict=True)), self.budget, dtype)
        whole.processes, whole.held = processes, self._share(processes.rank, processes.size)
        step = max(EXCHANGED_BYTES // (self.n_columns * dtype.itemsize), 1)
        waiting = [part for block in own for part in block.split(step)]
        del own
        self._blocks, self.n_rows = [], 0
        counts = processes.values([len(part) for part in waiting])
        for i in range(max(map(len, counts))):
            block = waiting.pop(0).to(dtype) if waiting else torch.empty(0, self.n_columns, dtype=dtype, device=device)
            parts = [block[:, self._share(r, processes.size)].reshape(-1) for r in range(processes.size)]
            rows = [count[i] if i < len(count) else 0 for count in counts]
            width = whole.held.stop - whole.held.start
            came = processes.exchange(parts, [n * width for n in rows])
            whole._add(torch.cat(came).reshape(sum(rows), width))
        self._folder = None
        return whole

    def rows(self, name: str, columns: slice = slice(None)) -> Tensor:
        """`[n, columns]` of one layer, wherever it lies; of rows that are spread, all processes ask at once."""
        start, stop, _ = columns.indices(self.width(name))
        first = self.columns[name].start
        wanted = slice(first + start, first + stop)
        if self.processes.size == 1 or start == stop:
            return self.read(wanted)
        self.processes.values(None)  # tells of one that failed
        found = []
        for rank in range(self.processes.size):
            share = self._share(rank, self.processes.size)
            part = slice(max(share.start, wanted.start), min(share.stop, wanted.stop))
            if part.start >= part.stop:
                continue
            if rank == self.processes.rank:
                piece = self.read(part).contiguous()
            else:
                piece = torch.empty(self.n_rows, part.stop - part.start, dtype=self.dtype)
            self.processes.share([piece], source=rank)
            found.append(piece.cpu())
        return torch.cat(found, dim=1)

    def read(self, columns: slice) -> Tensor:
        """`[n, columns]`, columns of all layers together that this process holds, wherever they lie."""
        here = slice(columns.start - self.held.start, columns.stop - self.held.start)
        blocks = [block[:, here] for block in self._all_blocks()]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def rounds(self, step: int) -> Iterator[list[slice]]:
        """The columns that each process holds, at most `step` at a time, in as many rounds for all of them."""
        shares = [self._share(rank, self.processes.size) for rank in range(self.processes.size)]
        count = -(-max(share.stop - share.start for share in shares) // step)
        for i in range(count):
            yield [slice(*(s.start + (s.stop - s.start) * j // count for j in (i, i + 1))) for s in shares]

    def slices(self, step: int) -> Iterator[slice]:
        """The columns that this process holds, at most `step` at a time."""
        for columns in self.rounds(step):
            yield columns[self.processes.rank]

    def slices_of_layers(self, step: int) -> Iterator[tuple[slice, slice]]:
        """The columns that this process holds, at most `step` at a time, with the layers that they are of.

        These are several whole layers of one width, or a part of one layer.
        """
        start, end = self.held.start, self.held.stop
        while start < end:
            first = bisect_right(self._edges, start) - 1
            width = self._widths[first]
            count = min(step // width, bisect_right(self._widths, width) - first, (end - start) // width)
            if count and start == self._edges[first]:
                last, stop = first + count, start + count * width
            else:
                last, stop = first + 1, min(start + step, self._edges[first + 1], end)
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

    def _add(self, block: Tensor) -> None:
        self.n_rows += len(block)
        n_bytes = self.n_rows * block.shape[1] * block.element_size()
        if self.place == "device" and n_bytes > self.budget:
            self.place = "file"
            self._folder = tempfile.TemporaryDirectory(prefix="blk-rows-")
            self._write(self._blocks)
        if self.place == "file":
            self._write([block])
            self._blocks = []  # they are in the file; a mapping is of the shorter file
        else:
            self._blocks.append(block)

    def _path(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "rows"

    def _write(self, blocks: Sequence[Tensor]) -> None:
        with open(self._path(), "ab") as file:
            for block in blocks:
                self.dtype = block.dtype
                file.write(block.cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def _share(self, rank: int, size: int) -> slice:
        return slice(self.n_columns * rank // size, self.n_columns * (rank + 1) // size)

    def _all_blocks(self) -> list[Tensor]:
        if self.place == "file" and not self._blocks:
            self._blocks = [self._map()]
        return self._blocks

    def _map(self) -> Tensor:
        assert self.dtype is not None
        shape = self.n_rows, self.held.stop - self.held.start
        mapped = torch.from_file(os.fspath(self._path()), shared=True, size=math.prod(shape), dtype=self.dtype)
        return mapped.reshape(shape)
