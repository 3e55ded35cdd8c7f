"""Triton kernels that multiply a tile of the vocabulary's weight by columns, and reduce the product where it lies.

Columns are the samples of all examples side by side (`vocabulary_variance`: the columns of the factors), `padded` of
them per example: a power of two, or a multiple of BC where an example fills more than a tile. Column c is sample
`c % padded` of example `c // padded`; tiles of columns go faster than tiles of tokens, `GROUP` of them at a time, so
that a tile of the weight is read from memory once per group and the columns stay in L2.

- `exponentials_kernel` keeps of a tile of logits its maximum and the sum of its exponentials per column (first pass),
  and with `STORE` the exponentials themselves, so that no second product is needed (bounded scratch).
- `merge_kernel` makes log-sum-exps of the tiles' maxima and sums.
- `means_kernel` computes the logits anew and averages `exp(logit - logsumexp)` over an example's columns (second pass).
- `squares_kernel` adds up the squares of an example's columns.

Bytes and operations. V tokens of width d in b bytes, C columns in all, G of them per group: every product takes
`2 V d C` operations and reads `V d b C / G` bytes of weight (G = 2048: once for most uses) and `C d b` of columns.
The first pass writes `8 C V / 128` bytes, the second the result, `4 N V`; with scratch the first writes `4 C V` and
`kernel_scratch.py` reads them. What that comes to for V = 128256, d = 4096, N = 16, S = 64 (C = 1024) in bf16 on a H100
at 798 TFLOP/s and 3 TB/s, as counted, not measured: a product 1.35 ms; two passes 2.7 ms and 16 MB besides the result
of 8 MB; with 263 MB of scratch (two parts of 512 columns, each of which reads the weight) 1.35 + 0.35 ms.
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
    columns_ptr,  # [planes, examples, columns, d], in any order of memory
    o_v,  # [BV]
    m_v,
    o_n,  # [BC] example of each column
    o_s,  # [BC] its number within the example
    m_c,
    width,
    stride_wv,
    stride_wd,
    stride_p,
    stride_n,
    stride_s,
    stride_d,
    PLANES: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """``[BV, BC]`` float32: the rows ``o_v`` of the weight times the columns, which are a sum of ``PLANES`` tensors,
    the smallest last in memory and first in the sum.
    """
    o_k = tl.arange(0, BK)
    p_w = weight_ptr + o_v[:, None].to(tl.int64) * stride_wv + o_k[None, :].to(tl.int64) * stride_wd  # [BV, BK]
    p_x = columns_ptr + o_n[None, :].to(tl.int64) * stride_n + o_s[None, :].to(tl.int64) * stride_s
    p_x += o_k[:, None].to(tl.int64) * stride_d  # [BK, BC]
    step = tl.full([], BK, tl.int64)
    b_sum = tl.zeros([BV, BC], dtype=tl.float32)
    for plane in tl.static_range(PLANES):
        p_wk = p_w
        p_xk = p_x + tl.full([], PLANES - 1 - plane, tl.int64) * stride_p
        for start in range(0, width, BK):
            m_k = o_k < width - start
            b_w = tl.load(p_wk, mask=m_v[:, None] & m_k[None, :], other=0.0)
            b_x = tl.load(p_xk, mask=m_k[:, None] & m_c[None, :], other=0.0)
            if WIDEN:
                b_w = b_w.to(tl.float32)
            b_sum = tl.dot(b_w, b_x, b_sum, input_precision=PRECISION)
            p_wk += step * stride_wd
            p_xk += step * stride_d
    return b_sum


@triton.jit
def logits_tile(b_z, bias_ptr, o_v, m_v, softcap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Bias and soft cap on a tile of products; minus infinity for excluded tokens and beyond the vocabulary."""
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + o_v, mask=m_v, other=float("-inf"))
        b_z += b_bias[:, None]
        m_v = b_bias != float("-inf")
    if SOFTCAP:
        # tanh x = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|)
        b_e = tl.exp(tl.abs(b_z) * (-2.0 / softcap))
        b_cap = softcap * (1.0 - b_e) / (1.0 + b_e)
        b_z = tl.where(b_z < 0, -b_cap, b_cap)
    return tl.where(m_v[:, None], b_z, float("-inf"))


