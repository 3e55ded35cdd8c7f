"""Which of a kernel's configurations to launch: the first, unless ``BLK_AUTOTUNE=1`` asks to time them all.

That is for an implementation that was asked for by name: ``auto`` launches what it has verified.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch

logger = logging.getLogger("bayesian_lora_kernels")
Configuration = TypeVar("Configuration", bound=Hashable)
_chosen: dict[Hashable, Hashable] = {}


class _State(threading.local):
    off = False


_state = _State()


@contextlib.contextmanager
def not_tuned() -> Iterator[None]:
    """Only first candidates are launched inside: those that a verification has seen."""
    before, _state.off = _state.off, True
    try:
        yield
    finally:
        _state.off = before


def autotuning() -> bool:
    """Whether the environment asks for it (read at every call), and there is a GPU to ask."""
    return not _state.off and os.environ.get("BLK_AUTOTUNE", "0") == "1" and torch.cuda.is_available()


def choose_configuration(
    key: Hashable, candidates: Sequence[Configuration], run: Callable[[Configuration], None]
) -> Configuration:
    """The known-good first candidate; with ``BLK_AUTOTUNE=1`` the fastest, timed once per key and process.

    ``run`` launches a candidate on the current device and must leave no trace. Candidates never differ in
    precision, so that tuning changes the speed and the order of sums, nothing else.
    """
    if not autotuning() or len(candidates) == 1:
        return candidates[0]
    if key not in _chosen:
        times = [_time(run, candidate) for candidate in candidates]
        _chosen[key] = candidates[times.index(min(times))]
        logger.info("%s: tuned to %s, %.3f ms (default %.3f ms)", key, _chosen[key], min(times), times[0])
    return _chosen[key]  # type: ignore[return-value]


def _time(run: Callable[[Configuration], None], candidate: Configuration) -> float:
    times = []
    for i in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(candidate)
        end.record()
        end.synchronize()
        if i > 0:  # the first compiles
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]
