"""``<J_c, J_c'>`` of Jacobians ``J_c = sum_t g_ct a_t^T`` in plain PyTorch: the definition, and what CPU
users run.

In a Kronecker posterior the product splits into four orthogonal blocks, kept directions and complement on
either side, each with its own variances. Every block is a Gram matrix of its own projections, so that all
terms are positive: the textbook form, which subtracts the kept part from the whole, loses all digits once
curvature outweighs the prior by more than the precision of float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masking import zero_masked
from .routes import prefer_tokens

# Temporaries hold at most about this many elements (64 MiB in float32): examples, then input columns, go in
# chunks.
_CHUNK_ELEMENTS = 1 << 24


def jacobian_gram(out: Tensor, a: Tensor, g: Tensor, mask: Tensor | None) -> None:
    """Write to ``out: [N, C, C]`` the inner products, from ``a: [N, T, d_in]``, ``g: [N, C, T, d_out]``,
    ``mask: [N, T]``.
    """
    for examples in _chunks(a, g):
        a_part, g_part = _prepare(a, g, mask, examples, out.dtype)
        _store_symmetric(out[examples], _gram(a_part, g_part))


def jacobian_covariance(
    out: Tensor,
    a: Tensor,
    g: Tensor,
    basis_s: Tensor,
    basis_a: Tensor,
    kept: Tensor,
    rest_a: Tensor,
    rest_s: Tensor,
    rest: Tensor,
    mask: Tensor | None,
) -> None:
    """Write to ``out: [N, C, C]`` the inner products in the posterior covariance.

    ``basis_s: [d_out, k_s]`` and ``basis_a: [d_in, k_a]`` have orthonormal columns. Precisions:
    ``kept: [k_s, k_a]`` where both sides are kept, ``rest_a: [k_s]`` on the complement of ``basis_a``,
    ``rest_s: [k_a]`` on that of ``basis_s``, ``rest: []`` on both complements.
    """
    basis_s, basis_a = basis_s.to(out.dtype), basis_a.to(out.dtype)
    # Standard deviations; in float64, since they are few and a large precision should not lose digits on the way.
    kept, rest_a, rest_s, rest = (
        precision.double().rsqrt().to(out.dtype) for precision in (kept, rest_a, rest_s, rest)
    )
    s_is_full = basis_s.shape[0] == basis_s.shape[1]
    a_is_full = basis_a.shape[0] == basis_a.shape[1]
    for examples in _chunks(a, g, basis_s.shape[1] * basis_a.shape[1]):
        a_part, g_part = _prepare(a, g, mask, examples, out.dtype)
        if a_part.shape[2] < a_part.shape[1]:
            a_part, g_part = _compress_tokens(a_part, g_part)
        g_kept = g_part @ basis_s  # [n, C, T, k_s]
        a_kept = a_part @ basis_a  # [n, T, k_a], once for all C
        projected = _flat_jacobians(a_kept, g_kept, kept)
        result = _inner_products(projected, projected)
        g_rest = None if s_is_full else g_part - g_kept @ basis_s.T
        if g_rest is not None:
            result += _gram(a_kept * rest_s, g_rest)
        if not a_is_full:
            # Both blocks on the complement of A share their input: one Gram matrix of the outputs side by
            # side.
            g_beside = [g_kept * rest_a] + ([] if g_rest is None else [g_rest * rest])
            result += _gram(a_part - a_kept @ basis_a.T, torch.cat(g_beside, dim=-1))
        _store_symmetric(out[examples], result)


def grouped_jacobian_covariance(
    out: Tensor,
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    basis_s: Sequence[Tensor],
    basis_a: Sequence[Tensor],
    kept: Sequence[Tensor],
    rest_a: Sequence[Tensor],
    rest_s: Sequence[Tensor],
    rest: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> None:
    """Write to ``out: [N, C, C]`` the sum over modules of ``jacobian_covariance``."""
    out.zero_()
    part = torch.empty_like(out)
    columns = (a, g, basis_s, basis_a, kept, rest_a, rest_s, rest, masks)
    for entry in zip(*columns, strict=True):
        jacobian_covariance(part, *entry)
        out += part


def _prepare(a: Tensor, g: Tensor, mask: Tensor | None, examples: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, g = a[examples].to(dtype), g[examples].to(dtype)
    if mask is None:
        return a, g
    part = mask[examples]
    return zero_masked(a, part), zero_masked(g, part[:, None, :].expand(g.shape[:3]))


def _compress_tokens(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The same Jacobians from only d_in tokens: ``J_c = sum_i (J_c e_i) e_i^T``."""
    identity = torch.eye(a.shape[2], dtype=a.dtype, device=a.device).expand(a.shape[0], -1, -1)
    return identity, _transposed_jacobians(a, g)


