"""``torch.linalg.eigh`` with descending eigenvalues: the definition, and what CPU users run."""

from __future__ import annotations

import torch
from torch import Tensor


def small_eigh(eigenvalues: Tensor, eigenvectors: Tensor, matrices: Tensor) -> None:
    """Write the eigenvalues ``[L, n]``, descending, and eigenvectors ``[L, n, n]`` (columns) of
    ``matrices: [L, n, n]``.
    """
    finite = matrices.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise ValueError(
            f"small_eigh: expected finite matrices, got NaN or infinity in matrix {first} of {matrices.shape[0]}"
        )
    values, vectors = torch.linalg.eigh(matrices)
    eigenvalues.copy_(values.flip(-1))
    eigenvectors.copy_(vectors.flip(-1))
