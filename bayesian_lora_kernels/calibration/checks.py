"""What every function here asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_BINS = 15

# How far the probabilities of an example may sum from 1: rounding of the dtype that they were computed in.
_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_probs(probs: Tensor, name: str = "probs") -> Tensor:
    """Class probabilities `[N, C]` in float64, on the CPU.

    Raises:
        TypeError: for anything but a floating-point tensor.
        ValueError: for another shape, no example, numbers that are not finite, negative, or do not sum to 1.
    """
    values = check_matrix(probs, name)
    if (values < 0).any():
        raise ValueError(f"{name}: expected probabilities, got {values.min():.3g} in row {_first(values < 0)}")
    off = (values.sum(dim=-1) - 1).abs()
    if (off > _SUM_TOLERANCE[probs.dtype]).any():
        worst = int(off.argmax())
        raise ValueError(f"{name}: expected rows that sum to 1, row {worst} sums to {values[worst].sum():.6g}")
    return values


def check_matrix(values: Tensor, name: str) -> Tensor:
    """Finite numbers `[N, C]` with N, C >= 1 in float64, on the CPU.

    Raises:
        TypeError: for anything but a floating-point tensor.
        ValueError: for another shape, no example, and numbers that are not finite.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor [N, C], got {type(values).__name__}")
    if values.dtype not in _SUM_TOLERANCE:
        raise TypeError(f"{name}: expected a floating-point tensor, got {values.dtype}")
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name}: expected shape [N, C] with at least one example, got {list(values.shape)}")
    result = values.detach().to("cpu", torch.float64)
    finite = torch.isfinite(result)
    if not finite.all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in row {_first(~finite)}")
    return result


def check_labels(labels: Tensor, examples: int, classes: int) -> Tensor:
    """Class indices `[N]` in 0..C-1 as int64, on the CPU.

    Raises:
        TypeError: for anything but an integer tensor.
        ValueError: for another shape or an index out of range.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor [N], got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected an integer tensor, got {labels.dtype}")
    if labels.shape != (examples,):
        raise ValueError(f"labels: expected shape [{examples}], as many as there are rows, got {list(labels.shape)}")
    result = labels.detach().to("cpu", torch.int64)
    wrong = (result < 0) | (result >= classes)
    if wrong.any():
        where = int(wrong.nonzero()[0])
        raise ValueError(f"labels: expected indices in 0..{classes - 1}, got {int(result[where])} in row {where}")
    return result


def check_scores(scores: Tensor, name: str) -> Tensor:
    """Finite numbers `[N]` with N >= 1 in float64, on the CPU.

    Raises:
        TypeError: for anything but a tensor of real numbers.
        ValueError: for another shape, no number, and numbers that are not finite.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"{name}: expected a tensor [N], got {type(scores).__name__}")
    if scores.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {scores.dtype}")
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"{name}: expected shape [N] with at least one score, got {list(scores.shape)}")
    result = scores.detach().to("cpu", torch.float64)
    finite = torch.isfinite(result)
    if not finite.all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity at index {int((~finite).nonzero()[0])}")
    return result


def check_count(value: int, name: str) -> int:
    """A positive int.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a positive int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def seeded(seed: int) -> torch.Generator:
    """A generator of its own on the CPU, so that the global one stays as it is.

    Raises:
        TypeError: for anything but an int.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    return torch.Generator().manual_seed(seed)


def _first(wrong: Tensor) -> int:
    return int(wrong.any(dim=-1).nonzero()[0])
