"""Triton kernels that read the products which `kernel.exponentials_kernel` stored, once or twice, and reduce them.

Each program has BV tokens of one example and goes through its columns BS at a time. With V tokens, C columns and 4
bytes per number: `4 C V` bytes from memory (the second reading of the statistics comes from L2), about 10 operations
per sample for the means, 50 for the statistics: 263 MB at V = 128256, C = 512 take 0.09 ms at 3 TB/s.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import bias_tile, logits_of, shift_and_scale

_LEAST = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


@triton.jit
def _probabilities(b_x, b_bias, p_lse, m_s, softcap, NEGATIVE: tl.constexpr, SOFTCAP: tl.constexpr):
    """``[BV, BS]``, zero beyond the samples."""
    b_shift, b_scale = shift_and_scale(p_lse, m_s)
    return tl.exp(logits_of(b_x, b_bias, softcap, NEGATIVE, SOFTCAP) - b_shift[None, :]) * b_scale[None, :]


@triton.jit(do_not_specialize=["first_token", "end_token", "samples"])
def stored_means_kernel(
    out_ptr,  # [examples, V] float32
    stored_ptr,  # [V and more, row]
    logsumexp_ptr,  # [examples, SIGNS, samples] float64
    bias_ptr,  # [examples, V] float32
    softcap,
    first_token,
    end_token,
    samples,
    row,
    stride_o,
    stride_b,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SIGNS: tl.constexpr,
    PADDED: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
):
    """Mean probabilities of BV tokens of one example."""
    blocks = tl.cdiv(end_token - first_token, BV)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    o_t = (tl.program_id(0) % blocks).to(tl.int64) * BV + tl.arange(0, BV)
    m_t = o_t < end_token - first_token
    o_e = n + tl.arange(0, 1)
    b_bias = bias_tile(bias_ptr, stride_b, first_token + o_t, m_t, o_e, o_e >= 0, HAS_BIAS)
    b_sum = tl.zeros([BV], tl.float32)
    for start in range(0, samples, BS):
        o_s = start + tl.arange(0, BS)
        m_s = o_s < samples
        b_x = tl.load(stored_ptr + o_t[:, None] * row + (n * PADDED + o_s)[None, :], mask=m_s[None, :], other=0.0)
        for sign in tl.static_range(SIGNS):
            p_lse = logsumexp_ptr + (n * SIGNS + sign) * samples + o_s
            b_sum += tl.sum(_probabilities(b_x, b_bias, p_lse, m_s, softcap, sign == 1, SOFTCAP), axis=1)
    tl.store(out_ptr + n * stride_o + first_token + o_t, b_sum / (SIGNS * samples), mask=m_t)


@triton.jit(do_not_specialize=["first_token", "end_token", "samples"])
def stored_statistics_kernel(
    entropy_ptr,  # [examples, blocks] float32
    information_ptr,  # likewise
    stored_ptr,  # [end_token - first_token and more, row]
    logsumexp_ptr,  # [examples, SIGNS, samples] float64
    bias_ptr,  # [examples, V] float32
    softcap,
    first_token,
    end_token,
    samples,
    row,
    stride_b,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SIGNS: tl.constexpr,
    PADDED: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
):
    """What BV tokens add to the entropy of the mean probabilities and to the mutual information of one example.

    The latter as the mean over samples of ``q (r log r - (r - 1))``, ``r = p / q``, no term of which is negative; near
    ``r = 1`` by its series, since there the two parts would cancel.
    """
    blocks = tl.cdiv(end_token - first_token, BV)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    o_t = (tl.program_id(0) % blocks).to(tl.int64) * BV + tl.arange(0, BV)
    m_t = o_t < end_token - first_token
    o_e = n + tl.arange(0, 1)
    b_bias = bias_tile(bias_ptr, stride_b, first_token + o_t, m_t, o_e, o_e >= 0, HAS_BIAS)
    b_sum = tl.zeros([BV], tl.float32)
    for start in range(0, samples, BS):
        o_s = start + tl.arange(0, BS)
        m_s = o_s < samples
        b_x = tl.load(stored_ptr + o_t[:, None] * row + (n * PADDED + o_s)[None, :], mask=m_s[None, :], other=0.0)
        for sign in tl.static_range(SIGNS):
            p_lse = logsumexp_ptr + (n * SIGNS + sign) * samples + o_s
            b_sum += tl.sum(_probabilities(b_x, b_bias, p_lse, m_s, softcap, sign == 1, SOFTCAP), axis=1)
    b_q = b_sum / (SIGNS * samples)
    b_least = tl.maximum(b_q, _LEAST)
    b_terms = tl.zeros([BV], tl.float32)
    for start in range(0, samples, BS):
        o_s = start + tl.arange(0, BS)
        m_s = o_s < samples
        b_x = tl.load(stored_ptr + o_t[:, None] * row + (n * PADDED + o_s)[None, :], mask=m_s[None, :], other=0.0)
        for sign in tl.static_range(SIGNS):
            p_lse = logsumexp_ptr + (n * SIGNS + sign) * samples + o_s
            b_r = _probabilities(b_x, b_bias, p_lse, m_s, softcap, sign == 1, SOFTCAP) / b_least[:, None]
            b_d = b_r - 1.0
            b_series = 1.0 / 42 - b_d * (1.0 / 56)
            b_series = 1.0 / 30 - b_d * b_series
            b_series = 1.0 / 20 - b_d * b_series
            b_series = 1.0 / 12 - b_d * b_series
            b_series = 1.0 / 6 - b_d * b_series
            b_series = b_d * b_d * (0.5 - b_d * b_series)
            b_term = tl.where(tl.abs(b_d) < 0.125, b_series, b_r * tl.log(tl.maximum(b_r, _LEAST)) - b_d)
            b_terms += tl.sum(tl.where(m_s[None, :], b_term, 0.0), axis=1)
    tl.store(entropy_ptr + tl.program_id(0), -tl.sum(b_q * tl.log(b_least), axis=0))
    tl.store(information_ptr + tl.program_id(0), tl.sum(b_q * b_terms, axis=0) / (SIGNS * samples))
