"""`calibrate`, and predictions of differences only."""

from __future__ import annotations

import gc
import json
import logging
import math
import warnings
import weakref

import pytest
import torch
from dense import covariance, flat, jacobians, relative
from models import Case, llama, mlp

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.calibration import paired_difference, summary
from bayesian_lora_kernels.crossfitting.folds import assign_folds
from bayesian_lora_kernels.predictive import probabilities
from bayesian_lora_kernels.predictive.calibrate import Calibration, LabelLikelihood

DOUBLE = torch.float64
METHODS = ("pairwise", "scalar")


def held_out(n: int = 30, seed: int = 5) -> Case:
    case = mlp(n=n)
    generator = torch.Generator().manual_seed(seed)
    case.examples = [2 * torch.randn(4, generator=generator, dtype=DOUBLE) for _ in case.examples]
    case.labels = torch.randint(3, (n,), generator=generator)
    return case


def fitted(case: Case, **settings) -> blk.LaplaceLoRA:
    laplace = blk.LaplaceLoRA(
        case.model, **{"curvature": "ekfac", "prior_precision": 0.3, **case.arguments, **settings}
    )
    return laplace.fit(case.loader(4), progress=False)


@pytest.fixture
def calibrated() -> tuple[blk.LaplaceLoRA, Case]:
    laplace = fitted(mlp(n=24))
    return laplace.calibrate(held_out().loader(7), progress=False), held_out(seed=6)


def by_hand(method: str, f: list[float], s: list[list[float]], t: float, b: float) -> list[float]:
    c = len(f)
    if method == "scalar":
        v = sum(s[i][i] + s[j][j] - 2 * s[i][j] for i in range(c) for j in range(c)) / (c * (c - 1))
        raw = [math.exp(x / math.sqrt(t * t + math.pi / 8 * b * v)) for x in f]
    else:
        width = [
            [math.sqrt(t * t + math.pi / 8 * b * (s[k][k] + s[j][j] - 2 * s[k][j])) for j in range(c)] for k in range(c)
        ]
        raw = [1 / sum(math.exp(-(f[k] - f[j]) / width[k][j]) for j in range(c)) for k in range(c)]
    return [x / sum(raw) for x in raw]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prior", [0.3, {"shared": False}])
def test_the_weights_and_the_average_number_by_number(method, prior):
    case, labelled, new = mlp(n=24), held_out(), held_out(3, seed=6)
    laplace = fitted(case)
    if isinstance(prior, dict):
        laplace.prior_precision = {layer.name: 0.2 + i for i, layer in enumerate(laplace.layers)}
    laplace.calibrate(labelled.loader(7), progress=False)

    squares = {layer.name: float(layer.matrix().square().sum()) for layer in laplace.layers}
    count = sum(layer.matrix().numel() for layer in laplace.layers)
    z = sum(float(laplace.prior[name]) * square for name, square in squares.items()) / count
    assert abs(laplace.calibration.variance_scale / z - 1) < 1e-12

    one = laplace.predict(labelled.batch())
    grid = [
        (i, j, math.exp(-7 + i), math.exp(-1.4 + j * 4.4 / 14)) for i in range(13) for j in range(15)
    ]  # i of b, j of T
    log_weight = {}
    for i, j, b, t in grid:
        likelihood = sum(
            math.log(by_hand(method, f.tolist(), s.tolist(), t, z * b)[int(y)])
            for f, s, y in zip(one.mean, one.covariance, labelled.labels, strict=True)
        )
        log_weight[i, j] = likelihood - ((-7 + i + 1) / 2.5) ** 2 / 2 - (math.log(t) - 0.5) ** 2 / 2
    top = max(log_weight.values())
    total = sum(math.exp(x - top) for x in log_weight.values())
    weights = {key: math.exp(x - top) / total for key, x in log_weight.items()}
    found = laplace.calibration.weights[method]
    assert max(abs(float(found[key]) - weight) for key, weight in weights.items()) < 1e-9
    effective = 1 / sum(weight**2 for weight in weights.values())
    assert abs(laplace.calibration.effective_points[method] / effective - 1) < 1e-8

    prediction = laplace.predict(new.batch())
    for n in range(3):
        expected = torch.zeros(3, dtype=DOUBLE)
        for i, j, b, t in grid:
            f, s = prediction.mean[n].tolist(), prediction.covariance[n].tolist()
            expected += weights[i, j] * torch.tensor(by_hand(method, f, s, t, z * b), dtype=DOUBLE)
        assert (prediction.probs(method)[n] - expected).abs().max() < 1e-8
    pairs = zip(prediction.mean.tolist(), prediction.covariance.tolist(), strict=True)
    plain = [by_hand(method, f, s, 1, 1) for f, s in pairs]
    assert (prediction.probs(method, calibrated=False) - torch.tensor(plain, dtype=DOUBLE)).abs().max() < 1e-10


