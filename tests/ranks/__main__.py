"""All checks on the processes that torchrun started (make test-distributed): `torchrun --nproc-per-node 2 -m ranks`."""

from __future__ import annotations

import functools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import checks, exact

RANDOM = 15
BY_SHARES = (
    checks.check_kfac,
    checks.check_low_rank,
    checks.check_wrapped,
    checks.check_gathered,
    checks.check_calibration,
    checks.check_pairs,
)
OTHERS = (
    checks.check_subgroup,
    checks.check_sampler,
    checks.check_repeats,
    checks.check_merge,
    checks.check_moods,
    checks.check_labels,
    checks.check_samples,
    checks.check_scores,
    checks.check_progress,
)


def everything() -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Every check with its name."""
    for kind in checks.SHARES:
        for check in BY_SHARES:
            yield f"{check.__name__}, {kind}", functools.partial(check, kind=kind)
        for settings in ({"curvature": "ekfac"}, {"tokens": "reduce"}, {"tokens": "last"}):
            what = ", ".join(f"{key}={value}" for key, value in settings.items())
            yield f"{what}, {kind}", functools.partial(checks.check_mlp, kind=kind, **settings)
        for model in ("mlp", "llama"):
            yield f"exact, {model}, {kind}", functools.partial(exact.check_gram, kind=kind, model=model)
            yield f"exact posterior, {model}, {kind}", functools.partial(exact.check_posteriors, kind=kind, model=model)
        yield f"exact samples, {kind}", functools.partial(exact.check_samples, kind=kind)
    for seed in range(RANDOM):
        yield f"random settings {seed}", functools.partial(checks.check_random, seed=seed)
    for check in OTHERS:
        yield check.__name__, check


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group, start, count = dist.group.WORLD, time.perf_counter(), 0
    for name, check in everything():
        torch.manual_seed(0)
        try:
            check(group)
        except Exception:
            print(f"rank {dist.get_rank()}: {name}", file=sys.stderr, flush=True)
            raise
        count += 1
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes: {count} checks, {time.perf_counter() - start:.0f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
