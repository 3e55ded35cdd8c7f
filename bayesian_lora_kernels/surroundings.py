"""The caller's surroundings: what of them reaches the model, and what must not reach this package's own algebra.

Under the caller's autocast a model runs in half precision, as it was asked to; factors, eigenvalues and covariances do
not. Every public entry is `without_autocast`, and the model's own forward pass alone runs in `callers_autocast`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps", "hpu")

P = ParamSpec("P")
R = TypeVar("R")


class _Outside(threading.local):
    autocast: tuple[tuple[str, torch.dtype], ...] = ()  # what the caller had on when it entered this package


_outside = _Outside()


def _active() -> tuple[tuple[str, torch.dtype], ...]:
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in DEVICE_TYPES if torch.is_autocast_enabled(kind))


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run with the caller's autocast switched off."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        active = _active() if torch._C._is_any_autocast_enabled() else ()
        if not active:
            return function(*args, **kwargs)
        before, _outside.autocast = _outside.autocast, active
        try:
            with ExitStack() as stack:
                for kind, _ in active:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                return function(*args, **kwargs)
        finally:
            _outside.autocast = before

    return run


@contextmanager
def callers_autocast() -> Iterator[None]:
    """The autocast that `without_autocast` switched off, for the model's own forward pass.

    Without its cache of cast weights: what the caller cast without gradients would cut the weights off.
    """
    with ExitStack() as stack:
        for kind, dtype in _outside.autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        yield
