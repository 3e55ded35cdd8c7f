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

MAX_N = 128  # largest matrix that small_eigh takes; kMaxN in csrc/small_eigh.h

# What the operator returns in place of a number of sweeps; kNotFinite in csrc/small_eigh.h. Lower: not converged.
_NOT_FINITE = -1

_ADVICE = (
    "to build it, have a C++ compiler and PyTorch installed and run pip install --no-build-isolation on the source"
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The extension module, or the reason why there is none."""
    note = Path(__file__).resolve().parent.parent / "_native_build.json"  # written by setup.py
    record = json.loads(note.read_text()) if note.exists() else {}
    if "reason" in record:
        return None, f"the native extension was not built: {record['reason']}"
    here = str(torch.__version__)
    built_for = record.get("torch", here)
    if built_for != here:
        # Loading it could end the process: PyTorch promises no binary interface between versions.
        return None, f"the native extension was built for PyTorch {built_for}, and this is {here}; {_ADVICE}"
    try:
        return importlib.import_module("bayesian_lora_kernels._native"), None
    except ModuleNotFoundError:
        return None, f"the native extension was not built; {_ADVICE}"
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


def refuses_small_eigh(eigenvalues: Tensor, eigenvectors: Tensor, matrices: Tensor) -> str | None:
    """Why ``small_eigh`` cannot take these arguments, or None."""
    if matrices.shape[-1] > MAX_N:
        return f"it takes matrices up to n = {MAX_N}, these have n = {matrices.shape[-1]}"
    if matrices.device.type == "cuda" and build_info()["cuda"] is None:
        return "the native extension was built without CUDA, and the matrices lie on a CUDA device"
    if matrices.device.type not in ("cpu", "cuda"):
        return f"it takes tensors on the CPU or a CUDA device, the matrices lie on {matrices.device}"
    return None


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
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"small_eigh: {reason}")
    info: Tensor = torch.ops.bayesian_lora_kernels_native.small_eigh(matrices, eigenvalues, eigenvectors)
    if not check_errors:
        return
    failed = (info < 0).nonzero()
    if len(failed) == 0:
        return
    first = int(failed[0])
    where = f"matrix {first} of {matrices.shape[0]}"
    if int(info[first]) == _NOT_FINITE:
        raise ValueError(f"small_eigh: expected finite matrices, got NaN or infinity in {where}")
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
        f"small_eigh: {where} did not converge; its results are not to be used"
    )
