"""The noise variance of a regression: given, chosen with the prior, in the posterior, and in files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import by_module, covariance, evidence, flat, ggn, jacobians, relative, trainable
from models import Case, bert, mlp
from torch import Tensor

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.posterior import storage

CURVATURES = ("kfac", "ekfac", "exact")


def regression(n: int = 12, outputs: int = 2, noise: float = 0.3) -> Case:
    """Targets around what the model says, so that little is left of them."""
    case = mlp(n=n, classes=outputs)
    case.arguments = {"likelihood": "regression"}
    with torch.no_grad():
        means = torch.stack([case.logits(case.evaluated(), x) for x in case.examples])
    draws = torch.randn(means.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    case.labels = means + noise**0.5 * draws
    return case


class Truth:
    def __init__(self, case: Case):
        self.means, self.jacobian = jacobians(case)
        self.error, self.targets = case.labels - self.means, case.labels.numel()
        self.theta = torch.cat([w.detach().flatten() for w in by_module(trainable(case.model)).values()])
        eye = torch.eye(self.means.shape[1], dtype=torch.float64).expand(len(self.means), -1, -1)
        self.unit = ggn(flat(self.jacobian), eye)

    def log_likelihood(self, noise: float) -> float:
        return -0.5 * float((self.error.square() / noise + math.log(2 * math.pi * noise)).sum())

    def evidence(self, prior: float, noise: float) -> float:
        each = torch.full_like(self.theta, prior)
        return float(evidence(self.log_likelihood(noise), self.theta, self.unit / noise, each))

    def predicted(self, prior: float, noise: float) -> Tensor:
        eye = torch.eye(len(self.theta), dtype=torch.float64)
        return covariance(flat(self.jacobian), self.unit / noise + prior * eye)


def fitted(case: Case, **settings: Any) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(case.model, **{**case.arguments, **settings}).fit(case.loader(5), progress=False)


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_given_noise_against_dense_matrices(outputs: int):
    case = regression(outputs=outputs)
    truth, laplace = Truth(case), fitted(case, curvature="exact", noise_variance=0.3, prior_precision=2.0)
    for prior, noise in ((2.0, 0.3), (0.5, 1.0), (7.0, 1e-3)):
        laplace.prior_precision, laplace.noise_variance = prior, noise
        assert laplace.log_likelihood == pytest.approx(truth.log_likelihood(noise), rel=1e-9)
        expected = truth.evidence(prior, noise)
        assert float(laplace.log_marginal_likelihood()) == pytest.approx(expected, rel=1e-8)
        assert float(laplace.log_marginal_likelihood(prior, noise)) == pytest.approx(expected, rel=1e-8)
        found = laplace.predict(case.batch())
        assert relative(found.covariance, truth.predicted(prior, noise)) < 1e-6
        assert relative(found.observation_variance, found.variance + noise) < 1e-12


def test_observations_less_the_mean_of_their_outputs():
    case, eye = regression(outputs=3), torch.eye(3, dtype=torch.float64)
    laplace = fitted(case, curvature="exact", noise_variance=0.3, prior_precision=2.0)
    observed = laplace.predict(case.batch()).covariance + 0.3 * eye
    found = laplace.predict(case.batch(), differences=True)
    expected = ((eye - 1 / 3) @ observed @ (eye - 1 / 3)).diagonal(dim1=1, dim2=2)
    assert relative(found.observation_variance, expected) < 1e-8


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_layers_at_a_noise(curvature: str):
    """Each layer's precision is `curvature / noise + prior`, and everything follows it."""
    case = regression()
    laplace = fitted(case, curvature=curvature, prior_precision=0.7)
    dense = {name: one.to_dense() for name, one in laplace.posterior.items()}
    unit = {name: x - 0.7 * torch.eye(len(x), dtype=x.dtype) for name, x in dense.items()}
    laplace.noise_variance = 0.25
    precision = {name: x / 0.25 + 0.7 * torch.eye(len(x), dtype=x.dtype) for name, x in unit.items()}
    for name, one in laplace.posterior.items():
        assert relative(one.to_dense(), precision[name]) < 1e-10
    _, jacobian = jacobians(case)
    blocks = torch.block_diag(*(precision[name] for name in jacobian))
    assert relative(laplace.predict(case.batch()).covariance, covariance(flat(jacobian), blocks)) < 1e-9
    logdet = float(torch.linalg.slogdet(blocks)[1])
    assert float(laplace.posterior.logdet) == pytest.approx(logdet, rel=1e-10)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_samples_at_a_noise(curvature: str):
    case = regression(n=4)
    laplace = fitted(case, curvature=curvature, noise_variance=0.05, prior_precision=0.7)
    n = 4000
    samples = laplace.posterior.sample(n, torch.Generator().manual_seed(1))
    _, jacobian = jacobians(case)
    moves = sum(torch.einsum("ncoi,soi->snc", j, samples[name].double()) for name, j in jacobian.items())
    variance = laplace.predict(case.batch()).variance
    spread = (moves.square().mean(dim=0) / variance - 1).abs() * (n / 2) ** 0.5
    assert spread.max() < 5


