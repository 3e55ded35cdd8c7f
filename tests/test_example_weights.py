"""Weighted examples: twice the weight is the example twice, and any weights give the dense matrices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from dense import evidence, fisher_columns, flat, ggn, jacobians, record, relative, softmax_fisher, trainable
from models import Case, bert, llama, t5
from torch import Tensor

import bayesian_lora_kernels as blk

TIMES = (2, 1, 0, 3)
FRACTIONS = torch.tensor([0.3, 0.0, 2.5, 0.05])
CASES = {
    "llama": lambda: llama(targets=("q_proj", "v_proj", "lm_head")),
    "bert": bert,
    "t5": t5,
}


def weighted(case: Case, weights: Sequence[float] | Tensor, size: int, **padding: Any) -> list[dict[str, Tensor]]:
    each, loader = torch.as_tensor(weights), case.loader(size, **padding)
    return [{**batch, "weights": each[i * size : (i + 1) * size]} for i, batch in enumerate(loader)]


def factors_of(laplace: blk.LaplaceLoRA) -> Tensor:
    """What is in the precision of every layer, row by row."""
    return torch.cat([one.to_dense().flatten() for one in laplace.posterior.values()])


@pytest.mark.parametrize(
    ("name", "curvature", "tokens"),
    [
        pytest.param(*one, marks=[] if one[0] == "bert" or one[1:] == ("kfac", "expand") else pytest.mark.slow)
        for one in itertools.product(CASES, ("kfac", "ekfac", "exact"), ("expand", "reduce", "last"))
    ],
)
def test_a_weight_is_a_repetition(name: str, curvature: str, tokens: str):
    case = CASES[name]()
    settings: dict[str, Any] = {**case.arguments, "curvature": curvature, "tokens": tokens, "rank": 3}
    found = blk.LaplaceLoRA(case.model, **settings).fit(weighted(case, TIMES, 3, extra=2), progress=False)
    repeated = [i for i, times in enumerate(TIMES) for _ in range(times)]
    loader = [case.batch(repeated[i : i + 4]) for i in range(0, len(repeated), 4)]
    truth = blk.LaplaceLoRA(case.model, **settings).fit(loader, progress=False)
    assert (found.n_examples, truth.n_examples) == (4, 6)
    assert found.log_likelihood == pytest.approx(truth.log_likelihood, rel=1e-10)
    assert float(found.log_marginal_likelihood()) == pytest.approx(float(truth.log_marginal_likelihood()), rel=1e-9)
    assert relative(found.predict(case.batch()).covariance, truth.predict(case.batch()).covariance) < 1e-8
    if curvature == "kfac":
        for module, one in truth.factors.items():
            assert relative(found.factors[module].a, one.a) < 1e-10
            assert relative(found.factors[module].s, one.s) < 1e-10


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_positions_with_a_label(fisher: Any):
    """Weights of texts of which every token counts."""
    case = llama(lengths=(5, 3, 6, 4), classes=None, vocabulary=5, hidden=8, r=2)

    def batch(which: Sequence[int]) -> dict[str, Tensor]:
        made = case.batch(which)
        return {**made, "labels": made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)}

    for curvature in ("kfac", "exact"):
        settings: dict[str, Any] = {"curvature": curvature, "fisher": fisher}
        loader = [{**batch(range(4)), "weights": torch.tensor(TIMES)}]
        found = blk.LaplaceLoRA(case.model, **settings).fit(loader, progress=False)
        repeated = [i for i, times in enumerate(TIMES) for _ in range(times)]
        truth = blk.LaplaceLoRA(case.model, **settings).fit([batch(repeated)], progress=False)
        assert found.log_likelihood == pytest.approx(truth.log_likelihood, rel=1e-10)
        evidences = [float(laplace.log_marginal_likelihood()) for laplace in (found, truth)]
        assert evidences[0] == pytest.approx(evidences[1], rel=1e-9)


def test_any_weights_against_the_dense_matrix():
    case = bert()
    laplace = blk.LaplaceLoRA(case.model, curvature="exact", prior_precision=0.8)
    laplace.fit(weighted(case, FRACTIONS, 3), progress=False)
    logits, jacobian = jacobians(case)
    weights = FRACTIONS.double()
    curvature = ggn(flat(jacobian), weights[:, None, None] * softmax_fisher(logits))
    each = logits.log_softmax(dim=-1)[torch.arange(4), case.labels]
    theta = torch.cat([p.detach().flatten() for p in trainable(case.model).values()])
    expected = evidence(float((weights * each).sum()), theta, curvature, torch.full_like(theta, 0.8))
    assert laplace.log_likelihood == pytest.approx(float((weights * each).sum()), rel=1e-7)
    assert float(laplace.log_marginal_likelihood()) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("tokens", ["expand", "reduce", "last"])
def test_any_weights_in_the_factors(tokens: Any):
    """A: the weighted mean over tokens or examples. S: the weighted sum."""
    case = bert()
    laplace = blk.LaplaceLoRA(case.model, tokens=tokens).fit(weighted(case, FRACTIONS, 3, extra=1), progress=False)
    names = [layer.name for layer in laplace.layers]
    recorded = record(case, names)
    for name in names:
        a: Any = 0
        s: Any = 0
        total = 0.0
        for example, weight in zip(recorded, FRACTIONS.double(), strict=True):
            inputs = example.a[name]
            inputs = {"expand": inputs, "reduce": inputs.mean(dim=0)[None], "last": inputs[-1:]}[tokens]
            a, total = a + weight * inputs.T @ inputs, total + weight * len(inputs)
            for column in fisher_columns(example.logits):
                g = example.pulled_back(name, column)
                g = {"expand": g, "reduce": g.sum(dim=0)[None], "last": g[-1:]}[tokens]
                s = s + weight * g.T @ g
        assert relative(laplace.factors[name].a, a / total) < 1e-6
        assert relative(laplace.factors[name].s, s) < 1e-6


def test_drawn_columns_are_weighted():
    case = bert()
    settings: dict[str, Any] = {"fisher": "mc", "curvature": "kfac"}
    once = blk.LaplaceLoRA(case.model, **settings).fit([case.batch()], progress=False)
    often = blk.LaplaceLoRA(case.model, **settings).fit(weighted(case, [4.0] * 4, 4), progress=False)
    for module, one in once.factors.items():
        assert relative(often.factors[module].s, 4 * one.s) < 1e-12
        assert relative(often.factors[module].a, one.a) < 1e-12


def test_some_batches_have_weights():
    case = bert()
    batches = [case.batch([0, 1]), {**case.batch([2, 3]), "weights": torch.ones(2)}]
    found = blk.LaplaceLoRA(case.model).fit(batches, progress=False)
    truth = blk.LaplaceLoRA(case.model).fit(case.loader(2), progress=False)
    assert relative(factors_of(found), factors_of(truth)) < 1e-12


def test_a_checkpoint_keeps_them(tmp_path: Any):
    """Interrupted after a batch, and gone on with."""
    case = bert()
    loader = weighted(case, FRACTIONS, 1)

    class Interrupted(list[Any]):
        def __iter__(self) -> Any:
            yield from loader[:2]
            raise KeyboardInterrupt

    laplace = blk.LaplaceLoRA(case.model)
    with pytest.raises(KeyboardInterrupt):
        laplace.fit(Interrupted(loader), progress=False, checkpoint=tmp_path, every=1)
    laplace.fit(loader, progress=False, checkpoint=tmp_path, every=1)
    truth = blk.LaplaceLoRA(case.model).fit(loader, progress=False)
    assert torch.equal(factors_of(laplace), factors_of(truth))
    assert laplace.log_likelihood == truth.log_likelihood


def test_what_counts_labels_takes_none():
    case = bert()
    laplace = blk.LaplaceLoRA(case.model).fit([case.batch()], progress=False)
    with pytest.raises(ValueError, match="weights: expected none in held-out batches"):
        laplace.calibrate(weighted(case, TIMES, 4), progress=False)
    laplace.optimize_prior_precision("nll", val_loader=weighted(case, TIMES, 4))
    repeated = [case.batch([i for i, times in enumerate(TIMES) for _ in range(times)])]
    truth = blk.LaplaceLoRA(case.model).fit([case.batch()], progress=False)
    truth.optimize_prior_precision("nll", val_loader=repeated)
    assert float(laplace.prior_precision) == pytest.approx(float(truth.prior_precision), rel=1e-6)


@pytest.mark.parametrize("weights", [[-1.0, 1.0, 1.0, 1.0], [float("nan")] * 4, [1.0, 1.0], ["a"] * 4])
def test_what_is_no_weight(weights: Any):
    case = bert()
    with pytest.raises((ValueError, TypeError), match="weights: expected"):
        blk.LaplaceLoRA(case.model).fit([{**case.batch(), "weights": weights}], progress=False)
