"""The posterior over a whole vocabulary against the dense one: moments, convergence, standard errors, bad calls."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from dense import by_module, flat, relative, rows_of, trainable
from models import llama, mlp
from snapshot import untouched, unusual
from torch import Tensor

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.predictive.sampled_logits import SampledLogits
from bayesian_lora_kernels.predictive.vocabulary import relative_error

VOCABULARY = 2000


class Dense:
    """Model, posterior and the truth: `logits [N, V]`, `factor [N, V, P]` with `factor factor^T` the covariance."""

    def __init__(self, vocabulary: int, hidden: int, prior: float, lengths=(5, 3)):
        case = llama(classes=None, vocabulary=vocabulary, hidden=hidden, layers=1, lengths=lengths)
        self.case = case
        self.laplace = blk.LaplaceLoRA(case.model, fisher="mc", rank=None, prior_precision=prior)
        self.laplace.fit([case.batch()], progress=False)
        self.posterior = self.laplace.predict(case.batch(), outputs="vocabulary")
        model, parameters, rows, logits = case.evaluated(), None, [], []
        parameters = trainable(model)
        for example in case.examples:
            f = case.logits(model, example)
            logits.append(f.detach())
            rows.append(rows_of(f, list(parameters.values())))
        stacked = {name: torch.stack(parts) for name, *parts in zip(parameters, *rows, strict=True)}
        jacobian = by_module(stacked, lead=2)
        self.logits = torch.stack(logits)
        posteriors = self.laplace.posterior
        roots = [torch.linalg.cholesky(torch.linalg.inv(p.to_dense())) for p in posteriors.values()]
        self.factor = flat(jacobian, list(posteriors)) @ torch.block_diag(*roots)

    def covariance(self, indices: Tensor) -> Tensor:
        chosen = self.factor.gather(1, indices[:, :, None].expand(-1, -1, self.factor.shape[2]))
        return chosen @ chosen.mT

    def whitened(self, samples: Tensor) -> Tensor:
        """`[S, k]` of logits `[S, N, V]`, standard normal if these are the truth's; all examples jointly."""
        stacked = self.factor.flatten(0, 1)
        values, vectors = torch.linalg.eigh(stacked.mT @ stacked)
        kept = values > 1e-12 * values.max()
        scores = (samples - self.logits).flatten(1) @ stacked @ vectors[:, kept]
        return scores / values[kept]

    def samples(self, n: int, seed: int) -> Tensor:
        noise = torch.randn(n, self.factor.shape[2], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.logits + torch.einsum("nvp,sp->snv", self.factor, noise)


@pytest.fixture(scope="module")
def wide() -> Dense:
    torch.manual_seed(0)
    return Dense(VOCABULARY, 16, 1.0)


@pytest.fixture(scope="module")
def small() -> Dense:
    """So uncertain that the softmax is far from linear."""
    torch.manual_seed(0)
    return Dense(13, 16, 0.5)


def upper(statistic: float, degrees: int) -> float:
    """Probability that a chi-squared variable exceeds the statistic."""
    return float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(statistic / 2).double()))


def test_mean_and_exact_covariances(wide):
    assert relative(wide.posterior.mean, wide.logits) < 1e-10
    generator = torch.Generator().manual_seed(0)
    each = torch.randint(0, VOCABULARY, (2, 30), generator=generator)
    assert relative(wide.posterior.covariance(each), wide.covariance(each)) < 1e-8
    shared = each[0]
    assert relative(wide.posterior.covariance(shared), wide.covariance(shared.expand(2, -1))) < 1e-8
    top = wide.posterior.top(5)
    assert torch.equal(top.indices, wide.logits.topk(5, dim=1).indices)
    assert relative(top.covariance, wide.covariance(top.indices)) < 1e-8
    assert relative(top.mean, wide.logits.gather(1, top.indices)) < 1e-10


