"""Rows that do not count may hold anything, NaN and infinity included: they are replaced, never multiplied by
zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def counted_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of ``x: [M, d]`` that the mask counts, in order, for sums over rows.

    On the CPU the others are dropped, which saves their share of the work. Elsewhere they become zeros, since
    how many there are is known only on the device.
    """
    if mask is None:
        return x
    if x.device.type == "cpu":
        return x[mask]
    return zero_masked(x, mask)


def zero_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with zeros where ``mask`` (over the leading dimensions of ``x``) is False."""
    if mask is None:
        return x
    return torch.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, x.new_zeros(()))
