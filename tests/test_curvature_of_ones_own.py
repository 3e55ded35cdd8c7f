"""A kind of curvature that is not in the package: one class, and everything works with it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from dense import relative
from models import llama, mlp
from torch import Tensor, nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.posterior.curvature import CURVATURES, Curvature, joined_spectra, register


@pytest.fixture(autouse=True)
def _gone_afterwards():
    before = dict(CURVATURES)
    register("diagonal")(DiagonalCurvature)
    yield
    CURVATURES.clear()
    CURVATURES.update(before)


# ---- the class -------------------------------------------------------------------------------------------------------


class DiagonalCurvature(Curvature):
    """The diagonal of the Gauss-Newton matrix, `{layer: [d_out, d_in]}`."""

    def __init__(self, diagonals: Mapping[str, Tensor]):
        self.diagonals = dict(diagonals)

    @classmethod
    def measure(cls, data):
        total = {layer.name: torch.zeros(layer.shape, dtype=torch.float64) for layer in data.layers}
        for gradients in data.weight_gradients("diagonal"):
            for name, gradient in gradients.items():
                total[name] += gradient.double().square().sum(dim=0)
        return cls(total)

    @property
    def shapes(self):
        return {name: tuple(diagonal.shape) for name, diagonal in self.diagonals.items()}

    def spectrum(self, layers=None):
        chosen = [self.diagonals[name].flatten() for name in layers or self.diagonals]
        return joined_spectra([(values, torch.ones_like(values)) for values in chosen])

    def covariance(self, jacobians, prior, prepared):
        total = torch.zeros((), dtype=torch.float64)
        for name, diagonal in self.diagonals.items():
            jacobian = jacobians.matrix(name).double().flatten(2)
            total = total + jacobian / (diagonal.flatten() + prior[name]) @ jacobian.mT
        return total

    def sample(self, n, prior, prepared, generator):
        return {
            name: torch.randn(n, *diagonal.shape, generator=generator, dtype=torch.float64)
            / (diagonal + prior[name]).sqrt()
            for name, diagonal in self.diagonals.items()
        }

    def pack(self):
        return {f"{name}.diagonal": diagonal for name, diagonal in self.diagonals.items()}, {}

    @classmethod
    def unpack(cls, stored):
        return cls(
            {name: stored.tensor(f"{layer}.diagonal", stored.shape(layer)) for layer, name in stored.names.items()}
        )


# ---- what works with it ----------------------------------------------------------------------------------------------


def fitted(case, **settings):
    settings = {**case.arguments, "fisher": "exact", **settings}
    return blk.LaplaceLoRA(case.model, **settings).fit(case.loader(2), progress=False)


def dense(case, prior: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """The diagonal of the exact Gauss-Newton matrix, and the prior precision, of every weight."""
    exact = fitted(case, curvature="exact").posterior.curvature
    rows = {name: exact.store.rows(name).double() for name in exact.shapes}
    diagonal = torch.cat([r.square().sum(dim=0) for r in rows.values()])
    return diagonal, torch.cat([torch.full((r.shape[1],), prior[n], dtype=torch.float64) for n, r in rows.items()])


@pytest.fixture(params=[llama, mlp], ids=["llama", "plain"])
def case(request):
    return request.param()


@pytest.mark.parametrize("per_module", [False, True])
def test_evidence_and_predictions_are_the_dense_ones(case, per_module):
    laplace = fitted(case, curvature="diagonal")
    prior = {name: 0.3 + 0.2 * i * per_module for i, name in enumerate(laplace.posterior.curvature.shapes)}
    diagonal, each = dense(case, prior)
    laplace.prior_precision = prior if per_module else 0.3
    assert isinstance(laplace.prior_precision, dict) == per_module
    theta = torch.cat([layer.matrix().flatten() for layer in laplace.layers])
    expected = (
        laplace.log_likelihood + 0.5 * (each.log() - each * theta.square()).sum() - 0.5 * (diagonal + each).log().sum()
    )
    assert float(laplace.log_marginal_likelihood()) == pytest.approx(float(expected), rel=1e-10)
    assert float(laplace.posterior.logdet) == pytest.approx(float((diagonal + each).log().sum()), rel=1e-10)
    probe = fitted(case, curvature="exact", prior_precision=1e6)  # there Sigma is I / 1e6 but for 1e-6
    batch = case.batch()
    prediction = laplace.predict(batch)
    assert relative(prediction.mean, probe.predict(batch).mean) < 1e-12
    samples = laplace.posterior.sample(20000, torch.Generator().manual_seed(0))
    spread = torch.cat([s.flatten(1) for s in samples.values()], dim=1).var(dim=0)
    assert relative(spread, 1 / (diagonal + each)) < 0.06
    moved = laplace.sample_weights(4)
    assert all(value.shape[0] == 4 for value in moved.values())


def test_what_needs_a_root_says_so(case):
    laplace = fitted(case, curvature="diagonal")
    for call in (lambda: laplace.joint(case.batch()), lambda: blk.influence(laplace, case.loader(2), case.loader(2))):
        with pytest.raises(NotImplementedError, match="DiagonalCurvature: expected a method root"):
            call()


def test_the_covariance_is_that_of_the_linearised_logits(case):
    laplace = fitted(case, curvature="diagonal", prior_precision=0.3)
    batch = case.batch()
    got = laplace.predict(batch)
    diagonal, each = dense(case, dict.fromkeys(laplace.posterior.curvature.shapes, 0.3))
    model, shapes = case.evaluated(), laplace.posterior.curvature.shapes
    named = dict(model.named_parameters())
    for row, example in enumerate(case.examples):
        logits = case.logits(model, example)
        jacobian = []
        for c in range(len(logits)):
            columns = []
            for layer in laplace.layers:
                leaves = [named[name] for name in layer.parameters()]
                grads = torch.autograd.grad(logits[c], leaves, retain_graph=True)
                matrix = torch.cat([g if g.ndim == 2 else g[:, None] for g in grads], dim=1)
                assert tuple(matrix.shape) == shapes[layer.name]
                columns.append(matrix.flatten())
            jacobian.append(torch.cat(columns))
        j = torch.stack(jacobian)
        assert relative(got.covariance[row], j / (diagonal + each) @ j.mT) < 1e-9


def test_it_is_tuned(case):
    laplace = fitted(case, curvature="diagonal").optimize_prior_precision()
    best = float(laplace.log_marginal_likelihood())
    for factor in (0.9, 1.1):
        assert float(laplace.log_marginal_likelihood(laplace.prior_precision * factor)) < best
    laplace.optimize_prior_precision(per_module=True)
    assert float(laplace.log_marginal_likelihood()) > best
    laplace.optimize_prior_precision("nll", val_loader=case.loader(3))


def test_it_is_saved_and_loaded(case, tmp_path):
    laplace = fitted(case, curvature="diagonal").optimize_prior_precision(per_module=True)
    laplace.save_pretrained(tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)
    assert again.config.as_json() == laplace.config.as_json()
    assert torch.equal(again.predict(case.batch()).covariance, laplace.predict(case.batch()).covariance)
    assert torch.equal(again.log_marginal_likelihood(), laplace.log_marginal_likelihood())
    del CURVATURES["diagonal"]
    with pytest.raises(ValueError, match=r"settings\.curvature: expected one of .*, got 'diagonal'"):
        blk.LaplaceLoRA.from_pretrained(case.model, tmp_path)


class Sometimes(nn.Module):
    """A layer that only batches with a positive first number call."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.always(x) + self.sometimes(x) if x[0, 0] > 0 else self.always(x)


