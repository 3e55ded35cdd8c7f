"""``out + scale * x^T diag(mask) x`` in plain PyTorch: the definition, and what CPU users run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masking import counted_rows

# PyTorch has no symmetric rank-k update. Above this width only the blocks on and below the diagonal are
# multiplied and the rest is mirrored, which saves up to half of the work; below it the extra calls cost more
# than they save.
_BLOCK = 768


def outer_product(
    out: Tensor, x: Tensor, mask: Tensor | None, scale: float, accumulate: bool, lower: bool = False
) -> None:
    """Write ``scale * x^T diag(mask) x`` to ``out: [d, d]``, or add it if ``accumulate``.

    Products are in the dtype of ``out``. What is written is bit-exactly symmetric: the diagonal blocks are
    averaged with their transpose, the others mirrored; with
    ``lower`` the blocks above the diagonal are left alone.
    """
    rows = counted_rows(x, mask).to(out.dtype)
    width = rows.shape[1]
    if 2 * width <= 3 * _BLOCK:  # one block: most factors of a LoRA are this narrow, and each call counts
        product = rows.T @ rows
        _store(out, product + product.T, 0.5 * scale, accumulate)
        return
    # Blocks of equal width: a narrow last one would run at a fraction of the speed.
    count = round(width / _BLOCK)
    edges = [width * i // count for i in range(count + 1)]
    for i in range(count):
        of_i = slice(edges[i], edges[i + 1])
        for j in range(i):
            of_j = slice(edges[j], edges[j + 1])
            product = rows[:, of_i].T @ rows[:, of_j]
            _store(out[of_i, of_j], product, scale, accumulate)
            if not lower:
                _store(out[of_j, of_i], product.T, scale, accumulate)
        product = rows[:, of_i].T @ rows[:, of_i]
        _store(out[of_i, of_i], product + product.T, 0.5 * scale, accumulate)


def mirror_lower(out: Tensor) -> None:
    """Copy what is below the diagonal of ``out: [d, d]`` to above it."""
    out.copy_(out.tril() + out.tril(-1).T)


def grouped_outer_product(
    outs: Sequence[Tensor],
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
    accumulate: bool,
    lower: bool = False,
) -> None:
    """``outer_product`` for each entry."""
    for out, x, mask, scale in zip(outs, xs, masks, scales, strict=True):
        outer_product(out, x, mask, scale, accumulate, lower)


def _store(out: Tensor, value: Tensor, scale: float, accumulate: bool) -> None:
    if accumulate:
        out.add_(value, alpha=scale)
    else:
        torch.mul(value, scale, out=out)
