"""The random columns of the test matrix: ``X^T S`` with a sparse sign matrix S (Martinsson and Tropp 2020, section 9).

Each column of S has a few entries of 1 or -1; here in rows drawn with replacement among those that count.

The random numbers are drawn before the operation, so that every implementation computes from the same ones, and rows
are chosen without asking the device how many count. Streams with the same mask and size share their choice: a few
launches, however many streams there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# So a column of the test matrix is a signed sum of this many rows: a sample of the batch's own range. Gaussian
# columns, which ignore that range, are clearly worse at the same number of columns.
NONZEROS_PER_COLUMN = 16


def draw_numbers(columns: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """``[2, columns, NONZEROS_PER_COLUMN]`` float64, uniform in [0, 1), from ``generator`` or the global one."""
    source = device if generator is None else generator.device
    shape = (2, columns, NONZEROS_PER_COLUMN)
    if source.type == "cpu" and device.type == "cuda":  # pinned: the host does not wait for the copy
        numbers = torch.rand(shape, dtype=torch.float64, device=source, generator=generator, pin_memory=True)
    else:
        numbers = torch.rand(shape, dtype=torch.float64, device=source, generator=generator)
    return numbers.to(device, non_blocking=True)


def choose_rows(numbers: Tensor, rows: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row numbers (int64) and signs (float32, 1 or -1), each ``[columns, NONZEROS_PER_COLUMN]``.

    Rows are drawn with replacement among those that ``mask: [rows]`` counts. Where none counts, the
    signs are 0.
    """
    which, sign = numbers.unbind(0)
    signs = torch.where(sign < 0.5, -1.0, 1.0).to(torch.float32)
    if rows == 0:
        return torch.zeros_like(which, dtype=torch.int64), torch.zeros_like(signs)
    if mask is None:
        return (which * rows).to(torch.int64).clamp_(max=rows - 1), signs
    # The n-th counted row, from 0 on, is the first whose running count exceeds n.
    running = mask.cumsum(0)
    count = running[-1]
    chosen = torch.searchsorted(running, (which * count).to(torch.int64), right=True)
    return chosen.clamp_(max=rows - 1), torch.where(count > 0, signs, 0.0)


def choose_all_rows(
    numbers: Tensor, columns: Sequence[int], heights: Sequence[int], masks: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """``choose_rows`` for each stream, made once for all of the same columns, rows and mask."""
    made: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
    chosen = []
    for wanted, height, mask in zip(columns, heights, masks, strict=True):
        key = wanted, height, None if mask is None else (mask.data_ptr(), mask.stride())
        if key not in made:
            made[key] = choose_rows(numbers[:, :wanted], height, mask)
        chosen.append(made[key])
    return [rows for rows, _ in chosen], [signs for _, signs in chosen]
