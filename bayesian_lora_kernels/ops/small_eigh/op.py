"""Public ``small_eigh``: checks, allocation, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..checks import check_tensor, describe
from ..dispatch import Implementation, check_impl, choose, register
from ..registration import custom_op
from ..verify.verifier import Evidence

# Up to this size calling LAPACK costs more than its work.
_ALWAYS_FASTER = 12
_CLASSES = (8, 16, 32, 64, 96, native.MAX_N)


def _native_is_faster(eigenvalues: Tensor, eigenvectors: Tensor, matrices: Tensor) -> bool:
    """Whether ``auto`` takes the native Jacobi solver; elsewhere impl="native" asks for it.

    On a GPU always: one launch. On the CPU LAPACK solves one matrix after another; the extension spends up to
    1 + n / 32 times as long on one, on all threads at once. Measured on x86, float64, minima of interleaved runs,
    LAPACK's time over the extension's: one thread, L = 1 to 64: 1.3 to 1.4 at n = 8, 1.0 to 1.3 at 12, 0.9 to 1.2 at
    20, 0.8 to 1.0 at 32, 0.3 to 0.6 at 64; two threads, L = 4 to 64: 1.5 to 1.9 at n = 12 to 20, 1.7 to 1.9 at 32,
    1.1 to 1.5 at 48 and 64.
    """
    if matrices.device.type != "cpu":
        return True
    count, n = len(matrices), matrices.shape[-1]
    speedup = count / max(1, -(-count // torch.get_num_threads()))
    return n <= _ALWAYS_FASTER or speedup > 1 + n / 32


def variants(eigenvalues: Tensor, eigenvectors: Tensor, matrices: Tensor) -> tuple[str, ...]:
    """What of the native solver a call takes: sizes of a class share the shape of a block and the place of vectors."""
    size = next(size for size in _CLASSES if matrices.shape[-1] <= size)
    return (f"{str(matrices.dtype).removeprefix('torch.')} n<={size}",)


_FOLDER = "bayesian_lora_kernels.ops.small_eigh"
register("small_eigh", "reference", Implementation(f"{_FOLDER}.reference", "small_eigh"))
register(
    "small_eigh",
    "native",
    Implementation(
        "bayesian_lora_kernels.ops.native",
        "small_eigh",
        native.refuses_small_eigh,
        _native_is_faster,
        Evidence(f"{_FOLDER}.problems:SUITE", f"{_FOLDER}.op:variants"),
    ),
)


def small_eigh(matrices: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of small symmetric matrices, ``matrices[i] = Q diag(e) Q^T``, e
    descending.

    Args:
        matrices: ``[L, n, n]``, symmetric (only the lower triangle is read), float32 or float64, any strides;
            L or n may be 0. The native solver takes n up to 128; beyond it ``"auto"`` is ``torch.linalg.eigh``
            (docs/performance.md says why).
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        Eigenvalues ``[L, n]``, descending, and orthonormal eigenvectors ``[L, n, n]`` as columns, in the
        dtype of the input. No gradient is recorded.

    Raises:
        TypeError: not a tensor, or not float32 or float64.
        ValueError: a shape that is not ``[L, n, n]``; NaN or infinity, naming the first such matrix; an
            unknown ``impl``.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.

    Source: ``torch.linalg.eigh`` (LAPACK, or cuSOLVER) for the reference, accurate relative to the largest eigenvalue;
    see ``ops.native.small_eigh`` for the Jacobi solver, which is also accurate relative to the small eigenvalues of
    graded matrices.
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


@custom_op(
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