def test_slices_change_nothing(calibrated, monkeypatch):
    laplace, new = calibrated
    prediction, labelled = laplace.predict(new.batch()), held_out().loader(7)
    expected = {method: prediction.probs(method) for method in METHODS}
    weights = laplace.calibration.weights
    monkeypatch.setattr(probabilities, "SLICE", 9 * 40)  # a few examples and pairs at a time
    for method in METHODS:
        assert relative(prediction.probs(method), expected[method]) < 1e-12
        assert relative(laplace.calibrate(labelled, progress=False).calibration.weights[method], weights[method]) < 1e-9


def test_the_evidence_of_parts_adds_up(calibrated):
    laplace, _ = calibrated
    expected, loader = laplace.calibration, held_out().loader(7)
    parts = [laplace.label_likelihood([batch], progress=False) for batch in loader]
    together = laplace.calibrate(sum(parts, LabelLikelihood())).calibration
    assert together.n_labels == expected.n_labels == 30
    for method in METHODS:
        assert relative(together.weights[method], expected.weights[method]) < 1e-9


def test_what_labels_do_to_overconfidence():
    """Labels at random: nearly even probabilities. Labels as predicted: sure ones."""
    laplace, labelled = fitted(mlp(n=24)), held_out(200)
    entropy = []
    for labels in (labelled.labels, laplace.predict(labelled.batch()).mean.argmax(1)):
        labelled.labels = labels
        laplace.calibrate(labelled.loader(50), progress=False)
        probs = laplace.predict(held_out(50, seed=8).batch()).probs()
        entropy.append(float(torch.special.entr(probs).sum(1).mean()))
    assert entropy[0] > 0.95 * math.log(3)
    plain = torch.special.entr(laplace.predict(held_out(50, seed=8).batch()).probs("map")).sum(1).mean()
    assert entropy[1] < plain  # the logits are small, and the labels say that they might be large


def test_the_level_of_the_prior_hardly_counts_where_the_data_say_little():
    """Without curvature the covariance is J J^T / l, and with the scale l falls out."""
    laplace, labelled, new = fitted(mlp(n=2)), held_out(), held_out(seed=6)
    probs = []
    for precision in (1e5, 1e8):
        laplace.prior_precision = precision
        laplace.calibrate(labelled.loader(7), progress=False)
        probs.append(laplace.predict(new.batch()).probs())
    assert (probs[0] - probs[1]).abs().max() < 1e-4


def test_scalar_keeps_the_most_probable_class_calibrated(calibrated):
    laplace, new = calibrated
    prediction = laplace.predict(new.batch())
    assert torch.equal(prediction.probs("scalar").argmax(1), prediction.mean.argmax(1))


def test_ten_labels_do():
    laplace = fitted(mlp(n=24)).calibrate(held_out(10).loader(10), progress=False)
    assert laplace.calibration.n_labels == 10
    assert 1 < laplace.calibration.effective_points["pairwise"] < 195
    assert "calibrated with 10 held-out labels; effective number of grid points of 195" in str(laplace.calibration)


def test_it_says_what_it_saw(caplog):
    with caplog.at_level(logging.INFO):
        fitted(mlp(n=24)).calibrate(held_out().loader(7), progress=False)
    assert [r.getMessage() for r in caplog.records if "calibrated with 30 held-out labels" in r.getMessage()]


