"""Every kernel case and provider under pytest-benchmark: `pytest benchmarks/test_kernels.py --benchmark-only`.

On a GPU at the shapes of docs/performance.md, on a CPU at moderate ones, from the same cases.
"""

from __future__ import annotations

import pytest
import torch

from .cases import Case, all_cases, interpretable
from .gpu_report.timing import synchronise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sized(case: Case) -> Case:
    return case if DEVICE.type == "cuda" else interpretable(case.moderate())


PAIRS = [
    pytest.param(case, provider.name, id=f"{case.name}-{provider.name}")
    for case in map(sized, all_cases())
    for provider in case.providers(DEVICE)
]


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_kernel(benchmark, case, name):
    provider = next(provider for provider in case.providers(DEVICE) if provider.name == name)
    if provider.absent:
        pytest.skip(provider.absent)
    inputs = case.inputs(DEVICE, seed=0)
    if provider.gated:
        error = case.error(case.truth(inputs), provider.comparable(provider.call(inputs)))
        assert error <= (case.tolerance if provider.tolerance is None else provider.tolerance)
        benchmark.extra_info["error"] = error
    work = case.work()
    benchmark.extra_info |= {"bytes": work.bytes, "flops": work.flops, "share": provider.share}

    def call():
        provider.call(inputs)
        synchronise(DEVICE)

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
