"""Sums of squares of rows in plain PyTorch: the definition, and what CPU users run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import accumulate_dtype
from ..masking import counted_rows


def grouped_square_sum(out: Tensor, xs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    """Write to ``out: [len(xs)]`` the sums of squares of the counted rows; rows in the accumulation dtype, their sum in
    float64.
    """
    for i, (x, mask) in enumerate(zip(xs, masks, strict=True)):
        rows = counted_rows(x, mask)
        out[i] = torch.linalg.vector_norm(rows, dim=1, dtype=accumulate_dtype(x)).double().square().sum()
