"""Priors and posteriors are values: equal if their numbers are, never changed, computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense import relative
from models import llama, mlp
from safetensors.torch import load_file

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.posterior.kronecker import KroneckerDecomposition

FILES = Path(__file__).parent / "files"
KINDS = ["kfac", "ekfac", "exact"]


def fitted(case, **settings) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(case.model, **{**case.arguments, **settings}).fit(case.loader(2), progress=False)


# ---- priors ----------------------------------------------------------------------------------------------------------


def test_a_prior_says_whether_it_is_shared():
    assert blk.Prior(0.5).shared == 0.5
    assert blk.Prior(0.5).modules is None
    each = blk.Prior({"a": 1.0, "b": 2.0})
    assert each.shared is None
    assert each.modules == ("a", "b")
    assert [float(each[name]) for name in "ab"] == [1.0, 2.0]
    equal = blk.Prior({"a": 2.0, "b": torch.tensor(2.0)})
    assert equal.shared == 2.0
    assert equal == blk.Prior(2.0)


def test_equality_is_that_of_the_numbers():
    assert blk.Prior(0.5) == blk.Prior(torch.tensor(0.5))
    assert blk.Prior(0.5) != blk.Prior(0.25)
    assert blk.Prior({"a": 1.0, "b": 2.0}) == blk.Prior({"a": 1, "b": torch.tensor(2.0, requires_grad=True)})
    assert blk.Prior({"a": 1.0, "b": 2.0}) != blk.Prior({"a": 2.0, "b": 1.0})
    assert blk.Prior({"a": 1.0, "b": 2.0}) != blk.Prior({"a": 1.0, "c": 2.0})
    assert blk.Prior(0.5) != 0.5
    assert repr(blk.Prior({"a": 1.0, "b": 2.0})) == "Prior({'a': 1.0, 'b': 2.0})"
    with pytest.raises(TypeError, match="unhashable"):
        hash(blk.Prior(1.0))


def test_what_comes_in_can_be_changed_afterwards():
    number = torch.tensor(0.5, dtype=torch.float64)
    several = {"a": number, "b": torch.tensor(2.0, dtype=torch.float64)}
    priors = blk.Prior(number), blk.Prior(several)
    number.fill_(7)
    several["b"].fill_(7)
    del several["a"]
    assert priors == (blk.Prior(0.5), blk.Prior({"a": 0.5, "b": 2.0}))


def test_gradients_go_through_a_prior():
    leaves = {name: torch.tensor(1.0, requires_grad=True) for name in "ab"}
    prior = blk.Prior(leaves)
    assert prior.requires_grad
    assert prior.shared is None  # each wants its own gradient, though they are equal
    (prior["a"] * 3 + prior["b"] * 5).backward()
    assert [float(leaf.grad) for leaf in leaves.values()] == [3.0, 5.0]
    assert not prior.detached().requires_grad
    assert prior.detached() == blk.Prior(1.0)


@pytest.mark.parametrize(
    ("precision", "kind", "text"),
    [
        (0.0, ValueError, "expected a finite positive number, got 0.0"),
        ({"a": 1.0, "b": float("nan")}, ValueError, "expected a finite positive number, got nan"),
        (torch.ones(2), ValueError, r"expected one positive number, got a tensor of shape \[2\]"),
        ("much", TypeError, "expected one positive number, got str 'much'"),
        ({}, ValueError, "expected one number for each module, got an empty mapping"),
    ],
)
def test_what_is_no_prior(precision, kind, text):
    with pytest.raises(kind, match=f"prior_precision: {text}"):
        blk.Prior(precision)


def test_a_prior_over_other_modules_is_refused():
    curvature = fitted(mlp()).posterior.curvature
    with pytest.raises(ValueError, match=r"one number for each of 3 modules; missing or unknown: last, other"):
        blk.Posterior(curvature, blk.Prior({"first": 1.0, "twice": 2.0, "other": 3.0}))


# ---- posteriors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_posterior_computes_once_and_never_changes(kind):
    case = mlp(n=6)
    laplace = fitted(case, curvature=kind, prior_precision=0.5)
    posterior = laplace.posterior
    assert posterior is laplace.posterior
    assert posterior.prepared is posterior.prepared
    assert posterior.logdet is posterior.logdet
    before = float(posterior.logdet)
    laplace.prior_precision = {name: 1.0 + i for i, name in enumerate(posterior.curvature.shapes)}
    assert laplace.posterior is not posterior
    assert laplace.posterior.curvature is posterior.curvature
    assert float(blk.Posterior(posterior.curvature, blk.Prior(0.5)).logdet) == before == float(posterior.logdet)
    with pytest.raises(AttributeError):
        posterior.prior = blk.Prior(1.0)
    refitted = laplace.fit(case.loader(3), progress=False).posterior
    assert refitted.curvature is not posterior.curvature


@pytest.mark.parametrize("kind", KINDS)
def test_the_curvature_knows_no_prior(kind):
    curvatures = [fitted(mlp(n=6), curvature=kind, prior_precision=p).posterior.curvature for p in (0.1, 10.0)]
    for one, other in zip(*(c.pack()[0].values() for c in curvatures), strict=True):
        assert torch.equal(one, other)


def test_the_mapping_is_the_gaussian_of_every_module():
    laplace = fitted(llama(), prior_precision=0.7)
    assert list(laplace.posterior) == [layer.name for layer in laplace.layers]
    assert len(laplace.posterior) == len(laplace.layers)
    total = torch.stack([one.logdet() for one in laplace.posterior.values()]).sum()
    assert torch.equal(total, laplace.posterior.logdet)
    assert not any(type(one) is KroneckerDecomposition for one in laplace.posterior.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_with_gradients_that_changes_in_place(kind, dtype):
    """Set once and changed by an optimizer: predictions follow float64 numbers, which alone can be kept."""
    case = mlp(n=6)
    laplace = fitted(case, curvature=kind)
    leaf = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    for value in (0.5, 2.0):
        with torch.no_grad():
            leaf.fill_(value)
        laplace.prior_precision = leaf
        covariance = laplace.predict(case.batch()).covariance
        assert not covariance.requires_grad
        expected = fitted(case, curvature=kind, prior_precision=value)
        assert torch.equal(covariance, expected.predict(case.batch()).covariance)
        for _ in range(2):  # a graph of its own each time
            (gradient,) = torch.autograd.grad(laplace.log_marginal_likelihood(), leaf)
            assert torch.isfinite(gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_leaves_a_posterior_that_has_gradients(kind):
    case = mlp(n=6)
    laplace = fitted(case, curvature=kind, prior_precision=0.5)
    with torch.inference_mode():
        first = laplace.predict(case.batch()).covariance
        assert float(laplace.posterior.logdet) != 0
    assert torch.equal(laplace.predict(case.batch()).covariance, first)
    if kind != "exact":
        jacobian = torch.randn(2, *laplace.posterior["last"].shape, dtype=torch.float64, requires_grad=True)
        laplace.posterior["last"].covariance(jacobian, jacobian).sum().backward()
        assert jacobian.grad is not None


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_settings_are_given_singly_or_at_once():
    model = mlp().model
    config = blk.LaplaceConfig(curvature="ekfac", rank=7, seed=3)
    one, other = blk.LaplaceLoRA(model, config=config), blk.LaplaceLoRA(model, curvature="ekfac", rank=7, seed=3)
    assert one.config == other.config == config
    assert blk.LaplaceLoRA(model, config=config, rank=None).config.rank is None
    with pytest.raises(TypeError, match="rang: no such setting; there are check, "):
        blk.LaplaceLoRA(model, rang=7)
    with pytest.raises(TypeError, match="config: expected a LaplaceConfig, got dict"):
        blk.LaplaceLoRA(model, config={"rank": 7})


def test_the_json_of_a_configuration_is_read_back():
    config = blk.LaplaceConfig(curvature="exact", row_dtype=torch.bfloat16, rank=None, seed=-5, check="off")
    again = blk.LaplaceConfig.from_json(config.as_json())
    assert again == blk.LaplaceConfig(curvature="exact", row_dtype=torch.bfloat16, rank=None, seed=-5)
    with pytest.raises(ValueError, match=r"settings\.tail: missing"):
        blk.LaplaceConfig.from_json({k: v for k, v in config.as_json().items() if k != "tail"})


# ---- files of the version before -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_format_2_load(kind):
    """Written by the last version without values for prior and curvature (commit 67227e6), on PyTorch 2.13."""
    case, folder = mlp(n=9, tokens=3), FILES / f"format-2-{kind}"
    laplace = blk.LaplaceLoRA.from_pretrained(case.model, folder)
    expected = load_file(folder / "expected.safetensors")
    prediction = laplace.predict(case.batch())
    assert relative(prediction.mean, expected["mean"]) < 1e-12
    assert relative(prediction.covariance, expected["covariance"]) < 1e-12
    assert float(laplace.log_marginal_likelihood()) == pytest.approx(float(expected["evidence"]), rel=1e-12)
    for name, samples in laplace.sample_weights(2, torch.Generator().manual_seed(1)).items():
        assert relative(samples, expected[f"sample of {name}"]) < 1e-9
