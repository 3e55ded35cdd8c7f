"""What an implementation of the small eigendecomposition is verified on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..verify.problem import Arguments, Draw, Problem, Suite

_SIZES = (1, 2, 7, 8, 16, 31, 32, 33, 64, 74, 100, 128)


def _problem(dtype: torch.dtype, n: int, decades: float) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        rows = draw.normal(5, n, 2 * n).double() * torch.logspace(0, -decades, n, device=draw.device)[:, None]
        return draw.output(5, n, dtype=dtype), draw.output(5, n, n, dtype=dtype), (rows @ rows.mT).to(dtype)

    return Problem(f"{dtype} n={n} over {decades:g} decades", arguments)


def _problems(device: torch.device) -> Iterator[Problem]:
    for dtype, n, decades in itertools.product((torch.float32, torch.float64), _SIZES, (0.0, 3.0)):
        yield _problem(dtype, n, decades)


def _determined(arguments: Arguments) -> list[Tensor]:
    """Eigenvalues, the matrices put together again, and the orthogonality of the eigenvectors."""
    values, vectors = arguments[0].double(), arguments[1].double()
    return [values, vectors * values[:, None] @ vectors.mT, vectors.mT @ vectors]


SUITE = Suite(
    _problems,
    comparable=_determined,
    limit=lambda arguments: 1e-11 if arguments[0].dtype == torch.float64 else 1e-4,
    outputs=2,
)