@pytest.mark.parametrize("seed", range(4))
def test_samples_are_of_the_dense_gaussian(wide, seed):
    """Whitened by the truth: length, mean and covariance by their own laws; 12 tests at a level of 1e-5 each."""
    n = 400
    samples = wide.posterior.sample(n, torch.Generator().manual_seed(seed))
    assert samples.shape == (n, 2, VOCABULARY)
    white = wide.whitened(samples)
    back = (
        white
        @ torch.linalg.pinv(wide.whitened(wide.samples(400, 9)))
        @ wide.samples(400, 9).sub(wide.logits).flatten(1)
    )
    assert relative(back, (samples - wide.logits).flatten(1)) < 1e-6  # nothing outside the truth's range
    k = white.shape[1]
    length = float(white.square().sum())
    mean = float(n * white.mean(dim=0).square().sum())
    products = white.mT @ white / math.sqrt(n)
    pairs = products[torch.triu_indices(k, k, 1).unbind()]
    for statistic, degrees in ((length, n * k), (mean, k), (float(pairs.square().sum()), len(pairs))):
        assert 1e-5 < upper(statistic, degrees) < 1 - 1e-5


def test_several_draws_are_one(small):
    """Samples are kept: more of them begin with the same, and every estimate looks at those."""
    first = small.laplace.predict(small.case.batch(), "vocabulary")
    second = small.laplace.predict(small.case.batch(), "vocabulary")
    torch.manual_seed(3)
    first.variance(8)
    first.variance(24)
    torch.manual_seed(3)
    assert relative(first.variance(24)[0], second.variance(24)[0]) < 1e-12
    assert torch.equal(first.probs(16), first.probs(16))
    assert relative(first.probs(16), second.probs(16)) < 1e-12
    assert not torch.equal(first.sample(2), first.sample(2))
    noise = torch.Generator().manual_seed(0)
    fresh = first.probs(16, noise)
    assert not torch.equal(fresh, first.probs(16))
    assert torch.equal(fresh, first.probs(16, noise.manual_seed(0)))


