"""What an implementation of the sums of squares is verified on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..verify.problem import Arguments, Draw, Problem, Suite, usual_limit
from ..verify.rows import LAYOUTS, dtypes, rows


def _problem(dtype: torch.dtype, width: int, masked: bool, layout: str) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        drawn = [rows(draw, height, width, dtype, masked, layout) for height in (900, 33, 1)]
        return draw.output(3, dtype=torch.float64), [x for x, _ in drawn], [mask for _, mask in drawn]

    return Problem(f"{dtype} {width} {layout}{' masked' * masked}", arguments)


def _problems(device: torch.device) -> Iterator[Problem]:
    for kind in itertools.product(dtypes(), (3, 8, 32, 40, 264, 600), (False, True), LAYOUTS):
        yield _problem(*kind)


SUITE = Suite(_problems, lambda arguments: [arguments[0]], lambda arguments: usual_limit(*arguments[1]) / 10)
