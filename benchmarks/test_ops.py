"""The operations on the CPU (or GPU), beside plain PyTorch. Run: `pytest benchmarks/test_ops.py`.

Baselines come from PyTorch itself or from `reference.py`; nothing is written a second time.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import pytest
import torch

from bayesian_lora_kernels import ops

from .cases.jacobian import Posterior, subtractive_covariance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FACTOR_WIDTH, ROWS, KEPT = 1536, 1024, 32


def measure(benchmark: Any, call: Any) -> None:
    def synchronised() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    synchronised()
    benchmark.pedantic(synchronised, rounds=7, warmup_rounds=1)


def activations(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, FACTOR_WIDTH + 1).float().rsqrt()
    return (torch.randn(ROWS, FACTOR_WIDTH, generator=generator) * spectrum).to(DEVICE)


def exact_svd(basis: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The published update: float64 SVD of `[B, X^T]`, keeping k columns."""
    u, s, _ = torch.linalg.svd(torch.cat([basis[:, :KEPT], x.T], dim=1).double(), full_matrices=False)
    return u[:, :KEPT] * s[:KEPT]


@pytest.mark.parametrize("provider", ["ours", "addmm"])
@pytest.mark.parametrize(("rows", "width"), [(1024, 128), (1024, 1536), (1024, 4096)])
def test_outer_product(benchmark, rows, width, provider):
    x, out = torch.randn(rows, width, device=DEVICE), torch.zeros(width, width, device=DEVICE)
    calls = {"ours": lambda: ops.outer_product(x, out=out), "addmm": lambda: out.addmm_(x.T, x)}
    measure(benchmark, calls[provider])


@pytest.mark.parametrize("provider", ["grouped", "one by one"])
def test_grouped_outer_product(benchmark, provider):
    xs = [torch.randn(2048, 8, device=DEVICE) for _ in range(64)]
    outs = [torch.zeros(8, 8, device=DEVICE) for _ in xs]
    calls = {
        "grouped": lambda: ops.grouped_outer_product(xs, outs=outs),
        "one by one": lambda: [out.addmm_(x.T, x) for x, out in zip(xs, outs, strict=True)],
    }
    measure(benchmark, calls[provider])


@pytest.mark.parametrize("batch", ["next", "first", "few rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_incremental_svd(benchmark, dtype, batch):
    x = activations().to(dtype)
    basis = ops.incremental_svd(None, activations(1), columns=2 * KEPT + 10)
    calls = {
        "next": lambda: ops.incremental_svd(basis, x),
        "first": lambda: ops.incremental_svd(None, x, columns=2 * KEPT + 10),
        "few rows": lambda: ops.incremental_svd(basis, x[:16]),
    }
    measure(benchmark, calls[batch])


@pytest.mark.slow
def test_incremental_svd_is_thirty_times_faster_than_the_exact_update(benchmark):
    """Side by side, one after the other in turns, so that a busy machine slows both."""
    x = activations()
    basis = ops.incremental_svd(None, activations(1), columns=2 * KEPT + 10)
    seconds: dict[str, list[float]] = {"ours": [], "exact": []}
    calls = {"ours": lambda: ops.incremental_svd(basis, x), "exact": lambda: exact_svd(basis, x)}
    for _ in range(5):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    ratio = median(seconds["exact"]) / median(seconds["ours"])
    benchmark.extra_info["times faster than the exact SVD"] = round(ratio, 1)
    benchmark.pedantic(calls["ours"], rounds=3)
    assert ratio >= 30


@pytest.mark.parametrize("provider", ["ours", "subtractive"])
@pytest.mark.parametrize("outputs", [4, 32])
@pytest.mark.parametrize("side", ["A", "B"])
def test_jacobian_covariance(benchmark, side, outputs, provider):
    """LoRA of rank 8 on a 2048-wide layer, 4 examples of 128 tokens, 32 kept directions on the wide side."""
    d_in, d_out = (2048, 8) if side == "A" else (8, 2048)
    a = torch.randn(4, 128, d_in, device=DEVICE)
    g = torch.randn(4, outputs, 128, d_out, device=DEVICE)
    q_s = torch.linalg.qr(torch.randn(d_out, min(d_out, 32), device=DEVICE)).Q
    q_a = torch.linalg.qr(torch.randn(d_in, min(d_in, 32), device=DEVICE)).Q
    k_s, k_a = q_s.shape[1], q_a.shape[1]
    blocks = tuple(1 + torch.rand(shape, device=DEVICE) for shape in ((k_s, k_a), (k_s,), (k_a,), ()))
    posterior = Posterior(q_s, q_a, blocks)

    calls = {
        "ours": lambda: ops.jacobian_covariance(a, g, posterior),
        "subtractive": lambda: subtractive_covariance(a, g, posterior),
    }
    expected, result = calls["subtractive"](), calls["ours"]()
    assert (result - expected).norm() <= 1e-4 * expected.norm()
    measure(benchmark, calls[provider])


@pytest.mark.parametrize("provider", ["auto", "reference", "native"])
@pytest.mark.parametrize(("count", "n"), [(64, 4), (64, 8), (64, 32), (16, 74)])
def test_small_eigh(benchmark, count, n, provider):
    matrices = torch.randn(count, n, n, dtype=torch.float64, device=DEVICE)
    matrices = matrices @ matrices.mT
    if provider == "native" and not ops.backends()["native"]["available"]:
        pytest.skip(str(ops.backends()["native"]["reason"]))
    measure(benchmark, lambda: ops.small_eigh(matrices, impl=provider))
