"""Fits of a group with checkpoints, of which a process is killed, and fits that go on; run by `ranks.start.run`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from interrupted import Batches, case, laplace, tensors
from torch import Tensor

from .checks import own_loader


class Killed(Batches):
    """A loader in which the process kills itself before one of its batches."""

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.given == self.stop:
                os.kill(os.getpid(), signal.SIGKILL)
            self.given += 1
            yield batch


def fails_at_the_end(group: Any, folder: Path) -> str:
    """All data are counted, and rank 1 fails before it has its result."""
    one = case()
    loader = own_loader(one, group, "turns")
    weights = mock.Mock(of=mock.Mock(side_effect=RuntimeError("planted")))
    fails = mock.patch("bayesian_lora_kernels.laplace.MeasuredWeights", weights)
    found = laplace(one, "kfac, low-rank")
    try:
        with fails if dist.get_rank(group) == 1 else nullcontext():
            found.fit(loader, progress=False, group=group, checkpoint=folder)
    except RuntimeError as error:
        return str(error)
    return "no error"


def fit(group: Any, setting: str, kind: str, folder: Path | None, stops: dict[int, int]) -> dict[str, Tensor] | str:
    """All that a fit found, or its error; process `rank` is killed before its batch number `stops[rank]`."""
    one = case()
    loader = Killed(own_loader(one, group, kind), stops.get(dist.get_rank(group)))
    found = laplace(one, setting)
    try:
        found.fit(loader, progress=False, group=group, checkpoint=folder, every=None if folder is None else 1)
    except RuntimeError as error:
        return str(error)
    return tensors(found)
