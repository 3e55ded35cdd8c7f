"""Running sums of outer products of rows, full or low-rank, many at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.model.deferred import AtOnce
from bayesian_lora_kernels.posterior.kronecker import descending_eigh, in_batches

FRESH_COLUMNS = 10
# An update of a low-rank factor costs some small decompositions whatever its number of rows: gather rows first.
ROWS_PER_COLUMN = 12

Rows = tuple[Tensor, Tensor | None]  # [M, d], and which of them count [M]; None: all


def stream_columns(config: LaplaceConfig, width: int) -> int | None:
    """Columns kept while streaming for a factor of this width; None if it is summed in full.

    Twice the final rank, and the fresh columns beside it. From 64 on a power of two in between takes their place, since
    it is a tile of the kernels: at rank 32, 64 columns instead of 74 are half the products and a quarter of the small
    matrices. Error over the best possible there with 74 and with 64 columns (`python -m benchmarks.stream_columns`):
    spectrum 1/i 1.0007 and 1.0012, 1/sqrt(i) 1.0047 and 1.0066, flat 1.0100 and 1.0107, massive activations of 1e6
    1.0074 and 1.0079, directions that change twice 1.033 and 1.042.

    Where the columns are the whole width, the sum itself is cheaper and exact.
    """
    if config.rank is None or width <= config.rank_threshold:
        return None
    columns = 2 * config.rank + FRESH_COLUMNS
    tile = 1 << (columns.bit_length() - 1)  # the largest power of two that is no more
    if tile >= max(2 * config.rank, 64):
        columns = tile
    return None if columns >= width else columns


class FactorSum:
    """`sum of x x^T` over the rows that are added: a full matrix, or low-rank columns with the exact trace."""

    def __init__(self, width: int, columns: int | None):
        self.columns = columns
        self.width = width
        self.matrix: Tensor | None = None  # [d, d], only its lower half; or [d, columns] with B B^T the estimate
        self.trace: Tensor | None = None  # 0-d float64
        self._rows: list[tuple[Tensor, Tensor | None]] = []

    def clone(self) -> FactorSum:
        """An independent copy."""
        copy = FactorSum(self.width, self.columns)
        copy.matrix = None if self.matrix is None else self.matrix.clone()
        copy.trace = None if self.trace is None else self.trace.clone()
        copy._rows = list(self._rows)
        return copy

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        return vars(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Stateful`."""
        vars(self).update(state)

    def gather(self, x: Tensor, mask: Tensor | None) -> bool:
        """Keep rows for the next low-rank update; True when there are enough."""
        assert self.columns is not None
        self._rows.append((x, mask))
        return sum(len(rows) for rows, _ in self._rows) >= ROWS_PER_COLUMN * self.columns

    def take_rows(self, joined: dict[tuple[int, ...], Tensor]) -> Rows:
        """The rows gathered so far, `[M, d]`, and their mask; `joined`: masks that other sums made of equal parts."""
        rows, parts = zip(*self._rows, strict=True)
        self._rows = []
        if len(rows) == 1:
            return rows[0], parts[0]
        mask, key = None, tuple(len(x) if m is None else -id(m) for x, m in zip(rows, parts, strict=True))
        if any(m is not None for m in parts):
            masks = [x.new_ones(len(x), dtype=torch.bool) if m is None else m for x, m in zip(rows, parts, strict=True)]
            mask = joined[key] if key in joined else torch.cat(masks)
            joined[key] = mask
        return torch.cat(rows), mask

    @property
    def waiting_bytes(self) -> int:
        """Of these rows."""
        return sum(x.numel() * x.element_size() for x, _ in self._rows)

    @property
    def waiting(self) -> bool:
        """Whether rows have been gathered that no update has seen."""
        return bool(self._rows)


