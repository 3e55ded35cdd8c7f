"""Containers that batches come in, taken apart and put together again, and numbers as tensors."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def is_record(value: Any) -> bool:
    """Whether it is an instance of a dataclass."""
    return is_dataclass(value) and not isinstance(value, type)


def items_of(value: Any) -> dict[Any, Any]:
    """The parts by their names, or by their places."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if is_record(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))


def rebuilt(like: Any, items: dict[Any, Any]) -> Any:
    """Something of the same type with other parts; a plain dict, list or tuple where the type does not allow it."""
    if isinstance(like, Mapping):
        return _rebuilt_mapping(like, items)
    if is_record(like):
        twin = copy.copy(like)
        for key, value in items.items():
            object.__setattr__(twin, key, value)  # it may be frozen
        return twin
    if hasattr(like, "_fields"):
        return type(like)._make(items.values())
    try:
        return type(like)(items.values())
    except TypeError:
        return list(items.values()) if isinstance(like, list) else tuple(items.values())


def _rebuilt_mapping(like: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    twin: Any
    if type(like) is dict:
        return items
    try:
        if isinstance(like, UserDict):  # BatchEncoding, BatchFeature
            twin = copy.copy(like)
            twin.data = items
        elif is_dataclass(like):  # ModelOutput
            twin = type(like)(**items)
        elif isinstance(like, dict):
            twin = copy.copy(like)
            twin.clear()
            twin.update(items)
        else:
            twin = type(like)(items)  # type: ignore[call-arg]
        same = isinstance(twin, type(like)) and list(twin.keys()) == list(items)
    except Exception:  # whatever a foreign type may raise: it is not needed
        return items
    return twin if same else items


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of every tensor, however deep; what holds none is handed on."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (Mapping, tuple, list)) or is_record(value):
        old = items_of(value)
        new = {key: map_tensors(part, function) for key, part in old.items()}
        return value if all(new[key] is old[key] for key in old) else rebuilt(value, new)
    return value


def as_tensor(value: Any) -> Tensor | None:
    """Numbers as a tensor: integers int64, bool, floats as NumPy has them; None if they do not make one."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value)
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if array.dtype.kind == "O":
            return as_tensor(array.tolist())
        dtypes: dict[str, np.dtype[Any]] = {"b": np.dtype(bool), "i": np.dtype(np.int64), "u": np.dtype(np.int64)}
        dtypes["f"] = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.dtype(np.float64)
        dtype = dtypes.get(array.dtype.kind)
        return None if dtype is None else torch.from_numpy(np.array(array, dtype, order="C"))
    if not isinstance(value, (list, tuple)):
        return None
    if all(isinstance(one, (bool, int, float, np.bool_, np.integer, np.floating)) for one in value):
        try:
            return torch.tensor(list(value), dtype=None if value else torch.long)
        except (OverflowError, RuntimeError, ValueError):  # beyond 64 bits
            return None
    rows: list[Tensor] = []
    for one in value:
        row = as_tensor(one)
        if row is None or (rows and row.shape != rows[0].shape):
            return None
        rows.append(row)
    return torch.stack(rows)


def is_numbers(value: Any) -> bool:
    """Whether there is nothing but numbers in it, of whatever shape."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf" or (value.dtype.kind == "O" and is_numbers(value.tolist()))
    if isinstance(value, (list, tuple)):
        return all(is_numbers(one) for one in value)
    return isinstance(value, (Tensor, bool, int, float, np.number, np.bool_))
