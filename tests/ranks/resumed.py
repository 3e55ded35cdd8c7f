"""Fits of a group with checkpoints, of which a process is killed, and fits that go on; run by `ranks.start.run`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