class FactorSums:
    """All the sums of a model, updated together: a few grouped operations per batch, however many sums there are."""

    def __init__(self, config: LaplaceConfig):
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.sums: dict[Hashable, FactorSum] = {}

    def state(self) -> dict[str, Any]:
        """See `Stateful`."""
        sums = {key: total.state() for key, total in self.sums.items()}
        return {"generator": self.generator.get_state(), "sums": sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Stateful`."""
        self.generator.set_state(state["generator"])
        self.sums = {}
        for key, own in state["sums"].items():
            self.sums[key] = FactorSum(own["width"], own["columns"])
            self.sums[key].restore(own)

    def add(self, rows: Mapping[Hashable, Rows], checks: AtOnce, error: Callable[[Hashable], Exception]) -> None:
        """Add `{key: (x [M, d], mask [M])}`.

        Raises:
            Exception: `error(key)`, when `checks` look, if counted entries are not all finite; if that is at once,
                nothing has been added.
        """
        kept = {}
        for key, (x, mask) in rows.items():
            if mask is not None and x.device.type == "cpu":
                x, mask = x[mask], None  # no synchronisation to avoid here: leave padding out altogether
            kept[key] = x, mask
        squares = checked_square_sums(kept, checks, error)
        full: list[tuple[FactorSum, Tensor, Tensor | None]] = []
        ready: list[FactorSum] = []
        for key, (x, mask) in kept.items():
            if key not in self.sums:
                self.sums[key] = FactorSum(x.shape[1], stream_columns(self.config, x.shape[1]))
            total = self.sums[key]
            if total.columns is None:
                full.append((total, x, mask))
            elif total.gather(x, mask):
                ready.append(total)
        self._add_traces(squares)
        self._add_full(full)
        budget = self.config.memory_budget
        if budget is not None and sum(total.waiting_bytes for total in self.sums.values()) > budget:
            ready = [total for total in self.sums.values() if total.waiting]
        try:
            self._update(ready)
        except ValueError:
            checks.end()  # an error that names the layer
            raise

    def _add_traces(self, squares: Mapping[Hashable, Tensor]) -> None:
        known = [key for key in squares if self.sums[key].trace is not None]
        if known:
            traces = [trace for key in known if (trace := self.sums[key].trace) is not None]
            torch._foreach_add_(traces, [squares[key] for key in known])
        for key in squares.keys() - known:
            self.sums[key].trace = squares[key]

    def _add_full(self, entries: Sequence[tuple[FactorSum, Tensor, Tensor | None]]) -> None:
        groups: dict[tuple[torch.device, bool], list[tuple[FactorSum, Tensor, Tensor | None]]] = {}
        for total, x, mask in entries:
            groups.setdefault((x.device, total.matrix is None), []).append((total, x, mask))
        for (_, new), here in groups.items():
            xs, masks = [x for _, x, _ in here], [mask for _, _, mask in here]
            if new:
                for (total, _, _), matrix in zip(here, ops.grouped_outer_product(xs, masks=masks), strict=True):
                    total.matrix = matrix
            else:
                outs = [total.matrix for total, _, _ in here if total.matrix is not None]
                ops.grouped_outer_product(xs, masks=masks, outs=outs, lower=True)

    def _update(self, totals: Sequence[FactorSum]) -> None:
        joined: dict[tuple[int, ...], Tensor] = {}
        rows = [(total, *total.take_rows(joined)) for total in totals]
        for group in dict.fromkeys((x.device, total.columns) for total, x, _ in rows):
            here = [entry for entry in rows if (entry[1].device, entry[0].columns) == group]
            columns = group[1]
            assert columns is not None
            updated = ops.grouped_incremental_svd(
                [total.matrix for total, _, _ in here],
                [x for _, x, _ in here],
                columns=columns,
                masks=[mask for _, _, mask in here],
                fresh=FRESH_COLUMNS,
                generator=self.generator,
            )
            for (total, _, _), matrix in zip(here, updated, strict=True):
                total.matrix = matrix

    def flush(self) -> None:
        """Update the low-rank sums by the rows that were gathered for them."""
        self._update([total for total in self.sums.values() if total.waiting])

    def finish(self, scales: Mapping[Hashable, float]) -> dict[Hashable, tuple[Tensor, Tensor]]:
        """`{key: (factor, tail)}`, every factor multiplied by its scale."""
        self.flush()
        groups: dict[tuple[object, ...], list[Hashable]] = {}
        for key in scales:
            total = self.sums[key]
            assert total.matrix is not None
            matrix = total.matrix
            groups.setdefault((total.columns, matrix.shape, matrix.dtype, matrix.device), []).append(key)
        found: dict[Hashable, tuple[Tensor, Tensor]] = {}
        for keys in groups.values():
            for part in in_batches(keys, self.sums[keys[0]].width ** 2):
                found |= zip(part, self._finished(part, [scales[key] for key in part]), strict=True)
        return {key: found[key] for key in scales}

    def _finished(self, keys: Sequence[Hashable], scales: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """Of sums of one shape."""
        totals = [self.sums[key] for key in keys]
        matrices = [total.matrix for total in totals if total.matrix is not None]
        traces = torch.stack([total.trace for total in totals if total.trace is not None])
        scale = torch.tensor(scales, dtype=torch.float64).to(matrices[0].device)
        rank, width = self.config.rank, totals[0].width
        if totals[0].columns is not None:
            assert rank is not None
            kept = torch.stack([matrix[:, :rank] for matrix in matrices]) * scale.sqrt().to(matrices[0])[:, None, None]
            sums = kept.double().square().sum(dim=(1, 2))
            return list(zip(kept, self._tails(traces * scale - sums, width), strict=True))
        lower = torch.stack(matrices).tril()
        full = (lower + lower.tril(-1).mT) * scale.to(lower)[:, None, None]
        if rank is None or width <= self.config.rank_threshold or rank >= width:
            return list(zip(full, torch.zeros_like(traces), strict=True))
        # Summed in full only because that was the cheaper way to the same low-rank factor.
        values, vectors = descending_eigh(full.double())
        values = values[:, :rank].clamp_min(0)
        tails = self._tails(full.double().diagonal(dim1=1, dim2=2).sum(dim=1) - values.sum(dim=1), width)
        return list(zip((vectors[:, :, :rank] * values.sqrt()[:, None, :]).to(full), tails, strict=True))

    def _tails(self, left: Tensor, width: int) -> Tensor:
        """The eigenvalue that stands for what is left of the traces `[L]`."""
        assert self.config.rank is not None
        return left.clamp_min(0) / (width - self.config.rank) if self.config.tail else torch.zeros_like(left)


def checked_square_sums(
    rows: Mapping[Hashable, Rows], checks: AtOnce, error: Callable[[Hashable], Exception]
) -> dict[Hashable, Tensor]:
    """Sum of squares of the counted entries of each `(x [M, d], mask [M])`, 0-d float64; one operation per device.

    Raises:
        Exception: `error(key)`, when `checks` look, if counted entries are not all finite.
    """
    sums: dict[Hashable, Tensor] = {}
    for device in dict.fromkeys(x.device for x, _ in rows.values()):
        here = {key: entry for key, entry in rows.items() if entry[0].device == device}
        found = ops.grouped_square_sum([x for x, _ in here.values()], masks=[mask for _, mask in here.values()])
        sums |= zip(here, found.unbind(), strict=True)
        checks.add(~torch.isfinite(found), functools.partial(_error_of, list(here), error))
    return sums


def _error_of(keys: Sequence[Hashable], error: Callable[[Hashable], Exception], index: int) -> Exception:
    return error(keys[index])


def not_finite(name: Hashable, what: str, where: str = "") -> ValueError:
    """Of the layer whose input or gradient it is."""
    return ValueError(f"{name}: its {what} is not finite (NaN or infinity){where}")
