"""The scale of the curvature: a sum over the data, whatever the batches, the padding and the pieces."""

from __future__ import annotations

import copy

import pytest
import torch
from dense import block_ggn, fisher_columns, jacobians, kfac_factors, record, relative, softmax_fisher
from models import Case, bert, gpt2, llama, mlp, t5

import bayesian_lora_kernels as blk

LENGTHS = (5, 3, 6, 4, 2, 7, 3)
CURVATURES = {
    "kfac": {"curvature": "kfac"},
    "kfac, reduce": {"curvature": "kfac", "tokens": "reduce"},
    "kfac, last": {"curvature": "kfac", "tokens": "last"},
    "kfac, truncated": {"curvature": "kfac", "rank": 5, "rank_threshold": 8},
    "ekfac": {"curvature": "ekfac"},
    "exact": {"curvature": "exact"},
}
WHOLE = ("kfac", "ekfac", "exact")
MODELS = {
    "llama": lambda: llama(lengths=LENGTHS, targets=("q_proj", "v_proj", "lm_head")),
    "gpt2": lambda: gpt2(lengths=LENGTHS),
    "bert": lambda: bert(lengths=LENGTHS),
    "t5": lambda: t5(lengths=LENGTHS),
    "mlp": lambda: mlp(n=7, tokens=3),
}


# (model, curvature): every model with the main ones, and every kind of factor with one model
PAIRS = [(m, c) for m in MODELS for c in CURVATURES if c in WHOLE or m == "llama"]
PADDED = [
    (model, curvature, side)
    for model, curvature in PAIRS
    for side in ("left", "right")
    # BERT pools its first position, which must not be padding; the multilayer perceptron's batches have none
    if model != "mlp" and (model, side) != ("bert", "left")
]


def fitted(case: Case, loader, **arguments) -> blk.LaplaceLoRA:
    settings = {**case.arguments, "fisher": "exact", "prior_precision": 0.7, **arguments}
    return blk.LaplaceLoRA(case.model, **settings).fit(loader, progress=False)


def assert_same(one: blk.LaplaceLoRA, other: blk.LaplaceLoRA, case: Case, tolerance: float = 1e-9) -> None:
    assert one.n_examples == other.n_examples
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=tolerance)
    evidence = [float(laplace.log_marginal_likelihood()) for laplace in (one, other)]
    assert evidence[0] == pytest.approx(evidence[1], rel=tolerance)
    batch = case.batch([0, 2, 3])
    assert relative(one.predict(batch).covariance, other.predict(batch).covariance) < tolerance
    if one.config.curvature != "exact":
        scale = max(float(f.s.abs().max()) for f in other.factors.values())
        for name, factors in one.factors.items():
            if factors.a.shape[1] == factors.a.shape[0]:
                assert relative(factors.a, other.factors[name].a) < tolerance, name
                assert (factors.s - other.factors[name].s).abs().max() < tolerance * scale, name


@pytest.mark.parametrize(("model", "curvature"), PAIRS)
def test_the_batch_size_does_not_matter(model, curvature):
    case = MODELS[model]()
    settings = CURVATURES[curvature]
    whole = fitted(case, [case.batch()], **settings)
    for size in (1, 5):  # 5 leaves a last batch of 2
        assert_same(fitted(case, case.loader(size), **settings), whole, case)


