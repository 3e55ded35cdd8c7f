"""Triton kernels that read the products which `kernel.product_kernel` wrote, and reduce them.

A logit is the bias plus the product, with `SIGNS = 2` of a second sample the bias minus the product, then the soft cap.

- `sums_kernel` makes of a block of tokens the maximum and the sum of the exponentials, per sample.
- `merge_kernel` makes log-sum-exps of those.
- `means_kernel` averages `exp(logit - logsumexp)` over an example's samples.
- `statistics_kernel` makes their terms of the entropy and of the mutual information.

Each program has BV tokens of one example and goes through its columns BS at a time. With V tokens, C columns and 4
bytes per number: `4 C V` bytes from memory each (the second reading of the statistics comes from L2), and 10 to 50
operations per sample: 263 MB at V = 128256, C = 512 take 0.09 ms at 3 TB/s, as counted, not measured.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_LEAST = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


@triton.jit
def _block(p, first_token, end_token, BV: tl.constexpr):
    """Example and tokens of the p-th program: counted from the first of the range, and which of them there are."""
    blocks = tl.cdiv(end_token - first_token, BV)
    o_t = (p % blocks).to(tl.int64) * BV + tl.arange(0, BV)
    return (p // blocks).to(tl.int64), o_t, o_t < end_token - first_token


@triton.jit
def _bias(bias_ptr, stride_b, n, o_v, m_v, HAS_BIAS: tl.constexpr):
    """``[BV]``, of an example; minus infinity for excluded tokens and beyond the range."""
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + n * stride_b + o_v, mask=m_v, other=float("-inf"))
    else:
        b_bias = tl.where(m_v, 0.0, float("-inf"))
    return b_bias


@triton.jit
def _logits(b_x, b_bias, softcap, NEGATIVE: tl.constexpr, SOFTCAP: tl.constexpr):
    """``[BV, BS]``; minus infinity where the bias is."""
    b_z = b_bias[:, None] - b_x if NEGATIVE else b_bias[:, None] + b_x
    if SOFTCAP:
        # tanh x = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|)
        b_e = tl.exp(tl.abs(b_z) * (-2.0 / softcap))
        b_cap = softcap * (1.0 - b_e) / (1.0 + b_e)
        b_z = tl.where(b_z < 0, -b_cap, b_cap)
    return tl.where(b_bias[:, None] == float("-inf"), float("-inf"), b_z)


@triton.jit
def _probabilities(b_x, b_bias, p_lse, m_s, softcap, NEGATIVE: tl.constexpr, SOFTCAP: tl.constexpr):
    """``[BV, BS]``, from float64 log-sum-exps; zero beyond the samples."""
    b_lse = tl.load(p_lse, mask=m_s, other=0.0)
    b_near = b_lse.to(tl.float32)
    # What rounding took from the log-sum-exp is a factor near 1.
    b_scale = tl.exp((b_near.to(tl.float64) - b_lse).to(tl.float32))
    b_shift = tl.where(m_s, b_near, float("inf"))
    return tl.exp(_logits(b_x, b_bias, softcap, NEGATIVE, SOFTCAP) - b_shift[None, :]) * b_scale[None, :]


@triton.jit(do_not_specialize=["first_token", "end_token", "samples"])
def sums_kernel(
    maxima_ptr,  # [blocks of tokens, SIGNS, row] float32, out
    sums_ptr,  # likewise
    stored_ptr,  # [end_token - first_token, row]
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
    """Maxima of the logits of BV tokens of one example, and sums of their exponentials relative to them."""
    n, o_t, m_t = _block(tl.program_id(0), first_token, end_token, BV)
    b_bias = _bias(bias_ptr, stride_b, n, first_token + o_t, m_t, HAS_BIAS)
    block = tl.program_id(0) % tl.cdiv(end_token - first_token, BV)
    for start in range(0, samples, BS):
        o_s = start + tl.arange(0, BS)
        m_s = o_s < samples
        o_c = n * PADDED + o_s
        b_x = tl.load(stored_ptr + o_t[:, None] * row + o_c[None, :], mask=m_t[:, None] & m_s[None, :], other=0.0)
        for sign in tl.static_range(SIGNS):
            b_z = _logits(b_x, b_bias, softcap, sign == 1, SOFTCAP)
            b_max = tl.max(b_z, axis=0)
            # Where every token is excluded the maximum is minus infinity, and its difference from itself is no number.
            b_e = tl.exp(b_z - tl.where(b_max == float("-inf"), 0.0, b_max)[None, :])
            place = (block.to(tl.int64) * SIGNS + sign) * row + o_c
            tl.store(maxima_ptr + place, b_max, mask=m_s)
            tl.store(sums_ptr + place, tl.sum(b_e, axis=0), mask=m_s)


@triton.jit(do_not_specialize=["blocks", "examples", "samples"])
def merge_kernel(
    logsumexp_ptr,  # [examples, SIGNS, samples] float64, out
    maxima_ptr,  # [blocks, SIGNS, row]
    sums_ptr,
    blocks,
    examples,
    samples,
    row,
    SIGNS: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Log-sum-exps of BC columns from those of blocks of tokens: BT running ones, which are then joined."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_t = tl.arange(0, BT)
    o_n = o_c % row // PADDED
    o_s = o_c % row % PADDED
    m_c = (o_c < SIGNS * row) & (o_n < examples) & (o_s < samples)
    b_max = tl.full([BT, BC], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT, BC], tl.float32)
    for start in range(0, blocks, BT):
        m_t = (o_t < blocks - start)[:, None] & m_c[None, :]
        p = (start + o_t).to(tl.int64)[:, None] * (SIGNS * row) + o_c[None, :]
        b_m = tl.load(maxima_ptr + p, mask=m_t, other=float("-inf"))
        b_s = tl.load(sums_ptr + p, mask=m_t, other=0.0)
        b_new = tl.maximum(b_max, b_m)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_shift) + b_s * tl.exp(b_m - b_shift)
        b_max = b_new
    b_all = tl.max(b_max, axis=0)
    b_all = tl.where(b_all == float("-inf"), 0.0, b_all)
    b_log = tl.log(tl.sum(b_sum * tl.exp(b_max - b_all[None, :]), axis=0))
    # The logarithm is small, the maximum may be large: together they need more than float32.
    p_lse = logsumexp_ptr + (o_n.to(tl.int64) * SIGNS + o_c // row) * samples + o_s
    tl.store(p_lse, b_all.to(tl.float64) + b_log.to(tl.float64), mask=m_c)


@triton.jit(do_not_specialize=["first_token", "end_token", "samples"])
def means_kernel(
    out_ptr,  # [examples, V] float32
    stored_ptr,  # [end_token - first_token, row]
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
    n, o_t, m_t = _block(tl.program_id(0), first_token, end_token, BV)
    b_bias = _bias(bias_ptr, stride_b, n, first_token + o_t, m_t, HAS_BIAS)
    b_sum = tl.zeros([BV], tl.float32)
    for start in range(0, samples, BS):
        o_s = start + tl.arange(0, BS)
        m_s = o_s < samples
        p_x = stored_ptr + o_t[:, None] * row + (n * PADDED + o_s)[None, :]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_s[None, :], other=0.0)
        for sign in tl.static_range(SIGNS):
            p_lse = logsumexp_ptr + (n * SIGNS + sign) * samples + o_s
            b_sum += tl.sum(_probabilities(b_x, b_bias, p_lse, m_s, softcap, sign == 1, SOFTCAP), axis=1)
    tl.store(out_ptr + n * stride_o + first_token + o_t, b_sum / (SIGNS * samples), mask=m_t)


@triton.jit(do_not_specialize=["first_token", "end_token", "samples"])
def statistics_kernel(
    entropy_ptr,  # [examples, blocks] float32
    information_ptr,  # likewise
    stored_ptr,  # [end_token - first_token, row]
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
    n, o_t, m_t = _block(tl.program_id(0), first_token, end_token, BV)
    b_bias = _bias(bias_ptr, stride_b, n, first_token + o_t, m_t, HAS_BIAS)
    b_sum = tl.zeros([BV], tl.float32)
    for start in range(0, samples, BS):
        o_s = start + tl.arange(0, BS)
        m_s = o_s < samples
        p_x = stored_ptr + o_t[:, None] * row + (n * PADDED + o_s)[None, :]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_s[None, :], other=0.0)
        for sign in tl.static_range(SIGNS):
            p_lse = logsumexp_ptr + (n * SIGNS + sign) * samples + o_s
            b_sum += tl.sum(_probabilities(b_x, b_bias, p_lse, m_s, softcap, sign == 1, SOFTCAP), axis=1)
    b_q = b_sum / (SIGNS * samples)
    b_least = tl.maximum(b_q, _LEAST)
    b_terms = tl.zeros([BV], tl.float32)
    for start in range(0, samples, BS):
        o_s = start + tl.arange(0, BS)
        m_s = o_s < samples
        p_x = stored_ptr + o_t[:, None] * row + (n * PADDED + o_s)[None, :]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_s[None, :], other=0.0)
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
