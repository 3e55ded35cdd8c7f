"""Covariances across inputs: against dense float64 products of Jacobians by autograd, in pieces and in one."""

from __future__ import annotations

import dataclasses
import itertools
import re

import dense
import models
import pytest
import torch
from torch import Tensor

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.model.dry_run import LiveBytes
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.predictive import joint

KINDS = ("kfac", "ekfac", "exact")


def fitted(case: models.Case, **settings) -> blk.LaplaceLoRA:
    settings = {"prior_precision": 0.3, "fisher": "exact", **case.arguments, **settings}
    return blk.LaplaceLoRA(case.model, **settings).fit(case.loader(2), progress=False)


def precision(laplace: blk.LaplaceLoRA, case: models.Case, jacobian: dict[str, Tensor], logits: Tensor) -> Tensor:
    """Of all weights, dense: the Gauss-Newton matrix itself, or each layer's own."""
    prior = [laplace.prior[name].expand(jacobian[name][0, 0].numel()) for name in jacobian]
    if laplace.config.curvature == "exact":
        return dense.ggn(dense.flat(jacobian), dense.softmax_fisher(logits)) + torch.diag(torch.cat(prior))
    return torch.block_diag(*(laplace.posterior[name].to_dense() for name in jacobian))


@pytest.mark.parametrize("curvature", KINDS)
@pytest.mark.parametrize("make", [models.llama, models.mlp])
def test_it_is_the_dense_product(make, curvature, monkeypatch):
    case = make()
    laplace = fitted(case, curvature=curvature, rank=2, rank_threshold=4)
    laplace.prior_precision = {layer.name: 0.3 + 0.1 * i for i, layer in enumerate(laplace.layers)}
    logits, jacobian = dense.jacobians(case)
    rows = dense.flat(jacobian).flatten(end_dim=1)
    expected = rows @ torch.linalg.solve(precision(laplace, case, jacobian, logits), rows.mT)
    n, c = logits.shape
    a, b = case.batch(), case.batch([2, 0, 1])
    order = torch.tensor([2, 0, 1])
    columns = (order[:, None] * c + torch.arange(c)).flatten()
    for step in (n, 1, 3):  # all at once, one by one, in unequal pieces; each block of the second batch held by itself
        monkeypatch.setattr(joint, "examples_at_once", lambda *args, step=step, **kwargs: step)
        laplace.config = dataclasses.replace(laplace.config, memory_budget=10**9 if step == n else 1)
        found = laplace.joint(a)
        assert found.shape == (n * c, n * c)
        assert torch.equal(found, found.mT)
        assert dense.relative(found, expected) < 1e-9
        assert dense.relative(laplace.joint(a, b), expected[:, columns]) < 1e-9
    single = laplace.predict(a).covariance
    blocks = found.reshape(n, c, n, c)[torch.arange(n), :, torch.arange(n)]
    assert dense.relative(single, blocks) < 1e-6


def test_chosen_logits_and_differences(monkeypatch):
    case = models.llama()
    laplace = fitted(case)
    whole, batch = laplace.joint(case.batch()), case.batch([1, 3])
    n, c = len(case.examples), 3
    chosen = laplace.joint(case.batch(), outputs=[2, 0])
    kept = [i * c + k for i in range(n) for k in (2, 0)]
    assert dense.relative(chosen, whole[kept][:, kept]) < 1e-12
    centring = torch.block_diag(*[torch.eye(c, dtype=torch.float64) - 1 / c] * n)
    differences = laplace.joint(case.batch(), differences=True)
    assert dense.relative(differences, centring @ whole @ centring) < 1e-10
    across = laplace.joint(case.batch(), batch, differences=True)
    assert dense.relative(across, differences.reshape(n, c, n, c)[:, :, [1, 3]].reshape(n * c, -1)) < 1e-10


def test_joint_samples_share_what_inputs_share():
    case = models.llama()
    laplace = fitted(case)
    batch = case.batch()
    samples = blk.joint_samples(laplace, batch, 20000, torch.Generator().manual_seed(0))
    assert samples.shape == (20000, 4, 3)
    prediction, covariance = laplace.predict(batch), laplace.joint(batch)
    errors = (samples.mean(dim=0) - prediction.mean) / (prediction.variance / 20000).sqrt()
    assert errors.abs().max() < 4
    assert dense.relative(torch.cov(samples.flatten(1).mT), covariance) < 0.03


