"""What is compiled for which arguments: the route, and how it is cut. Pure functions of sizes and dtypes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Shape(NamedTuple):
    """Modules of one group, as far as it decides what is compiled; ``rows`` are the directions of the narrow side."""

    wide_input: bool
    outputs: int
    tokens: int
    width: int
    rows: int
    kept: int
    wide: torch.dtype
    narrow: torch.dtype
    interpreted: bool
    masked: bool
    aligned: bool
    contiguous: bool

    @property
    def rest(self) -> bool:
        """Whether the wide side has a complement."""
        return self.kept < self.width

    @property
    def planes(self) -> bool:
        """Whether the narrow operand comes as three bfloat16 numbers: products with a bfloat16 input are exact then.

        The interpreter cannot multiply bfloat16; there the input is widened, as of the other dtypes.
        """
        return self.wide_input and self.wide == torch.bfloat16 and not self.interpreted

    @property
    def basis_planes(self) -> bool:
        """Whether the basis comes as three numbers of 16 bits: then the products with the input are exact."""
        return self.planes or self.wide == torch.float16


@dataclass(frozen=True)
class Configuration:
    """How a side is cut, and with which resources a program works on it.

    Args:
        width: columns of the wide side in a tile.
        tokens: tokens of one dot, at most; 1: no dot.
        num_warps: warps per program.
        num_stages: tiles in flight.
        max_registers: what the assembler may use. Left to itself it spills a little to fit one program more on a
            multiprocessor; with room it often needs no more.
    """

    width: int
    tokens: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class Variant:
    """All that selects what is compiled for a group.

    Args:
        route: ``tokens``, ``input`` (the Jacobians of a wide input) or ``output``.
        rows: directions of the narrow side, rounded up.
        outputs: side by side in a program, and ``directions`` beside them.
        kept: directions of the wide side, rounded up; 0 for none.
        columns: of the basis as the route ``tokens`` multiplies with it.
        main: of the kernel that reads the wide operand.
        tail: of ``token_gram_kernel``: its tiles are of ``width`` by ``tokens`` tokens.
    """

    route: str
    shape: Shape
    rows: int
    outputs: int
    directions: int
    kept: int
    main: Configuration
    columns: int = 0
    tail: Configuration | None = None

    @property
    def narrow(self) -> tuple[int, int]:
        """Outputs and directions in a program of ``narrow_rows_kernel``: as many as fill a matrix instruction."""
        c = min(self.outputs, max(1, 16 // self.rows)) if self.shape.wide_input else 1
        return c, max(self.rows, 16 // c)

    def __str__(self) -> str:
        shape = self.shape
        flags = [name for name in ("masked", "aligned", "contiguous", "rest", "planes") if getattr(shape, name)]
        sizes = {"R": self.rows, "C": self.outputs, "O": self.directions, "K": self.kept, "N": self.columns}
        sizes |= {"D": self.main.width, "T": self.main.tokens}
        if self.tail:
            sizes["S"] = self.tail.tokens
        numbers = [f"{name}={size}" for name, size in sizes.items() if size]
        return " ".join([self.route, _NAMES[shape.wide], _NAMES[shape.narrow], *flags, *numbers])


def power(size: int, least: int) -> int:
    """The next power of two, at least ``least``."""
    return max(least, 1 << max(0, size - 1).bit_length())


def side_by_side(outputs: int, rows: int, most: int) -> tuple[int, int]:
    """Outputs, and directions of the narrow side, that one program takes: powers of two, their product between 16 (a
    matrix instruction's least) and ``most`` (or what all outputs need).
    """
    c = power(outputs, 1)
    o = min(power(rows, 1), max(1, most // c))
    return c, max(o, 16 // c, 1)


# Rows of a Jacobian (outputs times directions of the narrow side) in one program. More would read the wide side from L2
# less often, but 32 is what a Gram matrix in tf32x3, whose operands are in registers, leaves without spills.
_ROWS = 32

# Programs are small, so that two to four share a multiprocessor and hide each other's latency; the same on sm_80, sm_90
# and sm_100, since nothing needs more than 48 KB of shared memory.
_INPUT_PLANES = Configuration(width=64, tokens=64, num_warps=4, num_stages=3)
_INPUT = Configuration(width=64, tokens=32, num_warps=4, num_stages=3)
_OUTPUT = Configuration(width=64, tokens=1, num_warps=8, num_stages=1)

# What bases of tiles and rows of kept directions take, in multiply-adds of the wide side for each direction: their
# estimated time over that of `similarities_kernel` (docs/performance.md) for eight examples and 10 directions.
_PER_KEPT = 7000
# Outputs, and kept directions, that the route through tokens leaves registers for.
_MOST = 32
_MOST_TOKENS = 1024  # the workspace grows with their square
# Tokens that a program of `similarities_kernel` has room for beside 128 columns of a basis; beside 32, 128.
_TOKENS = {"sm_80": 64, "sm_90": 128, "sm_100": 64}
# Outputs times directions in a program of `token_gram_kernel`: 64 are what wgmma multiplies at once. mma.sync would
# need more registers than there are, and for tcgen05 Triton 3.6 does not compile it.
_ROWS_OF_TOKENS = {"sm_80": 32, "sm_90": 64, "sm_100": 32}


def by_jacobian(shape: Shape) -> Variant:
    """The route through tiles of the Jacobians."""
    c, o = side_by_side(shape.outputs, shape.rows, _ROWS)
    chosen = (_INPUT_PLANES if shape.planes else _INPUT) if shape.wide_input else _OUTPUT
    if c > _ROWS:
        chosen = replace(chosen, width=32, tokens=min(32, chosen.tokens), max_registers=255)
    elif c * o < _ROWS:
        chosen = replace(chosen, num_warps=4, max_registers=192 if shape.wide_input else 168)
    if not shape.wide_input and shape.tokens <= _ROWS // c > 1:  # as many rows again, of outputs and tokens
        chosen = replace(chosen, tokens=_ROWS // c, num_warps=4, max_registers=255)
    kept = power(shape.kept, 16) if shape.kept else 0
    return Variant("input" if shape.wide_input else "output", shape, power(shape.rows, 1), c, o, kept, chosen)


def by_tokens(shape: Shape, architecture: str) -> Variant:
    """The route through inner products of tokens, for a wide input."""
    kept = power(shape.kept, 16)
    columns = power(3 * shape.kept, 16) if shape.basis_planes else kept
    columns = columns if columns <= 32 else 128  # with 64 the assembler spills
    if shape.wide == torch.float32:
        main = Configuration(width=32, tokens=64, num_warps=8, num_stages=3)
    else:
        tokens = min(power(shape.tokens, 64), 128 if columns <= 32 else _TOKENS[architecture])
        width, stages = {"sm_80": (32, 4), "sm_90": (64, 4), "sm_100": (64, 3)}[architecture]
        main = Configuration(width, tokens, num_warps=8, num_stages=stages)
    c, o = side_by_side(shape.outputs, shape.rows, _ROWS_OF_TOKENS[architecture])
    tail = Configuration(width=64, tokens=64 if c * o <= 32 else 32, num_warps=4, num_stages=3)
    return Variant("tokens", shape, power(shape.rows, 1), c, o, kept, main, columns, tail)


def padded_tokens(chosen: Variant) -> int:
    """Rows of a matrix of all tokens' inner products: a multiple of every tile."""
    return -(-chosen.shape.tokens // chosen.main.tokens) * chosen.main.tokens


def _cost_by_jacobian(shape: Shape, chosen: Variant) -> float:
    """Multiply-adds per module and example, as so many in bfloat16 (tf32x3 are 6); the docstrings of the kernels."""
    side = chosen.outputs * chosen.directions
    rows = -(-shape.rows // chosen.directions) * side
    tiles = rows * ((3 if shape.planes else 6) * shape.tokens + 6 * (2 * chosen.kept + side))
    return shape.width * (tiles + _PER_KEPT * chosen.kept)


def _cost_by_tokens(shape: Shape, chosen: Variant, sharing: float) -> float:
    assert chosen.tail is not None
    padded, side = padded_tokens(chosen), chosen.outputs * chosen.directions
    rows = -(-shape.rows // chosen.directions) * side
    main = shape.width * padded * ((padded + chosen.main.tokens) / 2 + chosen.columns)
    tail = 6 * rows * padded * ((padded + chosen.tail.width) / 2 + side + chosen.kept)
    return main * (6 if shape.wide == torch.float32 else 1) * sharing + tail


@functools.lru_cache(maxsize=1024)
def variant(shape: Shape, inputs: int, entries: int, architecture: str) -> Variant:
    """The cheaper route for modules of which ``inputs`` have an input of their own.

    Without kept directions it is that of the Jacobians: nothing could be taken out of tokens that cancel.
    """
    chosen = by_jacobian(shape)
    if shape.wide_input and shape.rest and 0 < shape.kept <= _MOST and shape.outputs <= _MOST:
        tokens = by_tokens(shape, architecture)
        if shape.tokens <= _MOST_TOKENS and _cost_by_tokens(shape, tokens, inputs / entries) < _cost_by_jacobian(
            shape, chosen
        ):
            return tokens
    return chosen
