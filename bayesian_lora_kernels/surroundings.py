"""The caller's surroundings: what of them reaches the model, and what must not reach this package's own algebra.

Under the caller's autocast a model runs in half precision, and under a default device it makes its tensors there, as it
was asked to; factors, eigenvalues and covariances do neither. Every public entry is `in_own_surroundings`, and the
model's own forward pass alone runs in `callers_surroundings`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps", "hpu")
CPU = torch.device("cpu")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class _Surroundings:
    """What a caller had on: autocast by device type, and the default device if it is not the CPU."""

    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    device: torch.device | None = None


class _Outside(threading.local):
    known = _Surroundings()  # when the caller entered this package


_outside = _Outside()


def _default_device() -> torch.device:
    # torch.get_default_device of PyTorch 2.6 knows nothing of `with torch.device(...)`, and raises after
    # torch.set_default_device(None).
    return torch.empty(0).device


def in_own_surroundings(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run without the caller's autocast and default device."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        cast, device = torch._C._is_any_autocast_enabled(), _default_device()
        if not cast and device == CPU:
            return function(*args, **kwargs)
        kinds = [kind for kind in DEVICE_TYPES if torch.is_autocast_enabled(kind)]
        active = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
        before = _outside.known
        _outside.known = _Surroundings(active or before.autocast, before.device if device == CPU else device)
        try:
            with ExitStack() as stack:
                for kind, _ in active:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                if device != CPU:
                    stack.enter_context(CPU)
                return function(*args, **kwargs)
        finally:
            _outside.known = before

    return run


@contextmanager
def callers_surroundings() -> Iterator[None]:
    """What `in_own_surroundings` switched off, for the model's own forward pass.

    Autocast goes without its cache of cast weights: what the caller cast without gradients would cut the weights off.
    """
    with ExitStack() as stack:
        for kind, dtype in _outside.known.autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        if _outside.known.device is not None:
            stack.enter_context(_outside.known.device)
        yield
