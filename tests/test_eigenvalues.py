"""EKFAC's corrected eigenvalues against loops over examples, directions and Fisher columns."""

from __future__ import annotations

import pytest
import torch
from dense import dense_factor, fisher_columns, jacobians, record, relative
from models import Case, bert, llama, mlp

import bayesian_lora_kernels as blk

CASES = {
    "mlp, full": (lambda: mlp(n=12, tokens=3), {}),
    "mlp, fewer rows than inputs": (lambda: mlp(n=3, inputs=9, width=8), {}),
    "mlp, reduce": (lambda: mlp(n=3, tokens=4, inputs=9, width=8), {"tokens": "reduce"}),
    "mlp, low-rank with tails": (
        lambda: mlp(n=20, tokens=3, inputs=20, width=22),
        {"rank": 3, "rank_threshold": 8},
    ),
    "mlp, low-rank without": (
        lambda: mlp(n=20, tokens=3, inputs=20, width=22),
        {"rank": 3, "rank_threshold": 8, "tail": False},
    ),
    "llama": (llama, {}),
    "bert, last": (bert, {"tokens": "last"}),
}


def fitted(case: Case, **arguments) -> blk.LaplaceLoRA:
    settings = {**case.arguments, "curvature": "ekfac", "rank": None, **arguments}
    return blk.LaplaceLoRA(case.model, **settings).fit(case.loader(2), progress=False)


def per_example_gradients(case: Case) -> dict[str, torch.Tensor]:
    """`{module: [N * C, d_out, d_in]}`: every Fisher column of every example, by autograd."""
    logits, jacobian = jacobians(case)
    columns = torch.stack([fisher_columns(f) for f in logits])  # [N, m, C]
    return {name: torch.einsum("nmc,ncoi->nmoi", columns, j).flatten(0, 1) for name, j in jacobian.items()}


def kept_directions(factor: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns of what is not numerically zero, leading first."""
    full = factor.shape[0] == factor.shape[1]
    u, s, _ = torch.linalg.svd(factor.double(), full_matrices=False)
    return u[:, s > s.max() * (1e-13 if full else 1e-8)]


@pytest.mark.parametrize("name", CASES)
def test_eigenvalues_are_second_moments_along_the_eigenbasis(name):
    build, arguments = CASES[name]
    case = build()
    laplace = fitted(case, **arguments)
    gradients = per_example_gradients(case)
    tail = arguments.get("tail", True)
    scale = max(float(g.square().sum(dim=0).max()) for g in gradients.values())
    for module, posterior in laplace.posterior.items():
        factors = laplace.factors[module]
        q_s, q_a = kept_directions(factors.s), kept_directions(factors.a)
        assert posterior.basis_s.shape == q_s.shape
        assert posterior.basis_a.shape == q_a.shape
        q_s, q_a = posterior.basis_s, posterior.basis_a  # the same up to signs, and the order of equal values
        for basis, factor in ((q_s, factors.s), (q_a, factors.a)):
            dense = dense_factor(factor, torch.tensor(0.0))
            diagonal = basis.T @ dense @ basis
            assert relative(diagonal, torch.diag(diagonal.diagonal())) < 1e-9
        d_out, d_in = posterior.shape
        rest_s = torch.linalg.svd(q_s).U[:, q_s.shape[1] :]  # any basis of the complement
        rest_a = torch.linalg.svd(q_a).U[:, q_a.shape[1] :]
        kept = torch.zeros(q_s.shape[1], q_a.shape[1], dtype=torch.float64)
        on_rest_a, on_rest_s, on_rest = kept.sum(1), kept.sum(0), 0.0
        for g in gradients[module]:
            kept += (q_s.T @ g @ q_a) ** 2
            on_rest_a = on_rest_a + ((q_s.T @ g @ rest_a) ** 2).sum(1)
            on_rest_s = on_rest_s + ((rest_s.T @ g @ q_a) ** 2).sum(0)
            on_rest = on_rest + ((rest_s.T @ g @ rest_a) ** 2).sum()
        n_s, n_a = d_out - q_s.shape[1], d_in - q_a.shape[1]
        measured_s = n_s > 0 and (tail or factors.s.shape[1] == d_out)
        measured_a = n_a > 0 and (tail or factors.a.shape[1] == d_in)
        expected = (
            kept,
            on_rest_a / n_a if measured_a else 0 * on_rest_a,
            on_rest_s / n_s if measured_s else 0 * on_rest_s,
            on_rest / (n_s * n_a) if measured_s and measured_a else torch.zeros((), dtype=torch.float64),
        )
        for got, want in zip(posterior.curvature, expected, strict=True):
            assert got.dtype == torch.float64
            assert torch.allclose(got, want, rtol=0, atol=1e-10 * scale), module


@pytest.mark.parametrize("tokens", ["expand", "reduce", "last"])
def test_the_trace_of_the_exact_blocks_is_kept(tokens):
    """Whatever the basis, with complements measured, the eigenvalues sum to the trace of the exact GGN."""
    case = mlp(n=4, tokens=3, inputs=9, width=8)
    laplace = fitted(case, tokens=tokens)
    for module, gradients in per_example_gradients(case).items():
        values, multiplicity = laplace.posterior[module].spectrum()
        assert float(values @ multiplicity) == pytest.approx(float(gradients.square().sum()), rel=1e-10), module


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("tokens", ["expand", "last"])
def test_nothing_depends_on_the_basis_of_a_null_space(curvature, tokens):
    """The same model in rotated input coordinates: the null space of A gets another arbitrary basis."""
    case, rotated = (mlp(n=3, tokens=4, inputs=30, width=8) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    with torch.no_grad():
        rotated.model.first.weight.copy_(case.model.first.weight @ rotation.T)
    rotated.examples = [x @ rotation.T for x in case.examples]
    settings = {"curvature": curvature, "tokens": tokens, "prior_precision": 0.1}
    first, second = fitted(case, **settings), fitted(rotated, **settings)
    assert first.factors["first"].a.shape == (31, 31)
    assert first.posterior["first"].complement[1] > 0
    one, two = first.predict(case.batch()), second.predict(rotated.batch())
    assert relative(one.covariance, two.covariance) < 1e-9
    assert float(first.log_marginal_likelihood()) == pytest.approx(float(second.log_marginal_likelihood()), rel=1e-10)


def test_record_sees_what_autograd_sees():
    """The two truths of these tests agree: tokens pulled back by hooks, and Jacobians by autograd."""
    case = llama()
    _, jacobian = jacobians(case)
    for n, example in enumerate(record(case, list(jacobian))):
        for module, expected in jacobian.items():
            got = torch.einsum("cto,ti->coi", example.g[module], example.a[module])
            assert (got - expected[n]).abs().max() < 1e-12