@pytest.mark.parametrize("curvature", CURVATURES)
def test_what_is_made_of_a_root_sees_the_noise(curvature: str):
    """Joint covariances, influence and the choice of a batch."""
    case = regression(n=5)
    laplace = fitted(case, curvature=curvature, noise_variance=0.2, prior_precision=0.7)
    joint = laplace.joint(case.batch()).unflatten(0, (5, 2)).unflatten(2, (5, 2))
    own = torch.stack([joint[i, :, i] for i in range(5)])
    assert relative(own, laplace.predict(case.batch()).covariance) < 1e-8
    means, _ = jacobians(case)
    slope = (means - case.labels) / 0.2  # of the losses in the outputs
    expected = -torch.einsum("nc,ncmd,md->nm", slope, joint, slope)
    found = blk.influence(laplace, case.loader(2), [case.batch()], progress=False)
    assert relative(found, expected) < 1e-8
    gain = blk.select_batch(laplace, case.batch(), 1)[1]
    each = 0.5 * torch.linalg.slogdet(torch.eye(2, dtype=torch.float64) + own / 0.2)[1]
    assert float(gain[0]) == pytest.approx(float(each.max()), rel=1e-8)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_evidence_has_derivatives_in_both(curvature: str):
    laplace = fitted(regression(n=6), curvature=curvature)
    numbers = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, 0.2)]
    assert torch.autograd.gradcheck(laplace.log_marginal_likelihood, numbers)
    noise = torch.ones((), dtype=torch.float64)  # unit noise, which changes nothing but derivatives
    _, slope = torch.func.jvp(lambda x: laplace.log_marginal_likelihood(1.0, x), (noise,), (noise,))
    values = [float(laplace.log_marginal_likelihood(1.0, 1 + step)) for step in (1e-5, -1e-5)]
    assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)
    laplace.noise_variance = numbers[1]
    assert laplace.log_marginal_likelihood().requires_grad
    assert laplace.posterior.logdet.requires_grad
    assert not laplace.predict(regression(n=6).batch()).covariance.requires_grad


