"""compat.laplace_lora: the call sequence of laplace-lora's scripts, and the two scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import models
import pytest
import torch
from snapshot import untouched
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.compat.laplace_lora import Laplace

IDS = [2, 5, 7]


class Rows(Dataset):
    def __init__(self, batch: Mapping[str, Tensor]):
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[i] for key, value in self.batch.items()}


class WrappedCausal(nn.Module):
    """As run_gpt_laplace.py wraps: keywords in, the last position's logits of some tokens out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Tensor) -> Tensor:
        kwargs.pop("labels", None)
        return self.model(**kwargs)["logits"][:, -1, IDS]


class WrappedClassifier(nn.Module):
    """As run_classification_bert_laplace.py wraps: the labels go to the model too."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Tensor) -> Tensor:
        assert "labels" in kwargs
        return self.model(**kwargs)["logits"]


def causal(dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[nn.Module, DataLoader]:
    case = models.llama((5, 3, 6, 4, 5), dtype=dtype, **changes)
    return WrappedCausal(case.model), DataLoader(Rows(case.batch(side="left")), batch_size=2)


def classifier() -> tuple[nn.Module, DataLoader]:
    case = models.bert((5, 3, 6, 4, 5))
    return WrappedClassifier(case.model), DataLoader(Rows(case.batch()), batch_size=2)


@pytest.mark.parametrize("build", [causal, classifier], ids=["llama", "bert"])
@pytest.mark.parametrize("scale", ["correct", "published"])
@pytest.mark.parametrize("prior", [1.0, None], ids=["homo", "hetero"])
def test_the_published_scripts_call_sequence(build, scale, prior):
    model, loader = build()
    la = Laplace(
        model,
        "classification",
        prior_precision=prior,
        subset_of_weights="all",
        hessian_structure="kron",
        scale=scale,
    )
    batches = list(loader)  # a DataLoader draws a random number
    with untouched(model):
        la.fit(batches)
    model.eval()
    assert la.n_data == 5
    before = la.log_marginal_likelihood().detach()
    precision = la.optimize_prior_precision(method="marglik", n_steps=50, lr=1e-1)
    assert precision.shape == ((la.n_layers,) if prior is None else (1,))
    assert la.log_marginal_likelihood() > before
    for batch in loader:  # the last is smaller
        with torch.no_grad():
            f_mu, f_var = la._glm_predictive_distribution(batch)
        n = len(batch["labels"])
        assert f_mu.shape == (n, 3)
        assert f_var.shape == (n, 3, 3)
        samples = 100_000
        means, covariances = f_mu.expand(samples, -1, -1), f_var.expand(samples, -1, -1, -1)
        noise = torch.randn_like(means).unsqueeze(-1)
        probs = torch.softmax(means + (torch.linalg.cholesky(covariances) @ noise).squeeze(-1), dim=-1).mean(0)
        assert torch.allclose(probs, la(batch, link_approx="mc", n_samples=20_000), atol=0.02)
        assert torch.allclose(f_mu, model(**batch).detach(), atol=1e-8)
    assert la.optimize_prior_precision(method="val_gd", n_steps=5, lr=1e-1, val_loader=loader).shape == precision.shape


def test_the_correct_scale_is_the_engine_s():
    model, loader = causal()
    la = Laplace(model, "classification", prior_precision=2.0)
    la.fit(loader)
    reference = blk.LaplaceLoRA(model.model, class_token_ids=IDS, prior_precision=2.0)
    reference.fit(models.llama((5, 3, 6, 4, 5)).loader(5, side="right"), progress=False)
    for (name, factor), truth in zip(la.engine.factors.items(), reference.factors.values(), strict=True):
        assert torch.allclose(factor.a, truth.a, atol=1e-5), name  # rotary angles are float32
        assert torch.allclose(factor.s, truth.s, atol=1e-5), name
    assert float(la.log_marginal_likelihood()) == pytest.approx(float(reference.log_marginal_likelihood()), rel=1e-5)
    precision = torch.tensor([1.5], requires_grad=True)
    (gradient,) = torch.autograd.grad(la.log_marginal_likelihood(precision), precision)
    step = 1e-3
    values = [float(la.log_marginal_likelihood(torch.tensor([1.5 + s], dtype=torch.float64))) for s in (-step, step)]
    assert float(gradient) == pytest.approx((values[1] - values[0]) / (2 * step), rel=1e-4)


def test_the_published_scale_divides_the_inputs_by_examples_and_counts_padding():
    model, loader = causal()
    la = Laplace(model, "classification", prior_precision=1.0, scale="published")
    la.fit(loader)
    inputs: dict[str, list[Tensor]] = {name: [] for name in la.engine.factors}
    handles = [
        module.register_forward_hook(lambda _, args, __, name=name: inputs[name].append(args[0].detach()))
        for name, module in model.named_modules()
        if name in inputs
    ]
    model.eval()
    correct = Laplace(model, "classification", rank=None)
    with torch.no_grad():
        for batch in loader:
            model(**batch)
    for handle in handles:
        handle.remove()
    correct.fit(loader)
    for name, factors in la.engine.factors.items():
        rows = torch.cat([a.flatten(0, 1) for a in inputs[name]])
        assert len(rows) == 5 * 6  # five texts of six columns, padding included
        torch.testing.assert_close(factors.a, rows.T @ rows / 5)
        torch.testing.assert_close(factors.s, correct.engine.factors[name].s)  # no gradient comes from padding
    posterior = blk.KroneckerPosterior.from_factors(la.engine.factors[name], 1.0)
    assert float(la.engine.posterior[name].logdet()) == pytest.approx(float(posterior.logdet()))


def test_tuple_batches_saved_modules_and_samples():
    case = models.bert()
    la = Laplace(WrappedPlain(case.model), "classification", prior_precision=3.0)
    loader = []
    for batch in case.loader(2):
        labels = batch.pop("labels")
        loader.append((batch, labels))
    la.fit(loader)
    assert all("modules_to_save" not in name for name in la.engine.factors)
    mean, covariance = la._glm_predictive_distribution(loader[0])
    assert mean.shape == (2, 3)
    assert la.n_params == len(la.mean) == la.sample(4).shape[1]
    assert torch.allclose(la.predict(loader[0]).covariance, covariance)


class WrappedPlain(WrappedClassifier):
    def forward(self, **kwargs: Tensor) -> Tensor:
        return self.model(**kwargs)["logits"]


@pytest.mark.parametrize("structure", ["ekfac", "full"])
def test_other_structures_are_the_engine_s(structure):
    model, loader = causal()
    la = Laplace(model, "classification", prior_precision=1.0, hessian_structure=structure)
    la.fit(loader)
    assert la._glm_predictive_distribution(next(iter(loader)))[1].shape == (2, 3, 3)


def test_bad_calls_say_what_was_expected():
    model, loader = causal()
    for change, message in (
        ({"subset_of_weights": "last_layer"}, "subset_of_weights: expected 'all', got 'last_layer'; freeze"),
        ({"hessian_structure": "diag"}, "hessian_structure: expected 'kron' or 'ekfac' or 'full'"),
        ({"scale": "other"}, "scale: expected 'correct' or 'published'"),
        ({"temperature": 0.5}, "temperature: expected 1, got 0.5"),
        ({"scale": "published", "rank": 3}, "no other settings"),
        ({"prior_precision": torch.ones(3)}, "expected one number, or one for each of 8 layers, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            Laplace(model, "classification", **change)
    la = Laplace(model, "classification")
    la.fit(loader)
    with pytest.raises(ValueError, match="method: expected 'marglik' or 'val_gd' or 'CV'"):
        la.optimize_prior_precision(method="grid")
    with pytest.raises(ValueError, match="needs labelled batches"):
        la.optimize_prior_precision(method="val_gd")
    with pytest.raises(TypeError, match="unexpected arguments"):
        la.optimize_prior_precision(other=1)
    with pytest.raises(TypeError, match="expected a mapping for the wrapped model, got Tensor"):
        la._glm_predictive_distribution((torch.zeros(2, 3), torch.zeros(2)))
