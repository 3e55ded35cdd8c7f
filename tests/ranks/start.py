"""Processes of a gloo group, started from a test."""

from __future__ import annotations

import multiprocessing
import socket
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_work, args=(work, rank, size, port, str(folder), timeout, arguments))
        for rank in range(size)
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


def _work(work: Any, rank: int, size: int, port: int, folder: str, timeout: float, arguments: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    try:
        result = work(dist.group.WORLD, *arguments)
    except Exception as error:
        result = error
    torch.save(result, Path(folder) / str(rank))
    dist.destroy_process_group()
