"""Likelihoods and Fisher types, and losses at several positions of a text, against naive loops."""

from __future__ import annotations

import pytest
import torch
from dense import (
    covariance,
    evidence,
    fisher_columns,
    flat,
    ggn,
    jacobians,
    kfac_factors,
    record,
    relative,
    softmax_fisher,
    trainable,
)
from models import Case, bert, llama, mlp
from torch import nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.curvature.likelihood import LIKELIHOODS, Classification, Regression

LOGITS = {
    "usual": torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "two classes": torch.tensor([[0.3, -0.2], [4.0, 1.0]], dtype=torch.float64),
    "many": torch.randn(2, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    "certain": torch.tensor([[50.0, 0.0, -50.0], [0.0, 50.0, 49.0]], dtype=torch.float64),
    "certain of the first": torch.tensor([[2000.0, 0.0, 0.0]], dtype=torch.float64),
    "certain of the last": torch.tensor([[0.0, 0.0, 2000.0]], dtype=torch.float64),
    "tokens": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOGITS)
def test_columns_of_the_softmax_are_its_fisher(name, dtype):
    logits = LOGITS[name].to(dtype)
    columns = Classification().exact_columns(logits)
    assert columns.shape == (*logits.shape, logits.shape[-1] - 1)
    assert columns.shape[-1] == Classification().exact_rank(logits.shape[-1])
    truth = softmax_fisher(LOGITS[name])
    eps = 1e-14 if dtype == torch.float64 else 1e-6
    assert (columns.double() @ columns.double().mT - truth).abs().max() < eps


def test_columns_of_a_gaussian_are_the_identity():
    columns = Regression().exact_columns(LOGITS["tokens"])
    assert torch.equal(columns, torch.eye(4, dtype=torch.float64).expand(2, 3, 4, 4))


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_sampled_scores_have_the_fisher_as_covariance(likelihood):
    """Fisher information: the covariance of the score under the model's own distribution."""
    n, logits = 40_000, torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    scores = LIKELIHOODS[likelihood]().sampled(logits.expand(n, 3), torch.Generator().manual_seed(4))
    truth = softmax_fisher(logits) if likelihood == "classification" else torch.eye(3, dtype=torch.float64)
    products = scores[:, :, None] * scores[:, None, :]
    assert ((products.mean(dim=0) - truth).abs() / products.std(dim=0) * n**0.5).max() < 5
    assert (scores.mean(dim=0).abs() / scores.std(dim=0) * n**0.5).max() < 5


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_score_is_the_gradient_of_the_log_likelihood(likelihood):
    model = LIKELIHOODS[likelihood]()
    logits = LOGITS["tokens"].clone().requires_grad_()
    labels = torch.tensor([[0, 3, -100], [2, -100, 1]]) if likelihood == "classification" else torch.randn(2, 3, 4)
    if likelihood == "classification":
        total = -nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    else:
        total = torch.distributions.Normal(logits, 1.0).log_prob(labels.double()).sum()
    labels = model.check_labels(logits, labels)
    (truth,) = torch.autograd.grad(total, logits)
    assert relative(model.score(logits.detach(), labels), truth) < 1e-12
    assert float(model.log_likelihood(logits, labels, None).sum()) == pytest.approx(float(total.detach()), rel=1e-12)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    one_by_one = model.log_likelihood(logits[mask][:, None], labels[mask][:, None], None)
    by_hand = torch.stack([part.sum() for part in one_by_one.split(2)])
    assert relative(model.log_likelihood(logits, labels, mask), by_hand) < 1e-12


@pytest.mark.parametrize("logits", [2, 17, 18])
def test_auto_is_exact_up_to_16_backward_passes(logits):
    chosen = Classification().choose_fisher("auto", torch.zeros(3, logits))
    assert chosen == ("exact" if logits <= 17 else "mc")
    assert Regression().choose_fisher("auto", torch.zeros(3, logits)) == ("exact" if logits <= 16 else "mc")
    assert Classification().choose_fisher("auto", torch.zeros(3, 2, 3)) == "mc"  # positions differ between batches


@pytest.mark.parametrize("tokens", ["expand", "reduce", "last"])
@pytest.mark.parametrize("build", [llama, bert, lambda: mlp(n=4, classes=1)], ids=["llama", "bert", "one score"])
def test_empirical_fisher_is_that_of_the_labels(build, tokens):
    case = build()
    laplace = blk.LaplaceLoRA(case.model, fisher="empirical", tokens=tokens, **case.arguments)
    factors = laplace.fit(case.loader(3), progress=False).factors
    recorded = record(case, list(factors))
    labels = {id(e): y for e, y in zip(recorded, case.labels, strict=True)}

    def score(example):
        y = labels[id(example)]
        if laplace.likelihood == "regression":
            return [y - example.logits]
        return [nn.functional.one_hot(y, len(example.logits)) - example.logits.softmax(dim=-1)]

    truth = kfac_factors(recorded, list(factors), tokens, score)
    scale = max(float(s.abs().max()) for _, s in truth.values())
    for module, (a, s) in truth.items():
        assert relative(factors[module].a, a) < 1e-10, module
        assert (factors[module].s - s).abs().max() < 1e-10 * scale, module


def test_monte_carlo_is_reproducible_and_follows_its_seed():
    case = mlp(n=8)
    fits = [blk.LaplaceLoRA(case.model, fisher="mc", seed=seed).fit(case.loader(3), False) for seed in (1, 1, 2)]
    s = [laplace.factors["first"].s for laplace in fits]
    assert torch.equal(s[0], s[1])
    assert not torch.equal(s[0], s[2])


# ---- losses at several positions -------------------------------------------------------------------------------------

VOCABULARY = 5
PROMPTS = (3, 1, 2)  # tokens without a label at the beginning


def next_token() -> tuple[Case, list[torch.Tensor]]:
    """Texts whose answers carry the loss, and their labels: -100 on the prompt."""
    case = llama(lengths=(5, 3, 6), classes=None, vocabulary=VOCABULARY, hidden=8, r=2)
    labels = [x.clone() for x in case.examples]
    for y, prompt in zip(labels, PROMPTS, strict=True):
        y[:prompt] = -100
    case.logits = lambda m, ids: m(input_ids=ids[None]).logits[0].flatten()  # every position
    return case, labels


def labelled_batch(case: Case, labels: list[torch.Tensor], which: list[int], side: str, extra: int) -> dict:
    batch = case.batch(which, side=side, extra=extra)
    full = torch.full_like(batch["input_ids"], -100)
    full[batch["attention_mask"].bool()] = torch.cat([labels[i] for i in which])
    return {**batch, "labels": full}


def positions_with_loss(labels: torch.Tensor) -> list[int]:
    """The token at t predicts the label at t + 1."""
    return [t for t in range(len(labels) - 1) if labels[t + 1] != -100]


class Truth:
    def __init__(self, case: Case, labels: list[torch.Tensor]):
        parts = [Case(case.model, [x], y[:1], case.logits) for x, y in zip(case.examples, labels, strict=True)]
        self.curvature, self.log_likelihood, last = 0.0, 0.0, []
        for part, y in zip(parts, labels, strict=True):
            logits, jacobian = jacobians(part)
            logits = logits.unflatten(1, (-1, VOCABULARY))[0]
            rows = flat(jacobian).unflatten(1, (-1, VOCABULARY))[0]
            at = positions_with_loss(y)
            self.curvature = self.curvature + ggn(rows[at], softmax_fisher(logits[at]))
            self.log_likelihood += float(logits[at].log_softmax(-1)[range(len(at)), y[[t + 1 for t in at]]].sum())
            last.append(rows[-1])
        self.last = torch.stack(last)


@pytest.mark.parametrize(("side", "extra"), [("right", 0), ("left", 3)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_next_token_losses_give_the_dense_curvature(size, side, extra):
    case, labels = next_token()
    truth = Truth(case, labels)
    loader = [labelled_batch(case, labels, list(range(3))[i : i + size], side, extra) for i in range(0, 3, size)]
    laplace = blk.LaplaceLoRA(case.model, curvature="exact", fisher="exact", prior_precision=0.8)
    laplace.fit(loader, progress=False)
    assert laplace.n_examples == 3
    assert laplace.log_likelihood == pytest.approx(truth.log_likelihood, rel=1e-10)
    precision = truth.curvature + 0.8 * torch.eye(len(truth.curvature), dtype=torch.float64)
    predicted = laplace.predict(case.batch(side=side, extra=extra))
    assert relative(predicted.covariance, covariance(truth.last, precision)) < 1e-9
    theta = torch.cat([p.detach().flatten() for p in trainable(case.model).values()])
    prior = torch.full_like(theta, 0.8)
    expected = evidence(truth.log_likelihood, theta, truth.curvature, prior)
    assert float(laplace.log_marginal_likelihood()) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(("side", "extra"), [("right", 0), ("left", 3)])
def test_next_token_losses_give_the_factors_of_every_position(side, extra):
    case, labels = next_token()
    batches = [labelled_batch(case, labels, which, side, extra) for which in ([0, 1], [2])]
    factors = blk.LaplaceLoRA(case.model, fisher="exact").fit(batches, progress=False).factors
    recorded = record(case, list(factors))
    of = {id(e): y for e, y in zip(recorded, labels, strict=True)}

    def columns(example):
        logits = example.logits.detach().unflatten(0, (-1, VOCABULARY))
        for t in positions_with_loss(of[id(example)]):
            for column in fisher_columns(logits[t]):
                cotangent = torch.zeros_like(logits)
                cotangent[t] = column
                yield cotangent

    for module, (a, s) in kfac_factors(recorded, list(factors), "expand", columns).items():
        assert relative(factors[module].a, a) < 1e-10, module
        assert relative(factors[module].s, s) < 1e-10, module


class Tagger(nn.Module):
    """One label per token."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x).cumsum(dim=1)))  # positions of an example interact


@pytest.mark.parametrize("way", ["labels", "mask", "nan where masked"])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "mc"])
def test_masked_positions_do_not_count(fisher, way):
    """The mask of the loss comes from labels of -100, or from forward."""
    torch.manual_seed(0)
    model, x = Tagger().double(), torch.randn(3, 4, 4, dtype=torch.float64)
    labels = torch.tensor([[0, 1, -100, -100], [2, -100, -100, -100], [1, 1, 0, -100]])
    mask = labels != -100

    def forward(model, batch):
        logits = model(batch[0])
        if way == "nan where masked":
            logits = logits.masked_fill(~(batch[1] != -100)[..., None], float("nan"))
        return logits if way == "labels" else (logits, batch[1] != -100)

    settings = {"fisher": fisher, "curvature": "exact", "fisher_samples": 300 if fisher == "mc" else 1}
    laplace = blk.LaplaceLoRA(model, forward=forward, **settings).fit([(x, labels)], progress=False)
    model_rows = Case(model, list(x), labels, lambda m, x: m(x[None])[0].flatten())
    logits, jacobian = jacobians(model_rows)
    rows, logits = flat(jacobian).unflatten(1, (4, 3)), logits.unflatten(1, (4, 3))
    if fisher == "empirical":
        scores = nn.functional.one_hot(labels.clamp_min(0), 3) - logits.softmax(-1)
        gradients = torch.einsum("ntc,ntcp->np", scores * mask[..., None], rows)
        truth = gradients.T @ gradients
    else:
        truth = ggn(rows[mask], softmax_fisher(logits[mask]))
    store = laplace.posterior.curvature.store
    r = torch.cat([store.rows(layer.name) for layer in laplace.layers], dim=1)
    if fisher == "mc":
        runs = (300**0.5 * r).unflatten(0, (300, 3))
        runs = runs.mT @ runs  # [300, P, P], each an estimate of its own
        assert ((runs.mean(dim=0) - truth).abs() <= 6 * runs.std(dim=0) / 300**0.5 + 1e-12).all()
    else:
        assert relative(r.T @ r, truth) < 1e-10
    expected = logits.log_softmax(-1)[mask][range(int(mask.sum())), labels[mask]].sum()
    assert laplace.log_likelihood == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("tokens", ["expand", "reduce", "last"])
def test_a_text_without_labels_does_not_enter_the_head(tokens):
    case = llama(lengths=(5, 3, 6), classes=None, vocabulary=VOCABULARY, hidden=8, r=2, targets=("lm_head",))
    case.logits = lambda m, ids: m(input_ids=ids[None]).logits[0].flatten()
    labels = [x.clone() for x in case.examples]
    labels[0][:2], labels[1][:] = -100, -100
    batch = labelled_batch(case, labels, [0, 1, 2], "right", 2)
    factors = blk.LaplaceLoRA(case.model, fisher="empirical", tokens=tokens).fit([batch], progress=False).factors
    name = next(name for name in factors if "lora_A" in name)
    rows = []
    for example, y in zip(record(case, [name]), labels, strict=True):
        if at := positions_with_loss(y):
            seen = example.a[name][at]
            rows += {"expand": list(seen), "reduce": [seen.mean(dim=0)], "last": [seen[-1]]}[tokens]
    truth = sum(torch.outer(a, a) for a in rows) / len(rows)
    assert relative(factors[name].a, truth) < 1e-10


def test_the_first_token_is_predicted_by_nothing_on_whichever_side_the_padding_is():
    """Labels as collators of language models make them: the ids, -100 on padding."""
    case = llama(lengths=(5, 3, 6), classes=None, vocabulary=VOCABULARY)
    found = []
    for side in ("right", "left"):
        batch = case.batch(side=side)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        laplace = blk.LaplaceLoRA(case.model, curvature="ekfac", fisher="empirical").fit([batch], progress=False)
        trace = sum(p.to_dense().diagonal().sum() for p in laplace.posterior.values())
        found.append(torch.stack([torch.tensor(laplace.log_likelihood), trace]))
    assert relative(found[1], found[0]) < 1e-10
    with torch.no_grad():
        rows = [case.evaluated()(input_ids=ids[None]).logits[0, :-1].log_softmax(-1) for ids in case.examples]
    truth = sum(float(r.gather(1, ids[1:, None]).sum()) for r, ids in zip(rows, case.examples, strict=True))
    assert abs(float(found[0][0]) - truth) < 1e-8 * abs(truth)
