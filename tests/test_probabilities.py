"""Class probabilities from differences of logits."""

from __future__ import annotations

import math

import pytest
import torch

from bayesian_lora_kernels.predictive import probabilities
from bayesian_lora_kernels.predictive.distribution import PROBABILITY_METHODS, LogitPosterior
from bayesian_lora_kernels.predictive.probabilities import contrasts, pairwise_log_probs, scalar_log_probs

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


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_probit_and_bridge_of_logits_less_their_mean_number_by_number(classes):
    mean, cov = gaussian(4, classes, 2.0)
    c, posterior = classes, LogitPosterior(mean, cov)
    for n in range(4):
        centre = torch.eye(c, dtype=DOUBLE) - torch.full((c, c), 1 / c, dtype=DOUBLE)
        f, v = (centre @ mean[n]).tolist(), (centre @ cov[n] @ centre).diagonal().tolist()
        probit = [math.exp(f[k] / math.sqrt(1 + math.pi / 8 * v[k])) for k in range(c)]
        spread = sum(math.exp(-x) for x in f)
        alpha = [(1 - 2 / c + math.exp(f[k]) / c**2 * spread) / v[k] for k in range(c)]
        for method, raw in (("probit", probit), ("bridge", alpha)):
            expected = torch.tensor(raw, dtype=DOUBLE) / sum(raw)
            assert (posterior.probs(method)[n] - expected).abs().max() < 1e-12, method


@pytest.mark.parametrize("method", PROBABILITY_METHODS)
def test_what_all_logits_share_does_not_count(method):
    mean, cov = gaussian(4, 5)
    generator = torch.Generator().manual_seed(1)
    shift = torch.randn(4, 1, generator=generator, dtype=DOUBLE)
    with_each = 0.3 * torch.randn(4, 5, generator=generator, dtype=DOUBLE)  # covariances with the logits
    moved = cov + with_each[:, :, None] + with_each[:, None, :] + 100
    one, other = (
        LogitPosterior(m, c).probs(method, generator=torch.Generator().manual_seed(0))
        for m, c in ((mean, cov), (mean + shift, moved))
    )
    assert (one - other).abs().max() < 1e-12


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("method", PROBABILITY_METHODS)
def test_limits(method, classes):
    """Of no variance: the softmax (the bridge's is another); of a lot: the same for all, whatever the logits."""
    mean, cov = gaussian(2, classes)
    even = torch.eye(classes, dtype=DOUBLE).expand(2, -1, -1)
    if method != "bridge":
        assert (LogitPosterior(mean, 0 * cov).probs(method) - mean.softmax(1)).abs().max() < 1e-7
    if method == "mc":  # of one logit above all others: each is that once in C times
        assert (LogitPosterior(mean, 1e8 * even).probs(method, 2**14) - 1 / classes).abs().max() < 3e-3
    elif method not in ("map", "bridge"):
        assert (LogitPosterior(mean, 1e16 * even).probs(method) - 1 / classes).abs().max() < 1e-6
    for posterior in (
        LogitPosterior(300 * mean.float(), cov.float()),
        LogitPosterior(mean.float(), 1e30 * even.float()),
    ):
        probs = posterior.probs(method)
        assert torch.isfinite(probs).all()
        assert (probs.sum(dim=1) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("method", FORMULAS)
def test_a_factor_of_zero_leaves_temperature_scaling(method):
    mean, cov = gaussian(3, 4)
    assert (FORMULAS[method](mean, cov, 3.0, 0.0).exp() - (mean / 3).softmax(1)).abs().max() < 1e-12


@pytest.mark.parametrize("method", FORMULAS)
def test_several_temperatures_and_factors_at_once(method, monkeypatch):
    mean, cov = gaussian(3, 4)
    t, b = torch.tensor([0.5, 1.0, 4.0], dtype=DOUBLE), torch.tensor([0.1, 2.0, 0.0], dtype=DOUBLE)
    each = torch.stack([FORMULAS[method](mean, cov, float(x), float(y)) for x, y in zip(t, b, strict=True)])
    for size in (2**22, 16 * 2 * 16, 16):  # at once; two examples; one pair
        monkeypatch.setattr(probabilities, "SLICE", size)
        found = torch.full_like(each, math.nan)
        for log_probs, rows, points in FORMULAS[method].on_grid(mean, cov, t, b):
            found[points, rows] = log_probs
        assert torch.allclose(found, each, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "classes"), [(torch.bfloat16, 257), (torch.float16, 300), (torch.float32, 1000)])
