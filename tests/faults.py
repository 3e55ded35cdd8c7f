"""Fits with checkpoints under kill -9 and on full disks: each must come to the same result bit for bit.

python -m faults [--kills 20] [--seed 0]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interrupted import SETTINGS, Batches, Stop, case, differences, laplace, tensors
from safetensors.torch import load_file, save_file

FORK = multiprocessing.get_context("fork")  # of a process that has imported everything


def fit(setting: str, folder: Path | None, out: Path) -> None:
    one = case()
    every = None if folder is None else 1
    save_file(tensors(laplace(one, setting).fit(one.loader(1), progress=False, checkpoint=folder, every=every)), out)


def fit_on_a_full_disk(setting: str, folder: Path, out: Path) -> None:
    """Fails if no checkpoint failed, or if something half-written is left."""
    one = case()

    class Watched(Batches):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                assert not (folder / "0/rank-0-of-1" / "writing").exists()
                yield batch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = laplace(one, setting).fit(Watched(one.loader(1)), progress=False, checkpoint=folder, every=1)
    assert any("could not be written" in str(warning.message) for warning in caught), "the disk was not full"
    save_file(tensors(found), out)


def bytes_of_the_first(setting: str, folder: Path) -> int:
    """Of all files of a checkpoint after one batch."""
    one = case()
    try:
        laplace(one, setting).fit(Batches(one.loader(1), 1), progress=False, checkpoint=folder, every=1)
    except Stop:
        return sum(path.stat().st_size for path in (folder / "0/rank-0-of-1").iterdir())
    raise AssertionError("not stopped")


def ended(target: Callable[..., None], *args: Any) -> None:
    process = FORK.Process(target=target, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == 0, f"{target.__name__}{args}: exit code {process.exitcode}"


def killed(setting: str, folder: Path, out: Path, seconds: float) -> bool:
    """A fit that is killed after so many seconds; whether it was before its end."""
    process = FORK.Process(target=fit, args=(setting, folder, out))
    process.start()
    assert process.pid is not None
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def moment_in(folder: Path) -> str:
    own = folder / "0/rank-0-of-1"
    if not (own / "checkpoint.json").exists():
        return "without a checkpoint yet"
    return "while one was written" if (own / "writing").exists() else "between two"


def kills(count: int, seed: int = 0) -> tuple[int, Counter[str]]:
    """How many of so many killed fits went on to the same bits, and when they were killed; a third of them twice."""
    moments, same, when = random.Random(seed), 0, Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out.safetensors"
        for i in range(count):
            setting, folder = list(SETTINGS)[i % len(SETTINGS)], Path(temporary) / str(i)
            ended(fit, setting, None, out)
            expected = load_file(out)
            started = time.perf_counter()
            ended(fit, setting, folder / "timed", out)
            duration = time.perf_counter() - started
            for part in ("", " the second time")[: 2 if i % 3 == 2 else 1]:
                while not killed(setting, folder, out, moments.uniform(0.2, 1) * duration):
                    pass  # it came to its end, and its checkpoint is gone
                when[moment_in(folder) + part] += 1
            ended(fit, setting, folder, out)
            same += differences(load_file(out), expected) == []
    return same, when


def full_disks() -> int:
    """How many fits came to the same bits although the disk had room for one checkpoint, and not for the next."""
    same = 0
    with tempfile.TemporaryDirectory() as temporary:
        for setting in SETTINGS:
            folder, out = Path(temporary) / setting, Path(temporary) / "out.safetensors"
            ended(fit, setting, None, out)
            expected, room = load_file(out), bytes_of_the_first(setting, Path(temporary) / "first" / setting)
            folder.mkdir()
            size = f"size={int(1.5 * room) // 1024}k"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True, capture_output=True)
            try:
                ended(fit_on_a_full_disk, setting, folder, out)
            finally:
                subprocess.run(["umount", folder], check=True)
            same += differences(load_file(out), expected) == []
    return same


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    same, when = kills(args.kills, args.seed)
    print(f"{args.kills} fits killed: {', '.join(f'{n} {moment}' for moment, n in when.most_common())}")
    print(f"{same} of {args.kills} went on to the same result, bit for bit")
    good = same == args.kills
    try:
        same = full_disks()
        print(f"full disk (a tmpfs): {same} of {len(SETTINGS)} with the same result, bit for bit")
        good &= same == len(SETTINGS)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"full disk (a tmpfs): none can be mounted here ({error})")
    sys.exit(not good)


if __name__ == "__main__":
    main()
