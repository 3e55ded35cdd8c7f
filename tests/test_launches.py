"""Fit and predict ask for as many operations for a deep model as for a shallow one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from models import Case, llama
from torch.utils._python_dispatch import TorchDispatchMode

import bayesian_lora_kernels as blk


class Calls(TorchDispatchMode):
    """Counts this package's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "bayesian_lora_kernels":
            self.seen[function._opname] += 1
        return function(*args, **(kwargs or {}))


def counted(case: Case, **settings: Any) -> tuple[Counter[str], Counter[str]]:
    """Operations of one batch of `fit` (two batches less one), and of `predict`."""
    fits = []
    for batches in (1, 2):
        laplace = blk.LaplaceLoRA(case.model, fisher="exact", **case.arguments, **settings)
        with Calls() as calls:
            laplace.fit([case.batch()] * batches, progress=False)
        fits.append(calls.seen)
    with Calls() as calls:
        laplace.predict(case.batch())
    return fits[1] - fits[0], calls.seen


@pytest.mark.parametrize("settings", [{}, {"rank": 1, "rank_threshold": 8}], ids=["full", "low-rank"])
def test_operations_do_not_grow_with_the_number_of_modules(settings):
    shallow, deep = (counted(llama([40] * 4, layers=layers, hidden=32), **settings) for layers in (1, 3))
    assert shallow == deep
    fit, predict = deep
    passes = 1 + 2  # the inputs, and the gradients of two Fisher columns
    assert fit["grouped_square_sum"] == passes
    assert fit["grouped_outer_product_accumulate"] == passes
    assert fit["grouped_incremental_svd"] == (passes if settings else 0)
    assert predict == {"grouped_weight_gradient": 3, "grouped_jacobian_covariance": 1}  # of 3 classes
