"""Public ``small_eigh``: checks, allocation, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tensor
from ..dispatch import Implementation, check_impl, choose, register

register(
    "small_eigh", "reference", Implementation("bayesian_lora_kernels.ops.small_eigh.reference", "small_eigh")
)


def small_eigh(matrices: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of small symmetric matrices, ``matrices[i] = Q diag(e) Q^T``, e
    descending.

    Args:
        matrices: ``[L, n, n]``, symmetric (only the lower triangle is read), float32 or float64, any strides;
            L or n may be 0. Meant for n up to 128; the reference takes any n, a kernel says so if it does
            not.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        Eigenvalues ``[L, n]``, descending, and orthonormal eigenvectors ``[L, n, n]`` as columns, in the
        dtype of the input. No gradient is recorded.

    Raises:
        TypeError: not a tensor, or not float32 or float64.
        ValueError: a shape that is not ``[L, n, n]``; NaN or infinity, naming the first such matrix; an
            unknown ``impl``.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.

    Source: ``torch.linalg.eigh`` (LAPACK) for the reference.
    """
    check_impl("small_eigh", impl)
    with torch.no_grad():
        return _small_eigh(matrices, impl)


def _validate_and_allocate(matrices: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor("small_eigh: matrices", matrices, ("L", "n", "n"), (torch.float32, torch.float64))
    count, n, other = matrices.shape
    if n != other:
        raise ValueError(f"small_eigh: matrices: expected shape [L, n, n], got {list(matrices.shape)}")
    return matrices.new_empty((count, n)), matrices.new_empty((count, n, n))


@torch.library.custom_op("bayesian_lora_kernels::small_eigh", mutates_args=())
def _small_eigh(matrices: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    eigenvalues, eigenvectors = _validate_and_allocate(matrices)
    arguments = (eigenvalues, eigenvectors, matrices)
    choose("small_eigh", impl, *arguments)(*arguments)
    return eigenvalues, eigenvectors


@_small_eigh.register_fake
def _(matrices: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return _validate_and_allocate(matrices)
