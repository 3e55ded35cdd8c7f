"""What an implementation of attention with tangents is verified on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..verify.problem import HALF, Arguments, Draw, Problem, Suite, off_alignment
from ..verify.rows import dtypes
from .variants import COLUMNS

_SEEN = [(None, False), (None, True), *((mask, False) for mask in ("bool", "added", "float32")), ("bool", True)]
_WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 192, 256)
_LAYOUTS = ("heads apart", "heads beside each other", "off alignment")


@dataclass(frozen=True)
class _Kind:
    """A call: dtype, width of a head and of a value, mask, layout."""

    dtype: torch.dtype
    width: int
    values: int
    mask: str | None
    causal: bool
    layout: str = _LAYOUTS[1]

    def __str__(self) -> str:
        seen = f"mask={self.mask} causal={self.causal}"
        return f"{self.dtype} d={self.width} d_v={self.values} {seen} {self.layout}"


def _arguments(kind: _Kind, draw: Draw) -> Arguments:
    """Several blocks of queries, ragged tiles, grouped heads, an odd number of tangents."""
    n, heads, kv_heads, queries, keys, tangents = 1, 2, 1, 150, 77, 3

    def normal(*shape: int) -> Tensor:
        *lead, head, tokens, width = shape
        if kind.layout == _LAYOUTS[1]:
            return draw.normal(*lead, tokens, head, width, dtype=kind.dtype).transpose(-3, -2)
        made = draw.normal(*shape, dtype=kind.dtype)
        return off_alignment(made) if kind.layout == _LAYOUTS[2] else made

    shapes = [(n, heads, queries, kind.width), (n, kv_heads, keys, kind.width), (n, kv_heads, keys, kind.values)]
    primals = [normal(*shape) for shape in shapes]
    changes = [normal(tangents, *shape) for shape in shapes]
    seen = draw.mask(n, 1, queries, keys)
    seen[:, :, 3] = False  # a query that sees no key
    masks: dict[str | None, Tensor] = {
        "bool": seen,
        "added": draw.normal(n, 1, queries, keys, dtype=kind.dtype).masked_fill(~seen, float("-inf")),
        "float32": draw.normal(heads, 1, keys),
    }
    mask = masks.get(kind.mask)
    mask = None if mask is None else mask.expand(n, heads, queries, keys)
    out = draw.output(n, heads, queries, kind.values, dtype=kind.dtype)
    dout = draw.output(tangents, *out.shape, dtype=kind.dtype)
    return out, dout, *primals, *changes, mask, kind.causal, kind.width**-0.5


def _kinds() -> Iterator[_Kind]:
    sizes = [*((width, width) for width in _WIDTHS), (192, 128), (64, 32), (20, 20)]
    for dtype, (width, values), (mask, causal) in itertools.product(dtypes(), sizes, _SEEN):
        yield _Kind(dtype, width, values, mask, causal)
    for dtype, width, layout in itertools.product(dtypes(), (64, 128), (_LAYOUTS[0], _LAYOUTS[2])):
        yield _Kind(dtype, width, width, None, True, layout)


def _near(variant: str) -> Iterator[_Kind]:
    """Kinds of the dtype and mask that a name of ``variants.Variant`` has, and of all widths."""
    name, *words = variant.split()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    of_mask = next((word.partition("=")[2] for word in words if word.startswith("mask=")), None)
    mask = {None: None, "bool": "bool", name: "added"}.get(of_mask, "float32")
    tile = {key: int(size) for key, _, size in (word.partition("=") for word in words) if key in ("D", "V")}
    # Tiles that are full, and such as have an empty column, also where rows are no whole vectors.
    whole = [
        [times * size - less for times in (1, 2, 4, 8, 16) for less in (0, COLUMNS + 8) if less < times * size <= 256]
        for size in tile.values()
    ]
    for width, values in itertools.product(*whole):
        yield _Kind(dtype, width, values, mask, "causal" in words)


def _limit(arguments: Arguments) -> float:
    """In half precision weights are rounded before they are multiplied, and so is the result: of a long row less."""
    dtype = arguments[2].dtype
    return 4 * torch.finfo(dtype).eps if dtype in HALF else 2e-5


def _problems(kinds: Iterable[_Kind]) -> Iterator[Problem]:
    return (Problem(str(kind), partial(_arguments, kind)) for kind in kinds)


SUITE = Suite(
    problems=lambda device: _problems(_kinds()),
    near=lambda variant: _problems(_near(variant)),
    comparable=lambda arguments: arguments[:2],
    limit=_limit,
    outputs=2,
)
