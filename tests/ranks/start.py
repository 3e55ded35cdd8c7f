"""Processes of a gloo group, started from a test."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, by a server that the processes are forked from.
PRELOADED = ["torch", "peft", "transformers.models.llama.modeling_llama", "bayesian_lora_kernels"]


def run(work: Callable[..., Any], size: int, folder: Path, *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """What `work(group, *arguments)` returns in each of `size` processes, an error it raises, or None if it is killed.

    `work` is a function of an importable module; `timeout` is the group's, in seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    for name in ("port", *map(str, range(size))):
        (folder / name).unlink(missing_ok=True)
    processes = [
        context.Process(target=_work, args=(work, rank, size, folder, timeout, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout + 60)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"{process.name} hangs")
    files = [folder / str(rank) for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _work(work: Any, rank: int, size: int, folder: Path, timeout: float, arguments: Any) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=timeout)
    store = _store(rank, folder, wait)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    try:
        result = work(dist.group.WORLD, *arguments)
    except Exception as error:
        result = error
    torch.save(result, folder / str(rank))
    dist.destroy_process_group()


def _store(rank: int, folder: Path, timeout: timedelta) -> dist.TCPStore:
    """That of the first process, at a port that the system chose."""
    file = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout)
        (folder / "new").write_text(str(store.port))
        (folder / "new").rename(file)
        return store
    while not file.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(file.read_text()), timeout=timeout)
