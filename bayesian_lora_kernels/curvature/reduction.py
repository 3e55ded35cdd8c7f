"""Sums of outer products of several processes, made one: full ones are added up, low-rank ones merged."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesian_lora_kernels.curvature.factor_sums import FactorSum
from bayesian_lora_kernels.ops.incremental_svd.reference import direct
from bayesian_lora_kernels.processes import BUCKET_BYTES, Processes

TOGETHER = 16  # estimates that one eigendecomposition merges, which is of all their columns


@dataclass(frozen=True)
class SumOfAll:
    """One sum, of which every process holds a part.

    Attributes:
        own: this process' part; without numbers where it has none.
        dtypes: of the parts of all processes, by name; None where there is none.
        device: of the layer, on this process.
    """

    own: FactorSum
    dtypes: Sequence[str | None]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The widest of all parts."""
        return functools.reduce(torch.promote_types, [getattr(torch, name) for name in self.dtypes if name])

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix, or `(d, l)` of low-rank columns."""
        return self.own.width, self.own.columns or self.own.width

    @property
    def numel(self) -> int:
        """Numbers in that."""
        return self.shape[0] * self.shape[1]


def reduce(processes: Processes, sums: Sequence[SumOfAll]) -> None:
    """Every process gets every sum, the same bit for bit.

    Args:
        processes: that call this with the same sums, in the same order.
        sums: without rows that wait for an update.
    """
    added: list[Tensor] = []
    for one in sums:
        trace, matrix = one.own.trace, one.own.matrix
        one.own.trace = torch.zeros((), dtype=torch.float64, device=one.device) if trace is None else trace
        added.append(one.own.trace)
        if one.own.columns is None:
            zero = torch.zeros(one.shape, dtype=one.dtype, device=one.device)
            one.own.matrix = zero if matrix is None else matrix.to(one.dtype)
            added.append(one.own.matrix)
    processes.add(added)
    _merge(processes, [one for one in sums if one.own.columns is not None])


def _merge(processes: Processes, streams: Sequence[SumOfAll]) -> None:
    """Of each low-rank sum, the leading columns of everybody's side by side.

    It travels to one process, which merges it, and from there back to all: a process sends less than twice what it
    holds, however many there are.
    """
    for chunk in _chunks(streams, processes.size):
        like = torch.empty(0, dtype=chunk[0].dtype, device=chunk[0].device)
        owned = [chunk[owner :: processes.size] for owner in range(processes.size)]
        mine = owned[processes.rank]
        sent = [_flat([one.own.matrix for one in part if one.own.matrix is not None], like) for part in owned]
        held = [[i for i, one in enumerate(mine) if one.dtypes[rank]] for rank in range(processes.size)]
        came = processes.exchange(sent, [sum(mine[i].numel for i in here) for here in held])
        estimates: list[list[Tensor]] = [[] for _ in mine]
        for here, flat in zip(held, came, strict=True):
            for i, matrix in zip(here, _split(flat, [mine[i] for i in here]), strict=True):
                estimates[i].append(matrix)
        merged = [leading(parts, one.shape[1]) for parts, one in zip(estimates, mine, strict=True)]
        for part, flat in zip(owned, processes.gather(_flat(merged, like)), strict=True):
            for one, matrix in zip(part, _split(flat, part), strict=True):
                one.own.matrix = matrix.to(one.device)


def merged(parts: Sequence[FactorSum]) -> FactorSum:
    """The sum of one or two, which have no rows that wait, on this process."""
    total = parts[0].clone()
    for part in parts[1:]:
        assert total.matrix is not None
        assert part.matrix is not None
        assert total.trace is not None
        assert part.trace is not None
        total.trace = total.trace + part.trace
        if total.columns is None:
            total.matrix = total.matrix + part.matrix
        else:
            total.matrix = leading([total.matrix, part.matrix], total.columns)
    return total


def leading(estimates: Sequence[Tensor], columns: int) -> Tensor:
    """`B [d, columns]` with `B B^T` the best of its rank for the sum of all `B_i B_i^T`, where these are up to 16.

    More are merged 16 at a time, which loses what each of these merges truncates.
    """
    while len(estimates) > 1:
        groups = [estimates[i : i + TOGETHER] for i in range(0, len(estimates), TOGETHER)]
        estimates = [direct(one, torch.cat(rest, dim=1).T, columns) if rest else one for one, *rest in groups]
    return estimates[0]


def _chunks(streams: Sequence[SumOfAll], owners: int) -> Iterator[list[SumOfAll]]:
    """Sums of one dtype that travel together: one for each owner at least, and those of one size side by side."""
    for dtype in dict.fromkeys(one.dtype for one in streams):
        chunk: list[SumOfAll] = []
        for one in sorted((one for one in streams if one.dtype == dtype), key=lambda one: one.numel):
            chunk.append(one)
            if len(chunk) >= owners and sum(each.numel for each in chunk) * dtype.itemsize >= BUCKET_BYTES:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _flat(matrices: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like, *(matrix.reshape(-1).to(like) for matrix in matrices)])


def _split(flat: Tensor, sums: Sequence[SumOfAll]) -> list[Tensor]:
    parts = flat.split([one.numel for one in sums])
    return [part.reshape(one.shape) for part, one in zip(parts, sums, strict=True)]
