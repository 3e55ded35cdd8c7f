"""Triton kernels that multiply a tile of the vocabulary's weight by columns.

Columns are the samples of all examples side by side (`vocabulary_variance`: the columns of the factors), `padded` of
them per example: a power of two, or a multiple of BC where an example fills more than a tile. Column c is sample
`c % padded` of example `c // padded`; tiles of columns go faster than tiles of tokens, `GROUP` of them at a time, so
that a tile of the weight is read from memory once per group and the columns stay in L2.

- `product_kernel` writes the products to bounded scratch, from which `kernel_scratch.py` reads them.
- `squares_kernel` adds up the squares of an example's columns.

Bytes and operations. V tokens of width d in b bytes, C columns in all, G of them per group: a product takes `2 V d C`
operations and reads `V d b C / G` bytes of weight (G = 2048: once for most uses) and `C d b` of columns. Products
written take `4 C V` bytes. For V = 128256, d = 4096, C = 1024 in bf16 on a H100 at 798 TFLOP/s and 3 TB/s, as counted,
not measured: 1.35 ms, and 0.18 ms for what is written.
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


@triton.jit(do_not_specialize=["first_token", "end_token", "examples", "samples"])
def product_kernel(
    out_ptr,  # [token tiles * BV, column tiles * BC] float32
    weight_ptr,  # [V, d]
    columns_ptr,  # [planes, examples, samples, d]
    first_token,
    end_token,
    examples,
    samples,
    width,
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
    """The tokens from first_token to end_token times all columns."""
    column_tiles = tl.cdiv(examples * PADDED, BC)
    i, j = tile_of(tl.program_id(0), tl.cdiv(end_token - first_token, BV), column_tiles, GROUP)
    o_t = i * BV + tl.arange(0, BV)
    o_c = j * BC + tl.arange(0, BC)
    o_n = o_c // PADDED
    o_s = o_c % PADDED
    m_c = (o_n < examples) & (o_s < samples)
    b_x = product_tile(
        weight_ptr, columns_ptr, first_token + o_t, first_token + o_t < end_token, o_n, o_s, m_c, examples, samples,
        width, stride_wv, stride_wd, PLANES, WIDEN, EVEN, PRECISION, BV, BC, BK,
    )  # fmt: skip
    row = tl.full([], BC, tl.int64) * column_tiles
    tl.store(out_ptr + o_t[:, None] * row + o_c[None, :], b_x)


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
    """Sums of squares of a tile of tokens, of the examples in BC columns, or of one example in several times BC."""
    PER: tl.constexpr = PADDED if PADDED < BC else BC  # columns of an example in one tile
    TILES: tl.constexpr = PADDED // PER  # tiles of an example
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
