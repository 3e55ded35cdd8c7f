"""Factors, Kronecker posteriors and EKFAC against dense float64 mathematics."""

from __future__ import annotations

import pytest
import torch
from dense import (
    block_ggn,
    covariance,
    dense_factor,
    fisher_columns,
    jacobians,
    kfac_factors,
    output_fisher,
    record,
    relative,
)
from models import Case, bert, gpt2, llama, mlp, t5

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.ops.outer_product import reference as outer_product
from bayesian_lora_kernels.posterior.kronecker import Blocks


def fitted(case: Case, batches=None, **arguments) -> blk.LaplaceLoRA:
    laplace = blk.LaplaceLoRA(case.model, **{**case.arguments, **arguments})
    return laplace.fit([case.batch()] if batches is None else batches, progress=False)


# One example, one token, one Fisher column: the Kronecker product is no approximation.
ONE = {
    "llama": lambda: llama(lengths=(1,), classes=(2, 5), targets=("v_proj", "o_proj", "up_proj")),
    "gpt2": lambda: gpt2(lengths=(1,)),
    "bert": lambda: bert(lengths=(1,), classes=2, bias="lora_only"),
    "t5": lambda: t5(lengths=(1,), classes=2),
    "mlp": lambda: mlp(n=1, classes=2, trainable=("first.weight", "first.bias", "last.weight", "last.bias")),
    "mlp, one score": lambda: mlp(n=1, classes=1, trainable=("first.weight", "first.bias", "last.weight")),
}


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ONE)
def test_one_token_of_one_example_gives_the_exact_block(name, curvature):
    case = ONE[name]()
    logits, jacobian = jacobians(case)
    truth = block_ggn(jacobian, output_fisher(logits, case.arguments.get("likelihood", "classification")))
    laplace = fitted(case, curvature=curvature, prior_precision=0.25)
    scale = max(float(block.abs().max()) for block in truth.values())
    for module, posterior in laplace.posterior.items():
        dense = posterior.to_dense() - 0.25 * torch.eye(len(truth[module]), dtype=torch.float64)
        assert (dense - truth[module]).abs().max() < 1e-10 * scale, module


FACTOR_CASES = {
    "llama": (llama, {"side": "left", "extra": 2}),
    "llama, head adapted": (lambda: llama(targets=("v_proj", "lm_head")), {"side": "right", "extra": 2}),
    "gpt2": (gpt2, {"side": "left"}),
    "bert": (bert, {"extra": 1}),
    "t5": (t5, {"extra": 1}),
    "mlp, tokens": (lambda: mlp(n=4, tokens=3), {}),
}


@pytest.mark.parametrize("block", [4, 768], ids=["blocks below the diagonal, mirrored", "whole"])
@pytest.mark.parametrize("tokens", ["expand", "reduce", "last"])
@pytest.mark.parametrize("name", FACTOR_CASES)
def test_factors_follow_their_definition(name, tokens, block, monkeypatch):
    monkeypatch.setattr(outer_product, "_BLOCK", block)
    build, padding = FACTOR_CASES[name]
    case = build()
    laplace = fitted(case, [case.batch([0, 1], **padding), case.batch([2, 3], **padding)], tokens=tokens)
    factors = laplace.factors
    recorded = record(case, list(factors))
    truth = kfac_factors(recorded, list(factors), tokens, lambda example: fisher_columns(example.logits))
    in_head = [module for module in factors if "lm_head" in module]  # which sees the one position that is used
    truth |= kfac_factors(recorded, in_head, "last", lambda example: fisher_columns(example.logits))
    scale = max(float(s.detach().abs().max()) for _, s in truth.values())
    for module, (a, s) in truth.items():
        if s.shape != factors[module].s.shape:
            rows = case.arguments["class_token_ids"]
            s = s[rows][:, rows]
        assert relative(factors[module].a, a) < 1e-10, module
        assert (factors[module].s - s).abs().max() < 1e-10 * scale, module
        assert factors[module].tail_a == factors[module].tail_s == 0


def test_factors_in_float32():
    narrow, wide = llama(dtype=torch.float32), llama()
    wide.model.load_state_dict(narrow.model.state_dict())
    factors = fitted(narrow).factors
    truth = kfac_factors(
        record(wide, list(factors)), list(factors), "expand", lambda example: fisher_columns(example.logits)
    )
    for module, (a, s) in truth.items():
        assert factors[module].a.dtype == torch.float32
        assert relative(factors[module].a, a) < 1e-5, module
        assert relative(factors[module].s, s) < 1e-5, module


# side: (columns or None for full, tail)
SIDES = {"full": (None, 0.0), "low-rank": (3, 0.0), "tail": (3, 0.2)}


