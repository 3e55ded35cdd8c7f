"""Many damaged files, one after the other, in a process that may die."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import torch

from fuzz.targets import Target, targets

ADAPTERS = 0.05  # their share: each loads a model
SECONDS = 20  # that one may take
GROWTH = 64 * 2**20  # bytes that one may ask for beyond what the process has; the files have less than a hundredth


def run(scratch: Path, count: int, seed: int = 0, only: int | None = None) -> int:
    """Try damaged files, say how many, and what was found; 1 if anything was."""
    torch.manual_seed(0)
    start, made = time.perf_counter(), targets(scratch)
    if only is not None:
        print(one(made, seed, only))
        return 0
    ends: Counter[str] = Counter()
    findings: list[str] = []
    first = 0
    while first < count:
        for index, end in _in_process(made, seed, first, count):
            first = index + 1
            ends["found" if end not in ("refused", "read") else end] += 1
            if end not in ("refused", "read"):
                findings.append(f"case {index}: {end}")
                print(findings[-1], file=sys.stderr, flush=True)
        if sys.stderr.isatty() or first % 10_000 == 0:
            print(f"{first} of {count}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    print(
        f"{first} damaged files in {seconds:.0f} s ({1000 * seconds / max(first, 1):.1f} ms each): {ends['refused']} "
        f"refused, {ends['read']} read as they were or as a whole posterior, {len(findings)} findings"
    )
    return int(bool(findings))


def one(made: list[Target], seed: int, index: int) -> str:
    """The end of one case; every case is made from the seed and its number alone."""
    random = Random(f"{seed} {index}")
    target = made[-1] if random.random() < ADAPTERS else random.choice(made[:-1])
    target.damage(random)
    return target.read()


def _in_process(made: list[Target], seed: int, first: int, count: int) -> Iterator[tuple[int, str]]:
    """Up to a thousand cases in a process of their own: its number, and how it ended."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    stop = min(count, first + 1000)
    process = context.Process(target=_cases, args=(sender, made, seed, range(first, stop)))
    process.start()
    sender.close()
    index = first
    while index < stop:
        try:
            if not receiver.poll(2 * SECONDS):
                process.kill()
                yield index, f"no end in {2 * SECONDS} s"
                break
            yield index, receiver.recv()
        except EOFError:
            process.join()
            yield index, f"the process ended with {process.exitcode}"
            break
        index += 1
    receiver.close()
    process.join()


def _cases(sender: Connection, made: list[Target], seed: int, indices: range) -> None:
    _quiet()
    signal.signal(signal.SIGALRM, _too_long)
    with suppress(BaseException):
        one(made, seed, indices.start)  # so that what is allocated once is there
    gc.collect()
    for index in indices:
        signal.alarm(SECONDS)
        try:
            with limited(GROWTH):
                end = one(made, seed, index)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            end = f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno})"
        signal.alarm(0)
        sender.send(end)
    sender.close()


@contextmanager
def limited(growth: int) -> Iterator[None]:
    """The process gets no more memory than it has and this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = 1024 * int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (used + growth, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"no end in {SECONDS} s")


def _quiet() -> None:
    """What other packages write is not of interest."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.filterwarnings("ignore")
