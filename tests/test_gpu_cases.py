"""The gates of the benchmark cases: what is right passes, and a fault in one stream, module or masked row does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import Case, all_cases
from benchmarks.cases.incremental_svd import IncrementalSvd

CPU = torch.device("cpu")
DRY = {case.name: replace(case.dry(), dtype=torch.float32) for case in all_cases()}


def of_reference(case: Case, inputs):
    (provider,) = (one for one in case.providers(CPU) if one.name == "reference")
    return provider.comparable(provider.call(inputs))


@pytest.mark.parametrize("name", [name for name in DRY if "masked" in name or "wide output" in name])
def test_masked_rows_hold_nan_and_every_provider_passes(name):
    case = DRY[name]
    for provider in case.providers(CPU):
        if provider.absent or provider.name == "einsum bf16":
            continue
        inputs = case.inputs(CPU, seed=0)
        truth = case.truth(inputs)
        error = case.error(truth, provider.comparable(provider.call(inputs)))
        assert error <= case.tolerance, provider.name
    if "masked" in name:
        tensors = inputs[0] if isinstance(inputs[0], list) else [inputs[0]]
        if not isinstance(case, IncrementalSvd):
            assert all(x.isnan().any() for x in tensors)


@pytest.mark.parametrize("masked", [False, True])
def test_the_error_of_a_stream_is_that_of_its_dense_matrix(masked):
    case = IncrementalSvd(torch.float32, modules=3, tokens=60, width=90, columns=30, masked=masked)
    bases, xs, mask = case.inputs(CPU, seed=1)
    if masked:
        assert mask is not None
        assert all(x[~mask].isnan().all() for x in xs)
    truth = case.truth((bases, xs, mask))
    result = of_reference(case, (bases, xs, mask))
    ratios = []
    for basis, x, made, (*_, squared, best) in zip(bases, xs, result, truth, strict=True):
        counted = (x if mask is None else x[mask]).double()
        dense = basis.double() @ basis.double().T + counted.T @ counted
        values = torch.linalg.eigvalsh(dense)
        assert squared == pytest.approx(float(dense.square().sum()))
        assert best == pytest.approx(float(values[: -case.kept].square().sum()), rel=1e-6)
        kept = made[:, : case.kept].double()
        ratios.append(float((dense - kept @ kept.T).norm() / values[: -case.kept].norm()))
    assert case.error(truth, result) == pytest.approx(max(ratios) - 1, abs=1e-6)


@pytest.mark.parametrize("stream", [0, 2, 4])
def test_any_stream_that_is_wrong_is_seen(stream):
    case = IncrementalSvd(torch.float32, modules=5, tokens=60, width=90, columns=30)
    inputs = case.inputs(CPU, seed=2)
    truth, result = case.truth(inputs), of_reference(case, inputs)
    assert case.error(truth, result) <= case.tolerance
    result[stream] = result[stream - 1]  # that of its neighbour
    assert case.error(truth, result) > case.tolerance
    result[stream] = torch.full_like(result[stream], float("nan"))
    assert case.error(truth, result) == float("inf")
