"""The reference with ``nystrom_eigh`` of the native extension (csrc/nystrom_eigh.h), one call for all entries."""

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
    reference.incremental_svd(out, basis, x, mask, rows, signs, fresh, nystrom_eigh)


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
    reference.grouped_incremental_svd(outs, bases, xs, masks, rows, signs, fresh, nystrom_eigh)


def nystrom_eigh(core: Tensor, gram: Tensor, rounding: float, check_errors: bool = True) -> Tensor:
    """As ``reference.nystrom_eigh``, for ``[L, l, l]``; ``check_errors`` as ``native.nystrom_eigh``."""
    combination = torch.empty_like(core, memory_format=torch.contiguous_format)
    native.nystrom_eigh(combination, core, gram, rounding, check_errors=check_errors)
    return combination
