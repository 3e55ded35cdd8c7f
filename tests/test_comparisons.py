"""Reward models: pairs and ranked lists against autograd's Hessian and dense matrices, in TRL's batches and others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense import by_module, covariance, evidence, flat, ggn, relative, rows_of, trainable
from models import bert, llama
from test_reward_pairs import reward_model
from torch import Tensor, nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.curvature import shares, takeover
from bayesian_lora_kernels.curvature.likelihood import BradleyTerry, PlackettLuce
from bayesian_lora_kernels.model.deferred import AtOnce, Error
from bayesian_lora_kernels.predictive import joint

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
REWARDS = {
    "usual": torch.randn(5, 4, generator=torch.Generator().manual_seed(0), **DOUBLE),
    "two": torch.tensor([[0.3, -0.2], [4.0, 1.0]], **DOUBLE),
    "certain": torch.tensor([[60.0, 0.0, -60.0], [-60.0, 0.0, 60.0]], **DOUBLE),
}


# ---- the formulas ----------------------------------------------------------------------------------------------------


def ranking(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Log-probability of one ranking, stage by stage: the best of those that are left."""
    left, total = [int(i) for i in ranks.argsort()], torch.zeros((), **DOUBLE)
    while left:
        total = total + rewards[left[0]] - rewards[left].logsumexp(0)
        left = left[1:]
    return total


def pair(rewards: Tensor, label: float, margin: float) -> Tensor:
    difference = rewards[0] - rewards[1] - margin
    return -(label * torch.log1p((-difference).exp()) + (1 - label) * torch.log1p(difference.exp()))


@pytest.mark.parametrize("name", REWARDS)
def test_rankings_against_autograd(name: str):
    rewards, model = REWARDS[name], PlackettLuce()
    draws = torch.Generator().manual_seed(1)
    ranks = torch.stack([torch.randperm(rewards.shape[1], generator=draws) for _ in rewards])
    columns = model.exact_columns(rewards, ranks)
    assert columns.shape[-1] == rewards.shape[1] - 1
    for i, (r, y) in enumerate(zip(rewards, ranks, strict=True)):
        hessian = torch.autograd.functional.hessian(lambda x, y=y: -ranking(x, y), r)
        assert (columns[i] @ columns[i].T - hessian).abs().max() < 1e-12
        gradient = torch.autograd.functional.jacobian(lambda x, y=y: ranking(x, y), r)
        assert (model.score(rewards, ranks)[i] - gradient).abs().max() < 1e-12
        found = model.log_likelihood(rewards, ranks, None)[i]
        assert float(found) == pytest.approx(float(ranking(r, y)), abs=1e-12)


def test_pairs_against_autograd():
    model, rewards = BradleyTerry(), REWARDS["usual"][:, :2]
    labels, margin = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.2], **DOUBLE), torch.tensor([0.7, 0, 0, -0.3, 0], **DOUBLE)
    shifted = model.shifted(rewards, labels, {"margin": margin})
    columns, scores = model.exact_columns(shifted), model.score(shifted, labels)
    for i, r in enumerate(rewards):
        own = float(labels[i]), float(margin[i])
        hessian = torch.autograd.functional.hessian(lambda x, own=own: -pair(x, *own), r)
        assert (columns[i] @ columns[i].T - hessian).abs().max() < 1e-14
        gradient = torch.autograd.functional.jacobian(lambda x, own=own: pair(x, *own), r)
        assert (scores[i] - gradient).abs().max() < 1e-14
        assert float(model.log_likelihood(shifted, labels, None)[i]) == pytest.approx(float(pair(r, *own)), rel=1e-13)


def test_a_list_of_two_is_a_pair():
    rewards = REWARDS["two"]
    pairs, lists = BradleyTerry().exact_columns(rewards), PlackettLuce().exact_columns(rewards)
    assert relative(lists @ lists.mT, pairs @ pairs.mT) < 1e-12


class Later(AtOnce):
    """As on a GPU, where numbers are looked at when they have been used."""

    def __init__(self) -> None:
        self.found: list[Exception | None] = []

    def add(self, bad: Tensor, error: Error) -> None:
        if bad.any():
            self.found.append(error(0))


