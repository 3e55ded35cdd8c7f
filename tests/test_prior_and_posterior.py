"""Priors and posteriors are values: equal if their numbers are, never changed, computed once."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import weakref
from pathlib import Path

import pytest
import torch
from dense import relative
from models import llama, mlp
from safetensors.torch import load_file

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.curvature import KroneckerCurvature
from bayesian_lora_kernels.posterior.kronecker import KroneckerDecomposition, KroneckerPosterior

FILES = Path(__file__).parent / "files"
KINDS = ["kfac", "ekfac", "exact"]


def fitted(case, **settings) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(case.model, **{**case.arguments, **settings}).fit(case.loader(2), progress=False)


# ---- priors ----------------------------------------------------------------------------------------------------------


def test_a_prior_says_whether_it_is_shared():
    assert blk.Prior(0.5).shared == 0.5
    assert blk.Prior(0.5).modules is None
    assert blk.Prior({"a": 1.0, "b": 1.0}).modules == ("a", "b")
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


@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_the_evidence_forwards_too(kind, per_module):
    laplace = fitted(mlp(n=6), curvature=kind)
    names = [layer.name for layer in laplace.layers]

    def evidence(*values):
        return laplace.log_marginal_likelihood(dict(zip(names, values, strict=True)) if per_module else values[0])

    point = tuple(torch.full((), 0.7, dtype=torch.float64, requires_grad=True) for _ in names[: 3 if per_module else 1])
    assert torch.autograd.gradcheck(evidence, point, check_forward_ad=True)
    backward = torch.autograd.grad(evidence(*point), point)
    forward = torch.func.jacfwd(evidence, argnums=tuple(range(len(point))))(*(p.detach() for p in point))
    for one, other in zip(forward, backward, strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-9)


def test_one_tensor_for_all_modules_is_shared():
    leaf = torch.tensor(0.5, requires_grad=True)
    assert blk.Prior({"a": leaf, "b": leaf}).shared is not None
    laplace = fitted(mlp(n=6), curvature="exact")
    laplace.prior_precision = {layer.name: leaf for layer in laplace.layers}
    assert isinstance(laplace.prior_precision, torch.Tensor)
    (gradient,) = torch.autograd.grad(laplace.log_marginal_likelihood(), leaf)
    assert torch.isfinite(gradient)
    assert "layer_grams" not in vars(laplace.posterior.curvature)  # the eigenvalues of the whole are enough


def test_what_is_given_out_is_not_the_value_itself():
    laplace = fitted(mlp(n=6))
    names = [layer.name for layer in laplace.layers]
    for prior in (blk.Prior(2.0), blk.Prior({n: 1.0 + i for i, n in enumerate(names)})):
        laplace.prior_precision = prior
        given = laplace.prior_precision
        for number in given.values() if isinstance(given, dict) else [given]:
            number *= 3
        assert prior == blk.Prior(prior.precision)
        assert laplace.prior != prior
    leaf = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    prior, posterior = blk.Prior(leaf), blk.Posterior(laplace.posterior.curvature, blk.Prior(leaf))
    with torch.no_grad():
        leaf *= 4
    assert prior == blk.Prior(0.5)
    assert float(posterior.logdet.detach()) == float(blk.Posterior(posterior.curvature, blk.Prior(0.5)).logdet)


def test_precisions_of_modules_stand_for_themselves():
    laplace = fitted(mlp(n=6))
    laplace.prior_precision = {layer.name: 1.0 + i for i, layer in enumerate(laplace.layers)}
    numbers = [value.requires_grad_() for value in laplace.prior_precision.values()]
    value = laplace.log_marginal_likelihood()
    with torch.no_grad():
        numbers[0] *= 2
    assert torch.isfinite(torch.autograd.grad(value, numbers[1])[0])


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


def test_a_fit_elsewhere_meanwhile_leaves_no_stale_posterior():
    case = mlp(n=6)
    laplace = fitted(case, prior_precision=0.5)
    stale = laplace.posterior
    laplace.fit(case.loader(3)[:1], progress=False)
    laplace._posterior = stale  # what a thread that had begun before writes
    assert laplace.posterior.curvature is not stale.curvature


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_predictions_prepares_once(kind, monkeypatch):
    case = mlp(n=6)
    laplace = fitted(case, curvature=kind)
    prepared = []
    kind_of = type(laplace.posterior.curvature)
    prepare = kind_of.prepare
    monkeypatch.setattr(kind_of, "prepare", lambda self, prior: prepared.append(prior) or prepare(self, prior))
    for gradients in (False, True):
        laplace.prior_precision = {
            layer.name: torch.tensor(1.0 + i, dtype=torch.float64, requires_grad=gradients)
            for i, layer in enumerate(laplace.layers)
        }
        for _ in range(3):
            laplace.predict(case.batch())
            laplace.sample_weights(2)
    assert len(prepared) == 1  # the numbers are the same


def test_tuning_keeps_no_posterior(monkeypatch):
    case = mlp(n=6)
    laplace = fitted(case)
    alive, most = weakref.WeakSet(), []
    prepare = KroneckerCurvature.prepare

    def watched(self, prior):
        gc.collect()
        result = prepare(self, prior)
        alive.update(result.values())
        most.append(len(alive))
        return result

    monkeypatch.setattr(KroneckerCurvature, "prepare", watched)
    monkeypatch.setattr(KroneckerPosterior, "__hash__", object.__hash__)
    gc.freeze()  # what is there already need not be looked at each time
    try:
        laplace.optimize_prior_precision("nll", val_loader=case.loader(3))
    finally:
        gc.unfreeze()
    assert max(most) <= 2 * len(laplace.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_curvature_knows_no_prior(kind):
    curvatures = [fitted(mlp(n=6), curvature=kind, prior_precision=p).posterior.curvature for p in (0.1, 10.0)]
    for one, other in zip(*(c.pack()[0].values() for c in curvatures), strict=True):
        assert torch.equal(*(x if isinstance(x, torch.Tensor) else x.read(slice(None)) for x in (one, other)))


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


def test_the_signature_has_every_setting():
    names = list(inspect.signature(blk.LaplaceLoRA).parameters)
    assert names[:4] == ["model", "forward", "class_token_ids", "config"]
    assert set(names[4:]) == {one.name for one in dataclasses.fields(blk.LaplaceConfig)} - {"class_token_ids"}

    class Own(blk.LaplaceLoRA):
        def __init__(self, model, extra):
            super().__init__(model)

    assert list(inspect.signature(Own).parameters) == ["model", "extra"]


def test_a_copy_of_one_that_was_made_with_a_graph():
    leaf = torch.tensor(0.0, requires_grad=True)
    model = mlp().model
    laplace = blk.LaplaceLoRA(model, prior_precision=leaf.exp(), modules=(n for n in ("first", "last")))
    laplace.prior_precision = 2.0
    again = copy.deepcopy(laplace)
    assert again.prior == laplace.prior == blk.Prior(2.0)
    assert again.config == laplace.config
    assert laplace.config.modules == ("first", "last")


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
