"""The refitted linearised model in function space: Newton, leave-one-out by the Gaussian cavity, evidence.

A softmax sees differences of logits only, so everything lives in the C - 1 coordinates of an orthonormal basis of what
is orthogonal to (1, ..., 1). With J the Jacobian of the training logits there, the model is `f = J w` with
`w ~ N(0, 1 / l)`, or the linearised network, `f = f_MAP + J (w - theta)`. If there are more weights than rows, w lives
in the rows' span.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.curvature.passes import Passes
from bayesian_lora_kernels.posterior.evidence import minimise_on_grid
from bayesian_lora_kernels.predictive.probabilities import orthonormal_contrasts

TOLERANCE = 1e-8  # of the Newton decrement, per example
STEPS = 60


def jacobians(laplace: LaplaceLoRA, batches: list[dict[str, Tensor]], c: int) -> Tensor:
    """`[N, C, P]` float64, of all c logits; `laplace` is for regression, whose Fisher's columns are the logits."""
    passes = Passes(laplace.model, laplace.layers, laplace._forward, batches, laplace.config)
    blocks, columns = [], []
    for gradients in passes.weight_gradients("rows"):
        columns.append(torch.cat([gradients[layer.name].flatten(start_dim=1) for layer in laplace.layers], 1).double())
        if len(columns) == c:
            blocks.append(torch.stack(columns, 1))
            columns = []
    assert not columns
    return torch.cat(blocks)


@dataclass(frozen=True)
class Features:
    """Training rows `[N, C - 1, R]` in at most as many coordinates as there are rows.

    Attributes:
        span: `[P, R]`, orthonormal, from weights to coordinates; None: they are the same.
        basis: `[C, C - 1]`, as `orthonormal_contrasts` gives it.
        offset: `[N, C - 1]`, what the logits are at w = 0; None: zero.
    """

    rows: Tensor
    span: Tensor | None
    basis: Tensor
    offset: Tensor | None = None

    @classmethod
    def of(cls, jacobian: Tensor) -> Features:
        n, c, p = jacobian.shape
        basis = orthonormal_contrasts(c, jacobian)
        # Before fine-tuning the gradients of every LoRA A are zero.
        used = jacobian.abs().amax((0, 1)) > 0
        if not used.all():
            inner = cls.of(jacobian[:, :, used])
            eye = torch.eye(p, dtype=torch.float64)[:, used]
            return cls(inner.rows, eye if inner.span is None else eye @ inner.span, basis)
        rows = torch.einsum("cd,ncp->ndp", basis, jacobian)
        flat = rows.reshape(n * (c - 1), p)
        if p <= len(flat):
            return cls(rows, None, basis)
        values, vectors = torch.linalg.eigh(flat @ flat.T)
        kept = values > 1e-12 * values[-1]
        root = values[kept].sqrt()
        vectors = vectors[:, kept]
        return cls((vectors * root).reshape(n, c - 1, -1), flat.T @ (vectors / root), basis)

    def logits(self, w: Tensor) -> Tensor:
        """`[N, C - 1]`."""
        f = self.rows @ w
        return f if self.offset is None else f + self.offset

    def around(self, logits: Tensor, jacobian: Tensor, theta: Tensor) -> Features:
        """The linearised network, `logits + J (w - theta)`; the prior of w is as before."""
        return replace(self, offset=(logits.double() - jacobian @ theta) @ self.basis)

    @property
    def flat(self) -> Tensor:
        return self.rows.reshape(-1, self.rows.shape[2])

    @cached_property
    def narrow(self) -> Tensor:
        return self.rows.float()

    @property
    def scale(self) -> float:
        """Mean prior variance of a centred logit at unit prior precision."""
        return float(self.rows.square().sum() / (self.rows.shape[0] * self.rows.shape[1]))


@dataclass(frozen=True)
class Likelihood:
    """Of logits `f [N, C - 1]`: probabilities, gradient and Hessian of the negative log-likelihood."""

    nll: float
    probs: Tensor
    gradient: Tensor
    hessian: Tensor

    @classmethod
    def at(cls, f: Tensor, labels: Tensor, basis: Tensor) -> Likelihood:
        log_probs = (f @ basis.T).log_softmax(1)
        probs = log_probs.exp()
        error = probs.clone()
        error[torch.arange(len(f)), labels] -= 1
        full = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
        nll = float(-log_probs.gather(1, labels[:, None]).sum())
        return cls(nll, probs, error @ basis, basis.T @ full @ basis)


@dataclass(frozen=True)
class Refit:
    """The refitted model at one prior precision.

    Attributes:
        weights: in the coordinates of the features.
        f: fitted logits `[N, C]`, centred.
        loo: leave-one-out means `[N, C]`.
        loo_covariance: of the cavities `[N, C, C]`.
        train_nll: mean.
    """

    precision: float
    weights: Tensor
    f: Tensor
    loo: Tensor
    loo_covariance: Tensor
    train_nll: float


