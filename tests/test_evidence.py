"""The log marginal likelihood against dense determinants, its gradient, and its maximum."""

from __future__ import annotations

import math

import pytest
import torch
from dense import by_module, dense_factor, evidence, flat, ggn, jacobians, output_fisher, trainable
from models import Case, llama, mlp

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.posterior.evidence import PriorPrecisionWarning

SETTINGS = {
    "kfac": {"curvature": "kfac"},
    "kfac, low-rank": {"curvature": "kfac", "rank": 3, "rank_threshold": 6},
    "ekfac": {"curvature": "ekfac"},
    "ekfac, low-rank": {"curvature": "ekfac", "rank": 3, "rank_threshold": 6},
    "exact": {"curvature": "exact"},
}
MODELS = {"llama": llama, "mlp": lambda: mlp(n=9, tokens=3), "one score": lambda: mlp(n=9, classes=1)}


def fitted(case: Case, **arguments) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(case.model, **{**case.arguments, **arguments}).fit(case.loader(4), progress=False)


def log_likelihood(case: Case) -> float:
    logits, _ = jacobians(case)
    if case.arguments.get("likelihood") == "regression":
        residual = case.labels.double() - logits
        return float((-0.5 * residual.square() - 0.5 * math.log(2 * math.pi)).sum())
    return float(logits.log_softmax(dim=-1)[torch.arange(len(logits)), case.labels].sum())


def dense_curvature(laplace: blk.LaplaceLoRA, case: Case) -> torch.Tensor:
    """`[P, P]`, modules in the order of the model."""
    if laplace.config.curvature == "exact":
        logits, jacobian = jacobians(case)
        return ggn(flat(jacobian), output_fisher(logits, case.arguments.get("likelihood", "classification")))
    blocks = []
    for name, posterior in laplace.posterior.items():
        if laplace.config.curvature == "kfac":
            factors = laplace.factors[name]
            s, a = dense_factor(factors.s, factors.tail_s), dense_factor(factors.a, factors.tail_a)
            blocks.append(torch.kron(s, a))
        else:
            identity = torch.eye(math.prod(posterior.shape), dtype=torch.float64)
            blocks.append(posterior.to_dense() - posterior.prior_precision * identity)
    return torch.block_diag(*blocks)


def weights(case: Case) -> dict[str, torch.Tensor]:
    return {name: w.detach().flatten() for name, w in by_module(trainable(case.model)).items()}


@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_evidence_is_the_dense_formula(model, setting, per_module):
    case = MODELS[model]()
    laplace = fitted(case, **SETTINGS[setting])
    curvature, theta = dense_curvature(laplace, case), weights(case)
    likelihood = log_likelihood(case)
    assert laplace.log_likelihood == pytest.approx(likelihood, rel=1e-10)
    for base in (1e-3, 0.7, 1e4):
        prior = {name: base * (1 + i * per_module) for i, name in enumerate(theta)}
        each = torch.cat([torch.full_like(theta[name], value) for name, value in prior.items()])
        expected = evidence(likelihood, torch.cat(list(theta.values())), curvature, each)
        got = laplace.log_marginal_likelihood(prior if per_module else base)
        assert got.dtype == torch.float64
        assert got.shape == ()
        assert float(got) == pytest.approx(float(expected), rel=1e-10), base
        laplace.prior_precision = prior if per_module else base
        assert torch.equal(laplace.log_marginal_likelihood(), got)


