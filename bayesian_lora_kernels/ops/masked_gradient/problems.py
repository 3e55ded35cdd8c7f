"""What an implementation of the search for gradients of masked tokens is verified on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..verify.problem import Arguments, Draw, Problem, Suite, off_alignment
from ..verify.rows import dtypes


def _problem(dtype: torch.dtype, width: int, aligned: bool) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        gs, inputs, masks = [], [], []
        for i in range(6):
            g, a = draw.normal(3, 70, width, dtype=dtype), draw.normal(3, 70, 24, dtype=dtype)
            mask = draw.mask(3, 70)
            if i % 3 == 0:
                g[~mask] = 0  # no masked token has a gradient
            elif i % 3 == 1:
                a[~mask] = 0  # or an input
            gs.append(g if aligned else off_alignment(g))
            inputs.append(a)
            masks.append(mask)
        return draw.output(len(gs), dtype=torch.bool), gs, inputs, masks

    return Problem(f"{dtype} {width}{' aligned' * aligned}", arguments)


def _problems(device: torch.device) -> Iterator[Problem]:
    for dtype, width, aligned in itertools.product(dtypes(), (8, 5, 32, 264, 300), (True, False)):
        yield _problem(dtype, width, aligned)


SUITE = Suite(_problems, comparable=lambda arguments: [arguments[0].float()], limit=lambda arguments: 0.0)