def test_it_says_if_the_grid_is_too_small(caplog):
    case = mlp(n=24)
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter *= 6  # large logits, and labels at random
    fitted(case).calibrate(held_out(300).loader(100), progress=False)
    assert "% of pairwise's weight is at the largest factor of the variance, 148; the labels ask for" in caplog.text


def test_chosen_logits_use_the_same_weights(calibrated):
    laplace, new = calibrated
    for outputs in (2, [2, 0], torch.tensor([[0, 1]] * 30)):
        prediction = laplace.predict(new.batch(), outputs=outputs)
        expected = laplace.calibration.probs("pairwise", prediction.mean, prediction.covariance)
        assert torch.equal(prediction.probs(), expected)
        assert prediction.probs().shape == (30, 2)


def test_other_methods_are_as_before(calibrated):
    laplace, new = calibrated
    prediction = laplace.predict(new.batch())
    for method in ("probit", "bridge", "map", "mc"):
        noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        assert torch.equal(
            prediction.probs(method, generator=noise[0]), prediction.probs(method, generator=noise[1], calibrated=False)
        )


def test_a_change_of_prior_or_fit_is_refused_until_it_is_undone(calibrated):
    laplace, new = calibrated
    before = laplace.predict(new.batch()).probs()
    laplace.prior_precision = 0.4
    prediction = laplace.predict(new.batch())
    for method in METHODS:
        with pytest.raises(RuntimeError, match="the prior precision changed since calibrate was called; call it again"):
            prediction.probs(method)
    assert torch.isfinite(prediction.probs(calibrated=False)).all()
    assert torch.isfinite(prediction.probs("probit")).all()
    precision = torch.tensor(0.3, dtype=DOUBLE)
    laplace.prior_precision = precision
    assert torch.equal(laplace.predict(new.batch()).probs(), before)
    precision.mul_(2)  # in place
    with pytest.raises(RuntimeError, match="the prior precision changed"):
        laplace.predict(new.batch()).probs()
    laplace.prior_precision = 0.3
    laplace.fit(mlp(n=24).loader(4), progress=False)
    with pytest.raises(RuntimeError, match="fit was called again since"):
        laplace.predict(new.batch()).probs()
    laplace.calibrate(held_out().loader(7), progress=False)
    assert (laplace.predict(new.batch()).probs() - before).abs().max() < 1e-9
    laplace.optimize_prior_precision()
    with pytest.raises(RuntimeError, match="the prior precision changed"):
        laplace.predict(new.batch()).probs()


def test_further_training_is_refused(calibrated):
    laplace, new = calibrated
    with torch.no_grad():
        next(p for p in laplace.model.parameters() if p.requires_grad).add_(1)
    with pytest.raises(ValueError, match=r"weights of the posterior have changed .* call fit"):
        laplace.calibrate(new.loader(7))


def test_saved_and_loaded(calibrated, tmp_path):
    laplace, new = calibrated
    laplace.save_pretrained(tmp_path)
    again = blk.LaplaceLoRA.from_pretrained(laplace.model, tmp_path)
    for method in METHODS:
        assert torch.equal(again.predict(new.batch()).probs(method), laplace.predict(new.batch()).probs(method))
    assert again.calibration.outdated is None
    assert str(again.calibration) == str(laplace.calibration)
    laplace.prior_precision = 1.0
    with pytest.warns(UserWarning, match="saved without its calibration: the prior precision changed since"):
        laplace.save_pretrained(tmp_path)
    assert blk.LaplaceLoRA.from_pretrained(laplace.model, tmp_path).calibration is None


def wrong_weights(content, value):
    content["weights"]["pairwise"] = value