@pytest.mark.parametrize("setting", SETTINGS)
def test_evidence_of_a_float32_model(setting):
    narrow, wide = mlp(n=9, tokens=3, dtype=torch.float32), mlp(n=9, tokens=3)
    wide.model.load_state_dict(narrow.model.state_dict())
    wide.examples, wide.labels = [x.double() for x in narrow.examples], narrow.labels
    one, other = (fitted(case, **SETTINGS[setting]) for case in (narrow, wide))
    for prior in (0.05, 3.0):
        evidences = [float(laplace.log_marginal_likelihood(prior)) for laplace in (one, other)]
        assert evidences[0] == pytest.approx(evidences[1], rel=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradient_in_the_prior_precision(setting):
    case = mlp(n=9, tokens=3)
    laplace = fitted(case, **SETTINGS[setting])
    curvature, theta = dense_curvature(laplace, case), torch.cat(list(weights(case).values()))
    for value in (0.05, 3.0):
        precision = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(laplace.log_marginal_likelihood(precision), precision)
        inverse = torch.linalg.inv(curvature + value * torch.eye(len(theta), dtype=torch.float64))
        formula = 0.5 * (len(theta) / value - theta.square().sum() - inverse.diagonal().sum())
        assert float(gradient) == pytest.approx(float(formula), rel=1e-9)
        step = 1e-5 * value
        up, down = (float(laplace.log_marginal_likelihood(value + sign * step)) for sign in (1, -1))
        assert float(gradient) == pytest.approx((up - down) / (2 * step), rel=1e-5)
        assert torch.autograd.gradcheck(laplace.log_marginal_likelihood, (precision,))


@pytest.mark.parametrize("start", ["equal", "different"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
def test_gradient_in_the_prior_precision_of_every_module(curvature, start):
    case = mlp(n=6)
    laplace = fitted(case, curvature=curvature)
    names = list(weights(case))
    values = [0.5 if start == "equal" else 0.3 * (i + 1) for i in range(len(names))]
    precisions = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
    assert torch.autograd.gradcheck(
        lambda *p: laplace.log_marginal_likelihood(dict(zip(names, p, strict=True))), precisions
    )


def slopes(laplace: blk.LaplaceLoRA, names: list[str], per_module: bool) -> list[float]:
    """Derivatives of the evidence in the logarithm of each precision, at the current ones."""
    current = laplace.prior_precision
    values = [current[n] for n in names] if isinstance(current, dict) else [current] * len(names)
    logs = [value.detach().log().requires_grad_() for value in (values if per_module else values[:1])]
    precisions = {n: (logs[i] if per_module else logs[0]).exp() for i, n in enumerate(names)}
    if not per_module:
        shared = logs[0].exp()
        precisions = dict.fromkeys(names, shared)
    total = laplace.log_marginal_likelihood(precisions)
    return [float(g) for g in torch.autograd.grad(total, logs)]


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
@pytest.mark.parametrize("model", ["llama", "mlp"])
def test_marglik_finds_the_maximum(model, curvature):
    case = MODELS[model]()
    laplace = fitted(case, curvature=curvature).optimize_prior_precision("marglik")
    found = laplace.prior_precision
    assert isinstance(found, torch.Tensor)
    best = float(laplace.log_marginal_likelihood())
    grid = torch.logspace(-6, 8, 400, dtype=torch.float64)
    values = torch.stack([laplace.log_marginal_likelihood(precision) for precision in grid])
    assert best >= float(values.max()) - 1e-9
    assert float(found) == pytest.approx(float(grid[values.argmax()]), rel=0.1)
    assert abs(slopes(laplace, list(weights(case)), per_module=False)[0]) < 1e-5


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
@pytest.mark.parametrize("model", ["llama", "mlp"])
def test_marglik_per_module_finds_the_maximum(model, curvature):
    case = MODELS[model]()
    laplace = fitted(case, curvature=curvature)
    shared = float(laplace.optimize_prior_precision().log_marginal_likelihood())
    laplace.optimize_prior_precision(per_module=True)
    names = list(weights(case))
    assert sorted(laplace.prior_precision) == sorted(names)
    best = float(laplace.log_marginal_likelihood())
    assert best > shared
    assert all(abs(slope) < 1e-4 for slope in slopes(laplace, names, per_module=True))
    for name in names:  # a maximum, not a saddle
        for factor in (0.5, 2.0):
            moved = {n: float(v) * (factor if n == name else 1.0) for n, v in laplace.prior_precision.items()}
            assert float(laplace.log_marginal_likelihood(moved)) < best


def test_weights_that_are_all_zero_have_no_best_precision():
    case = mlp(n=4, trainable=("last.weight",))
    with torch.no_grad():
        case.model.last.weight.zero_()
    laplace = fitted(case)
    with pytest.warns(PriorPrecisionWarning, match="the model lies at the end of the searched range"):
        laplace.optimize_prior_precision()


def test_nll_finds_the_best_held_out_probabilities():
    case = mlp(n=24)
    held_out = mlp(n=24)
    held_out.examples = [2 * torch.randn(4, dtype=torch.float64) for _ in held_out.examples]
    laplace = fitted(case)
    laplace.optimize_prior_precision("nll", val_loader=held_out.loader(10))

    def nll(precision: float) -> float:
        laplace.prior_precision = precision
        p = laplace.predict(held_out.batch()).probs("pairwise")
        return -float(p[torch.arange(24), held_out.labels].log().sum())

    found = float(laplace.prior_precision)
    grid = torch.logspace(-6, 8, 200).tolist()
    assert nll(found) <= min(nll(precision) for precision in grid) + 1e-3


def test_nll_of_a_regression():
    case, held_out = mlp(n=24, classes=1), mlp(n=24, classes=1)
    held_out.labels = 1.5 * torch.randn(24, 1, dtype=torch.float64)
    laplace = fitted(case).optimize_prior_precision("nll", val_loader=held_out.loader(10))

    def nll(precision: float) -> float:
        laplace.prior_precision = precision
        predicted = laplace.predict(held_out.batch())
        normal = torch.distributions.Normal(predicted.mean, (predicted.variance + 1).sqrt())
        return -float(normal.log_prob(held_out.labels).sum())

    found = float(laplace.prior_precision)
    assert nll(found) <= min(nll(precision) for precision in torch.logspace(-6, 8, 200).tolist()) + 1e-3
