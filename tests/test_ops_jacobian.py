"""`jacobian_gram` and `jacobian_covariance` against explicit Jacobians and dense Kronecker products in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops.jacobian_covariance import reference
from bayesian_lora_kernels.ops.jacobian_covariance.routes import (
    multiply_adds_by_jacobian,
    multiply_adds_by_tokens,
    prefer_tokens,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Posterior:
    basis_s: torch.Tensor
    basis_a: torch.Tensor
    precision_blocks: Any


def posterior_and_dense(d_out, d_in, k_s, k_a, precisions=None):
    """A posterior with the given kept directions, and its dense covariance of the row-major weight, from torch.kron."""
    q_s = torch.linalg.qr(torch.randn(d_out, d_out, dtype=torch.float64)).Q
    q_a = torch.linalg.qr(torch.randn(d_in, d_in, dtype=torch.float64)).Q
    if precisions is None:
        precisions = (torch.rand(k_s, k_a), torch.rand(k_s), torch.rand(k_a), torch.rand(()))
        precisions = tuple(block.double() + 0.05 for block in precisions)
    kept, rest_a, rest_s, rest = precisions
    eigenvalues = rest.expand(d_out, d_in).clone()
    eigenvalues[:k_s, :k_a] = kept
    eigenvalues[:k_s, k_a:] = rest_a[:, None]
    eigenvalues[k_s:, :k_a] = rest_s
    basis = torch.kron(q_s, q_a)
    dense = basis @ torch.diag(1 / eigenvalues.flatten()) @ basis.T
    return Posterior(q_s[:, :k_s], q_a[:, :k_a], precisions), dense


def jacobians(a, g, mask=None):
    """`[N, C, d_out * d_in]`, float64, in the plainest way."""
    a, g = a.double(), g.double()
    if mask is not None:
        a = torch.where(mask[..., None], a, 0.0)
        g = torch.where(mask[:, None, :, None], g, 0.0)
    return torch.einsum("ncto,nti->ncoi", g, a).flatten(2)


def plain_covariance(a, g, dense, dtype):
    """The definition in PyTorch in the given dtype: what the error budget compares with."""
    j = torch.einsum("ncto,nti->ncoi", g.to(dtype), a.to(dtype)).flatten(2)
    return j @ dense.to(dtype) @ j.mT


def assert_within_budget(result, a, g, dense, mask=None):
    j = jacobians(a, g, mask)
    truth = j @ dense @ j.mT
    if mask is not None:
        a = torch.where(mask[..., None], a, 0.0)
        g = torch.where(mask[:, None, :, None], g, 0.0)
    plain = plain_covariance(a, g, dense, result.dtype)
    size = truth.diagonal(dim1=1, dim2=2)
    size = (size[:, :, None] * size[:, None, :]).sqrt()  # Cauchy-Schwarz: what an entry could be
    # 8: the sums over tokens inside the Jacobian cancel more than `size`, the length of what is left, can tell.
    budget = 2 * (plain.double() - truth).abs() + 8 * torch.finfo(result.dtype).eps * size
    assert ((result.double() - truth).abs() <= budget).all()
    assert torch.equal(result, result.mT)


def data(n, tokens, d_in, d_out, outputs, dtype=torch.float32):
    return torch.randn(n, tokens, d_in).to(dtype), torch.randn(n, outputs, tokens, d_out).to(dtype)


SHAPES = [  # n, tokens, d_in, d_out, outputs
    (2, 5, 7, 4, 3),
    (2, 9, 3, 6, 2),  # fewer inputs than tokens
    (3, 2, 11, 5, 4),  # the token Gram is cheaper
    (1, 1, 6, 1, 1),
    (2, 4, 1, 3, 2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_equals_explicit_jacobians(shape, dtype):
    a, g = data(*shape, dtype)
    result = ops.jacobian_gram(a, g)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within_budget(result, a, g, torch.eye(shape[2] * shape[3]).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kept_s", ["full", "some", "none"])
@pytest.mark.parametrize("kept_a", ["full", "some", "none"])
def test_covariance_equals_dense_kronecker(shape, kept_s, kept_a, dtype):
    _, _, d_in, d_out, _ = shape
    k_s = {"full": d_out, "some": d_out // 2, "none": 0}[kept_s]
    k_a = {"full": d_in, "some": d_in // 2, "none": 0}[kept_a]
    posterior, dense = posterior_and_dense(d_out, d_in, k_s, k_a)
    a, g = data(*shape, dtype)
    result = ops.jacobian_covariance(a, g, posterior)
    assert_within_budget(result, a, g, dense)
    assert (torch.linalg.eigvalsh(result.double())[:, 0] >= -1e-5 * result.double().abs().amax((1, 2))).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_exact_to_ten_digits(shape):
    _, _, d_in, d_out, _ = shape
    posterior, dense = posterior_and_dense(d_out, d_in, (d_out + 1) // 2, (d_in + 1) // 2)
    a, g = data(*shape, torch.float64)
    j = jacobians(a, g)
    truth = j @ dense @ j.mT
    assert (ops.jacobian_covariance(a, g, posterior) - truth).norm() <= 1e-12 * truth.norm()
    single = ops.jacobian_covariance(a.float(), g.float(), posterior)
    assert (single - truth).norm() <= 1e-5 * truth.norm()


def test_masked_tokens_may_hold_anything():
    a, g = data(3, 6, 9, 4, 2)
    posterior, dense = posterior_and_dense(4, 9, 2, 3)
    mask = torch.rand(3, 6) < 0.5
    mask[1] = False
    a[~mask] = float("nan")
    g.transpose(1, 2)[~mask] = float("inf")
    assert_within_budget(ops.jacobian_covariance(a, g, posterior, mask=mask), a, g, dense, mask)
    gram = ops.jacobian_gram(a, g, mask=mask)
    assert_within_budget(gram, a, g, torch.eye(36).double(), mask)
    assert torch.equal(gram[1], torch.zeros(2, 2))


def test_any_layout_mixed_dtypes_and_empty_sizes():
    posterior, dense = posterior_and_dense(4, 6, 2, 3)
    layouts = [
        (torch.randn(3, 6, 5).mT, torch.randn(3, 2, 4, 5).mT),
        (torch.randn(6, 10, 12)[::2, ::2, ::2], torch.randn(3, 4, 5, 8)[:, ::2, :, ::2]),
        (torch.randn(1, 5, 6).expand(3, 5, 6), torch.randn(3, 1, 5, 4).expand(3, 2, 5, 4)),
        (torch.randn(3, 1, 6).expand(3, 5, 6), torch.randn(3, 2, 1, 4).expand(3, 2, 5, 4)),
        (torch.randn(3, 5, 6).bfloat16(), torch.randn(3, 2, 5, 4)),
    ]
    for a, g in layouts:
        assert_within_budget(ops.jacobian_covariance(a, g, posterior), a, g, dense)
        assert_within_budget(ops.jacobian_gram(a, g), a, g, torch.eye(24).double())
    for n, tokens, outputs in ((0, 5, 2), (3, 0, 2), (3, 5, 0)):
        a, g = data(n, tokens, 6, 4, outputs)
        for result in (ops.jacobian_covariance(a, g, posterior), ops.jacobian_gram(a, g)):
            assert torch.equal(result, torch.zeros(n, outputs, outputs))


@pytest.mark.parametrize("limit", [1, 40, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_leave_nothing_out(monkeypatch, shape, limit):
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", limit)
    a, g = data(5, *shape[1:])
    _, _, d_in, d_out, outputs = shape
    posterior, dense = posterior_and_dense(d_out, d_in, (d_out + 1) // 2, (d_in + 1) // 2)
    assert_within_budget(ops.jacobian_covariance(a, g, posterior), a, g, dense)
    poisoned = torch.full((5, outputs, outputs), float("nan"))
    reference.jacobian_gram(poisoned, a, g, None)
    assert_within_budget(poisoned, a, g, torch.eye(d_in * d_out).double())


@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_kept_directions_that_the_data_has_pinned_down(ratio):
    """Curvature far above the prior, Jacobians almost inside the kept directions: a subtractive form fails here."""
    d_out, d_in, k_s, k_a = 8, 64, 8, 12
    precisions = (torch.full((k_s, k_a), 1 + ratio), torch.ones(k_s), torch.ones(k_a), torch.ones(()))
    posterior, _ = posterior_and_dense(d_out, d_in, k_s, k_a, tuple(block.double() for block in precisions))
    inside = torch.randn(4, 16, k_a).double() @ posterior.basis_a.T
    a = (inside + 1e-5 * torch.randn(4, 16, d_in)).float()
    g = torch.randn(4, 3, 16, d_out)
    basis = posterior.basis_a  # truth, without cancellation: split in float64, where 1e-16 * 1e6 is nothing
    j = jacobians(a, g).reshape(4, 3, d_out, d_in)
    kept, rest = j @ basis, j - j @ basis @ basis.T
    truth = (kept.flatten(2) @ kept.flatten(2).mT) / (1 + ratio) + rest.flatten(2) @ rest.flatten(2).mT
    result = ops.jacobian_covariance(a, g, posterior)
    assert (result - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out", "outputs", "expected"),
    [
        (256, 4096, 8, 4, False),  # LoRA A, 4 classes: form J
        (256, 4096, 8, 64, True),  # LoRA A, many outputs: through tokens
        (1, 4096, 4096, 4, True),  # last token only: never form J
        (256, 8, 4096, 4, False),  # LoRA B
        (16, 16, 16, 1, False),
    ],
)
def test_route(tokens, d_in, d_out, outputs, expected):
    assert prefer_tokens(tokens, d_in, d_out, outputs) is expected


def test_counts_of_operations():
    # C = 2, T = 3, d_in = 5, d_out = 7, by hand; the formulas are in the docstring of routes.py.
    assert multiply_adds_by_jacobian(3, 5, 7, 2) == 210 + 140
    assert multiply_adds_by_tokens(3, 5, 7, 2) == 45 + 126 + 84


def test_precision_blocks_may_be_a_method_and_nothing_records_gradients():
    a, g = data(2, 5, 7, 4, 3)
    posterior, _ = posterior_and_dense(4, 7, 2, 3)
    as_method = Posterior(posterior.basis_s, posterior.basis_a, lambda: posterior.precision_blocks)
    a.requires_grad_()
    result = ops.jacobian_covariance(a, g, as_method)
    assert not result.requires_grad
    assert torch.equal(result, ops.jacobian_covariance(a, g, posterior))


A, G = torch.randn(2, 5, 7), torch.randn(2, 3, 5, 4)
BAD_GRAM = [
    (dict(a=A[0]), ValueError, r"jacobian_gram: a: expected shape \[N, T, d_in\], got float32\[5, 7\]"),
    (dict(a=None), TypeError, r"a: expected a tensor \[N, T, d_in\], got NoneType"),
    (dict(g=G[:, :, :4]), ValueError, r"g: expected shape \[2, C, 5, d_out\], got float32\[2, 3, 4, 4\]"),
    (dict(g=G.long()), TypeError, r"g: expected dtype float16, bfloat16, float32, float64, got int64"),
    (dict(g=G.to("meta")), ValueError, r"g: expected a tensor on cpu, got float32\[2, 3, 5, 4\] on meta"),
    (dict(mask=torch.ones(2, 4) > 0), ValueError, r"mask: expected shape \[2, 5\], got bool\[2, 4\]"),
    (dict(mask=torch.ones(2, 5)), TypeError, r"mask: expected dtype bool"),
    (dict(impl=""), ValueError, r"expected impl to be one of"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_GRAM)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.jacobian_gram(**{"a": A, "g": G, **arguments})


def test_bad_posteriors_are_named():
    posterior, _ = posterior_and_dense(4, 7, 2, 3)
    kept, rest_a, rest_s, rest = posterior.precision_blocks
    wide = torch.randn(4, 5)
    cases = [
        (Posterior(posterior.basis_a, posterior.basis_a, None), r"basis_s: expected shape \[4, k_s\]"),
        (Posterior(posterior.basis_s, posterior.basis_s, None), r"basis_a: expected shape \[7, k_a\]"),
        (
            Posterior(wide, posterior.basis_a, None),
            r"basis_s: expected at most as many columns as rows, got float32\[4, 5\]",
        ),
    ]
    for bad, message in cases:
        bad.precision_blocks = posterior.precision_blocks
        with pytest.raises(ValueError, match=r"jacobian_covariance: posterior." + message):
            ops.jacobian_covariance(A, G, bad)
    posterior.precision_blocks = (kept, rest_s, rest_a, rest)
    with pytest.raises(ValueError, match=r"posterior.precision_blocks, rest_a: expected shape \[2\], got float64\[3\]"):
        ops.jacobian_covariance(A, G, posterior)
    posterior.precision_blocks = (kept, rest_a, rest_s)
    with pytest.raises(TypeError, match=r"posterior: expected an object with basis_s, got NoneType"):
        ops.jacobian_covariance(A, G, None)
    with pytest.raises(ValueError, match=r"precision_blocks: expected 4 tensors, got 3"):
        ops.jacobian_covariance(A, G, posterior)
