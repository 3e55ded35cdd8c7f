"""Which of two ways to a Gram matrix of Jacobians costs less, by a count of multiply-adds per example.

With ``J_c = sum_t g_ct a_t^T``, C outputs, T tokens:

- *jacobian*: form every ``J_c``, then their inner products: ``C T d_in d_out + C^2 d_in d_out``;
- *tokens*: ``<J_c, J_c'> = sum_tt' (a_t . a_t') (g_ct . g_c't')``; form ``K = a a^T``, then ``h_c = K g_c``,
  then the inner products of h and g: ``T^2 d_in + C T^2 d_out + C^2 T d_out``.

With a wide input and a narrow output (LoRA A) the second is cheaper once ``C d_out > T``, and with few tokens
it always is.
"""

from __future__ import annotations


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
