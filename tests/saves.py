"""Two processes that save into one folder at once, while a third reads: `make test-saves`."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from models import mlp

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.posterior import storage

PRECISIONS = (2.0, 7.0)
FISHER = {2.0: "exact", 7.0: "empirical"}


def fitted(precision: float) -> blk.LaplaceLoRA:
    case = mlp()
    laplace = blk.LaplaceLoRA(case.model, prior_precision=precision, fisher=FISHER[precision])
    return laplace.fit(case.loader(2), progress=False)


def save_often(precision: float, folder: Path, count: int, barrier: Barrier, locks: bool) -> None:
    if not locks:
        storage.fcntl = None
    laplace = fitted(precision)
    for _ in range(count):
        barrier.wait(60)
        laplace.save_pretrained(folder)
        barrier.wait(60)


def race(folder: Path, count: int, locks: bool = True) -> list[str]:
    """What was wrong of `count` times that two posteriors were saved at once."""
    case = mlp()
    known = {precision: fitted(precision).predict(case.batch()).covariance for precision in PRECISIONS}

    def wrong() -> str | None:
        try:
            laplace = blk.LaplaceLoRA.from_pretrained(case.model, folder)
        except (OSError, ValueError) as error:
            return str(error)
        precision = float(laplace.prior_precision)
        if not torch.equal(laplace.predict(case.batch()).covariance, known[precision]):
            return f"the prior of one posterior ({precision}), the curvature of the other"
        return None

    fitted(PRECISIONS[0]).save_pretrained(folder)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    writers = [
        context.Process(target=save_often, args=(precision, folder, count, barrier, locks)) for precision in PRECISIONS
    ]
    for writer in writers:
        writer.start()
    found = []
    for number in range(count):
        barrier.wait(60)
        during = wrong()  # while both write
        barrier.wait(60)
        names = sorted(path.name for path in folder.iterdir())
        left = [name for name in names if name.startswith(".")]
        if locks and len(names) != 2:
            left = names
        for when, what in (("while they save", during), ("afterwards", wrong()), ("left", left)):
            if what:
                found.append(f"{number}, {when}: {what}")
    for writer in writers:
        writer.join(60)
    return found


def main(count: int) -> int:
    failed = 0
    for locks in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            found = race(Path(folder), count, locks)
        kind = "one after the other" if locks else "without locks"
        print(f"{count - len(found)} of {count} times two posteriors saved at once, {kind}, left a whole one")
        print(*found[:5], sep="\n", end="\n" if found else "")
        failed += len(found)
    return int(failed > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