def test_contrasts_are_orthogonal_and_see_nothing_of_what_is_shared(dtype, classes):
    for count in (2, 5, classes):
        columns = contrasts(count, torch.empty(0, dtype=dtype)).double()
        assert columns.shape == (count, count - 1)
        assert (columns.sum(dim=0) == 0).all()
        gram = columns.T @ columns
        assert torch.equal(gram, gram.diagonal().diag())
        assert (gram.diagonal() > 0).all()


def test_scalar_keeps_the_most_probable_class():
    mean, cov = gaussian(500, 6, 8.0)
    for temperature, factor in ((1.0, 1.0), (0.2, 50.0)):
        assert torch.equal(scalar_log_probs(mean, cov, temperature, factor).argmax(1), mean.argmax(1))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_against_a_million_samples(classes):
    """Plain ones, of all logits; the bounds are half as much again as the errors over many covariances."""
    mean, cov = gaussian(6, classes, 1.5)
    posterior, generator = LogitPosterior(mean, cov), torch.Generator().manual_seed(0)
    truth = torch.stack([posterior.sample(10**5, generator).softmax(2).mean(0) for _ in range(10)]).mean(0)
    bounds = {"mc": 1.5e-3, "pairwise": 0.035, "scalar": 0.05, "probit": 0.08}
    errors = {
        method: float((posterior.probs(method, 2**13, generator) - truth).abs().mean())
        for method in PROBABILITY_METHODS
    }
    for method, bound in bounds.items():
        assert errors[method] < bound, (method, errors)
    assert errors["pairwise"] < min(errors["bridge"], errors["map"])


def test_sobol_points_are_better_than_drawn_ones():
    mean, cov = gaussian(20, 4, 2.0)
    posterior, generator = LogitPosterior(mean, cov), torch.Generator().manual_seed(0)
    truth = posterior.probs("mc", 2**19, generator)
    sobol = torch.stack([posterior.probs("mc", 128, generator) for _ in range(10)])
    drawn = torch.stack([posterior.sample(128, generator).softmax(2).mean(0) for _ in range(10)])
    assert (sobol - truth).abs().mean() < 0.006
    assert (sobol - truth).abs().mean() < (drawn - truth).abs().mean() / 3


@pytest.mark.parametrize("n", [1, 4])
def test_the_points_are_those_of_scrambled_sobol(n):
    """Also the first, which PyTorch 2.6 rounds to the default dtype."""
    mean, cov = gaussian(3, 2, 2.0)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(5)))
    points = torch.quasirandom.SobolEngine(1, scramble=True, seed=seed).draw(n, dtype=DOUBLE)[:, 0]
    z = math.sqrt(2) * torch.erfinv(2 * points + 2.0**-30 - 1)
    deviation = (cov[:, 0, 0] + cov[:, 1, 1] - 2 * cov[:, 0, 1]).sqrt()
    difference = mean[:, 0] - mean[:, 1] + deviation * z[:, None]
    probs = LogitPosterior(mean, cov).probs("mc", n, torch.Generator().manual_seed(5))
    assert (probs[:, 0] - difference.sigmoid().mean(0)).abs().max() < 1e-6


def test_the_most_even_points_go_to_the_largest_eigenvalues():
    """The mean error is 2.1e-3 then, and 4.1e-3 in the opposite order."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(20, 10, 10, generator=generator, dtype=DOUBLE) * torch.logspace(0.5, -1.5, 10, dtype=DOUBLE)
    posterior = LogitPosterior(2 * torch.randn(20, 10, generator=generator, dtype=DOUBLE), root @ root.mT)
    truth = posterior.probs("mc", 2**16, generator)
    errors = [(posterior.probs("mc", 128, generator) - truth).abs().mean() for _ in range(12)]
    assert sum(errors) / 12 < 3e-3


def test_mc_where_almost_all_variance_is_shared():
    """What is left of the differences after rounding is not positive definite: no reason to give up."""
    mean, cov = gaussian(3, 4, 1e-3)
    probs = LogitPosterior(mean.float(), cov.float() + 1e6).probs("mc")
    assert (probs - mean.softmax(1)).abs().max() < 0.1
    with pytest.raises(ValueError, match="positive semi-definite matrix, example 0 is not"):
        LogitPosterior(mean, -torch.eye(4, dtype=DOUBLE).expand(3, -1, -1)).probs("mc")
