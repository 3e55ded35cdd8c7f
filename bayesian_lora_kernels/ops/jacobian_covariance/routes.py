"""Which way to a Gram matrix of Jacobians costs less, by a count of multiply-adds per example; what the kernels refuse.

With ``J_c = sum_t g_ct a_t^T``, C outputs, T tokens:

- *jacobian*: form every ``J_c``, then their inner products: ``C T d_in d_out + C^2 d_in d_out``;
- *tokens*: ``<J_c, J_c'> = sum_tt' (a_t . a_t') (g_ct . g_c't')``; form ``K = a a^T``, then ``h_c = K g_c``,
  then the inner products of h and g: ``T^2 d_in + C T^2 d_out + C^2 T d_out``.

With a wide input and a narrow output (LoRA A) the second is cheaper once ``C d_out > T``, and with few tokens
it always is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..device import triton_refuses

# What the kernels keep in registers and shared memory at once.
_NARROWEST_SIDE = 64
_KEPT = 64
_OUTPUTS = 64


def multiply_adds_by_jacobian(tokens: int, d_in: int, d_out: int, outputs: int) -> int:
    """Multiply-adds per example when every Jacobian is formed."""
    return outputs * tokens * d_in * d_out + outputs**2 * d_in * d_out


def multiply_adds_by_tokens(tokens: int, d_in: int, d_out: int, outputs: int) -> int:
    """Multiply-adds per example through the token Gram matrix ``a a^T``."""
    return tokens**2 * d_in + outputs * tokens**2 * d_out + outputs**2 * tokens * d_out


def prefer_tokens(tokens: int, d_in: int, d_out: int, outputs: int) -> bool:
    """Whether the token Gram matrix is the cheaper way."""
    by_tokens = multiply_adds_by_tokens(tokens, d_in, d_out, outputs)
    return by_tokens < multiply_adds_by_jacobian(tokens, d_in, d_out, outputs)


def kernel_refuses(
    out: Tensor,
    a: Tensor | Sequence[Tensor],
    g: Tensor | Sequence[Tensor],
    *rest: Tensor | Sequence[Tensor | None] | None,
) -> str | None:
    """Why the Triton kernels cannot take these arguments of ``jacobian_gram``, ``jacobian_covariance`` or its grouped
    form, or None.
    """
    if reason := triton_refuses(out):
        return reason
    if out.shape[1] > _OUTPUTS:
        return f"{out.shape[1]} outputs, more than {_OUTPUTS}"
    single = isinstance(a, Tensor)
    lists = ([a], [g]) if single else (a, g)
    for basis in rest[:2] if len(rest) > 1 else ():
        lists += ([basis] if single else basis,)  # type: ignore[assignment]
    for d_in, d_out, *kept in {tuple(one.shape[-1] for one in entry) for entry in zip(*lists, strict=True)}:
        if min(d_in, d_out) > _NARROWEST_SIDE:
            return f"both sides are wider than {_NARROWEST_SIDE}: {d_in} and {d_out}"
        if kept and kept[d_in >= d_out] > _KEPT:
            return f"{kept[d_in >= d_out]} kept directions on the wide side, more than {_KEPT}"
    return None


def kernel_suits(out: Tensor, *arguments: object) -> bool:
    """Whether "auto" takes the Triton kernels: always on a GPU, never in the interpreter."""
    return out.is_cuda
