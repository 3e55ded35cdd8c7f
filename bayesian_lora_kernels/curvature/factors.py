"""Running sums of the two Kronecker factors of every layer, full or low-rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.model.capture import LayerInput
from bayesian_lora_kernels.model.deferred import AT_ONCE, AtOnce
from bayesian_lora_kernels.model.masks import last_valid
from bayesian_lora_kernels.ops.checks import accumulate_dtype
from bayesian_lora_kernels.posterior.kronecker import KroneckerFactors, descending_eigh, in_batches

FRESH_COLUMNS = 10
# An update of a low-rank factor costs some small decompositions whatever its number of rows: gather rows first.
ROWS_PER_COLUMN = 12

Rows = tuple[Tensor, Tensor | None]  # [M, d], and which of them count [M]; None: all


def stream_columns(config: LaplaceConfig, width: int) -> int | None:
    """Columns kept while streaming for a factor of this width; None if it is summed in full.

    Twice the final rank, and the fresh columns beside it. From 64 on a power of two in between takes their place, since
    it is a tile of the kernels: at rank 32, 64 columns instead of 74 are half the products and a quarter of the small
    matrices. Measured there (width 512, 16 batches of 1024 rows, worst of three seeds), error over the best possible
    with 74 and with 64 columns: spectrum 1/i 1.0007 and 1.0012, 1/sqrt(i) 1.0047 and 1.0066, flat 1.0100 and 1.0107,
    massive activations of 1e6 1.0013 and 1.0019, a subspace that changes twice 1.042 and 1.048 (1.066 with 6 fresh
    columns instead of 10).

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
    def waiting(self) -> bool:
        """Whether rows have been gathered that no update has seen."""
        return bool(self._rows)


class FactorSums:
    """All the sums of a model, updated together: a few grouped operations per batch, however many sums there are."""

    def __init__(self, config: LaplaceConfig):
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.sums: dict[Hashable, FactorSum] = {}

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

    def finish(self, scales: Mapping[Hashable, float]) -> dict[Hashable, tuple[Tensor, Tensor]]:
        """`{key: (factor, tail)}`, every factor multiplied by its scale."""
        self._update([total for total in self.sums.values() if total.waiting])
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