@pytest.mark.parametrize("curvature", CURVATURES)
def test_noise_and_prior_are_the_best_of_a_grid(curvature: str):
    case = regression(n=30, noise=0.04)
    laplace = fitted(case, curvature=curvature).optimize_prior_precision(noise=True)
    best, prior, noise = (
        float(laplace.log_marginal_likelihood()),
        float(laplace.prior_precision),
        float(laplace.noise_variance),
    )
    assert 0.01 < noise < 0.2
    for factor in (0.5, 0.9, 1.1, 2.0):
        for other in (0.5, 0.9, 1.0, 1.1, 2.0):
            assert float(laplace.log_marginal_likelihood(prior * other, noise * factor)) < best
    logs = [torch.tensor(math.log(v), dtype=torch.float64, requires_grad=True) for v in (prior, noise)]
    slopes = torch.autograd.grad(laplace.log_marginal_likelihood(*(one.exp() for one in logs)), logs)
    assert max(abs(float(slope)) for slope in slopes) < 1e-5
    laplace.optimize_prior_precision(per_module=True, noise=True)
    assert float(laplace.log_marginal_likelihood()) > best
    logs = [*(p.log() for p in laplace.prior_precision.values()), laplace.noise_variance.log()]
    logs = [one.detach().requires_grad_() for one in logs]
    priors = dict(zip(laplace.prior_precision, (one.exp() for one in logs[:-1]), strict=True))
    slopes = torch.autograd.grad(laplace.log_marginal_likelihood(priors, logs[-1].exp()), logs)
    assert max(abs(float(slope)) for slope in slopes) < 1e-3


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("per_module", [False, True])
def test_a_prior_for_a_given_noise(curvature: str, per_module: bool):
    laplace = fitted(regression(), curvature=curvature, noise_variance=0.1)
    laplace.optimize_prior_precision(per_module=per_module)
    found = laplace.prior_precision
    best = float(laplace.log_marginal_likelihood())
    for factor in (0.8, 1.25):
        moved = {n: v * factor for n, v in found.items()} if isinstance(found, dict) else found * factor
        assert float(laplace.log_marginal_likelihood(moved)) < best


def test_targets_count_as_often_as_their_weights():
    case = bert(classes=1)
    targets = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64)
    weights = torch.tensor([2, 1, 0, 3])
    repeated = torch.tensor([0, 0, 1, 3, 3, 3])
    settings: dict[str, Any] = {"likelihood": "regression", "curvature": "ekfac"}
    found = blk.LaplaceLoRA(case.model, **settings)
    found.fit([{**case.batch(), "labels": targets, "weights": weights}], progress=False)
    truth = blk.LaplaceLoRA(case.model, **settings)
    truth.fit([{**case.batch(repeated.tolist()), "labels": targets[repeated]}], progress=False)
    for laplace in (found, truth):
        laplace.optimize_prior_precision(noise=True)
    assert float(found.noise_variance) == pytest.approx(float(truth.noise_variance), rel=1e-6)
    assert float(found.log_marginal_likelihood()) == pytest.approx(float(truth.log_marginal_likelihood()), rel=1e-9)


def test_held_out_targets_see_the_noise():
    case = regression(n=20)
    laplace = fitted(case, curvature="exact", noise_variance=0.3)
    laplace.optimize_prior_precision("nll", val_loader=case.loader(7))

    def nll(prior: float) -> float:
        laplace.prior_precision = prior
        found = laplace.predict(case.batch())
        return -float(
            torch.distributions.Normal(found.mean, found.observation_variance.sqrt()).log_prob(case.labels).sum()
        )

    assert nll(float(laplace.prior_precision)) <= min(nll(x) for x in torch.logspace(-6, 8, 100).tolist()) + 1e-3


def test_it_is_saved(tmp_path: Path):
    case = regression()
    laplace = fitted(case, noise_variance=0.4)
    laplace.save_pretrained(tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)
    assert float(again.noise_variance) == 0.4
    assert again.log_likelihood == laplace.log_likelihood
    assert float(again.log_marginal_likelihood(2.0, 0.7)) == float(laplace.log_marginal_likelihood(2.0, 0.7))
    assert main(["inspect", str(tmp_path), "--json", str(tmp_path / "inspect.json")]) == 0
    said = json.loads((tmp_path / "inspect.json").read_text())
    assert said["log_likelihood"] == pytest.approx(laplace.log_likelihood)
    assert said["evidence"]["now"] == pytest.approx(float(laplace.log_marginal_likelihood()))
    data = sum(float(one.to_dense().diagonal().sum()) - math.prod(one.shape) for one in laplace.posterior.values())
    assert sum(kind["trace"] for kind in said["kinds"]) == pytest.approx(data)
    content = json.loads((tmp_path / "laplace.json").read_text())
    assert content["noise"] == {"variance": 0.4, "targets": 24.0}
    again.optimize_prior_precision(noise=True)
    laplace.optimize_prior_precision(noise=True)
    assert float(again.noise_variance) == float(laplace.noise_variance)


