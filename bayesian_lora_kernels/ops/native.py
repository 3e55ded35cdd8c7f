"""The native extension (csrc/): loaded when first asked for; if it is not there, it can say why.

Its operators take contiguous results to write into, as the implementations that ``dispatch`` chooses from do.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .device import gpu_refuses

MAX_N = 128  # largest matrix that the operators take; kMaxN in csrc/small_eigh.h

# What the operators return in place of a number of sweeps; kNotFinite in csrc/small_eigh.h. Lower: not converged.
_NOT_FINITE = -1

_OPERATORS = ("small_eigh", "nystrom_eigh")
_ADVICE = (
    "to build it, have a C++ compiler and PyTorch installed and run pip install --no-build-isolation on the source"
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension module, or the reason why there is none."""
    note = Path(__file__).resolve().parent.parent / "_native_build.json"  # written by setup.py
    if not note.exists():
        return None, f"the native extension was not built; {_ADVICE}"
    record = json.loads(note.read_text())
    if "reason" in record:
        return None, f"the native extension was not built: {record['reason']}"
    here, built_for = str(torch.__version__), record["torch"]
    if built_for != here:
        # Loading it could end the process: PyTorch promises no binary interface between versions.
        return None, f"the native extension was built for PyTorch {built_for}, and this is {here}; {_ADVICE}"
    try:
        module = importlib.import_module("bayesian_lora_kernels._native")
        missing = [name for name in _OPERATORS if not hasattr(torch.ops.bayesian_lora_kernels_native, name)]
        if missing:
            return None, f"the native extension is older than this package and lacks {', '.join(missing)}; {_ADVICE}"
        return module, None
    except ImportError as error:
        return None, f"the native extension does not load: {error}; {_ADVICE}"


def why_unavailable() -> str | None:
    """Why the native extension cannot be used here, or None if it can."""
    return _load()[1]


def build_info() -> dict[str, str | None]:
    """How the extension was built: ``compiler``, ``torch``, ``cuda`` (None without), ``architectures``.

    Raises RuntimeError, with the reason, if there is no extension.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    info: dict[str, str | None] = module.build_info()
    return info


def refuses(matrices: Tensor) -> str | None:
    """Why the operators cannot take ``matrices: [..., n, n]``, or None."""
    if matrices.shape[-1] > MAX_N:
        return f"it takes matrices up to n = {MAX_N}, these have n = {matrices.shape[-1]}"
    return refuses_device(matrices)


def refuses_device(tensor: Tensor) -> str | None:
    """Why the operators cannot take tensors where ``tensor`` lies, or None."""
    if tensor.device.type == "cuda":
        if build_info()["cuda"] is None:
            return "the native extension was built without CUDA, and the matrices lie on a CUDA device"
        return gpu_refuses(tensor.device)
    if tensor.device.type not in ("cpu", "cuda"):
        return f"it takes tensors on the CPU or a CUDA device, the matrices lie on {tensor.device}"
    return None


def refuses_small_eigh(eigenvalues: Tensor, eigenvectors: Tensor, matrices: Tensor) -> str | None:
    """Why ``small_eigh`` cannot take these arguments, or None."""
    return refuses(matrices)


def small_eigh(eigenvalues: Tensor, eigenvectors: Tensor, matrices: Tensor, *, check_errors: bool = True) -> None:
    """Write the eigenvalues, descending, and eigenvectors (columns) of symmetric matrices, by Jacobi.

    Small eigenvalues of graded positive definite matrices (``D A D``, D diagonal, A well-conditioned) come
    out accurate relative to themselves, which ``torch.linalg.eigh`` does not promise. Deterministic; the
    results of one matrix do not depend on the others.

    Args:
        eigenvalues: ``[L, n]``, contiguous, dtype and device of ``matrices``; written.
        eigenvectors: ``[L, n, n]``, likewise; written.
        matrices: ``[L, n, n]``, float32 or float64, n up to 128, on the CPU or a CUDA device; only the lower
            triangle is read.
        check_errors: False skips the check of the outcome, which on a CUDA device waits for the result. The
            results of a matrix with NaN or infinity are then NaN.

    Raises:
        TypeError, ValueError: a dtype, shape or device other than those; NaN or infinity, naming the first
            such matrix.
        torch.linalg.LinAlgError: no convergence, naming the matrix.
        RuntimeError: no native extension; the message says why.

    Source: Jacobi 1846 with the stopping criterion of Demmel and Veselic, "Jacobi's method is more accurate
    than QR", SIAM J. Matrix Anal. Appl. 13 (1992).
    """
    _require("small_eigh")
    info: Tensor = torch.ops.bayesian_lora_kernels_native.small_eigh(matrices, eigenvalues, eigenvectors)
    if check_errors:
        _check_outcome("small_eigh", info)


def nystrom_eigh(
    combination: Tensor, core: Tensor, gram: Tensor, rounding: float, *, check_errors: bool = True
) -> None:
    """Eigendecomposition of Nystroem approximations ``Y C^+ Y^T`` from matrices of the sketch's size.

    Write ``W: [L, l, l]``: ``Y W`` has orthogonal, descending columns, and ``Y W (Y W)^T = Y C^+ Y^T``.

    As ``ops.incremental_svd.reference.nystrom_eigh``, with ``small_eigh``'s Jacobi solver, for all entries in one
    launch. Deterministic; the result of one entry does not depend on the others.

    Args:
        combination: ``[L, l, l]``, contiguous, float64, on the device of ``core``; written.
        core: ``C: [L, l, l]``, float64, l up to 128, on the CPU or a CUDA device, any strides; only the lower
            triangle is read.
        gram: ``K = Y^T Y``, likewise, symmetric; read whole.
        rounding: relative rounding of the data, in [0, 1). With ``C`` scaled to a unit diagonal, eigenvalues up to
            ``max(rounding, l * 2^-52)`` times the largest count as zero.
        check_errors: as ``small_eigh``.

    Raises:
        TypeError, ValueError: a dtype, shape or device other than those; NaN, infinity or overflow, naming the
            first such entry.
        torch.linalg.LinAlgError: no convergence, naming the entry.
        RuntimeError: no native extension; the message says why.

    Source: Nystroem approximation of Tropp et al. 2017 and of Frangella, Tropp and Udell 2021.
    """
    _require("nystrom_eigh")
    info: Tensor = torch.ops.bayesian_lora_kernels_native.nystrom_eigh(core, gram, rounding, combination)
    if check_errors:
        _check_outcome("nystrom_eigh", info)


def _require(operation: str) -> None:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"{operation}: {reason}")


def _check_outcome(operation: str, info: Tensor) -> None:
    failed = (info < 0).nonzero()
    if len(failed) == 0:
        return
    first = int(failed[0])
    where = f"matrix {first} of {len(info)}"
    if int(info[first]) == _NOT_FINITE:
        raise ValueError(f"{operation}: expected finite matrices, got NaN or infinity in {where}")
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
        f"{operation}: {where} did not converge; its results are not to be used"
    )
