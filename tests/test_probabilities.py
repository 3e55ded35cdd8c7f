"""Class probabilities from differences of logits."""

from __future__ import annotations

import math

import pytest
import torch

from bayesian_lora_kernels.predictive.distribution import LogitPosterior
from bayesian_lora_kernels.predictive.probabilities import pairwise_log_probs, scalar_log_probs

FORMULAS = {"pairwise": pairwise_log_probs, "scalar": scalar_log_probs}
DOUBLE = torch.float64


def gaussian(n: int, c: int, scale: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = scale / c**0.5 * torch.randn(n, c, c, generator=generator, dtype=DOUBLE)
    return torch.randn(n, c, generator=generator, dtype=DOUBLE), root @ root.mT


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize(("temperature", "factor"), [(1.0, 1.0), (2.5, 0.3), (0.4, 6.0)])
def test_the_formulas_number_by_number(classes, temperature, factor):
    mean, cov = gaussian(3, classes, 3.0)
    pairwise = pairwise_log_probs(mean, cov, temperature, factor).exp()
    scalar = scalar_log_probs(mean, cov, temperature, factor).exp()
    for n in range(3):
        f, s, raw = mean[n].tolist(), cov[n].tolist(), []
        for k in range(classes):
            total = 0.0
            for j in range(classes):
                variance = s[k][k] + s[j][j] - 2 * s[k][j]
                total += math.exp(-(f[k] - f[j]) / math.sqrt(temperature**2 + math.pi / 8 * factor * variance))
            raw.append(1 / total)
        expected = torch.tensor(raw, dtype=DOUBLE) / sum(raw)
        assert (pairwise[n] - expected).abs().max() < 1e-12
        trace, whole = sum(s[k][k] for k in range(classes)), sum(map(sum, s))
        v = 2 / (classes - 1) * (trace - whole / classes)
        expected = (mean[n] / math.sqrt(temperature**2 + math.pi / 8 * factor * v)).softmax(0)
        assert (scalar[n] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("method", FORMULAS)
def test_two_classes_are_mackays_formula_on_the_difference(method):
    mean, cov = gaussian(20, 2, 4.0)
    variance = cov[:, 0, 0] + cov[:, 1, 1] - 2 * cov[:, 0, 1]
    expected = ((mean[:, 0] - mean[:, 1]) / (1 + math.pi / 8 * variance).sqrt()).sigmoid()
    probs = LogitPosterior(mean, cov).probs(method)
    assert (probs[:, 0] - expected).abs().max() < 1e-12
    assert (probs.sum(dim=1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("method", FORMULAS)
def test_what_all_logits_share_does_not_count(method):
    mean, cov = gaussian(4, 5)
    generator = torch.Generator().manual_seed(1)
    shift = torch.randn(4, 1, generator=generator, dtype=DOUBLE)
    with_each = 0.3 * torch.randn(4, 5, generator=generator, dtype=DOUBLE)  # covariances with the logits
    moved = cov + with_each[:, :, None] + with_each[:, None, :] + 100
    one, other = LogitPosterior(mean, cov).probs(method), LogitPosterior(mean + shift, moved).probs(method)
    assert (one - other).abs().max() < 1e-12


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_limits(method, classes):
    mean, cov = gaussian(2, classes)
    formula = FORMULAS[method]
    assert (formula(mean, 0 * cov).exp() - mean.softmax(1)).abs().max() < 1e-12
    assert (formula(mean, cov, 3.0, 0.0).exp() - (mean / 3).softmax(1)).abs().max() < 1e-12
    assert (formula(mean, cov, factor=1e16).exp() - 1 / classes).abs().max() < 1e-6
    large = formula(300 * mean.float(), cov.float())
    assert torch.isfinite(large).all()
    assert (large.exp().sum(dim=1) - 1).abs().max() < 1e-4


def test_scalar_keeps_the_most_probable_class():
    mean, cov = gaussian(500, 6, 8.0)
    for temperature, factor in ((1.0, 1.0), (0.2, 50.0)):
        assert torch.equal(scalar_log_probs(mean, cov, temperature, factor).argmax(1), mean.argmax(1))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_pairwise_is_near_a_million_samples(classes):
    mean, cov = gaussian(6, classes, 1.5)
    posterior = LogitPosterior(mean, cov)
    truth = posterior.probs("mc", n_samples=10**6, generator=torch.Generator().manual_seed(0))
    errors = {m: float((posterior.probs(m) - truth).abs().mean()) for m in ("pairwise", "scalar", "bridge", "map")}
    assert errors["pairwise"] < 0.04
    assert errors["pairwise"] < min(errors["bridge"], errors["map"])
