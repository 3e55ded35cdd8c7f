"""A whole fit and prediction under the kernels, on a GPU (or in the interpreter), against the reference on the CPU."""

from __future__ import annotations

import copy

import models
import pytest
import torch

from bayesian_lora_kernels import LaplaceLoRA, set_default_impl
from bayesian_lora_kernels.ops.dispatch import interpreting

CPU = pytest.param("cpu", marks=pytest.mark.interpret)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[CPU, CUDA])
def device(request):
    if request.param == "cuda" and (interpreting() or not torch.cuda.is_available()):
        pytest.skip("no CUDA device, or TRITON_INTERPRET=1")
    return request.param


def moved(batch, device):
    return {key: value.to(device) for key, value in batch.items()}


def covariance(case, device, impl, curvature):
    """Of one prediction; factors wider than 8 keep 4 columns, so that every operation has its part."""
    arguments = dict(case.arguments, fisher="exact", rank=4, rank_threshold=8, curvature=curvature)
    if "class_token_ids" in arguments:
        arguments["class_token_ids"] = torch.as_tensor(arguments["class_token_ids"]).to(device)
    model = copy.deepcopy(case.model).float().to(device)
    set_default_impl(impl)
    try:
        laplace = LaplaceLoRA(model, **arguments)
        laplace.fit([moved(batch, device) for batch in case.loader(2)], progress=False)
        prediction = laplace.predict(moved(case.batch(), device))
        return prediction.mean.cpu(), prediction.covariance.cpu(), laplace.log_marginal_likelihood().cpu()
    finally:
        set_default_impl(None)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_fit_and_predict_as_the_reference_does(curvature, device):
    case = models.llama(lengths=(9, 6, 8, 7), hidden=32, layers=1)
    mean, truth, evidence = covariance(case, "cpu", "reference", curvature)
    kernels_mean, result, kernels_evidence = covariance(case, device, "triton", curvature)
    torch.testing.assert_close(kernels_mean, mean, rtol=1e-4, atol=1e-4)
    assert (result - truth).norm() <= 2e-3 * truth.norm()
    torch.testing.assert_close(kernels_evidence, evidence, rtol=1e-3, atol=1e-3)
    assert (torch.linalg.eigvalsh(result.double()) > 0).all()