DAMAGE = {
    "no weights": (lambda c: c.pop("weights"), "calibration.weights: missing"),
    "a method less": (lambda c: c["weights"].pop("scalar"), "calibration.weights: expected one table of each"),
    "a short table": (lambda c: c["weights"]["scalar"].pop(), r"weights.scalar: expected \[13, 15\] weights"),
    "text": (lambda c: wrong_weights(c, "?"), r"weights.pairwise: expected \[13, 15\] weights"),
    "a negative weight": (lambda c: c["weights"]["pairwise"][0].__setitem__(0, -1.0), "weights whose sum is 1"),
    "another grid": (lambda c: c["log_factors"].__setitem__(0, -6.0), "calibration.log_factors: expected"),
    "an unknown key": (lambda c: c.update(more=1), "calibration.more: expected no such key"),
    "a bad scale": (lambda c: c.update(variance_scale=-1.0), "calibration.variance_scale: expected a finite number"),
    "labels": (lambda c: c.update(n_labels=True), "calibration.n_labels: expected a number of labels"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_cannot_be_is_refused(name, calibrated):
    damage, message = DAMAGE[name]
    content = json.loads(json.dumps(calibrated[0].calibration.as_json()))
    assert Calibration.from_json(content).n_labels == 30
    damage(content)
    with pytest.raises(ValueError, match=message):
        Calibration.from_json(content)


def test_bad_calls():
    case, good = mlp(n=24), held_out()
    laplace = fitted(case)
    with pytest.raises(RuntimeError, match="call fit"):
        blk.LaplaceLoRA(case.model).calibrate(good.loader(7))
    with pytest.raises(TypeError, match="val_loader: expected an iterable of batches"):
        laplace.calibrate({"x": good.batch()[0], "labels": good.labels})
    with pytest.raises(ValueError, match="val_loader: expected at least one batch, got none"):
        laplace.calibrate([])
    with pytest.raises(ValueError, match="val_loader: expected labels, batch 1 has none"):
        laplace.calibrate([good.batch(), (good.batch()[0], None)])
    one = held_out()
    one.labels = torch.full((30,), 2)
    with pytest.raises(ValueError, match="expected at least two classes to calibrate with, all 30 are class 2"):
        laplace.calibrate(one.loader(7))
    one.labels = torch.full((30,), 3)
    with pytest.raises(ValueError, match="expected class indices from 0 to 2, got 3"):
        laplace.calibrate(one.loader(7))
    nan = held_out()
    nan.examples[3] = torch.full((4,), math.nan, dtype=DOUBLE)
    with pytest.raises(ValueError, match="not finite"):
        laplace.calibrate(nan.loader(7))
    assert laplace.calibration is None  # none of them left anything
    with pytest.raises(ValueError, match="calibrate: expected labels, there are none"):
        laplace.calibrate(LabelLikelihood())
    regression = mlp(n=24, classes=1)
    with pytest.raises(ValueError, match="expected likelihood='classification', or 'bradley-terry', got 'regression'"):
        fitted(regression).calibrate(regression.loader(7))


def test_a_failed_one_leaves_the_last_in_place(calibrated):
    laplace, new = calibrated
    before = laplace.predict(new.batch()).probs()
    with pytest.raises(ValueError, match="got none"):
        laplace.calibrate([])
    assert torch.equal(laplace.predict(new.batch()).probs(), before)


def test_a_vocabulary_is_too_much(monkeypatch):
    case = llama(classes=None)
    laplace = blk.LaplaceLoRA(case.model).fit([case.batch()], progress=False)
    monkeypatch.setattr("bayesian_lora_kernels.predictive.logits.MAX_LOGITS", 12)
    with pytest.raises(ValueError, match="covariance of 13 logits per example is too much at once"):
        laplace.calibrate([case.batch()])


def test_more_logits_than_labels_were_of(calibrated):
    laplace, _ = calibrated
    with pytest.raises(ValueError, match="expected at most the 3 logits of calibrate, got 4"):
        laplace.calibration.probs("pairwise", torch.zeros(1, 4), torch.eye(4)[None])


def test_a_default_device_does_not_reach_it(calibrated):
    """As after torch.set_default_device("cuda"), with a device on which nothing can be computed."""
    laplace, new = calibrated
    prediction = laplace.predict(new.batch())
    parts = [laplace.label_likelihood([batch], progress=False) for batch in held_out().loader(15)]
    with torch.device("meta"):
        total = sum(parts, LabelLikelihood())
        weights = Calibration.of(total, 1.0).weights["pairwise"]
        probs = laplace.calibration.probs("pairwise", prediction.mean, prediction.covariance)
        metrics = summary(probs, new.labels)
        paired_difference([1.0, 2.0, 4.0], [1.0, 3.0, 3.5])
        folds = assign_folds([0, 1] * 10, 2)
    assert weights.device.type == folds.device.type == "cpu"
    assert torch.equal(probs, prediction.probs())
    assert metrics == summary(probs, new.labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(laplace.calibration.probs("pairwise", prediction.mean, prediction.covariance), probs)


def test_the_old_curvature_is_not_kept(calibrated):
    laplace, _ = calibrated
    old = weakref.ref(laplace.posterior.curvature)
    laplace.fit(mlp(n=24).loader(4), progress=False)
    laplace.predict(held_out().batch())
    gc.collect()
    assert old() is None


def test_many_classes_in_slices(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(9, 30, generator=generator, dtype=DOUBLE)
    root = torch.randn(9, 30, 30, generator=generator, dtype=DOUBLE)
    posterior = blk.LogitPosterior(mean, root @ root.mT)
    for method in ("pairwise", "scalar", "probit", "bridge"):
        whole = posterior.probs(method)
        with monkeypatch.context() as patch:
            patch.setattr(probabilities, "SLICE", 900)
            assert torch.allclose(posterior.probs(method), whole, rtol=1e-12, atol=0)


def notes(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "says nothing of the level" in r.getMessage()]


def test_the_evidence_alone_is_no_calibration_and_it_says_so_once(caplog):
    laplace, new = fitted(mlp(n=24)), held_out()
    with caplog.at_level(logging.INFO):
        laplace.predict(new.batch()).probs()
        assert not notes(caplog)  # the prior is the user's
        laplace.optimize_prior_precision()
        prediction = laplace.predict(new.batch())
        prediction.probs("map")
        prediction.probs(calibrated=False)
        assert not notes(caplog)
        prediction.probs()
        laplace.predict(new.batch()).probs("mc")
        assert len(notes(caplog)) == 1
        caplog.clear()
        laplace.optimize_prior_precision().calibrate(new.loader(7), progress=False)
        laplace.predict(new.batch()).probs()
        laplace.predict(new.batch()).probs("mc")
        laplace.optimize_prior_precision("nll", val_loader=new.loader(7))
        laplace.predict(new.batch()).probs("probit")
        assert not notes(caplog)


# Differences.


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
@pytest.mark.parametrize("outputs", [None, 3, [7, 2, 5, 0], [4, 4], [[1, 2], [3, 4], [12, 0], [7, 7]]])
def test_differences_are_the_projection_of_all_logits(curvature, outputs):
    case = llama(classes=None)
    laplace = blk.LaplaceLoRA(case.model, curvature=curvature, fisher="exact", prior_precision=0.5)
    laplace.fit([case.batch()], progress=False)
    whole, found = laplace.predict(case.batch(), outputs), laplace.predict(case.batch(), outputs, differences=True)
    c = whole.mean.shape[1]
    centre = torch.eye(c, dtype=DOUBLE) - torch.full((c, c), 1 / c, dtype=DOUBLE)
    size = whole.covariance.abs().max()
    assert (found.covariance - centre @ whole.covariance @ centre).abs().max() < 1e-10 * size
    assert (found.mean - whole.mean @ centre).abs().max() < 1e-12
    assert found.differences
    if outputs is None:
        assert found.indices is None
    else:
        assert torch.equal(found.indices, whole.indices)
    if len(set(map(str, found.indices.tolist() if found.indices is not None else [0, 1]))) > 1 and outputs != [4, 4]:
        for method in ("pairwise", "scalar", "probit", "mc"):
            noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
            probs = (x.probs(method, generator=g) for x, g in zip((whole, found), noise, strict=True))
            assert relative(*probs) < 1e-6


def test_differences_against_dense_algebra():
    case = mlp(n=8)
    laplace = fitted(case, curvature="exact", fisher="exact")
    mean, by_module = jacobians(case)
    j = flat(by_module)
    from dense import ggn, softmax_fisher

    precision = ggn(j, softmax_fisher(mean)) + 0.3 * torch.eye(j.shape[-1], dtype=DOUBLE)
    truth = covariance(j, precision)
    centre = torch.eye(3, dtype=DOUBLE) - 1 / 3
    found = laplace.predict(case.batch(), differences=True)
    assert relative(found.covariance, centre @ truth @ centre) < 1e-8
    assert relative(found.mean, mean - mean.mean(1, keepdim=True)) < 1e-10


class Shared(torch.nn.Module):
    """Logits of which a large part is the same for all of them: `h W^T + 250 (h v) 1`."""

    def __init__(self, classes: int):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(6, 8)
        self.own, self.common = torch.nn.Linear(8, classes, bias=False), torch.nn.Linear(8, 1, bias=False)
        for head in (self.own, self.common):
            head.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x).tanh()
        return self.own(h) + 250 * self.common(h)


@pytest.mark.parametrize("curvature", ["kfac", "exact"])
@pytest.mark.parametrize("classes", [2, 4, 7])
def test_differences_lose_no_digits_to_what_all_logits_share(curvature, classes):
    torch.manual_seed(1)
    x, y = torch.randn(12, 6), torch.arange(12) % classes
    found = {}
    for dtype in (torch.float32, DOUBLE):
        laplace = blk.LaplaceLoRA(Shared(classes).to(dtype), curvature=curvature, fisher="exact")
        laplace.fit([(x.to(dtype), y)], progress=False)
        found[dtype] = [laplace.predict((x.to(dtype), None), differences=d).covariance for d in (False, True)]
    whole, truth = found[DOUBLE]
    assert whole.diagonal(dim1=1, dim2=2).mean() > 1e4 * truth.diagonal(dim1=1, dim2=2).mean()
    error = [
        float(
            (
                (
                    m.double()
                    - m.double().mean(1, keepdim=True)
                    - (m.double() - m.double().mean(1, keepdim=True)).mean(2, keepdim=True)
                )
                - truth
            )
            .abs()
            .max()
            / truth.abs().max()
        )
        for m in found[torch.float32]
    ]
    assert error[1] < 1e-4
    assert error[1] < error[0]


@pytest.mark.parametrize("differences", [False, True])
def test_backward_passes(differences, monkeypatch):
    from bayesian_lora_kernels.model.capture import Capture

    case = mlp(n=6)
    laplace, passes, backward = fitted(case), [], Capture.backward
    laplace.predict(case.batch(), differences=differences)  # what is checked first has passes of its own
    laplace.predict(case.batch(), differences=differences)
    monkeypatch.setattr(Capture, "backward", lambda *a, **k: passes.append(1) or backward(*a, **k))
    laplace.predict(case.batch(), differences=differences)
    assert len(passes) == (2 if differences else 3)


def test_samples_of_differences_sum_to_zero():
    case = mlp(n=3)
    prediction = fitted(case).predict(case.batch(), differences=True)
    n = 100_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = prediction.sample(n, torch.Generator().manual_seed(0))
    assert samples.sum(dim=2).abs().max() < 1e-9
    centred = samples - prediction.mean
    estimate = torch.einsum("snc,snd->ncd", centred, centred) / n
    v = prediction.variance
    spread = (prediction.covariance.square() + v[:, :, None] * v[:, None, :]).sqrt() / n**0.5
    assert ((estimate - prediction.covariance) / spread).abs().max() < 5
    for call in (prediction.scale_tril, prediction.distribution):
        with pytest.raises(ValueError, match="singular covariance"):
            call()


def test_calibrated_probabilities_of_differences_are_those_of_all_logits(calibrated):
    laplace, new = calibrated
    for method in METHODS:
        whole, found = (laplace.predict(new.batch(), differences=d).probs(method) for d in (False, True))
        assert (whole - found).abs().max() < 1e-9


def test_differences_that_are_not_served():
    case = mlp(n=6, classes=1)
    with pytest.raises(ValueError, match="differences: expected at least 2 logits, got 1"):
        fitted(case, likelihood="regression").predict(case.batch(), differences=True)
    case = llama(classes=None)
    laplace = blk.LaplaceLoRA(case.model).fit([case.batch()], progress=False)
    with pytest.raises(ValueError, match="differences: not of a vocabulary"):
        laplace.predict(case.batch(), "vocabulary", differences=True)