def handmade(d_out: int, d_in: int, side_s: str, side_a: str, dtype=torch.float64) -> blk.KroneckerFactors:
    def factor(d, k):
        x = torch.randn(d, 2 * d if k is None else k, dtype=torch.float64)
        return ((x @ x.T / d) if k is None else torch.linalg.svd(x, full_matrices=False).U * (3 - torch.arange(k))).to(
            dtype
        )

    (k_s, tail_s), (k_a, tail_a) = SIDES[side_s], SIDES[side_a]
    tails = (torch.tensor(t, dtype=torch.float64) for t in (tail_a, tail_s))
    return blk.KroneckerFactors(factor(d_in, k_a), factor(d_out, k_s), *tails)


def dense_precision(factors: blk.KroneckerFactors, prior: float) -> torch.Tensor:
    s, a = dense_factor(factors.s, factors.tail_s), dense_factor(factors.a, factors.tail_a)
    return torch.kron(s, a) + prior * torch.eye(len(s) * len(a), dtype=torch.float64)


@pytest.mark.parametrize("side_a", SIDES)
@pytest.mark.parametrize("side_s", SIDES)
def test_kronecker_posterior_is_its_dense_matrix(side_s, side_a):
    factors = handmade(5, 7, side_s, side_a)
    posterior = blk.KroneckerPosterior.from_factors(factors, 0.3)
    precision = dense_precision(factors, 0.3)
    sigma = torch.linalg.inv(precision)
    assert relative(posterior.to_dense(), precision) < 1e-10
    assert float(posterior.logdet()) == pytest.approx(float(torch.logdet(precision)), rel=1e-10)
    j1, j2 = torch.randn(4, 5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    expected = j1.flatten(1) @ sigma @ j2.flatten(1).T
    assert relative(posterior.covariance(j1, j2), expected) < 1e-10
    assert relative(posterior.covariance(j1.flatten(1), j2.flatten(1)), expected) < 1e-10
    # sampling is linear in its noise: its matrix on the identity is a square root of the covariance
    root = posterior.apply(torch.rsqrt, torch.eye(35, dtype=torch.float64).reshape(35, 5, 7)).reshape(35, 35)
    assert relative(root.T @ root, sigma) < 1e-10
    trace = float(precision.diagonal().sum()) - 0.3 * 35
    assert float(factors.trace()) == pytest.approx(trace, rel=1e-10)


@pytest.mark.parametrize(("k_s", "k_a"), [(4, 6), (4, 2), (1, 6), (1, 2), (0, 2), (0, 0)])
def test_corrected_eigenvalues_stand_on_their_directions(k_s, k_a):
    """EKFAC's posterior: any number on each direction, here put there one direction at a time."""
    left, right = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q for d in (4, 6))
    blocks = Blocks(*(torch.rand(shape, dtype=torch.float64) for shape in ((k_s, k_a), (k_s,), (k_a,), ())))
    posterior = blk.KroneckerPosterior(left[:, :k_s], right[:, :k_a], blocks, torch.tensor(0.3, dtype=torch.float64))
    precision = torch.zeros(24, 24, dtype=torch.float64)
    for j in range(4):
        for i in range(6):
            kept = blocks.kept[j, i] if j < k_s and i < k_a else None
            value = (
                kept
                if kept is not None
                else blocks.rest_a[j]
                if j < k_s
                else blocks.rest_s[i]
                if i < k_a
                else blocks.rest
            )
            direction = torch.outer(left[:, j], right[:, i]).flatten()
            precision += (value + 0.3) * torch.outer(direction, direction)
    assert relative(posterior.to_dense(), precision) < 1e-10
    assert float(posterior.logdet()) == pytest.approx(float(torch.logdet(precision)), rel=1e-10)
    a, g = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 2, 3, 4, dtype=torch.float64)
    jacobian = torch.einsum("nti,ncto->ncoi", a, g)
    truth = covariance(jacobian.flatten(2), precision)
    assert relative(blk.ops.jacobian_covariance(a, g, posterior), truth) < 1e-10
    assert relative(posterior.covariance(jacobian[0], jacobian[0]), truth[0]) < 1e-10


@pytest.mark.parametrize("side_a", SIDES)
@pytest.mark.parametrize("side_s", SIDES)
def test_samples_have_the_covariance_of_the_posterior(side_s, side_a):
    posterior = blk.KroneckerPosterior.from_factors(handmade(3, 5, side_s, side_a), 0.5)
    n = 40_000
    samples = posterior.sample(n, torch.Generator().manual_seed(1)).flatten(1)
    sigma = torch.linalg.inv(posterior.to_dense())
    spread = (sigma.square() + sigma.diagonal()[:, None] * sigma.diagonal()).sqrt() / n**0.5  # of an estimate
    assert ((samples.T @ samples / n - sigma) / spread).abs().max() < 5
    assert (samples.mean(dim=0) / (sigma.diagonal() / n).sqrt()).abs().max() < 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, 4, 12])  # the contraction takes another route with many tokens