def _transposed_jacobians(a: Tensor, g: Tensor) -> Tensor:
    """``J^T: [n, C, d_in, d_out]``, reading g as it lies; a is repeated for every output."""
    return a.mT[:, None] @ g


def _flat_jacobians(a: Tensor, g: Tensor, weight: Tensor | None = None) -> Tensor:
    """``[n, C, d_out * d_in]``, every Jacobian as one vector, times ``weight: [d_out, d_in]``.

    In which order its elements come is left open (inner products do not mind): that of the narrow side first, which
    moves the least memory.
    """
    n, outputs, tokens, d_out = g.shape
    d_in = a.shape[2]
    if d_in <= d_out:
        jacobians = _transposed_jacobians(a, g)
        return (jacobians if weight is None else jacobians * weight.T).flatten(2)
    # One product for all outputs, wide in a: g is the smaller one to bring into that order.
    jacobians = torch.bmm(g.mT.reshape(n, outputs * d_out, tokens), a).reshape(n, outputs, d_out, d_in)
    return (jacobians if weight is None else jacobians * weight).flatten(2)


def _gram(a: Tensor, g: Tensor) -> Tensor:
    n, outputs, tokens, d_out = g.shape
    d_in = a.shape[2]
    if prefer_tokens(tokens, d_in, d_out, outputs):
        similar = torch.bmm(a, a.mT)  # [n, T, T]
        if tokens <= d_out:
            h = similar[:, None] @ g
        else:  # narrow g: one wide product for all outputs
            h = torch.bmm(similar, g.transpose(1, 2).reshape(n, tokens, outputs * d_out))
            h = h.reshape(n, tokens, outputs, d_out).transpose(1, 2)
        return _inner_products(h.flatten(2), g.flatten(2))
    step = max(1, _CHUNK_ELEMENTS // max(1, n * outputs * d_out))
    result = a.new_zeros(n, outputs, outputs)
    for start in range(0, d_in, step):
        jacobians = _flat_jacobians(a[:, :, start : start + step], g)
        result += _inner_products(jacobians, jacobians)
    return result


def _inner_products(left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(left, right.mT)


def _chunks(a: Tensor, g: Tensor, projection: int = 0) -> list[slice]:
    """Slices of the examples, such that one slice's temporaries stay within ``_CHUNK_ELEMENTS``.

    ``projection`` is the number of elements of one Jacobian projected to the kept directions.
    """
    examples, tokens, d_in = a.shape
    outputs, d_out = g.shape[1], g.shape[3]
    gram = tokens**2 if prefer_tokens(tokens, d_in, d_out, outputs) else outputs * d_in * d_out
    largest = max(1, tokens * d_in, outputs * tokens * d_out, outputs * projection, gram)
    step = max(1, _CHUNK_ELEMENTS // largest)
    return [slice(start, start + step) for start in range(0, examples, step)]


def _store_symmetric(out: Tensor, value: Tensor) -> None:
    torch.add(value, value.mT, out=out).mul_(0.5)
