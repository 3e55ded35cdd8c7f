"""Influence: against dense second-order formulas by autograd, and against what a model does whose data change."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import dense
import models
import pytest
import torch
from test_joint import KINDS, fitted, precision
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.attribution import scores
from bayesian_lora_kernels.model.dry_run import LiveBytes


def loss_gradients(case: models.Case) -> Tensor:
    """`[N, P]` by autograd, one example at a time."""
    model = case.evaluated()
    parameters = dense.trainable(model)
    rows = []
    for example, label in zip(case.examples, case.labels, strict=True):
        loss = -case.logits(model, example).log_softmax(dim=-1)[label]
        rows.append(dense.rows_of(loss[None], list(parameters.values())))
    stacked = {name: torch.stack(parts) for name, *parts in zip(parameters, *rows, strict=True)}
    return dense.flat(dense.by_module(stacked, lead=2)).squeeze(1)


@pytest.mark.parametrize("curvature", KINDS)
@pytest.mark.parametrize("make", [models.llama, models.mlp])
def test_it_is_the_dense_second_order_formula(make, curvature):
    case = make()
    laplace = fitted(case, curvature=curvature, rank=2, rank_threshold=4)
    logits, jacobian = dense.jacobians(case)
    g = loss_gradients(case)
    expected = -g @ torch.linalg.solve(precision(laplace, case, jacobian, logits), g.mT)
    n = len(g)
    found = blk.influence(laplace, case.loader(2), [case.batch()], progress=False)
    assert found.dtype == torch.float64
    assert dense.relative(found, expected) < 1e-9
    few = blk.influence(laplace, case.loader(3), [case.batch([2]), case.batch([0, 1])], progress=False)
    assert dense.relative(few, expected[[2, 0, 1]]) < 1e-9
    laplace.prior_precision = {layer.name: 0.5 + i for i, layer in enumerate(laplace.layers)}
    damped = -g @ torch.linalg.solve(precision(laplace, case, jacobian, logits), g.mT)
    laplace_damping, laplace.prior_precision = laplace.prior_precision, 0.3
    other = blk.influence(laplace, case.loader(n), [case.batch()], damping=laplace_damping, progress=False)
    assert dense.relative(other, damped) < 1e-9


def test_queries_that_do_not_fit_go_in_blocks():
    case = models.llama()
    expected = blk.influence(fitted(case), case.loader(2), case.loader(4), progress=False)
    laplace = fitted(case, memory_budget=1)
    assert dense.relative(blk.influence(laplace, case.loader(2), case.loader(4), progress=False), expected) < 1e-12
    with pytest.raises(ValueError, match="train_loader: the queries do not fit the memory at once"):
        blk.influence(laplace, iter(case.loader(2)), case.loader(4), progress=False)


def test_memory_is_that_of_the_budget(monkeypatch):
    """Gradients and solved queries that live at once."""
    case = models.llama(lengths=[4] * 10, hidden=32, dtype=torch.float32)
    budget = 2**14
    laplace = fitted(case, memory_budget=budget)
    p = sum(laplace.posterior.curvature.n_parameters.values())
    assert 10 * p * 4 > budget  # neither the queries nor the training data would fit
    expected = blk.influence(fitted(case), case.loader(10), case.loader(10), progress=False)
    live, blocks, original = LiveBytes(), [], scores._blocks

    def counted(*args):
        for block in original(*args):
            blocks.append(len(next(iter(block.values()))))
            for tensor in block.values():
                live.add(tensor, lambda: "queries")
            yield block

    def measured(passes, recorded, **kwargs):
        for part, found in backward(passes, recorded, **kwargs):
            for tensor in found.values():
                live.add(tensor, lambda: "gradients")
            yield part, found

    backward = scores.Passes.backward
    monkeypatch.setattr(scores, "_blocks", counted)
    monkeypatch.setattr(scores.Passes, "backward", measured)
    found = blk.influence(laplace, case.loader(10), case.loader(10), progress=False)
    assert dense.relative(found, expected) < 1e-5
    assert sum(blocks) == 10
    assert len(blocks) > 1
    (peak,) = live.peak.values()
    assert 4 * p <= sum(peak.values()) <= budget


def test_positions_add_up():
    """Logits with a token dimension: an example's loss is the sum over its positions that carry one."""
    case = models.llama(classes=None)
    batch = case.batch()
    labels = batch["input_ids"].roll(-1, dims=1).masked_fill(batch["attention_mask"].roll(-1, dims=1) == 0, -100)
    labels[:, -1] = -100

    def forward(model, inputs):
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits

    data = [{**batch, "labels": labels}]
    laplace = blk.LaplaceLoRA(case.model, forward, prior_precision=2.0, fisher="empirical").fit(data, progress=False)
    found = blk.influence(laplace, data, data, progress=False)
    model, rows = case.evaluated(), []
    parameters = list(dense.trainable(model).values())
    for i, ids in enumerate(case.examples):
        logits = model(input_ids=ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        assert (labels[i] != -100).sum() == len(ids) - 1
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    g = torch.stack(rows)
    dense_precision = torch.block_diag(*(laplace.posterior[name].to_dense() for name in laplace.posterior))
    assert dense.relative(found, -g @ torch.linalg.solve(dense_precision, g.mT)) < 1e-9


def test_the_sign_and_scale_are_those_of_more_weight():
    """A linear model, whose exact curvature is the Hessian: the minimum is found again with other weights."""
    torch.manual_seed(0)
    n, d, classes, prior = 12, 3, 3, 0.7
    x, y = torch.randn(n, d, dtype=torch.float64), torch.randint(classes, (n,))
    model = torch.nn.Linear(d, classes, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)

    def losses() -> Tensor:
        return torch.nn.functional.cross_entropy(model(x), y, reduction="none")

    def train(weights: Tensor) -> Tensor:
        def objective(w: Tensor) -> Tensor:
            each = torch.nn.functional.cross_entropy(x @ w.reshape(classes, d).mT, y, reduction="none")
            return (weights * each).sum() + 0.5 * prior * w.square().sum()

        w = model.weight.detach().flatten().clone()
        for _ in range(12):  # Newton's method
            gradient = torch.autograd.functional.jacobian(objective, w)
            w = w - torch.linalg.solve(torch.autograd.functional.hessian(objective, w), gradient)
        assert gradient.norm() < 1e-12
        with torch.no_grad():
            model.weight.copy_(w.reshape(classes, d))
        return losses().detach()

    ones = torch.ones(n, dtype=torch.float64)
    step, expected = 1e-4, []
    for i in range(n):
        more, less = (train(ones.index_fill(0, torch.tensor(i), 1 + sign * step)) for sign in (1, -1))
        expected.append((more - less) / (2 * step))
    train(ones)
    laplace = blk.LaplaceLoRA(model, curvature="exact", prior_precision=prior, fisher="exact")
    laplace.fit([(x, y)], progress=False)
    found = blk.influence(laplace, [(x, y)], [(x, y)], progress=False)
    assert dense.relative(found, torch.stack(expected, dim=1)) < 1e-6


def test_weights_and_noise_are_those_of_the_data():
    """A linear regression: the derivative of what is found in closed form, with respect to the weights."""
    generator = torch.Generator().manual_seed(0)
    n, d, c, prior, noise = 9, 4, 2, 0.6, 0.3
    x, y = (torch.randn(n, k, dtype=torch.float64, generator=generator) for k in (d, c))
    weights = torch.rand(n, dtype=torch.float64, generator=generator) + 0.5

    def minimum(weights: Tensor) -> Tensor:
        gram = (x * weights[:, None]).mT @ x / noise + prior * torch.eye(d, dtype=torch.float64)
        return torch.linalg.solve(gram, (x * weights[:, None]).mT @ y / noise)

    def losses(weights: Tensor) -> Tensor:
        return 0.5 * (y - x @ minimum(weights)).square().sum(dim=1) / noise

    model = torch.nn.Linear(d, c, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(minimum(weights).mT)
    data = [{"x": x[rows], "labels": y[rows], "weights": weights[rows]} for rows in (slice(0, 5), slice(5, None))]
    for curvature in ("exact", "kfac"):
        laplace = blk.LaplaceLoRA(
            model,
            lambda model, batch: model(batch["x"]),
            likelihood="regression",
            curvature=curvature,
            prior_precision=prior,
            noise_variance=noise,
        ).fit(data, progress=False)
        found = blk.influence(laplace, data, data, progress=False)
        assert dense.relative(found, torch.autograd.functional.jacobian(losses, weights)) < 1e-10
        without = [{**batch, "weights": torch.zeros(len(batch["x"]))} for batch in data]
        assert torch.equal(blk.influence(laplace, without, without, progress=False), found)


@pytest.mark.parametrize("curvature", KINDS)
def test_an_index_answers_within_its_bound(curvature, tmp_path):
    case = models.llama(lengths=(5, 3, 6, 4, 4, 2, 3))
    laplace = fitted(case, curvature=curvature)
    queries = [case.batch([1, 3])]
    expected = blk.influence(laplace, case.loader(3), queries, progress=False)
    shares = []
    for rank in (1, 3, 7):
        index = blk.InfluenceIndex.build(laplace, case.loader(3), tmp_path / f"{rank}", rank, progress=False)
        found = blk.InfluenceIndex.open(laplace, tmp_path / f"{rank}").influence(queries)
        assert torch.equal(found.values, index.influence(queries).values)
        assert ((found.values - expected).abs() <= found.bound + 1e-9 * expected.abs().max()).all()
        assert (index.rank, index.n_examples) == (rank, 7)
        shares.append(index.kept)
    assert dense.relative(found.values, expected) < 1e-9  # as many directions as examples
    assert shares[0] < shares[1] < shares[2] <= 1
    assert shares[2] > 1 - 1e-12
    # the best share that a rank can have
    g = loss_gradients(case)
    logits, jacobian = dense.jacobians(case)
    self_influence = g @ torch.linalg.solve(precision(laplace, case, jacobian, logits), g.mT)
    values = torch.linalg.eigvalsh(self_influence).flip(0)
    assert shares[1] == pytest.approx(float(values[:3].sum() / values.sum()), rel=0.02)


def test_an_index_knows_its_posterior(tmp_path):
    case = models.llama()
    laplace = fitted(case)
    folder = tmp_path / "index"
    build = blk.InfluenceIndex.build
    build(laplace, case.loader(2), folder, 2, damping=0.9, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index"]
    with pytest.raises(FileExistsError, match="exists; expected a folder that is to be made"):
        build(laplace, case.loader(2), folder, 2, progress=False)
    laplace.prior_precision = 5.0  # the index has a damping of its own
    blk.InfluenceIndex.open(laplace, folder)
    laplace.save_pretrained(tmp_path / "posterior")
    again = blk.LaplaceLoRA.from_pretrained(case.model, tmp_path / "posterior")
    blk.InfluenceIndex.open(again, folder)
    with pytest.raises(ValueError, match="of another posterior"):
        blk.InfluenceIndex.open(fitted(case, curvature="exact"), folder)
    other = models.llama(scale=0.4)
    with pytest.raises(ValueError, match="of an adapter with other weights"):
        blk.InfluenceIndex.open(fitted(other), folder)
    base = next(p for p in case.model.parameters() if not p.requires_grad)
    with torch.no_grad():
        base.add_(1.0)
    with pytest.raises(ValueError, match="the base model is not the one"):
        blk.InfluenceIndex.open(fitted(case), folder)
    for name, message in (("influence.json", "damaged"), ("influence.safetensors", "damaged or altered")):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[:-20] + bytes(20))
        with pytest.raises(ValueError, match=message):
            blk.InfluenceIndex.open(laplace, folder)
        path.write_bytes(content)
    content = json.loads((folder / "influence.json").read_text())
    (folder / "influence.json").write_text(json.dumps({**content, "kept": 1.0}))
    with pytest.raises(ValueError, match="does not match its checksum"):
        blk.InfluenceIndex.open(laplace, folder)
    with pytest.raises(FileNotFoundError, match="no influence index here"):
        blk.InfluenceIndex.open(laplace, tmp_path)


@pytest.mark.parametrize("curvature", KINDS)
def test_an_index_tells_fits_to_other_data(curvature, tmp_path):
    """Data that leave most of the prior's variance alone, so that random directions hardly tell them apart."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2000, 3))
    x, y = torch.randn(4, 2000) / 100, torch.tensor([0, 1, 2, 0])

    def fit(rows: slice) -> blk.LaplaceLoRA:
        return blk.LaplaceLoRA(model, curvature=curvature).fit([(x[rows], y[rows])], progress=False)

    laplace = fit(slice(0, 2))
    blk.InfluenceIndex.build(laplace, [(x[:2], y[:2])], tmp_path / "index", 2, progress=False)
    laplace.save_pretrained(tmp_path / "posterior")
    blk.InfluenceIndex.open(blk.LaplaceLoRA.from_pretrained(model, tmp_path / "posterior"), tmp_path / "index")
    with pytest.raises(ValueError, match="of another posterior"):
        blk.InfluenceIndex.open(fit(slice(2, 4)), tmp_path / "index")


def test_an_index_knows_its_noise(tmp_path):
    torch.manual_seed(0)
    x, model = torch.randn(4, 3), torch.nn.Linear(3, 2)
    laplace = blk.LaplaceLoRA(model, likelihood="regression").fit([(x, x[:, :2])], progress=False)
    blk.InfluenceIndex.build(laplace, [(x, x[:, :2])], tmp_path / "index", 2, progress=False)
    laplace.noise_variance = 0.5
    with pytest.raises(ValueError, match="of another posterior"):
        blk.InfluenceIndex.open(laplace, tmp_path / "index")


class Turning:
    """Batches of which each time shows a slice."""

    def __init__(self, batches: Sequence[dict[str, Tensor]], times: Sequence[slice]):
        self.batches, self.times = batches, iter(times)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches[next(self.times)])


def test_the_order_of_the_examples_is_known(tmp_path):
    torch.manual_seed(0)
    x, y, model = torch.randn(6, 3), torch.arange(6) % 2, torch.nn.Linear(3, 2)
    dataset, plain = TensorDataset(x, y), [(x, y)]
    laplace = blk.LaplaceLoRA(model, memory_budget=1).fit(plain, progress=False)
    build, folder = blk.InfluenceIndex.build, tmp_path / "index"
    index = build(blk.LaplaceLoRA(model).fit(plain, progress=False), plain, folder, 1, progress=False)
    share = DistributedSampler(dataset, num_replicas=2, rank=1, shuffle=False)
    for loader, message in (
        (DataLoader(dataset, batch_size=2, shuffle=True), "its RandomSampler draws the order of the examples"),
        (DataLoader(dataset, batch_size=2, sampler=share), "its DistributedSampler gives this process one of 2 shares"),
    ):
        with pytest.raises(ValueError, match=f"train_loader: {message}"):
            blk.influence(laplace, loader, plain, progress=False)
        with pytest.raises(ValueError, match=f"train_loader: {message}"):
            build(laplace, loader, tmp_path / "other", 1, progress=False)
        for call in (lambda q: blk.influence(laplace, plain, q, progress=False), index.influence):
            with pytest.raises(ValueError, match=f"queries: {message}"):
                call(loader)
    cut = [(x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4)]
    forth, back, less, more = slice(None), slice(None, None, -1), slice(0, 2), slice(0, 3)
    for times, batch in (((forth, back), 0), ((forth, less), 2), ((less, more), 2)):
        with pytest.raises(ValueError, match=f"train_loader: gone over more than once, and batch {batch} is not what"):
            blk.influence(laplace, Turning(cut, times), plain, progress=False)
        with pytest.raises(ValueError, match=f"train_loader: gone over more than once, and batch {batch} is not what"):
            build(index._laplace, Turning(cut, times), tmp_path / "other", 1, progress=False)
    blk.influence(laplace, Turning(cut, [forth] * 6), plain, progress=False)


def test_a_curvature_that_is_spread_is_refused(tmp_path, monkeypatch):
    case = models.llama()
    laplace = fitted(case, curvature="exact")
    blk.InfluenceIndex.build(laplace, case.loader(2), tmp_path / "index", 2, progress=False)
    monkeypatch.setattr(laplace._fit.curvature.processes, "size", 2)
    with pytest.raises(ValueError, match="influence: the curvature's rows are spread over 2 processes"):
        blk.InfluenceIndex.open(laplace, tmp_path / "index")


def unlabelled(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


def test_what_is_refused(tmp_path):
    case = models.llama()
    laplace = blk.LaplaceLoRA(case.model, **case.arguments)
    data = case.loader(2)
    with pytest.raises(RuntimeError, match=r"influence: call fit\(loader\) first"):
        blk.influence(laplace, data, data, progress=False)
    laplace = fitted(case)
    with pytest.raises(ValueError, match="queries: batch 0 has no labels"):
        blk.influence(laplace, data, unlabelled(data), progress=False)
    with pytest.raises(ValueError, match="train_loader: batch 0 has no labels"):
        blk.influence(laplace, unlabelled(data), data, progress=False)
    with pytest.raises(TypeError, match=re.escape("queries: expected an iterable of batches")):
        blk.influence(laplace, data, data[0], progress=False)
    with pytest.raises(ValueError, match="missing or unknown"):
        blk.influence(laplace, data, data, damping={"nowhere": 1.0}, progress=False)
    build = blk.InfluenceIndex.build
    for rank, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="rank: expected"):
            build(laplace, data, tmp_path / "index", rank, progress=False)
    with pytest.raises(ValueError, match="rank: expected 1 to 1, for which memory_budget has room, got 8"):
        build(fitted(case, memory_budget=10**5), data, tmp_path / "index", 8, progress=False)
    with pytest.raises(ValueError, match="gone over twice"):
        build(laplace, iter(data), tmp_path / "index", 2, progress=False)
    with pytest.raises(ValueError, match="has no labels"):
        build(laplace, unlabelled(data), tmp_path / "index", 2, progress=False)
    assert not list(tmp_path.iterdir())
