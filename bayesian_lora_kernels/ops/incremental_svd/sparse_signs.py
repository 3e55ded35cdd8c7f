"""The random columns of the test matrix: ``X^T S`` with a sparse sign matrix S (Martinsson and Tropp 2020, section 9).

Each column of S has a few entries of 1 or -1; here in rows drawn with replacement among those that count.

Drawn before the operation and handed to it, so that every implementation computes from the same numbers, and
without asking the device how many rows count.
"""

from __future__ import annotations

import torch
from torch import Tensor

# So a column of the test matrix is a signed sum of this many rows: a sample of the batch's own range. Gaussian
# columns, which ignore that range, are clearly worse at the same number of columns.
NONZEROS_PER_COLUMN = 16


def draw_numbers(columns: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """``[2, columns, NONZEROS_PER_COLUMN]`` float64, uniform in [0, 1), from ``generator`` or the global one."""
    source = device if generator is None else generator.device
    numbers = torch.rand((2, columns, NONZEROS_PER_COLUMN), dtype=torch.float64, device=source, generator=generator)
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
    # The n-th counted row is where the running count first reaches n + 1.
    running = mask.cumsum(0)
    count = running[-1]
    target = torch.minimum((which * count).to(torch.int64) + 1, count)
    chosen = torch.searchsorted(running, target).clamp_(max=rows - 1)
    return chosen, torch.where(count > 0, signs, 0.0)
