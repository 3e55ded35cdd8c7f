"""Rows of inputs as calls bring them: of every dtype, layout and mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import interpreting
from .problem import Draw, off_alignment, poisoned, strided

LAYOUTS = ("contiguous", "strided", "off alignment")


def dtypes() -> tuple[torch.dtype, ...]:
    """Those of the kernels; arithmetic in bfloat16 is wrong in Triton's interpreter."""
    return (torch.float32, torch.float16, *(() if interpreting() else (torch.bfloat16,)))


def rows(
    draw: Draw, height: int, width: int, dtype: torch.dtype, masked: bool = False, layout: str = "contiguous"
) -> tuple[Tensor, Tensor | None]:
    """``[height, width]`` and its mask, if it has one; NaN in the rows that it does not count."""
    return laid_out(draw, draw.normal(height, width, dtype=dtype), masked, layout)


def laid_out(draw: Draw, x: Tensor, masked: bool, layout: str) -> tuple[Tensor, Tensor | None]:
    """The same rows in a layout, and a mask, if they have one."""
    x = {"contiguous": lambda x: x, "strided": strided, "off alignment": off_alignment}[layout](x)
    if not masked:
        return x, None
    mask = draw.mask(len(x))
    return poisoned(x, mask), mask
