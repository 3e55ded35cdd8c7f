"""Which of a kernel's configurations to launch: the first, unless ``BLK_AUTOTUNE=1`` asks to time them all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

logger = logging.getLogger("bayesian_lora_kernels")
Configuration = TypeVar("Configuration", bound=Hashable)
_chosen: dict[Hashable, Hashable] = {}


def autotuning() -> bool:
    """Whether the environment asks for it (read at every call), and there is a GPU to ask."""
    return os.environ.get("BLK_AUTOTUNE", "0") == "1" and torch.cuda.is_available()


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
