"""What an implementation of the Jacobian covariance is verified on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..verify.problem import Arguments, Draw, Problem, Suite, off_alignment, poisoned, some_entries, usual_limit
from ..verify.rows import dtypes


@dataclass(frozen=True)
class _Shape:
    """Of a module: the wide side, the narrow one, and how many directions of each are kept."""

    wide: int
    narrow: int
    kept: int
    kept_narrow: int


_SHAPES = (
    *(_Shape(72, 8, 10, 8), _Shape(200, 4, 0, 4), _Shape(136, 16, 33, 16), _Shape(264, 8, 32, 8)),
    *(_Shape(70, 3, 5, 2), _Shape(96, 40, 10, 40), _Shape(80, 40, 0, 39), _Shape(128, 1, 60, 1)),
)
_OUTPUTS = (1, 2, 4, 8, 15, 32, 33, 60)
_TOKENS = (1, 37, 130, 256, 300)


def _problem(
    dtype: torch.dtype, shape: _Shape, wide_input: bool, outputs: int, tokens: int, masked: bool, aligned: bool
) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        sides = (shape.wide, shape.kept), (shape.narrow, shape.kept_narrow)
        (d_in, k_in), (d_out, k_out) = sides if wide_input else sides[::-1]
        examples = 2
        mask = draw.mask(examples, tokens) if masked else None
        a = draw.normal(examples, tokens, d_in, dtype=dtype)
        lists: tuple[list[Tensor | None], ...] = ([], [], [], [], [], [], [], [], [])
        for i in range(3):
            # The first two share their input, as projections of one layer do.
            a = a if i < 2 else draw.normal(examples, tokens, d_in, dtype=dtype)
            g = draw.normal(examples, outputs, tokens, d_out, dtype=dtype)
            if mask is not None:
                poisoned(a, mask)
                poisoned(g.transpose(1, 2), mask)
            bases = [
                torch.linalg.qr(draw.normal(d, d)).Q[:, :k].contiguous() for d, k in ((d_out, k_out), (d_in, k_in))
            ]
            blocks = [0.5 + draw.uniform(*size) for size in ((k_out, k_in), (k_out,), (k_in,), ())]
            a_here, g_here = (a, g) if aligned else (off_alignment(a), off_alignment(g))
            for column, value in zip(lists, (a_here, g_here, *bases, *blocks, mask), strict=True):
                column.append(value)
        return draw.output(examples, outputs, outputs), *lists

    side = "input" if wide_input else "output"
    name = f"{dtype} {shape} wide {side} C={outputs} T={tokens}{' masked' * masked}{' off alignment' * (not aligned)}"
    return Problem(name, arguments)


def _problems(device: torch.device) -> Iterator[Problem]:
    tokens, masks = itertools.cycle(_TOKENS), itertools.cycle((False, True, True))
    aligned = itertools.cycle((True, True, False, True))
    for dtype, shape, wide_input, outputs in itertools.product(dtypes(), _SHAPES, (True, False), _OUTPUTS):
        for _ in range(2):
            yield _problem(dtype, shape, wide_input, outputs, next(tokens), next(masks), next(aligned))


GROUPED = Suite(
    _problems,
    comparable=lambda arguments: [arguments[0]],
    limit=lambda arguments: usual_limit(*arguments[1]),
    sample=lambda arguments: some_entries(arguments, arguments[1]),
)
