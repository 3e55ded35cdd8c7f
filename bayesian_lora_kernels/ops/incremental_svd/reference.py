"""One-touch randomised incremental SVD in plain PyTorch: the definition, and what CPU users run.

State ``B: [d, l]``, ``B B^T`` the running estimate of ``sum x x^T``. Two routes, by the number of rows:

- *sketch* (more rows than columns): Nystroem approximation of ``B B^T + X^T X`` with test columns taken from
  ``B`` and from the batch (Tropp et al. 2017; Frangella, Tropp and Udell 2021). The batch is touched once, the
  first of a stream twice;
- *direct* (at most as many rows as columns): the leading part of ``[B, X^T]`` from its Gram matrix, which is
  then as small as the sketch's and loses nothing but what the truncation must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masking import zero_masked

Eigh = Callable[[Tensor], Any]
NystromEigh = Callable[[Tensor, Tensor, float], Tensor]


def is_direct(rows: int, columns: int) -> bool:
    """Whether a batch of ``rows`` rows goes the direct route: ``rows <= columns``."""
    return rows <= columns


def grouped_incremental_svd(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    rows: Sequence[Tensor],
    signs: Sequence[Tensor],
    fresh: int,
    nystrom: NystromEigh | None = None,
) -> None:
    """Write to each ``out: [d, columns]`` the update of ``basis: [d, l]`` by the counted rows of ``x: [M, d]``.

    ``rows`` and ``signs``, ``[columns, 16]``, are the sparse sign matrix; the last ``fresh`` test
    columns come from it. ``nystrom``: another implementation of ``nystrom_eigh``.

    The Nystroem eigendecompositions of all entries of one size are one batch, which saves the calls and, on a GPU, all
    but one wait for the eigensolvers. Until then each entry keeps its ``Y``, as large as its basis.
    """
    nystrom = nystrom or nystrom_eigh
    sketches: dict[tuple[int, torch.dtype], list[tuple[Tensor, _Sketch]]] = {}
    for out, basis, x, mask, chosen, sign in zip(outs, bases, xs, masks, rows, signs, strict=True):
        if out.numel() == 0:
            continue
        counted = zero_masked(x, mask).to(out.dtype)
        columns = min(out.shape)
        if is_direct(x.shape[0], out.shape[1]):
            _write(out, direct(basis, counted, columns))
            continue
        few = fresh if fresh <= columns else columns // 2
        sketch = _sketch(basis, counted, x.dtype, chosen[:columns], sign[:columns], few)
        sketches.setdefault((columns, out.dtype), []).append((out, sketch))
    for (_, dtype), entries in sketches.items():
        core = torch.stack([sketch.core for _, sketch in entries])
        gram = torch.stack([sketch.gram for _, sketch in entries])
        _check_finite(core)
        for (out, sketch), combination in zip(entries, nystrom(core, gram, torch.finfo(dtype).eps), strict=True):
            _write(out, _combine(sketch.y, combination))


def _write(out: Tensor, result: Tensor) -> None:
    out[:, : result.shape[1]] = result
    out[:, result.shape[1] :] = 0.0


def direct(basis: Tensor, x: Tensor, columns: int, eigh: Eigh = torch.linalg.eigh) -> Tensor:
    """The leading ``columns`` of ``[B, X^T]``."""
    both = torch.cat([basis, x.T], dim=1).double()  # [d, l + M]
    gram = both.T @ both
    _check_finite(gram)
    values, vectors = eigh(gram)
    leading = min(columns, gram.shape[0])
    values, vectors = values[-leading:].flip(0), vectors[:, -leading:].flip(1)
    # Below this a column is the rounding of the stored state, or of the Gram matrix, and no direction
    # of the data.
    rounding = gram.shape[0] * max(torch.finfo(x.dtype).eps ** 2, torch.finfo(torch.float64).eps)
    kept = values > rounding * values[:1]
    return torch.where(kept, both @ vectors, 0.0).to(x.dtype)


@dataclass(frozen=True)
class _Sketch:
    """``Y: [d, l]``, and ``C`` and ``K: [l, l]`` in float64."""

    y: Tensor
    core: Tensor
    gram: Tensor


def _sketch(basis: Tensor, x: Tensor, rounded_to: torch.dtype, rows: Tensor, signs: Tensor, fresh: int) -> _Sketch:
    omega = _test_columns(basis, x, rows, signs, fresh).to(rounded_to).to(x.dtype)
    if basis.shape[1] == 0:
        # The first batch has no basis to build on: one step of subspace iteration makes up for it. Without it, its
        # loss is the largest of the stream and stays in the estimate (1.04 after one batch, 1.002 with it).
        z, _, y = _touch(basis, x, omega)
        omega = torch.linalg.qr(y).Q.to(rounded_to).to(x.dtype)
    z, r, y = _touch(basis, x, omega)
    wide, z, r = y.double(), z.double(), r.double()
    core = z.T @ z + r.T @ r  # Omega^T (B B^T + X^T X) Omega
    return _Sketch(y, core, wide.T @ wide)


def _combine(y: Tensor, combination: Tensor) -> Tensor:
    wide, eps = y.double(), torch.finfo(y.dtype).eps
    result = wide @ combination
    # A column smaller than the rounding errors of the columns of Y that it combines holds no direction of the data.
    rounding = eps * (wide.norm(dim=0) @ combination.abs())
    return torch.where(result.norm(dim=0) > rounding, result, 0.0).to(y.dtype)


def _touch(basis: Tensor, x: Tensor, omega: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Z = X Omega``, ``R = B^T Omega``, ``Y = (B B^T + X^T X) Omega``: all that is ever read of X."""
    # Transposed, X is the right operand of both products and read in its own layout: a quarter faster on the CPU.
    z = omega.T @ x.T  # [l, M]
    r = omega.T @ basis  # [l, l]
    # Two products, then their sum: accumulating the batch onto B R would round every step at the size of the whole
    # stream (error 1.10 instead of 1.01 after 32 batches with massive activations of 1e6).
    y = z @ x + r @ basis.T  # [l, d]
    return z.T, r.T, y.T