def estimates(dense: Dense, n: int, repeats: int) -> tuple[Tensor, Tensor]:
    """`probs [repeats, N, V]` and mutual information `[repeats, N]` of n samples each."""
    posterior = dense.posterior
    drawn = posterior._sampler.draw(posterior._batch, repeats * n // 2, False, torch.Generator().manual_seed(n))
    probs, information = [], []
    for i in range(repeats):
        part = type(drawn)(drawn.hidden[i * n // 2 : (i + 1) * n // 2], drawn.head)
        logits = SampledLogits(posterior._head, posterior.hidden, part, n, mirrored=True)
        probs.append(logits.probs())
        information.append(logits.statistics(None).mutual_information)
    return torch.stack(probs), torch.stack(information)


def test_probabilities_and_information_converge_as_the_root_of_the_samples(small):
    p = small.samples(100_000, 5).softmax(dim=-1)
    mean = p.mean(dim=0)
    information = torch.special.entr(mean).sum(dim=-1) - torch.special.entr(p).sum(dim=-1).mean(dim=0)
    assert information.min() > 0.05
    counts = [32, 128, 512]
    errors = []
    for n in counts:
        probs, found = estimates(small, n, 25)
        errors.append(
            [float((probs - mean).square().mean().sqrt()), float((found - information).square().mean().sqrt())]
        )
    for coarse, fine in itertools.pairwise(errors):
        for quantity in range(2):
            assert 0.35 < math.log(coarse[quantity] / fine[quantity]) / math.log(4) < 0.75
    assert errors[-1][0] < 0.02
    assert errors[-1][1] < 0.15 * float(information.mean())


@pytest.mark.parametrize("n", [8, 64])
def test_standard_errors_are_honest(small, n):
    """95 % intervals hold the exact variance in 92 to 98 % of the cases."""
    truth = small.factor.square().sum(dim=2)
    posterior = small.posterior
    drawn = posterior._sampler.draw(posterior._batch, 150 * n, False, torch.Generator().manual_seed(1))
    held = []
    for i in range(150):
        part = type(drawn)(drawn.hidden[i * n : (i + 1) * n], drawn.head)
        estimate = SampledLogits(posterior._head, posterior.hidden, part, n, mirrored=False).mean_square()
        held.append((estimate - truth).abs() <= 1.96 * relative_error(n) * estimate)
    assert 0.92 < float(torch.stack(held).double().mean()) < 0.98
    estimate, error = posterior.variance(n, torch.Generator().manual_seed(1))
    assert torch.equal(error, estimate * relative_error(n))
    first = type(drawn)(drawn.hidden[:n], drawn.head)
    expected = SampledLogits(posterior._head, posterior.hidden, first, n, mirrored=False).mean_square()
    assert relative(estimate, expected) < 1e-9


@pytest.mark.parametrize("n", [1, 2, 5, 64, 1000])
def test_the_law_of_the_standard_error(n):
    """By simulation; and for many samples it is the textbook's."""
    noise = torch.randn(200_000 if n < 100 else 20_000, n, generator=torch.Generator().manual_seed(n))
    estimate = noise.square().mean(dim=1)
    held = (estimate - 1).abs() <= 1.96 * relative_error(n) * estimate
    assert abs(float(held.double().mean()) - 0.95) < 0.006
    if n == 1000:
        assert relative_error(n) == pytest.approx(math.sqrt(2 / n), rel=0.01)


def test_exact_variances_of_the_most_probable(small):
    truth = small.factor.square().sum(dim=2)
    estimate, error = small.posterior.variance(16, exact=3)
    plain, plain_error = small.posterior.variance(16)
    top = small.logits.topk(3, dim=1).indices
    known = torch.zeros_like(truth, dtype=torch.bool).scatter(1, top, True)
    assert relative(estimate[known], truth[known]) < 1e-9
    assert not error[known].any()
    assert torch.equal(estimate[~known], plain[~known])
    assert torch.equal(error[~known], plain_error[~known])


def test_probs_are_distributions(small):
    probs = small.posterior.probs(32)
    assert relative(probs.sum(dim=1), torch.ones(2)) < 1e-12
    assert probs.min() > 0
    found = small.posterior.statistics(torch.tensor([3, 1]), 32)
    assert relative(found.target_log_prob, probs[[0, 1], [3, 1]].log()) < 1e-10
    assert relative(found.entropy, torch.special.entr(probs).sum(dim=1)) < 1e-10


@pytest.mark.parametrize(("targets", "tolerance"), [(("q_proj", "v_proj"), 1e-5), (("q_proj", "lm_head"), 1e-2)])
def test_deviations_are_multiplied_in_the_heads_dtype(targets, tolerance):
    """Of a bfloat16 model, without rounding them, but for LoRA on the head."""
    case = llama(classes=None, targets=targets)
    case.model.bfloat16()
    laplace = blk.LaplaceLoRA(case.model, **case.arguments).fit(case.loader(2), progress=False)
    posterior = laplace.predict(case.batch(), "vocabulary")
    variance, _ = posterior.variance(6)
    logits = posterior._samples(6, None, mirrored=False)
    for product in logits._products():
        assert product.weight.dtype == product.deviation.dtype == torch.bfloat16
    deviations = logits.logits().double() - posterior.mean.double()
    assert relative(variance, deviations.square().mean(dim=0)) < tolerance
    if targets[1] == "v_proj":
        weight = posterior._head.weight.double()
        exact = posterior._kept.hidden[:6].double() @ weight.mT
        assert relative(variance, exact.square().mean(dim=0)) < tolerance
        assert relative(posterior.mean, posterior.hidden.double() @ weight.mT) < tolerance
        z = posterior.mean.double() + torch.cat([exact[:3], -exact[:3]])
        assert relative(posterior.probs(6), z.softmax(dim=-1).mean(dim=0)) < tolerance


def test_the_model_is_untouched():
    case = llama(classes=None, targets=("q_proj", "lm_head"))
    unusual(case.model)
    laplace = blk.LaplaceLoRA(case.model, **case.arguments).fit(case.loader(2), progress=False)
    noise = torch.Generator().manual_seed(0)
    with untouched(case.model):
        posterior = laplace.predict(case.batch(), outputs="vocabulary")
        posterior.sample(2, noise)
        posterior.variance(2, noise)
        posterior.statistics(None, 2, noise)
        posterior.top(2)
        assert posterior.mean.requires_grad is False
        laplace.score(case.batch(), 2, noise)


def test_a_mean_in_inference_mode():
    case = llama(classes=None)
    laplace = blk.LaplaceLoRA(case.model, **case.arguments).fit(case.loader(2), progress=False)
    expected = laplace.predict(case.batch(), "vocabulary").probs(4, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        posterior = laplace.predict(case.batch(), "vocabulary")
        assert relative(posterior.probs(4, torch.Generator().manual_seed(0)), expected) < 1e-10
        posterior.covariance(torch.tensor([1]))


CALLS = {
    "sample": (lambda p: p.sample(0), "n: expected a positive int, got 0"),
    "probs": (lambda p: p.probs(0), "n_samples: expected a positive int, got 0"),
    "probs of a float": (lambda p: p.probs(2.0), "n_samples: expected a positive int, got 2.0"),
    "variance": (lambda p: p.variance(-1), "n_samples: expected a positive int"),
    "exact": (lambda p: p.variance(2, exact=14), "expected 1 to 13 most probable tokens, got 14"),
    "top": (lambda p: p.top(0), "expected 1 to 13 most probable tokens, got 0"),
    "indices": (lambda p: p.covariance(torch.tensor([13])), "indices: expected token ids from 0 to 12"),
    "indices' dtype": (lambda p: p.covariance(torch.tensor([1.0])), "indices: expected token ids, got torch.float32"),
    "indices' rows": (lambda p: p.covariance(torch.zeros(3, 1).long()), "expected one row for each of 2 examples"),
    "targets": (lambda p: p.statistics(torch.tensor([1, -1])), "targets: expected token ids from 0 to 12"),
    "targets' shape": (lambda p: p.statistics(torch.tensor([1])), r"targets: expected \[2\], got \[1\]"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls(small, name):
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(small.posterior)


def test_asked_for_among_outputs_it_is_the_same():
    case = llama(classes=None)
    laplace = blk.LaplaceLoRA(case.model, **case.arguments).fit(case.loader(2), progress=False)
    one, other = laplace.predict_vocabulary(case.batch()), laplace.predict(case.batch(), outputs="vocabulary")
    assert type(one) is type(other) is blk.VocabularyPosterior
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.covariance(torch.arange(4)), other.covariance(torch.arange(4)))


def test_models_without_a_vocabulary():
    case = mlp()
    laplace = blk.LaplaceLoRA(case.model).fit(case.loader(2), progress=False)
    with pytest.raises(ValueError, match="predict: expected a causal LM with an output head"):
        laplace.predict(case.batch(), outputs="vocabulary")
    with pytest.raises(ValueError, match="score: expected a causal LM"):
        laplace.score(case.batch())
    scored = llama()
    batch = {name: x for name, x in scored.batch().items() if name != "labels"}
    regression = blk.LaplaceLoRA(scored.model, likelihood="regression", **scored.arguments)
    regression.fit([batch], progress=False)
    with pytest.raises(ValueError, match="expected likelihood='classification' for a vocabulary, got 'regression'"):
        regression.predict(batch, outputs="vocabulary")
    with pytest.raises(TypeError, match="got str 'vocab'"):
        laplace.predict(case.batch(), outputs="vocab")


def test_before_fit_and_bad_batches():
    case = llama(classes=None)
    laplace = blk.LaplaceLoRA(case.model, **case.arguments)
    with pytest.raises(RuntimeError, match=r"call fit\(loader\) first"):
        laplace.predict(case.batch(), "vocabulary")
    laplace.fit(case.loader(2), progress=False)
    with pytest.raises(TypeError, match="expected a mapping"):
        laplace.predict_vocabulary(case.batch()["input_ids"])
    with pytest.raises(ValueError, match="at least one example"):
        laplace.predict_vocabulary({"input_ids": torch.zeros(0, 3).long()})
    with torch.no_grad():
        case.model.get_base_model().model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        laplace.predict(case.batch(), "vocabulary")
