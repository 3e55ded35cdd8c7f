"""The reference with its small algebra in the native extension (csrc/small_algebra.h), one call for all entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from . import reference


def incremental_svd(
    out: Tensor, basis: Tensor, x: Tensor, mask: Tensor | None, rows: Tensor, signs: Tensor, fresh: int
) -> None:
    """As ``reference.incremental_svd``."""
    reference.incremental_svd(out, basis, x, mask, rows, signs, fresh, small_algebra)


def grouped_incremental_svd(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    rows: Sequence[Tensor],
    signs: Sequence[Tensor],
    fresh: int,
) -> None:
    """As ``reference.grouped_incremental_svd``."""
    reference.grouped_incremental_svd(outs, bases, xs, masks, rows, signs, fresh, small_algebra)


def small_algebra(core: Tensor, gram: Tensor, rounding: float, check_errors: bool = True) -> Tensor:
    """As ``reference.small_algebra``, for ``[L, l, l]``; ``check_errors`` as ``native.small_algebra``."""
    combination = torch.empty_like(core, memory_format=torch.contiguous_format)
    native.small_algebra(combination, core, gram, rounding, check_errors=check_errors)
    return combination
