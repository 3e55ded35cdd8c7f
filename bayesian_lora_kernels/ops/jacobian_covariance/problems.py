"""What an implementation of the Jacobian covariance is verified on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..verify.problem import Arguments, Draw, Problem, Suite, off_alignment, poisoned, some_entries, usual_limit
from ..verify.rows import dtypes


@dataclass(frozen=True)
class _Kind:
    """A call: sizes of the wide and the narrow side, how many directions of each are kept, and the rest."""

    wide: int
    narrow: int
    kept: int
    kept_narrow: int
    wide_input: bool
    dtype: torch.dtype
    dtype_narrow: torch.dtype
    outputs: int
    tokens: int
    masked: bool = False
    aligned: bool = True
    contiguous: bool = True

    def __str__(self) -> str:
        flags = [name for name in ("wide_input", "masked", "aligned", "contiguous") if getattr(self, name)]
        kept = f"k={self.kept}, {self.kept_narrow}"
        sizes = f"C={self.outputs} T={self.tokens} {self.wide} x {self.narrow} {kept}"
        return " ".join([str(self.dtype), str(self.dtype_narrow), sizes, *flags])


# Wide and narrow side, kept directions of them.
_SHAPES = (
    *((72, 8, 10, 8), (1032, 8, 10, 8), (200, 4, 0, 4), (136, 16, 33, 16), (264, 8, 32, 8)),
    *((70, 3, 5, 2), (96, 40, 10, 40), (80, 40, 0, 39), (128, 1, 60, 1)),
)


def _problem(kind: _Kind) -> Problem:
    def laid(x: Tensor) -> Tensor:
        if not kind.contiguous:
            return x.repeat_interleave(2, dim=-1)[..., ::2]
        return x if kind.aligned else off_alignment(x)

    def arguments(draw: Draw) -> Arguments:
        sides = (kind.wide, kind.kept, kind.dtype), (kind.narrow, kind.kept_narrow, kind.dtype_narrow)
        (d_in, k_in, dtype_a), (d_out, k_out, dtype_g) = sides if kind.wide_input else sides[::-1]
        examples, tokens, outputs = 2, kind.tokens, kind.outputs
        mask = draw.mask(examples, tokens) if kind.masked else None
        a = draw.normal(examples, tokens, d_in, dtype=dtype_a)
        lists: tuple[list[Tensor | None], ...] = ([], [], [], [], [], [], [], [], [])
        for i in range(3):
            # The first two share their input, as projections of one layer do.
            a = a if i < 2 else draw.normal(examples, tokens, d_in, dtype=dtype_a)
            g = draw.normal(examples, outputs, tokens, d_out, dtype=dtype_g)
            if mask is not None:
                poisoned(a, mask)
                poisoned(g.transpose(1, 2), mask)
            bases = [
                torch.linalg.qr(draw.normal(d, d)).Q[:, :k].contiguous() for d, k in ((d_out, k_out), (d_in, k_in))
            ]
            blocks = [0.5 + draw.uniform(*size) for size in ((k_out, k_in), (k_out,), (k_in,), ())]
            here = a if kind.aligned and kind.contiguous else laid(a)
            for column, value in zip(lists, (here, laid(g), *bases, *blocks, mask), strict=True):
                column.append(value)
        return draw.output(examples, outputs, outputs), *lists

    return Problem(str(kind), arguments)


def _problems(device: torch.device) -> Iterator[Problem]:
    """What LoRA modules bring: q and v, few and many outputs, padding or not."""
    kinds = itertools.product(dtypes(), _SHAPES, (True, False), (1, 2, 4, 32), (False, True))
    for (dtype, shape, wide_input, outputs, masked), tokens in zip(kinds, itertools.cycle((37, 256, 130))):
        yield _problem(_Kind(*shape, wide_input, dtype, dtype, outputs, tokens, masked))


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _near(variant: str) -> Iterator[Problem]:
    """Problems of the sizes that a name of ``variants.Variant`` has."""
    route, wide, narrow_type, *words = variant.split()
    sizes = {name: int(size) for name, _, size in (word.partition("=") for word in words if "=" in word)}
    flags = {name: name in words for name in ("masked", "aligned", "contiguous")}
    c, r, k = sizes["C"], sizes["R"], sizes.get("K", 0)
    # Of a basis in three planes, as many directions as its columns have room for.
    kept_are = dict.fromkeys((k, max(0, k - 3), sizes.get("N", 3 * k) // 3))
    # An incomplete basis has the directions of its complement, too.
    narrow_are = ((64, 63),) if r > 64 else dict.fromkeys(((r, r), (r - r // 4, r - r // 4)))
    for width, tokens, outputs, narrow, kept in itertools.product(
        (136, 1032, 4104), (37, 256, 130, 5), (c, c - c // 4), narrow_are, kept_are
    ):
        for wide_size in (width,) if "rest" in words else (kept,):
            if wide_size >= narrow[0]:
                dtype, dtype_narrow = _DTYPES[wide], _DTYPES[narrow_type]
                shape = wide_size, narrow[0], kept, narrow[1]
                yield _problem(_Kind(*shape, route != "output", dtype, dtype_narrow, outputs, tokens, **flags))


GROUPED = Suite(
    _problems,
    comparable=lambda arguments: [arguments[0]],
    limit=lambda arguments: usual_limit(*arguments[1]),
    sample=lambda arguments: some_entries(arguments, arguments[1]),
    near=_near,
)


def _single(problem: Problem) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        out, *lists = problem.arguments(draw)
        return out, *(column[0] for column in lists)

    return Problem(problem.name, arguments)


ALONE = replace(
    GROUPED,
    problems=lambda device: map(_single, _problems(device)),
    near=lambda variant: map(_single, _near(variant)),
    limit=lambda arguments: usual_limit(arguments[1]),
    sample=lambda arguments: arguments,
)


def _without_posterior(problem: Problem) -> Problem:
    def arguments(draw: Draw) -> Arguments:
        out, a, g, *_, mask = problem.arguments(draw)
        return out, a, g, mask

    return Problem(problem.name, arguments)


GRAM = replace(
    ALONE,
    problems=lambda device: map(_without_posterior, ALONE.problems(device)),
    near=lambda variant: map(_without_posterior, ALONE.near(variant)),
)
