"""Outputs that share memory, with themselves, each other or an input: programs that run at the same time would race."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layouts import addresses


def overlaps_itself(matrix: Tensor) -> bool:
    """Whether two elements have one address: ``i s_0 = j s_1`` for some indices within the shape."""
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    if matrix.numel() < 2:
        return False
    common = math.gcd(down, right) or 1
    return down // common < columns and right // common < rows


def spans(matrices: Sequence[Tensor]) -> Tensor:
    """``[len(matrices)]`` int64, the bytes from the first element of each to behind its last."""
    return torch.tensor([_span(matrix) for matrix in matrices], dtype=torch.int64, device="cpu")


def check_apart(where: str, outs: Sequence[Tensor], xs: Sequence[Tensor], known_spans: Tensor) -> None:
    """Check that no output shares memory with another, or with an input; ValueError with their numbers if so.

    ``known_spans`` are those of outputs and inputs. By address ranges, O(n log n); where ranges overlap, by the pieces
    of contiguous memory that they are made of.
    """
    if xs[0].is_meta:
        return  # has no memory
    at = addresses([*outs, *xs])
    if len(at) == 2:  # one module: nothing to sort
        out_length, x_length = known_spans.tolist()
        if at[0] + out_length <= at[1] or at[1] + x_length <= at[0]:
            return
    owners = torch.arange(len(at), device="cpu")
    starts = torch.tensor(at, dtype=torch.int64, device="cpu")
    if _overlap(starts, known_spans, owners, len(outs)) is None:
        return
    pieces = [_pieces(matrix) for matrix in (*outs, *xs)]
    owners = owners.repeat_interleave(torch.tensor([len(starts) for starts, _ in pieces], device="cpu"))
    lengths = torch.tensor([length for _, length in pieces], dtype=torch.int64, device="cpu")
    found = _overlap(torch.cat([starts for starts, _ in pieces]), lengths[owners], owners, len(outs))
    if found is not None:
        names = [f"out of entry {i}" if i < len(outs) else f"x of entry {i - len(outs)}" for i in sorted(found)]
        raise ValueError(f"{where}: expected outputs with memory of their own, got {names[0]} overlapping {names[1]}")


def _overlap(starts: Tensor, lengths: Tensor, owners: Tensor, outs: int) -> tuple[int, int] | None:
    """The owners of two ranges that overlap, one of them at least among the first ``outs``; None if there are none."""
    starts, order = torch.where(lengths > 0, starts, 0).sort()
    ends, owners = starts + lengths[order], owners[order]
    written = owners < outs
    furthest, of_any = ends.cummax(0)
    furthest_written, of_written = ends.where(written, 0).cummax(0)
    reached = (starts[1:] < furthest_written[:-1]) | (written[1:] & (starts[1:] < furthest[:-1]))
    if not reached.any():
        return None
    one = int(reached.nonzero()[0])
    other = of_any[one] if bool(written[one + 1]) else of_written[one]
    return int(owners[one + 1]), int(owners[other])


def _span(matrix: Tensor) -> int:
    if matrix.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True))
    return (last + 1) * matrix.element_size()


def _pieces(matrix: Tensor) -> tuple[Tensor, int]:
    """Addresses of the pieces of contiguous memory that a matrix is made of, and their length in bytes."""
    size = matrix.element_size()
    (rows, columns), (down, right) = matrix.shape, matrix.stride()
    if down == 1 and right != 1:
        rows, columns, down, right = columns, rows, right, down
    firsts = matrix.data_ptr() + size * down * torch.arange(rows, device="cpu")
    if right == 1 or columns <= 1:
        return firsts, columns * size
    return (firsts[:, None] + size * right * torch.arange(columns, device="cpu")).flatten(), size
