"""What an operation on lists of tensors works out once for their layouts; only addresses change from call to call."""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Combinations of layouts that are remembered: a fit and a prediction have a few, ragged batches more.
REMEMBERED = 256


class Layout(NamedTuple):
    """What decides how a tensor is computed with: all but its numbers and its address."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    aligned: bool  # begins at a multiple of 16 bytes

    @property
    def in_vectors(self) -> bool:
        """Whether the rows of a matrix are pieces of 16 aligned bytes, which a kernel then loads at once."""
        vector = 16 // self.dtype.itemsize
        strides = self.stride[1] == 1 and self.stride[0] % vector == 0
        return strides and self.shape[1] % vector == 0 and self.aligned


def layouts(tensors: Sequence[Tensor | None]) -> tuple[Layout | None, ...]:
    """The layout of each: what functions under ``functools.lru_cache(REMEMBERED)`` take instead of tensors."""
    return tuple(
        [None if x is None else Layout(x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % 16 == 0) for x in tensors]
    )


def once_per_layout(validate: Callable[..., None]) -> Callable[..., None]:
    """``validate``, which takes lists of tensors (or None for a list), run once for each combination of layouts."""
    valid: set[object] = set()

    @functools.wraps(validate)
    def check(*lists: Sequence[Tensor | None] | None) -> None:
        key = tuple([None if one is None else layouts(one) for one in lists])
        if key not in valid:
            validate(*lists)
            if len(valid) >= REMEMBERED:
                valid.clear()
            valid.add(key)

    return check


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """The address of each, 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def device_table(columns: Sequence[Sequence[int]], fixed: Tensor, order: Tensor, device: torch.device) -> Tensor:
    """Addresses and shapes of many modules on the device; copied from pinned memory, so that the host does not wait.

    Args:
        columns: what this call has for each module, in the order of the call: addresses.
        fixed: ``[modules, F]`` int64 on the CPU, what all calls with these layouts have, in the order of the table.
        order: ``[modules]`` int64 on the CPU: which module of the call is in which row.
        device: of the result.

    Returns:
        ``[modules, len(columns) + F]`` int64.
    """
    given = torch.frombuffer(array("q", itertools.chain.from_iterable(columns)), dtype=torch.int64)
    # Where the table is made is said: a default device of the process must not decide it.
    shape = len(order), len(columns) + fixed.shape[1]
    table = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    table[:, : len(columns)] = given.view(len(columns), -1)[:, order].T
    table[:, len(columns) :] = fixed
    return table.to(device, non_blocking=True)
