"""Where the examples of a batch stand in a tensor that a layer sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

AXES = 3  # leading dimensions among which the examples are looked for


@dataclass(frozen=True)
class Layout:
    """One leading dimension holds the examples; all other leading dimensions are tokens.

    Attributes:
        axis: which dimension; its size is a multiple k N of the number of examples.
        blocks: whether it is k blocks of all examples (concatenated pairs), rather than N groups of k rows.
    """

    axis: int
    blocks: bool

    def groups(self, shape: Sequence[int], n: int) -> int:
        """How many rows of that dimension an example has: with one, `blocks` makes no difference."""
        return shape[self.axis] // n

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Whether a tensor `[..., d]` of this shape can be read so."""
        return self.axis < len(shape) - 1 and shape[self.axis] > 0 and shape[self.axis] % n == 0

    def tokens(self, x: Tensor, n: int) -> Tensor:
        """`[..., d]` as `[N, T, d]`."""
        groups = x.shape[self.axis] // n
        split = (groups, n) if self.blocks else (n, groups)
        x = x.reshape(*x.shape[: self.axis], *split, *x.shape[self.axis + 1 :])
        x = x.movedim(self.axis + int(self.blocks), 0)
        return x.reshape(n, -1, x.shape[-1])


FIRST = Layout(axis=0, blocks=False)


@dataclass(frozen=True)
class Whole(Layout):
    """All of the tensor belongs to the only example: every leading dimension is tokens."""

    axis: int = 0
    blocks: bool = False

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """See `Layout.fits`."""
        return n == 1

    def tokens(self, x: Tensor, n: int) -> Tensor:
        """See `Layout.tokens`."""
        return x.reshape(1, -1, x.shape[-1])


WHOLE = Whole()


def layouts(shape: Sequence[int], n: int) -> list[Layout]:
    """All readings of a tensor `[..., d]` of this shape as N examples, the most usual first."""
    if n == 1:
        return [WHOLE]
    found = []
    for axis in range(min(AXES, len(shape) - 1)):
        if FIRST.fits(shape[axis:], n):
            found.append(Layout(axis, blocks=False))
            if shape[axis] > n:
                found.append(Layout(axis, blocks=True))
    return found