def newton(features: Features, labels: Tensor, precision: float, start: Tensor | None = None) -> Tensor:
    """Mode of the weights."""
    x = features.flat
    n = len(labels)
    w = torch.zeros(features.rows.shape[2], dtype=torch.float64) if start is None else start.clone()

    def loss(w: Tensor) -> tuple[float, Likelihood]:
        likelihood = Likelihood.at(features.logits(w), labels, features.basis)
        return likelihood.nll + precision / 2 * float(w @ w), likelihood

    value, likelihood = loss(w)
    for _ in range(STEPS):
        gradient = x.T @ likelihood.gradient.flatten() + precision * w
        step = torch.cholesky_solve(gradient[:, None], _rough_factor(features, likelihood.hessian, precision))[:, 0]
        decrement = float(gradient @ step)
        if decrement < TOLERANCE * n:
            break
        size = 1.0
        while True:
            new, new_likelihood = loss(w - size * step)
            if new <= value - 1e-4 * size * decrement or size < 1e-6:
                break
            size /= 2
        w, value, likelihood = w - size * step, new, new_likelihood
    return w


def _factor(features: Features, hessian: Tensor, precision: float) -> Tensor:
    weighted = (hessian @ features.rows).reshape(features.flat.shape)
    matrix = features.flat.T @ weighted
    matrix.diagonal().add_(precision)
    return torch.linalg.cholesky(matrix)


def _rough_factor(features: Features, hessian: Tensor, precision: float) -> Tensor:
    """For Newton's steps, from float32 where that will do: only the gradient has to be exact."""
    weighted = (hessian.float() @ features.narrow).reshape(features.flat.shape)
    matrix = features.narrow.reshape(features.flat.shape).T @ weighted
    matrix.diagonal().add_(precision)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return _factor(features, hessian, precision) if failed else factor.double()


def cavity(features: Features, hessian: Tensor, precision: float) -> Tensor:
    """Covariances `[N, C - 1, C - 1]` of each example's logits without the example's own site."""
    n, d, _ = features.rows.shape
    factor = _factor(features, hessian, precision)
    half = torch.linalg.solve_triangular(factor, features.flat.T, upper=False).T.reshape(n, d, -1)
    covariance = half @ half.mT
    result = torch.linalg.solve(torch.eye(d, dtype=torch.float64) - covariance @ hessian, covariance)
    return (result + result.mT) / 2


def refit(features: Features, labels: Tensor, precision: float, start: Tensor | None = None) -> Refit:
    w = newton(features, labels, precision, start)
    n = len(labels)
    f = features.logits(w)
    likelihood = Likelihood.at(f, labels, features.basis)
    covariance = cavity(features, likelihood.hessian, precision)
    loo = f + torch.einsum("nij,nj->ni", covariance, likelihood.gradient)
    basis = features.basis
    return Refit(precision, w, f @ basis.T, loo @ basis.T, basis @ covariance @ basis.T, likelihood.nll / n)


@dataclass(frozen=True)
class Evidence:
    """The network's own Laplace posterior at the prior precision of the largest evidence."""

    precision: float
    factor: float  # z = l0 ||theta||^2 / P
    hessian: Tensor
    features: Features

    @classmethod
    def of(cls, features: Features, logits: Tensor, labels: Tensor, square_norm: float, n_weights: int) -> Evidence:
        hessian = Likelihood.at(logits.double() @ features.basis, labels, features.basis).hessian
        weighted = (hessian @ features.rows).reshape(features.flat.shape)
        values = torch.linalg.eigvalsh(features.flat.T @ weighted).clamp_min(0)

        def negative(logs: Tensor) -> Tensor:
            inner = torch.stack([torch.log1p(values / one).sum() for one in logs.exp()])
            return 0.5 * logs.exp() * square_norm + 0.5 * inner

        precision = math.exp(minimise_on_grid(negative, "the network"))
        return cls(precision, precision * square_norm / n_weights, hessian, features)

    def cavities(self) -> Tensor:
        """`[N, C, C]`, of training examples, each without itself."""
        basis = self.features.basis
        return basis @ cavity(self.features, self.hessian, self.precision) @ basis.T

    def covariance(self, jacobian: Tensor) -> Tensor:
        """`[M, C, C]`, centred, of new examples, from their Jacobians `[M, C, P]`."""
        features = self.features
        rows = torch.einsum("cd,ncp->ndp", features.basis, jacobian)
        inside = rows if features.span is None else rows @ features.span
        factor = _factor(features, self.hessian, self.precision)
        m, d, r = inside.shape
        half = torch.linalg.solve_triangular(factor, inside.reshape(m * d, r).T, upper=False).T.reshape(m, d, r)
        result = half @ half.mT
        if features.span is not None:
            result = result + (rows @ rows.mT - inside @ inside.mT) / self.precision
        return features.basis @ result @ features.basis.T


def map_weights(laplace: LaplaceLoRA) -> Tensor:
    """`[P]` float64, in the order of the Jacobian's columns."""
    return torch.cat([layer.matrix().detach().double().flatten() for layer in laplace.layers])


def evidence_arguments(laplace: LaplaceLoRA) -> dict[str, Any]:
    """`||theta||^2` and P of the layers that carry the posterior."""
    return {
        "square_norm": float(sum(layer.matrix().double().square().sum() for layer in laplace.layers)),
        "n_weights": sum(math.prod(layer.shape) for layer in laplace.layers),
    }