def test_bad_ranks_are_no_bad_indices():
    model, rewards, checks = PlackettLuce(), REWARDS["certain"], Later()
    ranks = model.check_labels(rewards, torch.tensor([[2, 0, 1], [-1, 7, 7]]), checks)
    assert "got [-1, 7, 7]" in str(checks.found[0])
    assert ranks[0].tolist() == [2, 0, 1]
    assert ranks[1].sort().values.tolist() == [0, 1, 2]
    model.exact_columns(rewards, ranks)
    model.score(rewards, ranks)


@pytest.mark.parametrize("kind", [BradleyTerry, PlackettLuce])
def test_drawn_scores_have_the_expected_fisher(kind: Any):
    """The expectation over all rankings, of which the Hessian of the one that was seen is one draw."""
    rewards = torch.tensor([0.5, -1.0, 0.2], **DOUBLE)[: 2 if kind is BradleyTerry else 3]
    n, k = 40_000, len(rewards)
    scores = kind().sampled(rewards.expand(n, k), torch.Generator().manual_seed(4))
    truth, total = torch.zeros(k, k, **DOUBLE), torch.zeros((), **DOUBLE)
    for order in itertools.permutations(range(k)):
        y = torch.tensor(order)
        p = ranking(rewards, y).exp()
        truth += p * torch.autograd.functional.hessian(lambda x, y=y: -ranking(x, y), rewards)
        total += p
    assert float(total) == pytest.approx(1)
    products = scores[:, :, None] * scores[:, None, :]
    assert ((products.mean(dim=0) - truth).abs() / products.std(dim=0) * n**0.5).max() < 5


# ---- a reward model --------------------------------------------------------------------------------------------------

LENGTHS = {"pairs": [(5, 7), (3, 2), (6, 4), (4, 6)], "lists": [(5, 3, 6), (2, 7, 4), (6, 6, 1)]}


def texts(kind: str) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [[torch.randint(3, 40, (n,), generator=generator) for n in lengths] for lengths in LENGTHS[kind]]


def padded(answers: list[Tensor], side: str = "right", extra: int = 0) -> dict[str, Tensor]:
    width = max(map(len, answers)) + extra
    ids, mask = torch.zeros(2, len(answers), width, dtype=torch.long)
    for row, answer in enumerate(answers):
        place = slice(0, len(answer)) if side == "right" else slice(width - len(answer), width)
        ids[row, place], mask[row, place] = answer, 1
    return {"input_ids": ids, "attention_mask": mask}


def beside(examples: list[list[Tensor]], form: str = "{key}_{side}", **padding: Any) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {}
    for i, side in enumerate(("chosen", "rejected")):
        for key, value in padded([one[i] for one in examples], **padding).items():
            batch[form.format(key=key, side=side)] = value
    return batch


def below(examples: list[list[Tensor]], **padding: Any) -> dict[str, Tensor]:
    """As TRL's collator: chosen ones first."""
    return padded([one[i] for i in (0, 1) for one in examples], **padding)


def lists(examples: list[list[Tensor]], **padding: Any) -> dict[str, Tensor]:
    together = padded([answer for one in examples for answer in one], **padding)
    return {key: value.unflatten(0, (len(examples), -1)) for key, value in together.items()}


class Truth:
    """Rewards `[N, K]` and Jacobians of every answer by itself, without padding; the GGN and evidence of all."""

    def __init__(self, model: nn.Module, examples: list[list[Tensor]], losses: list[Any], weights: Any = None):
        parameters = trainable(model)
        rewards, rows = [], []
        for example in examples:
            r = torch.cat([model(input_ids=ids[None]).logits[0] for ids in example])
            rewards.append(r.detach())
            rows.append(rows_of(r, list(parameters.values())))
        stacked = {name: torch.stack(parts) for name, *parts in zip(parameters, *rows, strict=True)}
        self.rewards, self.jacobian = torch.stack(rewards), by_module(stacked, lead=2)
        self.weights = torch.ones(len(examples), **DOUBLE) if weights is None else weights
        self.fisher = torch.stack(
            [torch.autograd.functional.hessian(lambda x, f=f: -f(x), r) for r, f in zip(rewards, losses, strict=True)]
        )
        each = torch.stack([f(r) for r, f in zip(rewards, losses, strict=True)])
        self.log_likelihood = float((self.weights * each).sum())
        self.curvature = ggn(flat(self.jacobian), self.weights[:, None, None] * self.fisher)
        self.theta = torch.cat([w.detach().flatten() for w in by_module(parameters).values()])

    def predicted(self, prior: float) -> Tensor:
        return covariance(flat(self.jacobian), self.curvature + prior * torch.eye(len(self.theta), **DOUBLE))

    def evidence(self, prior: float) -> float:
        return float(evidence(self.log_likelihood, self.theta, self.curvature, torch.full_like(self.theta, prior)))


