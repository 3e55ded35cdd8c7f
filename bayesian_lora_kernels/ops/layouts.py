"""What an operation on lists of tensors works out once for their layouts; only addresses change from call to call."""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

# Combinations of layouts that are remembered: a fit and a prediction have a few, ragged batches more.
REMEMBERED = 64

Result = TypeVar("Result")
_everything: list[dict[Hashable, object]] = []


def per_layout(function: Callable[..., Result]) -> Callable[..., Result]:
    """``function``, whose result or error depends on the layouts of lists of tensors alone, called once for each.

    A layout is dtype, shape, strides, device, and whether the address is a multiple of 16: all of a tensor but its
    numbers and where it lies. Other arguments, and what else is in a list, are hashable. Errors are not remembered.
    """
    results: dict[Hashable, Result] = {}
    _everything.append(results)  # type: ignore[arg-type]

    @functools.wraps(function)
    def remembered(*arguments: Hashable | Sequence[Hashable]) -> Result:
        key = tuple([_layouts(one) if isinstance(one, (list, tuple)) else one for one in arguments])
        try:
            return results[key]
        except KeyError:  # another thread may clear them at any time: nothing is looked up twice
            result = function(*arguments)
        if len(results) >= REMEMBERED:
            results.clear()
        results[key] = result
        return result

    return remembered


def forget() -> None:
    """Work everything out anew: for tests and recordings in which one device stands in for several."""
    for results in _everything:
        results.clear()


def _layouts(values: Sequence[Hashable]) -> Hashable:
    return tuple(
        [
            (x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x
            for x in values
        ]
    )


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
