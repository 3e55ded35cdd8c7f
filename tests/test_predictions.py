"""What `predict` returns: choices of logits, and probabilities and samples from their Gaussian."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from dense import relative
from models import Case, llama, mlp

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.predictive import probabilities
from bayesian_lora_kernels.predictive.distribution import PROBABILITY_METHODS, CovarianceWarning, LogitPosterior


@pytest.fixture(scope="module", params=["kfac", "exact"])
def whole(request) -> tuple[blk.LaplaceLoRA, Case, LogitPosterior]:
    """A fit over a vocabulary of 13, and the posterior over all its logits."""
    case = llama(classes=None)
    laplace = blk.LaplaceLoRA(case.model, curvature=request.param, fisher="exact", prior_precision=0.5)
    laplace.fit([case.batch()], progress=False)
    return laplace, case, laplace.predict(case.batch())


OUTPUTS = {
    "all": None,
    "some": torch.tensor([7, 2, 5]),
    "one": torch.tensor([3]),
    "a list": [7, 2],
    "one twice": torch.tensor([4, 4]),
    "a list per example": [[1, 2], [3, 4], [12, 0], [7, 7]],
    "per example": torch.tensor([[1, 2], [3, 4], [12, 0], [7, 7]]),
    "most probable": 3,
    "most probable of all": 13,
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_chosen_logits_are_a_part_of_all(whole, name):
    laplace, case, everything = whole
    outputs = OUTPUTS[name]
    chosen = laplace.predict(case.batch(), outputs=outputs)
    if outputs is None:
        assert chosen.indices is None
        index = torch.arange(13).expand(4, -1)
    elif isinstance(outputs, int):
        index = everything.mean.topk(outputs, dim=1).indices
        assert torch.equal(chosen.indices, index)
    else:
        given = torch.as_tensor(outputs)
        assert torch.equal(chosen.indices, given)
        index = given.expand(4, -1) if given.ndim == 1 else given
    n = torch.arange(4)[:, None]
    assert relative(chosen.mean, everything.mean[n, index]) < 1e-12
    part = everything.covariance[n[:, :, None], index[:, :, None], index[:, None, :]]
    assert relative(chosen.covariance, part) < 1e-9
    assert relative(chosen.variance, part.diagonal(dim1=1, dim2=2)) < 1e-9


def test_labels_are_never_passed_on_and_never_needed(whole):
    laplace, case, everything = whole
    batch = case.batch()
    del batch["labels"]
    assert torch.equal(laplace.predict(batch).covariance, everything.covariance)
    assert torch.equal(laplace.predict({**batch, "labels": torch.full((4,), 99)}).mean, everything.mean)


def test_a_smaller_prior_precision_gives_a_larger_variance(whole):
    laplace, case, everything = whole
    laplace.prior_precision = 0.05
    wider = laplace.predict(case.batch())
    laplace.prior_precision = 0.5
    assert (wider.variance > everything.variance).all()
    assert torch.equal(laplace.predict(case.batch()).covariance, everything.covariance)


@pytest.mark.parametrize("curvature", ["kfac", "exact"])
@pytest.mark.parametrize("per_module", [False, True])
def test_a_prior_that_is_changed_in_place_counts_at_once(curvature, per_module):
    case = mlp()
    laplace = blk.LaplaceLoRA(case.model, curvature=curvature).fit([case.batch()], progress=False)
    names = list(laplace.sample_weights(1))
    names = sorted({name.rsplit(".", 1)[0] for name in names})
    values = [0.5 + i for i in range(len(names))] if per_module else [0.5] * len(names)
    priors = [torch.tensor(value, dtype=torch.float64) for value in values]
    laplace.prior_precision = dict(zip(names, priors, strict=True))
    before = laplace.predict(case.batch()).variance
    assert torch.equal(laplace.predict(case.batch()).variance, before)
    for prior in priors:
        prior *= 10
    after = laplace.predict(case.batch()).variance
    laplace.prior_precision = {name: 10 * value for name, value in zip(names, values, strict=True)}
    assert (after < before).all()
    assert torch.equal(laplace.predict(case.batch()).variance, after)


def gaussian(n: int, c: int, scale: float = 1.0, seed: int = 0, dtype=torch.float64) -> LogitPosterior:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, c, generator=generator, dtype=torch.float64)
    root = scale * torch.randn(n, c, c, generator=generator, dtype=torch.float64)
    return LogitPosterior(mean.to(dtype), (root @ root.mT).to(dtype))


def by_integration(posterior: LogitPosterior) -> torch.Tensor:
    """E softmax for two classes: a one-dimensional integral of a sigmoid over the difference of the logits."""
    difference = posterior.mean[:, 0] - posterior.mean[:, 1]
    s = posterior.covariance
    variance = s[:, 0, 0] + s[:, 1, 1] - 2 * s[:, 0, 1]
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    first = ((difference[:, None] + variance.sqrt()[:, None] * z).sigmoid() * weight).sum(dim=1)
    return torch.stack([first, 1 - first], dim=1)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_monte_carlo_probabilities_converge_to_the_integral(scale):
    posterior = gaussian(5, 2, scale)
    n = 200_000
    probs = posterior.probs("mc", n_samples=n, generator=torch.Generator().manual_seed(1))
    assert (probs.sum(dim=1) - 1).abs().max() < 1e-12
    assert (probs - by_integration(posterior)).abs().max() < 5 * 0.5 / n**0.5
    again = posterior.probs("mc", n_samples=n, generator=torch.Generator().manual_seed(1))
    assert torch.equal(probs, again)


def test_monte_carlo_averages_probabilities_not_logits():
    certain, uncertain = gaussian(3, 3, 1e-4), gaussian(3, 3, 6.0)
    assert (certain.probs("mc") - certain.probs("map")).abs().max() < 1e-3
    assert (uncertain.probs("mc").amax(dim=1) < uncertain.probs("map").amax(dim=1)).any()
    assert (uncertain.probs("mc") - uncertain.probs("map")).abs().max() > 0.05


def test_monte_carlo_in_slices_uses_every_sample(monkeypatch):
    """More samples than fit into one slice of memory."""
    posterior = gaussian(20, 3, 0.5)
    probs = []
    for size in (2**22, 60 * 7):
        monkeypatch.setattr(probabilities, "SLICE", size)
        probs.append(posterior.probs("mc", n_samples=100, generator=torch.Generator().manual_seed(0)))
    assert relative(*probs) < 1e-12


def test_bridge_survives_large_logits():
    posterior = LogitPosterior(torch.tensor([[500.0, -500.0, 0.0]]), 0.1 * torch.eye(3)[None])
    assert relative(posterior.probs("bridge"), torch.tensor([[1.0, 0.0, 0.0]])) < 1e-5


@pytest.mark.parametrize("method", PROBABILITY_METHODS)
def test_a_single_logit_has_all_the_probability(method):
    assert torch.equal(gaussian(3, 1).probs(method), torch.ones(3, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    "method", sorted({*PROBABILITY_METHODS} - {"bridge"})
)  # the bridge needs the covariance of a Dirichlet for this
def test_probabilities_of_an_almost_certain_posterior_are_the_softmax(method):
    posterior = gaussian(4, 3, 1e-5)
    assert (posterior.probs(method) - posterior.mean.softmax(dim=-1)).abs().max() < 1e-3


def test_samples_have_the_stated_mean_and_covariance():
    posterior, n = gaussian(3, 4), 100_000
    samples = posterior.sample(n, torch.Generator().manual_seed(1))
    assert samples.shape == (n, 3, 4)
    centred = samples - posterior.mean
    variance = posterior.variance
    assert (centred.mean(dim=0) / (variance / n).sqrt()).abs().max() < 5
    estimate = torch.einsum("snc,snd->ncd", centred, centred) / n
    spread = (posterior.covariance.square() + variance[:, :, None] * variance[:, None, :]).sqrt() / n**0.5
    assert ((estimate - posterior.covariance) / spread).abs().max() < 5


def test_distribution_is_the_same_gaussian():
    posterior = gaussian(3, 4)
    normal = posterior.distribution()
    assert normal.batch_shape == (3,)
    assert relative(normal.covariance_matrix, posterior.covariance) < 1e-12
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = [
        torch.distributions.MultivariateNormal(posterior.mean[n], posterior.covariance[n]).log_prob(x[n])
        for n in range(3)
    ]
    assert relative(normal.log_prob(x), torch.stack(expected)) < 1e-10


def test_singular_covariances_can_be_sampled():
    """Logits that move together, as under a weight that all of them share, and logits that do not move."""
    vector = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    for covariance in (torch.outer(vector, vector), torch.zeros(3, 3, dtype=torch.float64)):
        posterior = LogitPosterior(torch.zeros(1, 3, dtype=torch.float64), covariance[None])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            samples = posterior.sample(1000)
        off = samples[:, 0] - samples[:, 0, :1] * vector
        assert off.abs().max() < 1e-3


def test_a_covariance_that_is_clearly_wrong_is_not_repaired():
    bad = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    with pytest.raises(ValueError, match="expected a positive semi-definite matrix, example 0"):
        LogitPosterior(torch.zeros(1, 2), bad).sample(1)
    slightly = torch.tensor([[[1.0, 1.00002], [1.00002, 1.0]]], dtype=torch.float64)
    with pytest.warns(CovarianceWarning, match="added 0.0001 of the mean variance"):
        LogitPosterior(torch.zeros(1, 2, dtype=torch.float64), slightly).sample(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_of_narrow_models_are_float32(dtype):
    case = mlp(n=4, dtype=torch.float32)
    case.model.to(dtype)
    case.examples = [x.to(dtype) for x in case.examples]
    predicted = blk.LaplaceLoRA(case.model).fit([case.batch()], progress=False).predict(case.batch())
    assert predicted.mean.dtype == predicted.covariance.dtype == predicted.probs().dtype == torch.float32
    wide = mlp(n=4)
    wide.model.load_state_dict(case.model.state_dict())
    wide.examples = [x.double() for x in case.examples]
    truth = blk.LaplaceLoRA(wide.model).fit([wide.batch()], progress=False).predict(wide.batch())
    assert relative(predicted.covariance, truth.covariance) < (1e-5 if dtype == torch.float32 else 0.1)


def test_regression_predicts_scores_without_probabilities():
    case = mlp(n=4, classes=1)
    predicted = blk.LaplaceLoRA(case.model, **case.arguments).fit([case.batch()], False).predict(case.batch())
    assert predicted.covariance.shape == (4, 1, 1)
    assert predicted.sample(5).shape == (5, 4, 1)
    with pytest.raises(
        ValueError, match="probs: expected classes, or two answers to compare, got a regression or single rewards"
    ):
        predicted.probs()
