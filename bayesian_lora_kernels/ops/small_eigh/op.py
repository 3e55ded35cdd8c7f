"""Public ``small_eigh``: checks, allocation, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..checks import check_tensor, describe
from ..dispatch import Implementation, check_impl, choose, register

# On a CPU the native Jacobi solver beats LAPACK up to this size, where calling LAPACK costs more than its work (one
# core, batches of 1 to 64: 1.05 to 4 times as fast up to n = 8, about 0.7 times at n = 16). Above, impl="native" asks
# for it explicitly, for its accuracy on graded matrices.
_NATIVE_FASTER_ON_CPU = 8


def _native_is_faster(eigenvalues: Tensor, eigenvectors: Tensor, matrices: Tensor) -> bool:
    # The CUDA kernel has not run on a GPU yet: only impl="native" asks for it there.
    return matrices.device.type == "cpu" and matrices.shape[-1] <= _NATIVE_FASTER_ON_CPU


register("small_eigh", "reference", Implementation("bayesian_lora_kernels.ops.small_eigh.reference", "small_eigh"))
register(
    "small_eigh",
    "native",
    Implementation("bayesian_lora_kernels.ops.native", "small_eigh", native.refuses_small_eigh, _native_is_faster),
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

    Source: ``torch.linalg.eigh`` (LAPACK) for the reference; see ``ops.native.small_eigh`` for the Jacobi solver, which
    is also accurate relative to the small eigenvalues of graded matrices.
    """
    check_impl("small_eigh", impl)
    _validate(matrices)
    with torch.no_grad():
        return _small_eigh(matrices, impl)


def _validate(matrices: Tensor) -> None:
    check_tensor("small_eigh: matrices", matrices, ("L", "n", "n"), (torch.float32, torch.float64))
    if matrices.shape[1] != matrices.shape[2]:
        raise ValueError(f"small_eigh: matrices: expected shape [L, n, n], got {describe(matrices)}")


def _validate_and_allocate(matrices: Tensor) -> tuple[Tensor, Tensor]:
    _validate(matrices)
    return matrices.new_empty(matrices.shape[:2]), matrices.new_empty(matrices.shape)


@torch.library.custom_op(
    "bayesian_lora_kernels::small_eigh",
    mutates_args=(),
    schema="(Tensor matrices, str impl) -> (Tensor, Tensor)",
)
def _small_eigh(matrices: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    eigenvalues, eigenvectors = _validate_and_allocate(matrices)
    arguments = (eigenvalues, eigenvectors, matrices)
    choose("small_eigh", impl, *arguments)(*arguments)
    return eigenvalues, eigenvectors


@_small_eigh.register_fake
def _(matrices: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return _validate_and_allocate(matrices)