def check(laplace: blk.LaplaceLoRA, truth: Truth, batch: Any, n: int) -> None:
    assert laplace.n_examples == n
    assert laplace.log_likelihood == pytest.approx(truth.log_likelihood, rel=1e-9)
    assert float(laplace.log_marginal_likelihood()) == pytest.approx(truth.evidence(0.8), rel=1e-8)
    found = laplace.predict(batch)
    assert relative(found.mean, truth.rewards) < 1e-8
    assert relative(found.covariance, truth.predicted(0.8)) < 1e-7


BATCHES = {
    "beside, right": lambda e: beside(e),
    "beside, left": lambda e: beside(e, side="left", extra=2),
    "beside, TRL's other names": lambda e: beside(e, "{side}_{key}", extra=1),
    "below, right": lambda e: below(e, extra=3),
    "below, left": lambda e: below(e, side="left"),
    "lists": lambda e: lists(e, extra=1),
}


PLACES = [("llama", form) for form in BATCHES] + [("bert", form) for form in BATCHES if "left" not in form]


@pytest.mark.parametrize(("family", "form"), PLACES)
def test_pairs_in_any_batch(family: str, form: str):
    """Padded here and there, in batches of two and in one: always the dense matrix of the answers by themselves."""
    model, examples = reward_model(family).eval(), texts("pairs")
    truth = Truth(model, examples, [lambda r: pair(r, 1.0, 0.0)] * 4)
    parts = [examples[:3], examples[3:]] if "below" in form else [examples]
    laplace = blk.LaplaceLoRA(model, likelihood="bradley-terry", curvature="exact", prior_precision=0.8)
    laplace.fit([BATCHES[form](part) for part in parts], progress=False)
    check(laplace, truth, lists(examples), 4)


def test_the_padding_of_a_shorter_side_is_masked():
    """Sides of texts of one length each need no masks, and have other widths."""
    model, examples = reward_model("bert").eval(), [[one[0][:3], one[1].repeat(4)[:6]] for one in texts("pairs")]
    truth = Truth(model, examples, [lambda r: pair(r, 1.0, 0.0)] * 4)
    laplace = blk.LaplaceLoRA(model, likelihood="bradley-terry", curvature="exact", prior_precision=0.8)
    batch = {key: value for key, value in beside(examples).items() if "mask" not in key}
    check(laplace.fit([batch], progress=False), truth, batch, 4)


def test_labels_margins_and_weights_of_pairs():
    model, examples = reward_model().eval(), texts("pairs")
    columns = {
        "labels": torch.tensor([1.0, 0.5, 1.0, 0.0]),
        "margin": torch.tensor([0.5, 0.0, -1.0, 0.0]),
        "weights": torch.tensor([2.0, 0.5, 0.0, 1.0]),
    }
    own = list(zip(columns["labels"].tolist(), columns["margin"].tolist(), strict=True))
    losses = [lambda r, one=one: pair(r, *one) for one in own]
    truth = Truth(model, examples, losses, columns["weights"].double())
    laplace = blk.LaplaceLoRA(model, likelihood="bradley-terry", curvature="exact", prior_precision=0.8)
    for batch in (beside(examples), below(examples, extra=2), lists(examples)):
        check(laplace.fit([{**batch, **columns, "return_loss": True}], progress=False), truth, beside(examples), 4)


