"""How close is what is approximated: leave-one-out by the cavity, against refitting without each example, in float64.

Jacobians are compared with autograd, logit by logit, and the evidence with the package's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import LaplaceLoRA

from . import rules
from .linearised import Evidence, Features, Refit, evidence_arguments, jacobians, map_weights, newton, refit
from .models import FOUR, SIX, Model, digits, sequences

VARIANCES = (1.0, 10.0, 100.0, 1000.0)


def left_out(features: Features, labels: Tensor, fit: Refit) -> Tensor:
    """`[N, C]`, the logits of each example from a refit without it."""
    result = torch.empty_like(fit.loo)
    for i in range(len(labels)):
        others = torch.arange(len(labels)) != i
        part = replace(features, rows=features.rows[others], offset=_of(features.offset, others))
        w = newton(part, labels[others], fit.precision, fit.weights)
        result[i] = features.basis @ features.logits(w)[i]
    return result


def _of(offset: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if offset is None else offset[rows]


def leave_one_out(features: Features, labels: Tensor) -> list[dict[str, float]]:
    rows = []
    for variance in VARIANCES:
        fit = refit(features, labels, features.scale / variance)
        true = left_out(features, labels, fit)
        rows.append(
            {
                "variance": variance,
                "relative_error_of_change": float((fit.loo - true).norm() / (fit.f - true).norm()),
                "nll_fitted": fit.train_nll,
                "nll_cavity": rules.measured(fit.loo.softmax(1), labels)["nll"],
                "nll_refitted": rules.measured(true.softmax(1), labels)["nll"],
                "T_cavity": rules.temperature(fit.loo, labels),
                "T_refitted": rules.temperature(true, labels),
                "accuracy_cavity": float((fit.loo.argmax(1) == labels).double().mean()),
                "accuracy_refitted": float((true.argmax(1) == labels).double().mean()),
            }
        )
    return rows


def against_autograd(model: Model, laplace: LaplaceLoRA, found: Tensor) -> float:
    """Largest difference of the first examples' Jacobians to autograd's, over the largest entry."""
    weights = [weight for layer in laplace.layers for weight in layer.parameters().values()]
    batch = {key: value[:3] for key, value in model.batches["train"][0].items()}
    logits = model.forward(model.model, batch)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(value, weights, retain_graph=True)])
        for value in logits.flatten()
    ]
    truth = torch.stack(rows).reshape(*logits.shape, -1).double()
    return float((found[:3] - truth).abs().max() / truth.abs().max())


def verification() -> dict[str, Any]:
    result: dict[str, Any] = {}
    families = [
        digits("digits, C 4, N 60, noise 30 %", FOUR, 60, 0.3, (60, 300), pretrained=SIX),
        sequences("sequences, C 3, N 60, noise 20 %", 3, 60, 0.2, (60, 300)),
    ]
    for family in families:
        *_, model = family.make(0)
        labels, logits = model.labels["train"], model.logits("train")
        arguments: dict[str, Any] = {"curvature": "exact", "fisher": "exact"}
        forward = model.forward if model.class_token_ids is None else None
        laplace = LaplaceLoRA(model.model, forward, model.class_token_ids, likelihood="regression", **arguments)
        jacobian = jacobians(laplace, model.batches["train"], logits.shape[1])
        features = Features.of(jacobian)
        evidence = Evidence.of(features, logits, labels, **evidence_arguments(laplace))
        package = LaplaceLoRA(model.model, forward, model.class_token_ids, **arguments)
        sizes = [len(batch[next(iter(batch))]) for batch in model.batches["train"]]
        batches = [
            {**batch, "labels": part} for batch, part in zip(model.batches["train"], labels.split(sizes), strict=True)
        ]
        package.fit(batches, progress=False).optimize_prior_precision()
        new = model.batches["test"][0]
        centre = features.basis @ features.basis.T
        truth = centre @ package.predict(new).covariance.double() @ centre
        ours = evidence.covariance(jacobians(laplace, [new], logits.shape[1]))
        result[model.cell] = {
            "jacobian_against_autograd": against_autograd(model, laplace, jacobian),
            "evidence_prior_over_the_package's": evidence.precision / float(package.prior_precision),  # type: ignore[arg-type]
            "covariance_against_the_package's": float((ours - truth).norm() / truth.norm()),
            "leave_one_out": {
                "linearised network": leave_one_out(features.around(logits, jacobian, map_weights(laplace)), labels),
                "kernel": leave_one_out(features, labels),
            },
        }
    return result
