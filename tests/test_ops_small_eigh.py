"""`small_eigh`: residual, orthogonality and order, on every kind of symmetric matrix."""

from __future__ import annotations

import pytest
import torch

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops import native

KINDS = {
    "random": lambda n: torch.randn(n, n),
    "zero": lambda n: torch.zeros(n, n),
    "identity": lambda n: torch.eye(n),
    "rank one": lambda n: torch.ones(n, n),
    "graded": lambda n: torch.diag(10.0 ** torch.linspace(0, -12, n)) + 1e-14,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 33, 74, 129, 256])
def test_decomposition(kind, n, dtype):
    matrices = torch.stack([KINDS[kind](n).double() * scale for scale in (1.0, 1e-8, 1e8)])
    matrices = ((matrices + matrices.mT) / 2).to(dtype)
    values, vectors = ops.small_eigh(matrices)
    assert values.shape == (3, n)
    assert vectors.shape == (3, n, n)
    assert (values[:, :-1] >= values[:, 1:]).all()
    tolerance = 8 * n * torch.finfo(dtype).eps
    wide_values, wide_vectors, wide = values.double(), vectors.double(), matrices.double()
    size = torch.linalg.matrix_norm(wide)[:, None, None]
    identity = torch.eye(n).double()
    assert (wide_vectors.mT @ wide_vectors - identity).abs().max() <= tolerance
    rebuilt = wide_vectors * wide_values[:, None, :] @ wide_vectors.mT
    assert ((rebuilt - wide).abs() <= tolerance * size).all()
    truth = torch.linalg.eigvalsh(wide).flip(-1)
    assert ((wide_values - truth).abs() <= tolerance * size[..., 0]).all()


@pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))
def test_beyond_the_native_solver_s_size_auto_is_lapack_and_native_says_no():
    matrices = torch.randn(2, 129, 129)
    matrices = matrices + matrices.mT
    for found, expected in zip(ops.small_eigh(matrices), torch.linalg.eigh(matrices), strict=True):
        assert torch.equal(found.flip(-1), expected)
    with pytest.raises(RuntimeError, match=r"cannot run: it takes matrices up to n = 128, these have n = 129"):
        ops.small_eigh(matrices, impl="native")


def test_layouts_and_empty_batches():
    stack = torch.randn(4, 12, 12)
    stack = stack + stack.mT
    for matrices in (
        stack[::2],
        stack[:, ::2, ::2],
        stack.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        stack[:1].expand(3, 12, 12),
    ):
        values, vectors = ops.small_eigh(matrices)
        assert torch.allclose(vectors * values[:, None, :] @ vectors.mT, matrices, atol=1e-4)
    for shape in ((0, 5, 5), (3, 0, 0), (0, 0, 0)):
        values, vectors = ops.small_eigh(torch.zeros(shape))
        assert values.shape == shape[:2]
        assert vectors.shape == shape


def test_only_the_lower_triangle_is_read():
    matrix = torch.randn(2, 6, 6)
    symmetric = matrix.tril() + matrix.tril(-1).mT
    for read, expected in zip(ops.small_eigh(matrix.tril()), ops.small_eigh(symmetric), strict=True):
        assert torch.equal(read, expected)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_named(value, n, impl):
    matrices = torch.eye(n).repeat(5, 1, 1)
    matrices[3, 1, 0] = value
    with pytest.raises(ValueError, match=r"small_eigh: expected finite matrices, got NaN or infinity in matrix 3 of 5"):
        ops.small_eigh(matrices, impl=impl)


BAD = [
    (torch.eye(3), ValueError, r"small_eigh: matrices: expected shape \[L, n, n\], got float32\[3, 3\] on cpu"),
    (torch.zeros(1, 3, 4), ValueError, r"expected shape \[L, n, n\], got float32\[1, 3, 4\]"),
    (torch.zeros(1, 3, 3).half(), TypeError, r"expected dtype float32, float64, got float16\[1, 3, 3\]"),
    ([[1.0]], TypeError, r"expected a tensor \[L, n, n\], got list"),
]


@pytest.mark.parametrize(("matrices", "error", "message"), BAD)
def test_bad_arguments_are_named(matrices, error, message):
    with pytest.raises(error, match=message):
        ops.small_eigh(matrices)
