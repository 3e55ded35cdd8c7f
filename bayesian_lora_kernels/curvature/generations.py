"""Whose folder is whose: the processes of a fit, and those of an earlier fit by another number of them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from bayesian_lora_kernels.curvature.checkpoint import FIT, Checkpoint
from bayesian_lora_kernels.curvature.checkpoint_folder import JSON_NAME, CheckpointFolder, held, locked
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.processes import ALONE, Processes


@contextmanager
def checkpoint_in(
    folder: str | os.PathLike[str] | None,
    every: int | None,
    identity: Callable[[], Mapping[str, Any]],
    processes: Processes = ALONE,
    read: Callable[[Any], Batch] = Batch.of,
) -> Iterator[Checkpoint | None]:
    """The checkpoint of a fit, in a folder that no other fit can write to meanwhile; None without a folder.

    Each process of a group has a folder of its own in it, `0/rank-0-of-2` and so on. Another number of processes begins
    the next generation, `1/rank-0-of-3`, which counts once all of them have written.

    Raises:
        ValueError: for a checkpoint that is damaged, or of another fit.
        OSError: if another fit writes to the folder, or nothing can be written there.
    """
    if folder is None:
        yield None
        return
    base, rank, size = Path(folder), processes.rank, processes.size
    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(locked(base))
        generation, before = processes.values(_generation(base, size) if rank == 0 else None)[0]
        own = stack.enter_context(held(_place(base, generation, rank, size)))
        shards = []
        for shard in range(before or 0):
            path = _place(base, generation - 1, shard, before)
            shards.append(stack.enter_context(held(path)) if shard % size == rank else CheckpointFolder(path))
            if FIT not in shards[-1].parts:
                raise ValueError(
                    f"{path}: expected the checkpoint of one of {before} processes, got none; is it shared?"
                )
        if shards:
            own.clear()  # of an earlier attempt
        described = identity()
        if described["adapter"] is None or described["base_model"] is None:
            raise ValueError(
                "checkpoint: the weights are not at hand (sharded, on the meta device, or with an adapter merged into "
                "them), so that nothing would tell whether a checkpoint is of the same; fit without checkpoint"
            )
        yield Checkpoint(own, every, described, processes, shards, read)
    for path in base.glob("[0-9]*"):
        with suppress(OSError):  # something is in it
            path.rmdir()


def _place(base: Path, generation: int, rank: int, size: int) -> Path:
    return base / str(generation) / f"rank-{rank}-of-{size}"


def _generation(base: Path, size: int) -> tuple[int, int | None]:
    """Which generation a fit of so many processes is, and how many the one before had, if it has to take that over."""
    places: dict[tuple[int, int], list[Path]] = {}
    for path in base.glob("*/rank-*-of-*"):
        if match := re.fullmatch(r"(\d+)/rank-\d+-of-(\d+)", path.relative_to(base).as_posix()):
            places.setdefault((int(match[1]), int(match[2])), []).append(path)
    whole = [key for key, paths in places.items() if sum((path / JSON_NAME).exists() for path in paths) == key[1]]
    if not whole:  # nothing, or folders on disks that others do not see
        return max((key[0] for key in places if key[1] == size), default=0), None
    generation, before = max(whole)
    for path in (path for key in places if key != (generation, before) for path in places[key]):
        shutil.rmtree(path, ignore_errors=True)  # of a fit that was killed as it took over
    return (generation, None) if before == size else (generation + 1, before)