class KroneckerSums:
    """The factors of all layers while the data passes by.

    Layers that saw the same tensor share one input factor. The sharing is read off each batch; should a batch break it,
    the layers part with the sum they had in common.
    """

    def __init__(self, config: LaplaceConfig):
        self.config = config
        self._sums = FactorSums(config)
        self._group: dict[str, int] = {}
        self._counts: dict[int, list[int | Tensor]] = {}  # rows of each batch; what a mask counts stays on its device

    def add_inputs(self, inputs: Mapping[str, LayerInput], checks: AtOnce = AT_ONCE, where: str = "") -> None:
        """Add one batch's inputs.

        Raises:
            ValueError: for a layer whose input is not finite, when `checks` look; it ends with `where`.
        """
        self._regroup(inputs)
        rows: dict[Hashable, tuple[Tensor, Tensor | None]] = {}
        names: dict[Hashable, str] = {}
        counts: dict[int, Tensor] = {}  # of the masks, which most layers share
        for name, (a, mask, _) in inputs.items():
            group = self._group[name]
            if ("a", group) in names:
                continue
            names["a", group] = name
            x, counted = rows["a", group] = token_rows(a, mask, self.config.tokens, mean=True)
            if counted is not None and id(mask) not in counts:
                counts[id(mask)] = counted.sum()
            self._counts.setdefault(group, []).append(len(x) if counted is None else counts[id(mask)])
        self._sums.add(rows, checks, lambda key: not_finite(names[key], "input", where))

    def add_gradients(
        self,
        gradients: Mapping[str, Tensor],
        inputs: Mapping[str, LayerInput],
        checks: AtOnce = AT_ONCE,
        where: str = "",
    ) -> None:
        """Add one backward pass's output gradients.

        Raises:
            ValueError: for a layer whose gradient is not finite, when `checks` look; it ends with `where`.
        """
        names: dict[Hashable, str] = {("s", name): name for name in gradients}
        rows: dict[Hashable, tuple[Tensor, Tensor | None]] = {
            key: token_rows(gradients[name], inputs[name].mask, self.config.tokens, mean=False)
            for key, name in names.items()
        }
        self._sums.add(rows, checks, lambda key: not_finite(names[key], "output gradient", where))

    @property
    def input_rows(self) -> dict[str, int]:
        """How many rows (tokens, or examples) the A of each layer is the mean of."""
        of_group = _summed(self._counts)
        return {name: of_group[group] for name, group in self._group.items()}

    def factors(self) -> dict[str, KroneckerFactors]:
        """The finished factors: A a mean over tokens (or examples), S a sum. Shared inputs share their tensor."""
        scales: dict[Hashable, float] = {("s", name): 1.0 for name in self._group}
        scales |= {("a", self._group[name]): 1.0 / max(rows, 1) for name, rows in self.input_rows.items()}
        finished = self._sums.finish(scales)
        result = {}
        for name, group in self._group.items():
            (a, tail_a), (s, tail_s) = finished["a", group], finished["s", name]
            result[name] = KroneckerFactors(a, s, tail_a, tail_s)
        return result

    def _regroup(self, inputs: Mapping[str, LayerInput]) -> None:
        """Groups as fine as this batch demands: equal group before, equal tensor now."""
        placed: dict[tuple[int | None, object], int] = {}
        for name in dict.fromkeys([*self._group, *inputs]):
            before = self._group.get(name)
            now = inputs[name].key if name in inputs else None
            if (before, now) in placed:
                self._group[name] = placed[before, now]
                continue
            group = before
            if before is None or before in placed.values():  # new, or others kept the old group: take a copy along
                group = max(self._counts, default=-1) + 1
                self._counts[group] = list(self._counts.get(before, ())) if before is not None else []
                if before is not None:
                    self._sums.sums["a", group] = self._sums.sums["a", before].clone()
            assert group is not None
            placed[before, now] = self._group[name] = group


def _summed(counts: Mapping[int, Sequence[int | Tensor]]) -> dict[int, int]:
    """Sums of numbers of which some are on a device; there is one synchronisation per device."""
    tensors = {id(n): n for numbers in counts.values() for n in numbers if isinstance(n, Tensor)}
    known: dict[int, int] = {}
    for device in dict.fromkeys(n.device for n in tensors.values()):
        here = {key: n for key, n in tensors.items() if n.device == device}
        known |= zip(here, torch.stack(list(here.values())).tolist(), strict=True)
    return {key: sum(known[id(n)] if isinstance(n, Tensor) else n for n in numbers) for key, numbers in counts.items()}


def token_rows(x: Tensor, mask: Tensor | None, tokens: str, *, mean: bool) -> tuple[Tensor, Tensor | None]:
    """Rows `[M, d]` that enter a factor, and their mask `[M]`, from `[N, T, d]`.

    `expand` takes every token; `reduce` one row per example, the mean (of inputs) or sum (of gradients) over its valid
    tokens; `last` the last valid token. An example without a valid token, such as a text without a labelled position
    where the output head only sees those, has no row that counts.
    """
    n, t, d = x.shape
    if tokens == "expand":
        return x.reshape(n * t, d), None if mask is None else mask.reshape(n * t)
    if tokens == "last":
        if mask is None:
            return x[:, -1], None
        return x[torch.arange(n, device=x.device), last_valid(x, mask)], mask.any(dim=1)
    counted = x if mask is None else x.masked_fill(~mask[:, :, None], 0)
    total = counted.sum(dim=1, dtype=accumulate_dtype(x))
    counts_at_all = None if mask is None else mask.any(dim=1)
    if not mean:
        return total, counts_at_all
    count = t if mask is None else mask.sum(dim=1, keepdim=True).clamp_min(1)
    return total / count, counts_at_all