@pytest.mark.parametrize("labelled", [False, True])
def test_ranked_lists(labelled: bool):
    """Lists of three, and of two in another batch."""
    model, examples, short = reward_model().eval(), texts("lists"), texts("pairs")[:2]
    ranks = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 2, 0]]) if labelled else torch.arange(3).expand(3, 3)
    truth = Truth(model, examples, [lambda r, y=y: ranking(r, y) for y in ranks])
    more = Truth(model, short, [lambda r: pair(r, 1.0, 0.0)] * 2)
    truth.curvature, truth.log_likelihood = truth.curvature + more.curvature, truth.log_likelihood + more.log_likelihood
    batch = lists(examples, side="left", extra=1)
    laplace = blk.LaplaceLoRA(model, likelihood="plackett-luce", curvature="exact", prior_precision=0.8)
    laplace.fit([{**batch, **({"labels": ranks} if labelled else {})}, lists(short)], progress=False)
    check(laplace, truth, lists(examples), 5)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_layerwise_curvature_of_pairs_is_that_of_two_calls(curvature: str):
    """The same pairs through a forward of one's own and a softmax over two classes, in batches without padding."""

    def two_calls(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([model(input_ids=batch[f"input_ids_{side}"]).logits for side in ("chosen", "rejected")], dim=1)

    model, examples = reward_model().eval(), [[one[0][:3], one[1][:2].repeat(2)[:3]] for one in texts("pairs")]
    settings: dict[str, Any] = {"curvature": curvature, "rank": None}
    found = blk.LaplaceLoRA(model, likelihood="bradley-terry", **settings).fit([below(examples)], progress=False)
    loader = [{**beside(examples), "labels": torch.zeros(4, dtype=torch.long)}]
    truth = blk.LaplaceLoRA(model, forward=two_calls, **settings).fit(loader, progress=False)
    for name, factors in found.factors.items():
        assert relative(factors.a, truth.factors[name].a) < 1e-10
        assert relative(found.posterior[name].to_dense(), truth.posterior[name].to_dense()) < 1e-9
    assert found.log_likelihood == pytest.approx(truth.log_likelihood, rel=1e-10)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
def test_padding_changes_nothing(curvature: str):
    model, examples = reward_model().eval(), texts("pairs")
    found = []
    for extra, side in ((0, "right"), (9, "right"), (4, "left")):
        laplace = blk.LaplaceLoRA(model, likelihood="bradley-terry", curvature=curvature, rank=None)
        laplace.fit([beside(examples, extra=extra, side=side)], progress=False)
        found.append(laplace.predict(below(examples)).covariance)
    assert relative(found[1], found[0]) < 1e-7
    assert relative(found[2], found[0]) < 1e-7


def test_predictions_of_single_answers_pairs_and_lists():
    model, examples = reward_model().eval(), texts("lists")
    laplace = blk.LaplaceLoRA(model, likelihood="plackett-luce", curvature="exact").fit([lists(examples)], False)
    joint = laplace.predict(lists(examples, extra=2))
    single = laplace.predict(padded([answer for one in examples for answer in one]))
    assert single.mean.shape == (9, 1)
    assert relative(single.mean.view(3, 3), joint.mean) < 1e-10
    assert relative(single.variance.view(3, 3), joint.variance) < 1e-8
    with pytest.raises(ValueError, match="probs: expected classes, or two answers"):
        single.probs()
    draws = joint.sample(200_000, torch.Generator().manual_seed(0))
    mean, variance = joint.difference(2, 0)
    difference = draws[:, :, 2] - draws[:, :, 0]
    assert relative(difference.mean(dim=0), mean) < 0.05
    assert relative(difference.var(dim=0), variance) < 0.02
    without_level = laplace.predict(lists(examples), differences=True)
    assert relative(torch.stack(without_level.difference(2, 0)), torch.stack((mean, variance))) < 1e-8
    with pytest.raises(ValueError, match="difference: expected two of the logits 0 to 2, got 1 and 1"):
        joint.difference(1, 1)


def test_calibration_of_pairs_is_that_of_classes():
    """Every second pair is turned round for a classifier, which would learn nothing of labels of one class."""
    model, examples = reward_model().eval(), texts("pairs")
    laplace = blk.LaplaceLoRA(model, likelihood="bradley-terry", curvature="exact").fit([below(examples)], False)
    laplace.calibrate([beside(examples[:1]), below(examples[1:])], progress=False)
    assert laplace.calibration is not None

    def two_scores(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        ids, mask = (batch[key].flatten(0, 1) for key in ("input_ids", "attention_mask"))
        return model(input_ids=ids, attention_mask=mask).logits.view(-1, 2)

    classes = blk.LaplaceLoRA(model, forward=two_scores, curvature="exact")
    classes.fit([{**lists(examples), "labels": torch.zeros(4, dtype=torch.long)}], False)
    turned = [one if i % 2 == 0 else one[::-1] for i, one in enumerate(examples)]
    classes.calibrate([{**lists(turned), "labels": torch.tensor([0, 1, 0, 1])}], progress=False)
    assert classes.calibration is not None
    for name, table in classes.calibration.weights.items():
        assert relative(laplace.calibration.weights[name], table) < 1e-6
    assert relative(laplace.predict(lists(examples)).probs(), classes.predict(lists(examples)).probs()) < 1e-6
    laplace.optimize_prior_precision("nll", val_loader=[beside(examples)])
    classes.optimize_prior_precision("nll", val_loader=[{**lists(examples), "labels": torch.zeros(4).long()}])
    assert float(laplace.prior_precision) == pytest.approx(float(classes.prior_precision), rel=1e-6)


def test_influence_and_choice_of_pairs():
    model, examples = reward_model().eval(), texts("pairs")
    laplace = blk.LaplaceLoRA(model, likelihood="bradley-terry", curvature="exact").fit([below(examples)], False)
    truth = Truth(model, examples, [lambda r: pair(r, 1.0, 0.0)] * 4)
    across = laplace.joint(lists(examples, extra=1), lists(examples))
    jacobian = flat(truth.jacobian).flatten(0, 1)
    sigma = torch.linalg.inv(truth.curvature + torch.eye(len(truth.theta), **DOUBLE))
    assert relative(across, jacobian @ sigma @ jacobian.T) < 1e-7
    slopes = [torch.autograd.functional.jacobian(lambda r: -pair(r, 1.0, 0.0), r) for r in truth.rewards]
    losses = torch.einsum("nc,ncp->np", torch.stack(slopes), flat(truth.jacobian))
    found = blk.influence(laplace, [beside(examples)], [below(examples, extra=2)], progress=False)
    assert relative(found, -losses @ sigma @ losses.T) < 1e-7
    gain = blk.select_batch(laplace, lists(examples), 1)[1]
    p = (truth.rewards[:, 0] - truth.rewards[:, 1]).sigmoid()
    variance = laplace.predict(lists(examples)).difference()[1]
    assert float(gain[0]) == pytest.approx(float(0.5 * torch.log1p(p * (1 - p) * variance).max()), rel=1e-6)
    with pytest.raises(ValueError, match="likelihood: bradley-terry expects the rewards of two answers"):
        blk.select_batch(laplace, below(examples), 1)
    weighted = {**beside(examples), "weights": torch.tensor([0.5, 1.0, 2.0, 3.0])}  # influence is of a unit of weight
    assert torch.equal(blk.influence(laplace, [weighted], [below(examples, extra=2)], progress=False), found)


def test_influence_sizes_pieces_of_joint_by_the_answers(monkeypatch: pytest.MonkeyPatch):
    examples, steps = texts("pairs"), []

    def noted(layers: Any, forward: Any, batch: Any, step: int) -> Any:
        steps.append(step)
        return captures(layers, forward, batch, step)

    captures = joint.captures
    monkeypatch.setattr(joint, "captures", noted)
    laplace = blk.LaplaceLoRA(reward_model().eval(), likelihood="bradley-terry", memory_budget=200_000)
    laplace.fit([beside(examples)], progress=False)
    found = laplace.joint(beside(examples))
    assert relative(laplace.joint(beside(examples), outputs=[0, 1]), found) < 1e-12
    assert steps[0] == steps[1] > 1


def test_it_is_saved_verified_and_estimated(tmp_path: Any):
    model, examples = reward_model().eval(), texts("pairs")
    laplace = blk.LaplaceLoRA(model, likelihood="bradley-terry").fit([beside(examples)], False)
    laplace.save_pretrained(tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(model, tmp_path)
    assert again.likelihood == "bradley-terry"
    assert relative(again.predict(lists(examples)).covariance, laplace.predict(lists(examples)).covariance) < 1e-12
    report = laplace.verify(below(examples, extra=2))
    assert report.ok
    assert sum(one.error is not None for one in report.agreements) == 5
    estimate = laplace.memory_estimate(beside(examples))
    assert min(*estimate.fit.values(), *estimate.predict.values()) > 0


def test_a_pair_by_itself_must_score_as_in_the_batch():
    """GPT-NeoX-like absolute positions under padding on the left would; here a model that counts padding."""
    model = reward_model().eval()
    whole = model.base_model.model.forward

    def counts_padding(input_ids: Any = None, attention_mask: Any = None, **rest: Any) -> Any:
        output = whole(input_ids=input_ids, attention_mask=attention_mask, **rest)
        output.logits = output.logits * (1 + input_ids.shape[1] / 100)
        return output

    model.base_model.model.forward = counts_padding
    with pytest.raises(ValueError, match=r"example \d of the batch has other logits among padding"):
        blk.LaplaceLoRA(model, likelihood="bradley-terry").fit([beside(texts("pairs"))], False)


def test_examples_are_pairs_wherever_they_are_told_apart():
    """Digests of checkpoints, what is left of a batch without some, and shares that repeat some."""
    forward = blk.LaplaceLoRA(reward_model(), likelihood="bradley-terry")._forward
    examples, margin = texts("pairs"), torch.tensor([0.1, 0.2, 0.3, 0.4])
    batch = {**below(examples), "margin": margin}
    digests = takeover.example_digests(batch, forward.read)
    assert digests is not None
    other = {**beside(examples[::-1], side="left", extra=3), "margin": margin.flip(0)}
    again = takeover.example_digests(other, forward.read)
    assert again is not None
    assert torch.equal(again.flip(0), digests)
    left = [*takeover.uncounted(batch, digests, takeover.counter(digests[1:2]), forward.read)]
    found = [forward.read(part).given for part, _ in left]
    assert [part["margin"].tolist() for part in found] == [margin[:1].tolist(), margin[2:].tolist()]
    whole = forward.read(batch).given["input_ids"]
    assert all(torch.equal(part["input_ids"], whole[rows]) for part, rows in zip(found, ([0], [2, 3]), strict=True))
    shared = shares.WithoutRepeats(SimpleNamespace(batch_sampler=None), [(4, 3)], forward.read)
    shared.loader = [batch]
    (cut,) = shared
    assert torch.equal(forward.read(cut).given["input_ids"], whole[:3])


def test_the_empirical_fisher_takes_no_ties():
    """It would be that of both orders with half a weight each, `(1 - p)^2 / 2 + p^2 / 2`; the score is 1/2 - p."""
    model, examples = reward_model().eval(), texts("pairs")
    laplace = blk.LaplaceLoRA(model, likelihood="bradley-terry", curvature="exact", fisher="empirical")
    with pytest.raises(ValueError, match=r"batch 0: labels: expected 0 or 1 with fisher='empirical', got 0\.5"):
        laplace.fit([{**beside(examples), "labels": torch.full((4,), 0.5)}], progress=False)
    half = torch.full((4,), 0.5)
    orders = [{**beside(examples), "weights": half, "labels": y} for y in (torch.ones(4), torch.zeros(4))]
    found = laplace.fit(orders, progress=False).predict(beside(examples)).covariance
    truth = Truth(model, examples, [lambda r: pair(r, 1.0, 0.0)] * 4)
    p = (truth.rewards[:, 0] - truth.rewards[:, 1]).sigmoid()
    square = ((1 - p).square() + p.square()) / 2
    truth.curvature = ggn(
        flat(truth.jacobian), square[:, None, None] * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], **DOUBLE)
    )
    assert relative(found, truth.predicted(1.0)) < 1e-7
    tie = {**beside(examples), "labels": half}  # the gradient of a tie's loss is no square
    assert blk.influence(laplace, [tie], [tie], progress=False).shape == (4, 4)


EMPTY = torch.tensor([[[1, 1], [0, 0]]])


@pytest.mark.parametrize(
    ("likelihood", "batch", "message"),
    [
        ("bradley-terry", {"input_ids_chosen": [[1, 2]]}, "input_ids_rejected: missing"),
        ("bradley-terry", {"input_ids": [[1, 2]] * 3}, "input_ids: expected an even number of rows"),
        ("bradley-terry", {"input_ids": [[[1, 2]] * 3]}, r"bradley-terry expects the rewards of two answers, \[N, 2\]"),
        ("bradley-terry", {"input_ids": [[1, 2]] * 2, "labels": [0]}, "labels: expected floats of shape"),
        ("bradley-terry", {"input_ids": [[1, 2]] * 2, "labels": [1.5]}, "labels: expected probabilities from 0 to 1"),
        ("bradley-terry", {"input_ids": [[1, 2]] * 2, "margin": [1.0, 2.0]}, "margin: expected one number for each"),
        (
            "bradley-terry",
            {"input_ids": [[1, 2]] * 2, "margin": [1.0], "labels": [0.5]},
            "margin: expected finite numbers, and 0 where the label is not 1",
        ),
        ("bradley-terry", {"input_ids": EMPTY, "attention_mask": EMPTY}, "answer 1 of example 0 has no token"),
        (
            "bradley-terry",
            {"input_ids_chosen": [[1]], "input_ids_rejected": [[1]], "input_ids": [[1]]},
            "got all three",
        ),
        ("bradley-terry", {"input_ids_chosen": [[1], [2]], "input_ids_rejected": [[1]]}, "expected one for each of 2"),
        ("bradley-terry", torch.zeros(2, 3), "batch: expected a mapping with input_ids_chosen"),
        ("bradley-terry", {"input_ids": [[1, 2], [3]]}, "input_ids: expected rows of the same length"),
        ("plackett-luce", {"input_ids": [[1, 2]] * 2}, "plackett-luce expects the rewards of 2 to 128 answers"),
        ("plackett-luce", {"input_ids": [[[1, 2]] * 3], "labels": [[0, 1, 1]]}, "expected each of the ranks 0 to 2"),
        ("plackett-luce", {"input_ids": [[[1, 2]] * 3], "labels": [0]}, "labels: expected the rank of each answer"),
        (
            "plackett-luce",
            {"input_ids": [[[1, 2]] * 3], "margin": [1.0]},
            "margin: expected likelihood='bradley-terry'",
        ),
        ("bradley-terry", {"input_ids": [[1, 2]] * 2, "weights": [-1.0]}, "weights: expected finite numbers, not neg"),
        ("bradley-terry", {"input_ids": [[1, 2]] * 2, "weights": [1.0, 1.0]}, "weights: expected one number for each"),
        ("bradley-terry", {"input_ids": [[1, 2]] * 2, "weights": [0.0]}, "or weights that are all 0"),
    ],
)
def test_what_is_no_pair(likelihood: Any, batch: Any, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        blk.LaplaceLoRA(reward_model(), likelihood=likelihood).fit([batch], progress=False)


def test_what_is_no_reward_model():
    small = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match="expected a reward model, which gives a text one score"):
        blk.LaplaceLoRA(bert().model, likelihood="bradley-terry").fit([small], False)
    with pytest.raises(ValueError, match="expected a reward model, which gives a text one score"):
        blk.LaplaceLoRA(llama().model, likelihood="bradley-terry").fit([small], False)
    with pytest.raises(ValueError, match="class_token_ids: expected none"):
        blk.LaplaceLoRA(llama().model, class_token_ids=[1, 2], likelihood="bradley-terry")


@pytest.mark.parametrize("likelihood", ["bradley-terry", "plackett-luce"])
@pytest.mark.parametrize("tokens", ["reduce", "last"])
def test_one_row_of_several_answers_is_refused(likelihood: Any, tokens: Any):
    """The last token of all answers is that of the one that happens to stand last."""
    with pytest.raises(ValueError, match=f"tokens: expected 'expand' with likelihood='{likelihood}', got '{tokens}'"):
        blk.LaplaceLoRA(reward_model(), likelihood=likelihood, tokens=tokens)