@triton.jit
def exponentials_kernel(
    maxima_ptr,  # [token tiles, column tiles * BC] float32, out
    sums_ptr,  # likewise
    stored_ptr,  # [token tiles * BV, column tiles * BC] float32, out with STORE
    target_logits_ptr,  # [examples, samples] float32, out with HAS_TARGETS
    weight_ptr,  # [V, d]
    columns_ptr,  # [planes, examples, samples, d]
    bias_ptr,  # [V] float32
    targets_ptr,  # [examples] int64
    softcap,
    first_token,
    end_token,
    examples,
    samples,
    width,
    stride_wv,
    stride_wd,
    stride_p,
    stride_n,
    stride_s,
    stride_d,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    STORE: tl.constexpr,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Maximum and sum of the exponentials of a tile of logits, of the tokens from first_token to end_token."""
    column_tiles = tl.cdiv(examples * PADDED, BC)
    i, j = tile_of(tl.program_id(0), tl.cdiv(end_token - first_token, BV), column_tiles, GROUP)
    o_v = first_token + i * BV + tl.arange(0, BV)
    o_c = j * BC + tl.arange(0, BC)
    o_n = o_c // PADDED
    o_s = o_c % PADDED
    m_v = o_v < end_token
    m_c = (o_n < examples) & (o_s < samples)
    b_z = product_tile(
        weight_ptr, columns_ptr, o_v, m_v, o_n, o_s, m_c, width, stride_wv, stride_wd, stride_p, stride_n, stride_s,
        stride_d, PLANES, WIDEN, PRECISION, BV, BC, BK,
    )  # fmt: skip
    b_z = logits_tile(b_z, bias_ptr, o_v, m_v, softcap, HAS_BIAS, SOFTCAP)
    if HAS_TARGETS:
        # Stores of which one per column takes place: picking it by a sum would take the registers of another tile.
        b_place = tl.load(targets_ptr + o_n, mask=m_c, other=-1) - (first_token + i * BV)  # [BC], within the tile
        m_target = m_c & (b_place >= 0) & (b_place < tl.minimum(end_token - first_token - i * BV, BV))
        b_place = tl.where(m_target, b_place, -1).to(tl.int32)
        p_target = target_logits_ptr + o_n.to(tl.int64) * samples + o_s
        m_picked = tl.arange(0, BV)[:, None] == b_place[None, :]
        tl.store(tl.broadcast_to(p_target[None, :], [BV, BC]), b_z, mask=m_picked)
    b_max = tl.max(b_z, axis=0)
    # Where every token is excluded the maximum is minus infinity, and its difference from itself is no number.
    b_e = tl.exp(b_z - tl.where(b_max == float("-inf"), 0.0, b_max)[None, :])
    row = tl.full([], BC, tl.int64) * column_tiles
    tl.store(maxima_ptr + i * row + o_c, b_max)
    tl.store(sums_ptr + i * row + o_c, tl.sum(b_e, axis=0))
    if STORE:
        p_e = stored_ptr + (i * BV + tl.arange(0, BV))[:, None] * row + o_c[None, :]
        tl.store(p_e, b_e)


@triton.jit
def merge_kernel(
    logsumexp_ptr,  # [examples, samples] float64, out
    maxima_ptr,  # [token tiles, padded columns]
    sums_ptr,
    token_tiles,
    columns,
    examples,
    samples,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Log-sum-exps of BC columns from those of their tiles: the maximum first, then the sum in order."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_t = tl.arange(0, BT)
    m_c = o_c < columns
    b_max = tl.full([BC], float("-inf"), tl.float32)
    for start in range(0, token_tiles, BT):
        m_t = (o_t < token_tiles - start)[:, None] & m_c[None, :]
        p = (start + o_t).to(tl.int64)[:, None] * columns + o_c[None, :]
        b_max = tl.maximum(b_max, tl.max(tl.load(maxima_ptr + p, mask=m_t, other=float("-inf")), axis=0))
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros([BC], tl.float32)
    for start in range(0, token_tiles, BT):
        m_t = (o_t < token_tiles - start)[:, None] & m_c[None, :]
        p = (start + o_t).to(tl.int64)[:, None] * columns + o_c[None, :]
        b_part = tl.exp(tl.load(maxima_ptr + p, mask=m_t, other=float("-inf")) - b_shift[None, :])
        b_sum += tl.sum(b_part * tl.load(sums_ptr + p, mask=m_t, other=0.0), axis=0)
    o_n = o_c // PADDED
    o_s = o_c % PADDED
    # The logarithm is small, the maximum may be large: together they need more than float32.
    b_lse = b_shift.to(tl.float64) + tl.log(b_sum).to(tl.float64)
    tl.store(logsumexp_ptr + o_n.to(tl.int64) * samples + o_s, b_lse, mask=(o_n < examples) & (o_s < samples))


@triton.jit
def means_kernel(
    out_ptr,  # [examples, V] float32
    logsumexp_ptr,  # [examples, samples] float64
    weight_ptr,  # [V, d]
    columns_ptr,  # [planes, examples, samples, d]
    bias_ptr,  # [V] float32
    softcap,
    tokens,
    examples,
    samples,
    width,
    stride_o,
    stride_wv,
    stride_wd,
    stride_p,
    stride_n,
    stride_s,
    stride_d,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    WIDEN: tl.constexpr,
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
    b_mean = tl.zeros([BV, EXAMPLES], tl.float32)
    for part in range(TILES):
        o_c = (j * TILES + part) * BC + tl.arange(0, BC)
        o_n = o_c // PADDED
        o_s = o_c % PADDED
        m_c = (o_n < examples) & (o_s < samples)
        b_z = product_tile(
            weight_ptr, columns_ptr, o_v, m_v, o_n, o_s, m_c, width, stride_wv, stride_wd, stride_p, stride_n, stride_s,
            stride_d, PLANES, WIDEN, PRECISION, BV, BC, BK,
        )  # fmt: skip
        b_z = logits_tile(b_z, bias_ptr, o_v, m_v, softcap, HAS_BIAS, SOFTCAP)
        p_lse = logsumexp_ptr + o_n.to(tl.int64) * samples + o_s
        b_lse = tl.load(p_lse, mask=m_c, other=0.0)
        b_near = b_lse.to(tl.float32)
        # What rounding took from the log-sum-exp is a factor near 1.
        b_scale = tl.exp((b_near.to(tl.float64) - b_lse).to(tl.float32)) / samples
        b_p = tl.exp(b_z - tl.where(m_c, b_near, float("inf"))[None, :]) * b_scale[None, :]
        b_mean += tl.sum(tl.reshape(b_p, [BV, EXAMPLES, PER]), axis=2)
    o_e = j * EXAMPLES + tl.arange(0, EXAMPLES)
    p_out = out_ptr + o_e[None, :].to(tl.int64) * stride_o + o_v[:, None]
    tl.store(p_out, b_mean, mask=(o_e < examples)[None, :] & m_v[:, None])


@triton.jit
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
    stride_p,
    stride_n,
    stride_s,
    stride_d,
    PADDED: tl.constexpr,
    PLANES: tl.constexpr,
    WIDEN: tl.constexpr,
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
        b_z = product_tile(
            weight_ptr, columns_ptr, o_v, m_v, o_n, o_s, m_c, width, stride_wv, stride_wd, stride_p, stride_n, stride_s,
            stride_d, PLANES, WIDEN, PRECISION, BV, BC, BK,
        )  # fmt: skip
        b_sum += tl.sum(tl.reshape(b_z * b_z, [BV, EXAMPLES, PER]), axis=2)
    o_e = j * EXAMPLES + tl.arange(0, EXAMPLES)
    p_out = out_ptr + o_e[None, :].to(tl.int64) * stride_o + o_v[:, None]
    tl.store(p_out, b_sum, mask=(o_e < examples)[None, :] & m_v[:, None])
