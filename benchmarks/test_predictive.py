"""Prediction of 4 logits given the same factors, beside bayesian_lora's where that is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from bayesian_lora_kernels import LaplaceLoRA

from .peak_memory import PACKAGES, measurable, peak_in_fresh_process
from .workload import Factors, Workload, published_factors, published_prediction, relative_error


@dataclass(frozen=True)
class Prepared:
    workload: Workload
    model: peft.PeftModel
    laplace: LaplaceLoRA
    batch: dict[str, Tensor]


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    workload = Workload()
    model = workload.model()
    return Prepared(workload, model, workload.published_posterior(model), workload.batches(1, seed=2)[0])


@pytest.fixture(scope="module")
def published(prepared: Prepared) -> Factors:
    pytest.importorskip("bayesian_lora", reason="the peer, bayesian_lora 0.0.6, is not installed")
    return published_factors(prepared.laplace, prepared.workload)


@pytest.mark.benchmark(group="predict")
def test_bayesian_lora_kernels(benchmark: Any, prepared: Prepared) -> None:
    prediction = benchmark(prepared.laplace.predict, prepared.batch)
    assert prediction.covariance.shape == (8, 4, 4)


@pytest.mark.benchmark(group="predict")
def test_bayesian_lora(benchmark: Any, prepared: Prepared, published: Factors) -> None:
    arguments = (prepared.model, prepared.batch, published, prepared.workload)
    mean, covariance = benchmark.pedantic(published_prediction, arguments, rounds=3, warmup_rounds=1)
    ours = prepared.laplace.predict(prepared.batch)
    assert relative_error(ours.mean, mean) <= 1e-4
    assert relative_error(ours.covariance, covariance) <= 1e-4


@pytest.mark.skipif(not measurable(), reason="needs Linux: a high-water mark of the resident set that can be reset")
def test_peak_memory(prepared: Prepared, published: Factors, tmp_path: Path) -> None:
    prepared.laplace.save_pretrained(tmp_path)
    torch.save(published, tmp_path / "published.pt")
    ours, theirs = (peak_in_fresh_process(package, prepared.workload, tmp_path) for package in PACKAGES)
    assert ours <= theirs / 4