@pytest.mark.parametrize("kind", ["diagonal", "exact"])
def test_a_layer_that_only_some_batches_call(kind):
    torch.manual_seed(0)
    model, x = Sometimes().double(), torch.randn(3, 4, dtype=torch.float64)
    batches = [(x.abs(), torch.tensor([0, 1, 2])), (-x.abs(), torch.tensor([2, 1, 0]))]

    def curvature(some):
        laplace = blk.LaplaceLoRA(model, curvature=kind, fisher="exact", modules=["always", "sometimes"])
        return laplace.fit(some, progress=False).posterior.curvature

    both, first = curvature(batches), curvature(batches[:1])
    if kind == "diagonal":
        assert torch.equal(both.diagonals["sometimes"], first.diagonals["sometimes"])
        assert (both.diagonals["always"] > first.diagonals["always"]).all()
    else:
        n, sometimes = len(first.gram), first.store.names.index("sometimes")
        assert relative(both.layer_grams[sometimes, :n, :n], first.layer_grams[sometimes]) < 1e-12
        assert not both.layer_grams[sometimes, n:].any()
    with pytest.raises(ValueError, match="sometimes: never called by forward"):
        curvature(batches[1:])


def test_what_it_does_not_have(case):
    laplace = fitted(case, curvature="diagonal")
    with pytest.raises(RuntimeError, match="factors: curvature='diagonal' has no Kronecker factors"):
        _ = laplace.factors
    with pytest.raises(RuntimeError, match="DiagonalCurvature has no Gaussian for each module"):
        list(laplace.posterior)


def test_a_name_is_given_once():
    register("diagonal")(DiagonalCurvature)  # the same again: nothing happens
    with pytest.raises(ValueError, match="'kfac' is the name of KroneckerCurvature already"):
        register("kfac")(DiagonalCurvature)
