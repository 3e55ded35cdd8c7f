"""What BayesAdapt's trainer does with its `Laplace`, by ours, in a stand-in for that package; and dense truth."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import models
import pytest
import torch
import transformers
from dense import covariance, flat, ggn, jacobians, relative, softmax_fisher
from torch import Tensor, nn

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.compat import laplace_lora

CLASSES, LAMBDA = 3, 2.0


class Wrapped(nn.Module):
    """The last position's logits of a causal LM whose output head has one row for each class."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Tensor:
        kwargs.pop("labels", None)
        return self.model(**kwargs).logits[:, -1, :]


class Trainer:
    """Evaluates as the trainer there: fit on triples, evidence by its arguments, mean and covariance of the logits."""

    def __init__(self, make: Any, model: nn.Module, loader: list[Any], **settings: Any):
        self.la = make(
            Wrapped(model),
            "classification",
            prior_precision=1.0,
            subset_of_weights="all",
            **{"hessian_structure": "kron", **settings},
        )
        self.la.fit(loader)
        self.found = self.la.optimize_prior_precision(method="marglik", n_steps=100, lr=1e-1)

    def logits(self, inputs: Any, samples: int) -> Tensor:
        with torch.no_grad():
            mean, variance = self.la._glm_predictive_distribution(inputs)
        mean, variance = mean.expand(samples, -1, -1), variance.expand(samples, -1, -1, -1)
        root = torch.linalg.cholesky(variance + 1e-6 * torch.eye(CLASSES)).to(mean.dtype)
        return (mean + (root @ torch.randn_like(mean)[..., None])[..., 0]).permute(1, 0, 2)


def case(lengths: tuple[int, ...] = (5, 3, 6, 4)) -> models.Case:
    """LoRA on q, v and the small head."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        pad_token_id=models.PAD,
    )
    model = transformers.LlamaForCausalLM(config)
    model.lm_head = nn.Linear(16, CLASSES, bias=False)
    adapted = models.lora(model, ["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM", scale=0.2)
    return models.causal_case(models.in_float64(adapted), lengths, range(CLASSES), models.VOCABULARY)


def triples(one: models.Case, size: int, extra: int = 0) -> list[Any]:
    """`(BatchEncoding, labels, question ids)`, padded on the left."""
    batches = []
    for number, batch in enumerate(one.loader(size, side="left", extra=extra)):
        labels = batch.pop("labels")
        batches.append((transformers.BatchEncoding(batch), labels, [f"q{number}-{i}" for i in range(len(labels))]))
    return batches


@pytest.fixture
def theirs(monkeypatch) -> Iterator[ModuleType]:
    """The module that defines `Laplace`, and a trainer's that imported it."""

    def Laplace(model, likelihood, subset_of_weights="last_layer", hessian_structure="kron", *args, **kwargs):
        raise AssertionError("theirs was called")

    for name in ("bayesadapt", "bayesadapt.laplace", "bayesadapt.laplace.laplace", "bayesadapt.trainers"):
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        module.Laplace = Laplace  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    yield sys.modules["bayesadapt.laplace.laplace"]
    blk.unpatch("bayesadapt")


def test_patch_puts_ours_where_the_trainer_finds_theirs_and_takes_it_out_again(theirs):
    original = theirs.Laplace
    replaced = blk.patch("bayesadapt")
    assert set(replaced) == {
        f"{name}.Laplace" for name in ("bayesadapt", "bayesadapt.laplace", theirs.__name__, "bayesadapt.trainers")
    }
    one = case()
    trainer = Trainer(sys.modules["bayesadapt.trainers"].Laplace, one.model, triples(one, 3))
    assert isinstance(trainer.la, laplace_lora.Laplace)
    assert float(trainer.found) != pytest.approx(1.0, rel=0.1)
    inputs = triples(one, 3)[0][0]
    torch.manual_seed(0)
    logits = trainer.logits(inputs, samples=20_000)
    assert logits.shape == (3, 20_000, CLASSES)
    mean, variance = trainer.la._glm_predictive_distribution(inputs)
    assert torch.allclose(logits.mean(dim=1), mean.detach(), atol=0.05 * float(variance.max()) ** 0.5)
    assert set(blk.unpatch("bayesadapt")) == set(replaced)
    assert theirs.Laplace is original


def test_the_exact_structure_is_the_dense_posterior_whatever_the_padding_and_the_batches():
    one = case()
    logits, parts = jacobians(one)
    jacobian = flat(parts)
    precision = ggn(jacobian, softmax_fisher(logits)) + LAMBDA * torch.eye(jacobian.shape[2])
    expected = covariance(jacobian, precision)
    found = {}
    for size, extra in ((4, 0), (2, 5)):
        la = laplace_lora.Laplace(Wrapped(one.model), "classification", "all", "full", prior_precision=LAMBDA)
        la.fit(triples(one, size, extra))
        predictions = [la._glm_predictive_distribution(batch) for batch, _, _ in triples(one, size, extra)]
        means, variances = zip(*predictions, strict=True)
        assert relative(torch.cat(means), logits) < 1e-6
        assert relative(torch.cat(variances), expected) < 1e-5  # rotary angles are float32
        la.optimize_prior_precision(method="marglik")
        found[size, extra] = float(la.prior_precision)
        la.calibrate(triples(one, size, extra))
        reference = blk.LaplaceLoRA(one.model, curvature="exact", prior_precision=la.prior_precision)
        reference.fit([one.batch()], progress=False).calibrate([one.batch()], progress=False)
        calibrated = torch.cat([la.predict(batch).probs() for batch in triples(one, size, extra)])
        assert torch.allclose(calibrated, reference.predict(one.batch()).probs(), atol=1e-4)
    assert found[2, 5] == pytest.approx(found[4, 0], rel=1e-4)


def test_a_checkout_that_is_another_or_is_not_there_is_refused(theirs, monkeypatch):
    theirs.Laplace = lambda model: None
    with pytest.raises(RuntimeError, match=r"Laplace\(model\) is not known, expected Laplace\(model, likelihood"):
        blk.patch("bayesadapt")
    monkeypatch.setitem(sys.modules, "bayesadapt", None)
    with pytest.raises(ModuleNotFoundError, match="bayesadapt cannot be imported, run where its checkout is"):
        blk.patch("bayesadapt")
