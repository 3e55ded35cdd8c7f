"""The trace of the summed curvature, row by row as `python -m benchmarks.trace_table` prints it."""

from __future__ import annotations

import pytest
import torch

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.compat import bayesian_lora as ours
from bayesian_lora_kernels.compat.laplace_lora import Laplace

table = pytest.importorskip("benchmarks.trace_table", reason="run from the repository's root: python -m pytest")


def fitted_trace(curvature: str, pads: int, size: int, **settings: object) -> float:
    laplace = LaplaceLoRA(table.toy(), lambda m, b: m(b), curvature=curvature, rank=None, **settings)
    laplace.fit(list(table.loader(pads, size)), progress=False)
    spectra = [layer.spectrum() for layer in laplace.posterior.values()]
    return sum(float((values * multiplicity).sum()) for values, multiplicity in spectra)


def published(pads: int) -> float:
    la = Laplace(table.toy(), "classification", scale="published")
    la.fit(list(table.loader(pads, 4)))
    return sum(float(f.trace()) for f in la.engine.factors.values())


def test_our_rows_are_the_exact_trace_or_near_it_whatever_the_padding_and_the_batches():
    truth = table.exact(table.toy())
    kfac = fitted_trace("kfac", 0, 12)
    assert kfac == pytest.approx(truth, rel=0.2)
    for pads, size in ((0, 5), (10, 5), (10, 12)):
        assert fitted_trace("ekfac", pads, size) == pytest.approx(truth, rel=1e-4)
        assert fitted_trace("kfac", pads, size) == pytest.approx(kfac, rel=1e-4)


def test_laplace_lora_s_row_is_t_times_too_large_and_padding_counts():
    kfac = fitted_trace("kfac", 0, 12)
    assert published(0) == pytest.approx(table.TOKENS * kfac, rel=1e-4)
    assert published(10) > 1.5 * published(0)


def sampled_trace(size: int, low_rank: bool) -> float:
    settings = {"n_kfac": 10, "lr_threshold": 16} if low_rank else {}
    model, total = table.toy(), 0.0
    for seed in range(60):
        torch.manual_seed(seed)
        factors = ours.calculate_kronecker_factors(
            model, lambda m, b: m(b), list(table.loader(0, size)), target_module_keywords=["lora"], **settings
        )
        for pair in factors.values():
            traces = [f.trace() if f.shape[0] == f.shape[1] else f.square().sum() for f in pair]
            total += float(traces[0] * traces[1]) / 60
    return total


def test_bayesian_lora_s_rows_see_the_last_position_and_low_rank_goes_with_one_over_the_batch_size():
    last = fitted_trace("kfac", 0, 12, tokens="last")
    assert table.EXAMPLES * sampled_trace(12, low_rank=False) == pytest.approx(last, rel=0.1)
    whole, third = sampled_trace(12, low_rank=True), sampled_trace(4, low_rank=True)
    assert third == pytest.approx(3 * whole, rel=0.1)


@pytest.mark.parametrize("name", table.CHECKOUTS)
def test_laplace_lora_itself_is_our_published_scale(name):
    pytest.importorskip("asdl", reason="asdl, which laplace-lora needs, is not installed")
    from peers import sources

    checkout = sources.find(name)
    for pads in (0, 10):
        theirs = table._in_its_own_process(str(checkout.parent), pads, name)
        assert published(pads) == pytest.approx(theirs, rel=1e-4)
