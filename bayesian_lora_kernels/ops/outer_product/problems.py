"""What an implementation of the outer products is verified on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..verify.problem import Arguments, Draw, Problem, Suite, some_entries, usual_limit
from ..verify.rows import LAYOUTS, dtypes, rows

_WIDTHS = (4, 7, 8, 16, 24, 60, 64, 128, 272)
_MODES = ("fresh", "accumulate", "lower")


def _problem(dtype: torch.dtype, width: int, heights: Sequence[int], masked: bool, layout: str, mode: str) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        drawn = [rows(draw, height, width, dtype, masked, layout) for height in heights]
        starts = [draw.normal(width, width) if mode != "fresh" else None for _ in heights]
        outs = [draw.output(width, width, start=None if one is None else one + one.T) for one in starts]
        xs, masks = [x for x, _ in drawn], [mask for _, mask in drawn]
        return outs, xs, masks, [0.5 + i for i in range(len(xs))], mode != "fresh", mode == "lower"

    return Problem(f"{dtype} {heights} x {width} {layout} {mode}{' masked' * masked}", arguments)


def _grouped(device: torch.device) -> Iterator[Problem]:
    for dtype, width, masked, layout, mode in itertools.product(dtypes(), _WIDTHS, (False, True), LAYOUTS, _MODES):
        yield _problem(dtype, width, (77, 40, 1), masked, layout, mode)
    tall = itertools.product(dtypes(), (8, 16, 32, 64, 128), (False, True), ("contiguous", "strided"), _MODES)
    for dtype, width, masked, layout, mode in tall:  # rows split over programs
        yield _problem(dtype, width, (5200,), masked, layout, mode)


def _determined(arguments: Arguments) -> list[Tensor]:
    outs, *_, lower = arguments
    return [out.tril() if lower else out for out in outs]


GROUPED = Suite(
    problems=_grouped,
    comparable=_determined,
    limit=lambda arguments: usual_limit(*arguments[1]),
    sample=lambda arguments: some_entries(arguments, arguments[0]),
    accumulates=lambda arguments: bool(arguments[4]),
)


def _triangle(width: int) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        return (draw.output(width, width, start=draw.normal(width, width)),)

    return Problem(f"{width} x {width}", arguments)


def _triangles(device: torch.device) -> Iterator[Problem]:
    yield from map(_triangle, (1, 40, 150))


MIRROR = Suite(_triangles, comparable=lambda arguments: list(arguments), limit=lambda arguments: 0.0)