def test_the_batch_that_tells_most():
    """Gains against log-determinants of dense precisions, of every next example: the greedy choice, one by one."""
    case = models.llama(lengths=(5, 3, 6, 4, 4, 2))
    laplace = fitted(case, curvature="exact")
    logits, jacobian = dense.jacobians(case)
    flat, fisher = dense.flat(jacobian), dense.softmax_fisher(logits)
    base = dense.ggn(flat, fisher) + 0.3 * torch.eye(flat.shape[2], dtype=torch.float64)

    def worth(chosen: list[int]) -> float:
        more = dense.ggn(flat[chosen], fisher[chosen])
        return 0.5 * float(torch.linalg.slogdet(base + more)[1] - torch.linalg.slogdet(base)[1])

    found = blk.select_batch(laplace, case.batch(), 4)
    chosen: list[int] = []
    for index, gain in zip(found.indices.tolist(), found.gains.tolist(), strict=True):
        before = worth(chosen) if chosen else 0.0
        gains = {i: worth([*chosen, i]) - before for i in range(6) if i not in chosen}
        assert index == max(gains, key=gains.__getitem__)
        assert gain == pytest.approx(gains[index], rel=1e-8)
        chosen.append(index)
    assert sum(found.gains.tolist()) == pytest.approx(worth(chosen), rel=1e-8)


def test_margins_of_a_pool_do_not_count():
    """Like labels; also where a forward of one's own returns the rewards."""
    torch.manual_seed(0)
    x, model = torch.randn(5, 2, 3), torch.nn.Linear(3, 1, bias=False)

    def rewards(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).squeeze(-1)

    laplace = blk.LaplaceLoRA(model, rewards, likelihood="bradley-terry").fit([{"x": x}], progress=False)
    expected = blk.select_batch(laplace, {"x": x}, 3).gains
    assert torch.equal(blk.select_batch(laplace, {"x": x, "margin": torch.full((5,), 2.0)}, 3).gains, expected)


def test_noise_is_in_the_covariance_and_in_what_labels_tell():
    generator = torch.Generator().manual_seed(0)
    x, prior, noise = torch.randn(7, 4, dtype=torch.float64, generator=generator), 0.5, 0.2
    model = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
    arguments = {"likelihood": "regression", "prior_precision": prior, "noise_variance": noise}
    laplace = blk.LaplaceLoRA(model, curvature="exact", **arguments).fit([(x[:3], x[:3, :1])], progress=False)
    base = x[:3].mT @ x[:3] / noise + prior * torch.eye(4, dtype=torch.float64)
    assert dense.relative(laplace.joint(x), x @ torch.linalg.solve(base, x.mT)) < 1e-10
    found = blk.select_batch(laplace, x, 2)
    more = base + x[found.indices].mT @ x[found.indices] / noise
    gain = 0.5 * float(torch.linalg.slogdet(more)[1] - torch.linalg.slogdet(base)[1])
    assert float(found.gains.sum()) == pytest.approx(gain, rel=1e-10)


def test_memory_is_that_of_the_budget(monkeypatch):
    """The rows that live at once: bounded by the budget however many examples there are."""
    case = models.llama(lengths=[4] * 10, hidden=32, dtype=torch.float32)
    laplace = fitted(case, memory_budget=2**17)
    p = sum(laplace.posterior.curvature.n_parameters.values())
    assert 2 * 10 * 3 * p * 4 > 2**17  # Jacobians and rows of all of them would not fit
    live, original = LiveBytes(), Posterior.root

    def counted(self, vectors, transpose=False):
        found = original(self, vectors, transpose)
        for tensor in itertools.chain(vectors.values(), found.values()):
            live.add(tensor, lambda: "rows")
        return found

    expected = laplace.joint(case.batch())
    monkeypatch.setattr(Posterior, "root", counted)
    assert dense.relative(laplace.joint(case.batch()), expected) < 1e-12
    (peak,) = live.peak.values()
    assert 2**14 < sum(peak.values()) <= 2**17, peak


def test_what_is_refused():
    case = models.llama()
    laplace = blk.LaplaceLoRA(case.model, **case.arguments)
    with pytest.raises(RuntimeError, match=r"joint: call fit\(loader\) first"):
        laplace.joint(case.batch())
    laplace = fitted(case)
    for outputs in (2, torch.zeros(4, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=re.escape("outputs: expected None or indices [C]")):
            laplace.joint(case.batch(), outputs=outputs)
    with pytest.raises(ValueError, match="count: expected 1 to 4, the examples of the pool, got 5"):
        blk.select_batch(laplace, case.batch(), 5)
    with pytest.raises(TypeError, match="count: expected an int"):
        blk.select_batch(laplace, case.batch(), 2.0)
    empty = {key: value[:0] for key, value in case.batch().items()}
    with pytest.raises(ValueError, match="joint: expected at least one example"):
        laplace.joint(case.batch(), empty)


def test_logits_that_are_not_finite_are_refused():
    class Shifted(torch.nn.Linear):
        shift = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.shift

    torch.manual_seed(0)
    x, model = torch.randn(4, 3), Shifted(3, 2)
    laplace = blk.LaplaceLoRA(model).fit([(x, torch.tensor([0, 1, 0, 1]))], progress=False)
    model.shift = torch.tensor([0.0, torch.inf])
    for call in (laplace.joint, lambda x: laplace.joint(x, x), lambda x: blk.joint_samples(laplace, x, 2)):
        with pytest.raises(ValueError, match="joint: the logits are not finite"):
            call(x)
    with pytest.raises(ValueError, match="joint: the logits are not finite"):
        blk.select_batch(laplace, x, 1)