@pytest.mark.parametrize(("model", "curvature", "side"), PADDED)
def test_padding_does_not_matter(model, curvature, side):
    case = MODELS[model]()
    settings = CURVATURES[curvature]
    padded = fitted(case, case.loader(4, side=side, extra=10), **settings)
    alone = fitted(case, [case.batch([i]) for i in range(7)], **settings)  # no padding at all
    assert_same(padded, alone, case)
    batch, wide = case.batch([0, 1]), case.batch([0, 1], side=side, extra=10)
    assert relative(padded.predict(wide).mean, padded.predict(batch).mean) < 1e-10
    assert relative(padded.predict(wide).covariance, padded.predict(batch).covariance) < 1e-9


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("model", ["llama", "mlp"])
def test_twice_the_data_is_twice_the_curvature(model, curvature):
    case = MODELS[model]()
    loader = case.loader(3)
    settings = CURVATURES[curvature]
    once, twice = fitted(case, loader, **settings), fitted(case, loader + loader, **settings)
    assert twice.n_examples == 2 * once.n_examples
    assert twice.log_likelihood == pytest.approx(2 * once.log_likelihood, rel=1e-10)
    # 2 F + 2 lambda is twice F + lambda
    twice.prior_precision = 1.4
    batch = case.batch()
    assert relative(2 * twice.predict(batch).covariance, once.predict(batch).covariance) < 1e-9
    values = [laplace.posterior.curvature.spectrum() for laplace in (once, twice)]
    traces = [float(v @ multiplicity) for v, multiplicity in values]
    assert traces[1] == pytest.approx(2 * traces[0], rel=1e-10)
    if curvature == "kfac":
        for name, factors in once.factors.items():
            assert torch.allclose(twice.factors[name].s, 2 * factors.s, rtol=1e-12, atol=0)
            assert torch.allclose(twice.factors[name].a, factors.a, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
@pytest.mark.parametrize("model", ["llama", "mlp"])
def test_pieces_within_a_memory_budget_do_not_matter(model, curvature):
    case = MODELS[model]()
    whole = fitted(case, [case.batch()], curvature=curvature)
    pieces = fitted(case, [case.batch()], curvature=curvature, memory_budget=1)
    assert_same(pieces, whole, case)
    per_example = [[0, 1]] * 3 + [[1, 0]] * 4
    for chosen in (None, 2, [1, 0], per_example, torch.tensor(per_example)):
        one, other = pieces.predict(case.batch(), outputs=chosen), whole.predict(case.batch(), outputs=chosen)
        assert relative(one.mean, other.mean) < 1e-10
        assert relative(one.covariance, other.covariance) < 1e-9
        assert (one.indices is None) == (chosen is None)
        assert chosen is None or torch.equal(one.indices, other.indices)


def toy() -> Case:
    """The toy of the scale table: LoRA's alpha is chosen such that the trace of the exact GGN is 17.68 here too."""
    lengths = (10,) * 12
    return llama(lengths=lengths, hidden=32, vocabulary=32, spread=0.2, r=4, scale=0.3, lora_alpha=1.2211)


def test_trace_of_the_toy():
    case = toy()
    logits, jacobian = jacobians(case)
    exact = sum(float(b.diagonal().sum()) for b in block_ggn(jacobian, softmax_fisher(logits)).values())
    assert exact == pytest.approx(17.68, abs=0.05)
    truth = kfac_factors(record(case, list(jacobian)), list(jacobian), "expand", lambda e: fisher_columns(e.logits))
    naive = sum(float(a.diagonal().sum() * s.diagonal().sum()) for a, s in truth.values())
    padded = {"side": "left", "extra": 10}, {"side": "right", "extra": 10}
    for loader in ([case.batch()], case.loader(5), *(case.loader(4, **padding) for padding in padded)):
        for rank, tolerance in ((None, 1e-9), (4, 1e-6)):  # low-rank with a tail keeps the trace
            laplace = fitted(case, loader, rank=rank, rank_threshold=8)
            trace = sum(float(factors.trace()) for factors in laplace.factors.values())
            assert trace == pytest.approx(naive, rel=tolerance)
            assert 14.0 <= trace <= 17.7
        for curvature in ("ekfac", "exact"):
            values, multiplicity = fitted(case, loader, curvature=curvature).posterior.curvature.spectrum()
            assert float(values @ multiplicity) == pytest.approx(exact, rel=1e-9)
            assert multiplicity.sum() == sum(j[0, 0].numel() for j in jacobian.values())


def test_nothing_is_divided_by_the_number_of_classes_or_samples():
    """The Monte Carlo Fisher has the exact one as its mean, for any number of samples."""
    case = mlp(n=4, classes=3)
    exact = fitted(case, [case.batch()])
    for samples in (1, 4):
        runs = [
            fitted(case, [case.batch()], fisher="mc", fisher_samples=samples, seed=seed).factors["last"].s
            for seed in range(200 // samples)
        ]
        runs = torch.stack(runs)
        error = (runs.mean(dim=0) - exact.factors["last"].s).abs()
        assert (error <= 5 * runs.std(dim=0) / len(runs) ** 0.5 + 1e-12).all()


def test_an_iterator_of_batches_is_enough_for_one_pass():
    case = copy.copy(mlp(n=7))
    assert_same(fitted(case, iter(case.loader(2))), fitted(case, [case.batch()]), case)