@pytest.mark.parametrize("side_a", SIDES)
@pytest.mark.parametrize("side_s", SIDES)
def test_jacobian_covariance_is_the_dense_formula(side_s, side_a, tokens, dtype):
    factors = handmade(6, 8, side_s, side_a, dtype)
    posterior = blk.KroneckerPosterior.from_factors(factors, 0.3)
    a, g = torch.randn(2, tokens, 8, dtype=dtype), torch.randn(2, 3, tokens, 6, dtype=dtype)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[0, tokens // 2 :] = tokens == 1
    jacobian = torch.einsum("nt,nti,ncto->ncoi", mask.double(), a.double(), g.double()).flatten(2)
    truth = covariance(jacobian, dense_precision(factors, 0.3))
    got = blk.ops.jacobian_covariance(a, g, posterior, mask=mask)
    assert got.dtype == dtype
    assert relative(got, truth) < (1e-10 if dtype == torch.float64 else 1e-5)


# Settings that lead to each combination in a real fit: widths 24 and 3 with LoRA, 24 on both sides of the MLP's middle.
RANKS = {
    "all full": {"rank": None},
    "low-rank": {"rank": 4, "rank_threshold": 8, "tail": False},
    "tail": {"rank": 4, "rank_threshold": 8, "tail": True},
    "by truncation": {"rank": 10, "rank_threshold": 8, "tail": True},
}


@pytest.mark.parametrize("tokens", [None, 4])
@pytest.mark.parametrize("rank", RANKS)
def test_predictions_equal_the_dense_formula(rank, tokens):
    case = mlp(n=30, tokens=tokens, width=24, inputs=20)
    laplace = fitted(case, case.loader(7), prior_precision=0.4, **RANKS[rank])
    middle = laplace.factors["twice"]
    assert (middle.a.shape[1] < 25) == (rank != "all full")
    case.examples = case.examples[:3]
    logits, jacobian = jacobians(case)
    truth = sum(
        covariance(jacobian[name].flatten(2), dense_precision(factors, 0.4))
        for name, factors in laplace.factors.items()
    )
    predicted = laplace.predict(case.batch())
    assert relative(predicted.mean, logits) < 1e-10
    assert relative(predicted.covariance, truth) < 1e-10
    assert torch.equal(predicted.covariance, predicted.covariance.mT)


def test_predictions_of_a_language_model_equal_the_dense_formula():
    case = llama(targets=("q_proj", "v_proj", "lm_head"))
    laplace = fitted(case, prior_precision=0.4, rank=2, rank_threshold=8)
    _, jacobian = jacobians(case)
    head = next(name for name in jacobian if "lm_head.lora_B" in name)
    jacobian[head] = jacobian[head][:, :, case.arguments["class_token_ids"]]
    truth = sum(
        covariance(jacobian[name].flatten(2), dense_precision(factors, 0.4))
        for name, factors in laplace.factors.items()
    )
    assert relative(laplace.predict(case.batch(side="left", extra=2)).covariance, truth) < 1e-10


@pytest.mark.parametrize("build", [llama, bert, lambda: mlp(tokens=3)], ids=["llama", "bert", "mlp"])
def test_samples_of_weights_have_the_posterior_as_covariance(build):
    case = build()
    laplace = fitted(case, prior_precision=2.0)
    n = 4000
    samples = laplace.sample_weights(n, torch.Generator().manual_seed(3))
    parameters = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    assert {name: s.shape[1:] for name, s in samples.items()} == {name: p.shape for name, p in parameters.items()}
    for module, posterior in laplace.posterior.items():
        parts = [samples[f"{module}.{leaf}"] for leaf in ("weight", "bias") if f"{module}.{leaf}" in samples]
        map_parts = [parameters[f"{module}.{leaf}"] for leaf in ("weight", "bias") if f"{module}.{leaf}" in samples]
        deviation = torch.cat(
            [(s - p).detach().reshape(n, len(p), -1) for s, p in zip(parts, map_parts, strict=True)], 2
        )
        sigma = torch.linalg.inv(posterior.to_dense())
        spread = (sigma.square() + sigma.diagonal()[:, None] * sigma.diagonal()).sqrt() / n**0.5
        flat = deviation.flatten(1).double()
        assert ((flat.T @ flat / n - sigma) / spread).abs().max() < 6, module


def test_rows_of_a_head_that_no_class_uses_keep_the_spread_of_the_prior():
    case = llama(targets=("v_proj", "lm_head"))
    laplace = fitted(case, prior_precision=4.0)
    ids = case.arguments["class_token_ids"]
    samples = laplace.sample_weights(4000, torch.Generator().manual_seed(5))
    name = next(name for name in samples if "lm_head.lora_B" in name)
    variance = (samples[name] - dict(case.model.named_parameters())[name]).var(dim=0)
    unused = [row for row in range(len(variance)) if row not in ids]
    assert (variance[unused] - 0.25).abs().max() < 0.25 * 6 * (2 / 4000) ** 0.5
    module = name.removesuffix(".weight")
    expected = torch.linalg.inv(laplace.posterior[module].to_dense()).diagonal().reshape(len(ids), -1)
    assert ((variance[ids] - expected) / expected).abs().max() < 6 * (2 / 4000) ** 0.5
