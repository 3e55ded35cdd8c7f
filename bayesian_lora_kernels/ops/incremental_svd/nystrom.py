"""The reference with ``nystrom_eigh`` of the native extension (csrc/nystrom_eigh.h), one call for all entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from . import reference


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


def nystrom_eigh(core: Tensor, gram: Tensor, rounding: float) -> Tensor:
    """As ``reference.nystrom_eigh``, for ``[L, l, l]``. Errors are looked for on the CPU only."""
    combination = torch.empty_like(core, memory_format=torch.contiguous_format)
    native.nystrom_eigh(combination, core, gram, rounding, check_errors=core.device.type == "cpu")
    return combination