def _test_columns(basis: Tensor, x: Tensor, rows: Tensor, signs: Tensor, fresh: int) -> Tensor:
    """Orthonormal ``[d, columns]`` spanning the leading columns of the basis and signed sums of rows of ``x``.

    A column that the basis does not fill (its rank is smaller, or the stream begins) is fresh too, and where
    the batch has nothing to offer (all rows zero) the basis keeps its own.
    """
    columns = rows.shape[0]
    old = x.new_zeros(x.shape[1], columns)
    old[:, : basis.shape[1]] = basis[:, :columns]
    new = torch.nn.functional.embedding_bag(rows, x, per_sample_weights=signs.to(x.dtype), mode="sum").T
    old_norm, new_norm = old.norm(dim=0), new.norm(dim=0)
    filled = old_norm > torch.finfo(x.dtype).eps * old_norm.max()
    is_old = filled & (torch.arange(columns, device=x.device) < columns - fresh)
    is_old |= filled & (new_norm == 0)
    tiny = torch.finfo(x.dtype).tiny
    stacked = torch.where(is_old, old / old_norm.clamp(min=tiny), new / new_norm.clamp(min=tiny))
    # Without orthonormal test columns the update fails as soon as a few rows carry massive activations: they
    # would dominate every column, and their difference be rounding. Householder QR also survives dependent
    # columns.
    return torch.linalg.qr(stacked).Q


def nystrom_eigh(core: Tensor, gram: Tensor, rounding: float) -> Tensor:
    """Eigendecomposition of the Nystroem approximation ``Y C^+ Y^T`` from matrices of the sketch's size.

    ``W: [..., l, l]`` with ``Y W`` orthogonal, descending, and ``Y W (Y W)^T = Y C^+ Y^T``: its columns are the
    eigenvectors times the roots of the eigenvalues. ``core`` is ``C``, ``gram`` is ``Y^T Y``, all in float64;
    ``rounding`` is that of the data.

    Both are scaled so that ``C`` has a unit diagonal: the threshold of the pseudo-inverse then compares
    directions, not sizes, and a massive activation does not wipe out the others.
    """
    diagonal = core.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = torch.where(diagonal > 0, 1.0 / diagonal, 0.0)
    values, vectors = torch.linalg.eigh(core * scale[..., None, :] * scale[..., :, None])
    threshold = max(rounding, core.shape[-1] * torch.finfo(torch.float64).eps) * values[..., -1:]
    inverse_root = torch.where(values > threshold, values.clamp(min=1e-300).rsqrt(), 0.0)
    whiten = scale[..., :, None] * vectors * inverse_root[..., None, :]
    _, rotation = torch.linalg.eigh(whiten.mT @ gram @ whiten)
    return whiten @ rotation.flip(-1)


def _check_finite(small: Tensor) -> None:
    # On the CPU only: a GPU is not waited for.
    if small.device.type == "cpu" and not bool(small.isfinite().all()):
        raise ValueError("incremental_svd: expected finite counted rows and basis, got NaN or infinity")
