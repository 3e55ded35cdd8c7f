"""All rows of docs/models.md, measured in processes of one thread each."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
import transformers

from .cells import Row, measure
from .recipes import FAMILIES, VARIANTS

PROCESSES = 2
RECIPES = [*FAMILIES, *VARIANTS]


def quiet() -> None:
    """What PEFT and transformers warn of in such small models is not the point here."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def measured(i: int) -> Row:
    return measure(RECIPES[i])


def all_rows(indices: Sequence[int]) -> dict[int, Row]:
    """Measured rows by their index, with a line for each, and the time that is left."""
    start, rows = time.monotonic(), {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context, initializer=quiet) as pool:
        jobs = {pool.submit(measured, i): i for i in indices}
        for done, job in enumerate(as_completed(jobs), 1):
            row = rows[jobs[job]] = job.result()
            spent = time.monotonic() - start
            kinds = Counter(one.kind for one in row.cells.values() if one.kind != "none")
            said = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
            left = spent / done * (len(indices) - done)
            print(f"{done:3}/{len(indices)}  {row.name}: {said}; {left:.0f} s left", flush=True)
            for column, one in row.cells.items():
                if one.bad:
                    print(f"         {column} {one.kind.upper()}: {one.text}", flush=True)
    print(f"{time.monotonic() - start:.0f} s in total")
    return rows