def test_what_has_no_noise():
    case = mlp()
    with pytest.raises(ValueError, match="noise_variance: expected likelihood='regression' with it"):
        blk.LaplaceLoRA(case.model, noise_variance=0.5)
    laplace = blk.LaplaceLoRA(case.model).fit(case.loader(3), progress=False)
    for call in (
        lambda: laplace.log_marginal_likelihood(1.0, 0.5),
        lambda: laplace.optimize_prior_precision(noise=True),
        lambda: setattr(laplace, "noise_variance", 2.0),
    ):
        with pytest.raises(ValueError, match="expected likelihood='regression' with it, got 'classification'"):
            call()
    with pytest.raises(ValueError, match="observation_variance: expected a regression"):
        _ = laplace.predict(case.batch()).observation_variance
    case = regression()
    for value in (0.0, -1.0, float("nan"), [1.0, 2.0]):
        with pytest.raises(ValueError, match="noise_variance: expected"):
            blk.LaplaceLoRA(case.model, **case.arguments, noise_variance=value)
    with pytest.raises(ValueError, match="expected another Fisher than fisher='empirical'"):
        blk.LaplaceLoRA(case.model, **case.arguments, fisher="empirical", noise_variance=0.5)
    laplace = blk.LaplaceLoRA(case.model, **case.arguments)
    laplace.fit([(batch[0], None) for batch in case.loader(3)], progress=False)
    with pytest.raises(RuntimeError, match="noise: fit saw batches without labels"):
        laplace.optimize_prior_precision(noise=True)
    with pytest.raises(ValueError, match="noise: expected method='marglik'"):
        laplace.optimize_prior_precision("nll", val_loader=case.loader(3), noise=True)


def rewritten(folder: Path, change: Any) -> None:
    """The JSON file with a change, and a checksum that fits."""
    path = folder / storage.JSON_NAME
    content = json.loads(path.read_text())
    content.pop("sha256")
    change(content)
    path.write_text(json.dumps({**content, "sha256": storage.content_digest(content)}))


def test_files_of_format_3_have_unit_noise(tmp_path: Path):
    case = regression()
    laplace = fitted(case)
    laplace.save_pretrained(tmp_path)

    def older(content: dict[str, Any]) -> None:
        content["version"] = 3
        del content["noise"]

    rewritten(tmp_path, older)
    again = blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)
    assert float(again.log_marginal_likelihood()) == float(laplace.log_marginal_likelihood())
    with pytest.raises(RuntimeError, match="saved before the number of its targets was; fit again"):
        again.log_marginal_likelihood(1.0, 0.5)
    with pytest.raises(RuntimeError, match="saved before the number of its targets was; fit again"):
        again.optimize_prior_precision(noise=True)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (None, "noise: expected an object, got None"),
        ({"targets": 24.0}, "noise.variance: missing"),
        ({"variance": -1.0, "targets": 24.0}, "noise.variance: expected a finite positive number"),
        ({"variance": 1.0, "targets": "many"}, "noise.targets: expected a number of targets"),
    ],
)
def test_what_is_no_noise_in_a_file(noise: Any, message: str, tmp_path: Path):
    case = regression()
    fitted(case).save_pretrained(tmp_path)
    rewritten(tmp_path, lambda content: content.update(noise=noise))
    with pytest.raises(ValueError, match=message):
        blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)
