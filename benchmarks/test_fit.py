"""A fit against a plain forward and backward pass of the same batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bayesian_lora_kernels import LaplaceLoRA

from .peers import FIT_RANK
from .workload import Workload, plain_pass

BATCHES = 8


@pytest.fixture(scope="module")
def passes() -> dict[str, Callable[[], object]]:
    workload = Workload()
    model, loader, ids = workload.model(), workload.batches(BATCHES), workload.class_token_ids

    def fit(**arguments: Any) -> Callable[[], object]:
        laplace = LaplaceLoRA(model, class_token_ids=ids, rank=FIT_RANK, **arguments)
        return lambda: laplace.fit(loader, progress=False)

    return {
        "plain forward and backward": lambda: plain_pass(model, loader, ids),
        "kfac, mc": fit(fisher="mc"),
        "kfac, exact Fisher": fit(fisher="exact"),
        "ekfac, mc": fit(fisher="mc", curvature="ekfac"),
    }


@pytest.mark.benchmark(group="fit")
@pytest.mark.parametrize("name", ["plain forward and backward", "kfac, mc", "kfac, exact Fisher", "ekfac, mc"])
def test_pass(benchmark: Any, passes: dict[str, Callable[[], object]], name: str) -> None:
    benchmark.pedantic(passes[name], rounds=5, warmup_rounds=1)
