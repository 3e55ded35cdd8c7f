"""What an implementation of the weight gradients is verified on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..verify.problem import Arguments, Draw, Problem, Suite, off_alignment, poisoned, some_entries, usual_limit
from ..verify.rows import dtypes

_SIZES = ((264, 8), (8, 264), (130, 3), (5, 130), (72, 80), (200, 16))  # d_out, d_in


def _problem(dtype: torch.dtype, d_out: int, d_in: int, masked: bool, aligned: bool) -> Problem:
    def laid(x: Tensor, mask: Tensor | None) -> Tensor:
        x = x if mask is None else poisoned(x, mask)
        return x if aligned else off_alignment(x)

    def arguments(draw: Draw) -> Arguments:
        lists: tuple[list[Tensor | None], ...] = ([], [], [], [])
        for tokens in (150, 150, 1):
            mask = draw.mask(3, tokens) if masked else None
            g = laid(draw.normal(3, tokens, d_out, dtype=dtype), mask)
            a = laid(draw.normal(3, tokens, d_in, dtype=dtype), mask)
            for column, value in zip(lists, (draw.output(3, d_out, d_in), g, a, mask), strict=True):
                column.append(value)
        return lists

    return Problem(f"{dtype} {d_out} x {d_in}{' masked' * masked}{' aligned' * aligned}", arguments)


def _problems(device: torch.device) -> Iterator[Problem]:
    for dtype, sizes, masked, aligned in itertools.product(dtypes(), _SIZES, (False, True), (True, False)):
        yield _problem(dtype, *sizes, masked, aligned)


SUITE = Suite(
    _problems,
    comparable=lambda arguments: arguments[0],
    limit=lambda arguments: usual_limit(*arguments[1]),
    sample=lambda arguments: some_entries(arguments, arguments[0]),
)
