"""Triton kernels that multiply a tile of the vocabulary's weight by columns, and reduce the product where it lies.

Columns are the samples of all examples side by side (`vocabulary_variance`: the columns of the factors), `padded` of
them per example: a power of two, or a multiple of BC where an example fills more than a tile. Column c is sample
`c % padded` of example `c // padded`; tiles of columns go faster than tiles of tokens, `GROUP` of them at a time, so
that a tile of the weight is read from memory once per group and the columns stay in L2. With `SIGNS = 2` every column
stands for two samples, whose logits are the bias plus and minus the product.

- `exponentials_kernel` makes of a tile of logits its maximum and the sum of its exponentials per sample (first pass),
  and with `STORE` keeps the products, so that they need not be computed again (bounded scratch).
- `merge_kernel` makes log-sum-exps of the tiles' maxima and sums.
- `means_kernel` computes the products anew and averages `exp(logit - logsumexp)` over an example's samples (second
  pass).
- `squares_kernel` adds up the squares of an example's columns.

Bytes and operations. V tokens of width d in b bytes, C columns in all, G of them per group: every product takes
`2 V d C` operations and reads `V d b C / G` bytes of weight (G = 2048: once for most uses) and `C d b` of columns.
The first pass writes `8 k C V / 128` bytes (k signs), the second the result, `4 N V`; with scratch the first writes
`4 C V` and `kernel_scratch.py` reads them. What that comes to for V = 128256, d = 4096, N = 16, S = 64 in bf16 on a
H100 at 798 TFLOP/s and 3 TB/s, as counted, not measured: a product with 1024 columns 1.35 ms, with 512 and their mirror
images 0.68 ms; two passes twice that and 16 MB besides the result of 8 MB; with 263 MB of scratch 1.35 + 0.35 ms (two
parts of 512 columns, each of which reads the weight), mirrored 0.68 + 0.18 ms.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(p, token_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile of tokens and tile of columns of the p-th program."""
    first = p // (GROUP * token_tiles) * GROUP
    height = tl.minimum(column_tiles - first, GROUP)
    local = p - first * token_tiles
    return local // height, first + local % height


