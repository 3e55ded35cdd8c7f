"""Argument checks shared by the operations: each error says what was expected, what came, and where."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: object) -> str:
    """``float32[3, 4] on cpu`` for a tensor, the type's name for anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return type(value).__name__


def check_tensor(
    where: str, value: object, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """Check that ``value`` is a tensor of that shape (a string leaves a dimension free) and one of the
    dtypes.

    Raises TypeError for what is no tensor or has another dtype, ValueError for another shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected a tensor {_shape(shape)}, got {describe(value)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{where}: expected dtype {names}, got {describe(value)}")
    fits = value.ndim == len(shape) and all(
        isinstance(wanted, str) or wanted == size for wanted, size in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{where}: expected shape {_shape(shape)}, got {describe(value)}")


def are_tensors(values: Iterable[object], *others: type) -> bool:
    """Whether all are tensors, or of one of the other types: quick where all is well."""
    return all(issubclass(kind, (Tensor, *others)) for kind in {type(value) for value in values})


def check_device(where: str, value: Tensor, device: torch.device) -> None:
    """Check that ``value`` lies on ``device``; ValueError otherwise."""
    if value.device != device:
        raise ValueError(f"{where}: expected a tensor on {device}, got {describe(value)}")


def check_mask(where: str, mask: object, like: Tensor, shape: tuple[int | str, ...]) -> None:
    """Check an optional bool mask (True = counts) of that shape on the device of ``like``."""
    if mask is None:
        return
    check_tensor(where, mask, shape, (torch.bool,))
    assert isinstance(mask, Tensor)
    check_device(where, mask, like.device)


def check_gradient(where: str, g: object, a: object, mask: object, first: Tensor) -> None:
    """Check an output gradient ``[N, T, d_out]``, its input ``[N, T, d_in]``, a mask ``[N, T]``, where ``first`` is."""
    check_tensor(f"{where}: g", g, ("N", "T", "d_out"))
    assert isinstance(g, Tensor)
    check_tensor(f"{where}: a", a, (*g.shape[:2], "d_in"))
    assert isinstance(a, Tensor)
    check_device(f"{where}: g", g, first.device)
    check_device(f"{where}: a", a, first.device)
    check_mask(f"{where}: mask", mask, g, tuple(g.shape[:2]))


def check_same_length(where: str, expected: int, value: object) -> None:
    """Check that ``value`` is a list or tuple of ``expected`` entries."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{where}: expected a list of {expected} entries, got {describe(value)}")
    if len(value) != expected:
        raise ValueError(f"{where}: expected {expected} entries, got {len(value)}")


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums and results: float64 if any input is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
