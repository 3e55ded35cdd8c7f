"""What an implementation of the incremental update is verified on.

Where there are as many columns as the width nothing is cut off, and the estimate is the sum itself: a sharp test. Else
the test columns, which are rounded to the dtype of the input, decide what is lost, and only its size is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..device import multiprocessors
from ..verify.problem import Arguments, Draw, Problem, Suite, some_entries
from ..verify.rows import LAYOUTS, dtypes, laid_out
from .sparse_signs import NONZEROS_PER_COLUMN

_EXACT, _CUT = 2e-4, 1e-2
_COLUMNS = (10, 16, 30, 32, 54, 64, 74, 128)


def _problem(
    dtype: torch.dtype, width: int, columns: int, height: int, masked: bool, layout: str, first: bool, streams: int = 2
) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        lists: tuple[list[Tensor | None], ...] = ([], [], [], [], [], [])
        outs, bases, xs, masks, rows, signs = lists
        deviation = torch.arange(1, width + 1, device=draw.device).float().pow(-1.0)
        for _ in range(streams):
            x, mask = laid_out(draw, (draw.normal(height, width) * deviation).to(dtype), masked, layout)
            outs.append(draw.output(width, columns))
            kept = 0 if first else min(columns, width)
            bases.append(3 * (draw.normal(width, kept) * deviation[:, None]))
            xs.append(x)
            masks.append(mask)
            counted = torch.arange(height, device=draw.device) if mask is None else mask.nonzero()[:, 0]
            which = (draw.uniform(columns, NONZEROS_PER_COLUMN) * len(counted)).long().clamp_max(len(counted) - 1)
            rows.append(counted[which])
            signs.append(torch.where(draw.uniform(columns, NONZEROS_PER_COLUMN) < 0.5, -1.0, 1.0))
        return *lists, min(10, columns // 2)

    name = f"{dtype} {height} x {width} l={columns} {layout}{' masked' * masked}{' first' * first}"
    return Problem(name, arguments)


def _problems(device: torch.device) -> Iterator[Problem]:
    layouts = itertools.cycle(LAYOUTS)
    for dtype, columns, masked, first in itertools.product(dtypes(), _COLUMNS, (False, True), (False, True)):
        width = 8 * (columns // 8)
        for layout in ("contiguous", next(layouts)):
            yield _problem(dtype, width, columns, 4 * columns, masked, layout, first)  # nothing is cut off
            yield _problem(dtype, width, columns, columns // 2 + 3, masked, layout, first)  # more columns than rows
        yield _problem(dtype, 3 * width, columns, 12 * columns, masked, "contiguous", first)
        yield _problem(dtype, width + 1, columns, 700, masked, "contiguous", first)
        for layout in LAYOUTS:
            yield _problem(dtype, width, columns, columns + 3, masked, layout, first, streams=1)
    # So many rows that larger blocks keep all multiprocessors busy: beside a cache that holds X, and one that does not.
    height = 32 * multiprocessors(device) + 37
    for dtype, columns, masked, layout in itertools.product(dtypes(), (16, 30, 64, 128), (False, True), LAYOUTS):
        for width in (8 * (columns // 8), 2048) if layout == "contiguous" else (3 * columns,):
            yield _problem(dtype, width, columns, height, masked, layout, first=masked)


def _probed(arguments: Arguments) -> list[Tensor]:
    """``B B^T`` by what it does to a few vectors: as a matrix it would be large."""
    found = []
    for out in arguments[0]:
        state = torch.Generator().manual_seed(0)
        probes = torch.randn(out.shape[0], 6, generator=state, dtype=torch.float64).to(out.device)
        found.append(out.double() @ (out.double().T @ probes))
    return found


def _limit(arguments: Arguments) -> float:
    outs: Sequence[Tensor] = arguments[0]
    return _EXACT if all(out.shape[1] >= out.shape[0] for out in outs) else _CUT


GROUPED = Suite(_problems, _probed, _limit, sample=lambda arguments: some_entries(arguments, arguments[0]))