@triton.jit
def product_tile(
    weight_ptr,  # [V, d]
    columns_ptr,  # [planes, examples, samples, d], contiguous
    o_v,  # [BV]
    m_v,
    o_n,  # [BC] example of each column
    o_s,  # [BC] its number within the example
    m_c,
    examples,
    samples,
    width,
    stride_wv,
    stride_wd,
    PLANES: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """``[BV, BC]`` float32: the rows ``o_v`` of the weight times the columns, which are a sum of ``PLANES`` tensors,
    the smallest last in memory and first in the sum. ``EVEN``: BK divides the width.
    """
    o_k = tl.arange(0, BK)
    p_w = weight_ptr + o_v[:, None].to(tl.int64) * stride_wv + o_k[None, :].to(tl.int64) * stride_wd  # [BV, BK]
    p_x = columns_ptr + (o_n[None, :].to(tl.int64) * samples + o_s[None, :]) * width + o_k[:, None]  # [BK, BC]
    plane = tl.full([], samples, tl.int64) * examples * width
    step = tl.full([], BK, tl.int64) * stride_wd
    b_sum = tl.zeros([BV, BC], dtype=tl.float32)
    for i in tl.static_range(PLANES):
        p_wk = p_w
        p_xk = p_x + (PLANES - 1 - i) * plane
        for start in range(0, width, BK):
            if EVEN:
                b_w = tl.load(p_wk, mask=m_v[:, None], other=0.0)
                b_x = tl.load(p_xk, mask=m_c[None, :], other=0.0)
            else:
                m_k = o_k < width - start
                b_w = tl.load(p_wk, mask=m_v[:, None] & m_k[None, :], other=0.0)
                b_x = tl.load(p_xk, mask=m_k[:, None] & m_c[None, :], other=0.0)
            if WIDEN:
                b_w = b_w.to(tl.float32)
            b_sum = tl.dot(b_w, b_x, b_sum, input_precision=PRECISION)
            p_wk += step
            p_xk += BK
    return b_sum


@triton.jit
def bias_tile(bias_ptr, stride_b, o_v, m_v, o_e, m_e, HAS_BIAS: tl.constexpr):
    """``[BV, examples]``: minus infinity for excluded tokens and beyond the vocabulary."""
    if HAS_BIAS:
        p_bias = bias_ptr + o_e[None, :].to(tl.int64) * stride_b + o_v[:, None]
        b_bias = tl.load(p_bias, mask=m_v[:, None] & m_e[None, :], other=float("-inf"))
    else:
        b_bias = tl.where(m_v[:, None] & m_e[None, :], 0.0, float("-inf"))
    return b_bias


@triton.jit
def logits_of(b_x, b_bias, softcap, NEGATIVE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Bias plus or minus the product, and the soft cap; minus infinity where the bias is."""
    b_z = b_bias - b_x if NEGATIVE else b_bias + b_x
    if SOFTCAP:
        # tanh x = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|)
        b_e = tl.exp(tl.abs(b_z) * (-2.0 / softcap))
        b_cap = softcap * (1.0 - b_e) / (1.0 + b_e)
        b_z = tl.where(b_z < 0, -b_cap, b_cap)
    return tl.where(b_bias == float("-inf"), float("-inf"), b_z)


@triton.jit(do_not_specialize=["first_token", "end_token", "examples", "samples"])
def exponentials_kernel(
    maxima_ptr,  # [token tiles, SIGNS * column tiles * BC] float32, out
    sums_ptr,  # likewise
    stored_ptr,  # [token tiles * BV, column tiles * BC] float32, out with STORE
    weight_ptr,  # [V, d]
    columns_ptr,  # [planes, examples, samples, d]
    bias_ptr,  # [examples, V] float32
    softcap,
    first_token,
    end_token,
    examples,
    samples,
    width,
    stride_b,
    stride_wv,
    stride_wd,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SIGNS: tl.constexpr,
    SUMS: tl.constexpr,
    STORE: tl.constexpr,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of a tile of products of the tokens from first_token to end_token, the maximum and the sum of the exponentials
    of the logits (``SUMS``), and the products themselves (``STORE``).
    """
    PER: tl.constexpr = PADDED if PADDED < BC else BC  # columns of an example in one tile
    EXAMPLES: tl.constexpr = BC // PER
    column_tiles = tl.cdiv(examples * PADDED, BC)
    i, j = tile_of(tl.program_id(0), tl.cdiv(end_token - first_token, BV), column_tiles, GROUP)
    o_v = first_token + i * BV + tl.arange(0, BV)
    o_c = j * BC + tl.arange(0, BC)
    o_n = o_c // PADDED
    o_s = o_c % PADDED
    m_v = o_v < end_token
    m_c = (o_n < examples) & (o_s < samples)
    b_x = product_tile(
        weight_ptr, columns_ptr, o_v, m_v, o_n, o_s, m_c, examples, samples, width, stride_wv, stride_wd, PLANES, WIDEN,
        EVEN, PRECISION, BV, BC, BK,
    )  # fmt: skip
    row = tl.full([], BC, tl.int64) * column_tiles
    if STORE:
        tl.store(stored_ptr + (i * BV + tl.arange(0, BV))[:, None] * row + o_c[None, :], b_x)
    if SUMS:
        o_e = j * BC // PADDED + tl.arange(0, EXAMPLES)
        b_bias = bias_tile(bias_ptr, stride_b, o_v, m_v, o_e, o_e < examples, HAS_BIAS)
        b_bias = tl.reshape(tl.broadcast_to(b_bias[:, :, None], [BV, EXAMPLES, PER]), [BV, BC])
        for sign in tl.static_range(SIGNS):
            b_z = logits_of(b_x, b_bias, softcap, sign == 1, SOFTCAP)
            b_max = tl.max(b_z, axis=0)
            # Where every token is excluded the maximum is minus infinity, and its difference from itself is no number.
            b_e = tl.exp(b_z - tl.where(b_max == float("-inf"), 0.0, b_max)[None, :])
            place = (i * SIGNS + sign) * row + o_c
            tl.store(maxima_ptr + place, b_max)
            tl.store(sums_ptr + place, tl.sum(b_e, axis=0))


@triton.jit(do_not_specialize=["token_tiles", "examples", "samples"])
def merge_kernel(
    logsumexp_ptr,  # [examples, SIGNS, samples] float64, out
    maxima_ptr,  # [token tiles, SIGNS, padded columns]
    sums_ptr,
    token_tiles,
    columns,
    examples,
    samples,
    SIGNS: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Log-sum-exps of BC columns from those of their tiles: BT running ones, which are then joined."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_t = tl.arange(0, BT)
    m_c = o_c < SIGNS * columns
    b_max = tl.full([BT, BC], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT, BC], tl.float32)
    for start in range(0, token_tiles, BT):
        m_t = (o_t < token_tiles - start)[:, None] & m_c[None, :]
        p = (start + o_t).to(tl.int64)[:, None] * (SIGNS * columns) + o_c[None, :]
        b_m = tl.load(maxima_ptr + p, mask=m_t, other=float("-inf"))
        b_s = tl.load(sums_ptr + p, mask=m_t, other=0.0)
        b_new = tl.maximum(b_max, b_m)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_shift) + b_s * tl.exp(b_m - b_shift)
        b_max = b_new
    b_all = tl.max(b_max, axis=0)
    b_all = tl.where(b_all == float("-inf"), 0.0, b_all)
    b_log = tl.log(tl.sum(b_sum * tl.exp(b_max - b_all[None, :]), axis=0))
    o_n = o_c % columns // PADDED
    o_s = o_c % columns % PADDED
    # The logarithm is small, the maximum may be large: together they need more than float32.
    p_lse = logsumexp_ptr + (o_n.to(tl.int64) * SIGNS + o_c // columns) * samples + o_s
    tl.store(p_lse, b_all.to(tl.float64) + b_log.to(tl.float64), mask=m_c & (o_n < examples) & (o_s < samples))


@triton.jit
def shift_and_scale(p_lse, mask):
    """A float64 log-sum-exp as a float32 number, and a factor near 1 for what rounding took from it; infinity and 0
    where there is none.
    """
    b_lse = tl.load(p_lse, mask=mask, other=float("inf"))
    b_near = b_lse.to(tl.float32)
    return b_near, tl.where(mask, tl.exp((b_near.to(tl.float64) - b_lse).to(tl.float32)), 0.0)


@triton.jit(do_not_specialize=["tokens", "examples", "samples"])
def means_kernel(
    out_ptr,  # [examples, V] float32
    logsumexp_ptr,  # [examples, SIGNS, samples] float64
    weight_ptr,  # [V, d]
    columns_ptr,  # [planes, examples, samples, d]
    bias_ptr,  # [examples, V] float32
    softcap,
    tokens,
    examples,
    samples,
    width,
    stride_o,
    stride_b,
    stride_wv,
    stride_wd,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SIGNS: tl.constexpr,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Mean probabilities of a tile of tokens, of the examples in BC columns, or of one example in several times BC."""
    PER: tl.constexpr = PADDED if PADDED < BC else BC  # columns of an example in one tile
    TILES: tl.constexpr = PADDED // PER  # tiles of an example
    EXAMPLES: tl.constexpr = BC // PER
    i, j = tile_of(tl.program_id(0), tl.cdiv(tokens, BV), tl.cdiv(examples, EXAMPLES), GROUP)
    o_v = i * BV + tl.arange(0, BV)
    m_v = o_v < tokens
    o_e = j * EXAMPLES + tl.arange(0, EXAMPLES)
    m_e = o_e < examples
    b_mean = tl.zeros([BV, EXAMPLES], tl.float32)
    for part in range(TILES):
        o_c = (j * TILES + part) * BC + tl.arange(0, BC)
        o_n = o_c // PADDED
        o_s = o_c % PADDED
        m_c = (o_n < examples) & (o_s < samples)
        b_x = product_tile(
            weight_ptr, columns_ptr, o_v, m_v, o_n, o_s, m_c, examples, samples, width, stride_wv, stride_wd, PLANES,
            WIDEN, EVEN, PRECISION, BV, BC, BK,
        )  # fmt: skip
        b_bias = bias_tile(bias_ptr, stride_b, o_v, m_v, o_e, m_e, HAS_BIAS)
        b_bias = tl.reshape(tl.broadcast_to(b_bias[:, :, None], [BV, EXAMPLES, PER]), [BV, BC])
        for sign in tl.static_range(SIGNS):
            b_z = logits_of(b_x, b_bias, softcap, sign == 1, SOFTCAP)
            p_lse = logsumexp_ptr + (o_n.to(tl.int64) * SIGNS + sign) * samples + o_s
            b_shift, b_scale = shift_and_scale(p_lse, m_c)
            b_p = tl.exp(b_z - b_shift[None, :]) * b_scale[None, :]
            b_mean += tl.sum(tl.reshape(b_p, [BV, EXAMPLES, PER]), axis=2)
    p_out = out_ptr + o_e[None, :].to(tl.int64) * stride_o + o_v[:, None]
    tl.store(p_out, b_mean / (SIGNS * samples), mask=m_e[None, :] & m_v[:, None])


@triton.jit(do_not_specialize=["tokens", "examples", "samples"])
def squares_kernel(
    out_ptr,  # [examples, V] float32
    weight_ptr,  # [V, d]
    columns_ptr,  # [planes, examples, m, d]
    tokens,
    examples,
    samples,  # m
    width,
    stride_o,
    stride_wv,
    stride_wd,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sums of squares of the products of a tile of tokens, as `means_kernel` cuts them."""
    PER: tl.constexpr = PADDED if PADDED < BC else BC
    TILES: tl.constexpr = PADDED // PER
    EXAMPLES: tl.constexpr = BC // PER
    i, j = tile_of(tl.program_id(0), tl.cdiv(tokens, BV), tl.cdiv(examples, EXAMPLES), GROUP)
    o_v = i * BV + tl.arange(0, BV)
    m_v = o_v < tokens
    b_sum = tl.zeros([BV, EXAMPLES], tl.float32)
    for part in range(TILES):
        o_c = (j * TILES + part) * BC + tl.arange(0, BC)
        o_n = o_c // PADDED
        o_s = o_c % PADDED
        m_c = (o_n < examples) & (o_s < samples)
        b_x = product_tile(
            weight_ptr, columns_ptr, o_v, m_v, o_n, o_s, m_c, examples, samples, width, stride_wv, stride_wd, PLANES,
            WIDEN, EVEN, PRECISION, BV, BC, BK,
        )  # fmt: skip
        b_sum += tl.sum(tl.reshape(b_x * b_x, [BV, EXAMPLES, PER]), axis=2)
    o_e = j * EXAMPLES + tl.arange(0, EXAMPLES)
    p_out = out_ptr + o_e[None, :].to(tl.int64) * stride_o + o_v[:, None]
    tl.store(p_out, b_sum, mask=(o_e < examples)[None, :] & m_v[:, None])
