"""Device functions of the outer product kernels: which tile, its product, its store."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lower_tile(p):
    """Row and column of the ``p``-th tile of a lower triangle (diagonal included), row by row."""
    i = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: it may be one off.
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    return i, p - i * (i + 1) // 2


@triton.jit
def lower_tile_in_bands(p, tiles, BAND: tl.constexpr):
    """The same for a triangle of ``tiles`` tile rows, ``BAND`` rows at a time, column by column within a band.

    Programs that run at the same time then share their tiles of X in the L2 cache.
    """
    row, _ = lower_tile(p)
    first = row // BAND * BAND
    height = tl.minimum(tiles - first, BAND)
    local = p - first * (first + 1) // 2
    # A band is a rectangle of `first` columns and a small triangle at its right end.
    corner_i, corner_j = lower_tile(tl.maximum(local - first * height, 0))
    in_rectangle = local < first * height
    i = tl.where(in_rectangle, first + local % height, first + corner_i)
    j = tl.where(in_rectangle, local // height, first + corner_j)
    return i, j


@triton.jit
def tile_product(
    x_ptr,
    mask_ptr,
    stride_xm,
    stride_xd,
    first_row,
    count,
    width,
    i,
    j,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """``X[rows, tile i]^T X[rows, tile j]`` over those of ``count`` rows from ``first_row`` on that count, float32."""
    o_i = i * BD + tl.arange(0, BD)
    o_j = j * BD + tl.arange(0, BD)
    o_m = first_row + tl.arange(0, BM)
    p_i = x_ptr + o_m[None, :].to(tl.int64) * stride_xm + o_i[:, None].to(tl.int64) * stride_xd  # [BD, BM]
    p_j = x_ptr + o_m[:, None].to(tl.int64) * stride_xm + o_j[None, :].to(tl.int64) * stride_xd  # [BM, BD]
    p_mask = mask_ptr + o_m
    m_i = (o_i < width)[:, None]
    m_j = (o_j < width)[None, :]
    step = tl.full([], BM, tl.int64)
    b_sum = tl.zeros([BD, BD], dtype=tl.float32)
    for start in range(0, count, BM):
        m_m = tl.arange(0, BM) < count - start
        if HAS_MASK:
            # Rows that do not count are never read: they may hold NaN.
            m_m = m_m & (tl.load(p_mask, mask=m_m, other=0) != 0)
            p_mask += BM
        b_i = tl.load(p_i, mask=m_m[None, :] & m_i, other=0.0)  # [BD, BM]
        b_j = tl.load(p_j, mask=m_m[:, None] & m_j, other=0.0)  # [BM, BD]
        b_sum = tl.dot(b_i, b_j, b_sum, input_precision=PRECISION)
        p_i += step * stride_xm
        p_j += step * stride_xm
    return b_sum


@triton.jit
def narrow_product(
    x_ptr,
    mask_ptr,
    stride_xm,
    stride_xd,
    first_row,
    count,
    width,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """``tile_product`` of a width that fits one tile: X is loaded once for both sides, the next rows while these
    multiply.

    The compiler's pipeline would load it once per side, and this is bound by loading.
    """
    o_d = tl.arange(0, BD)
    o_m = first_row + tl.arange(0, BM)
    p_x = x_ptr + o_m[:, None].to(tl.int64) * stride_xm + o_d[None, :].to(tl.int64) * stride_xd  # [BM, BD]
    p_mask = mask_ptr + o_m
    m_d = (o_d < width)[None, :]
    step = tl.full([], BM, tl.int64)
    b_x = _rows(p_x, p_mask, count, m_d, HAS_MASK, BM)
    b_sum = tl.zeros([BD, BD], dtype=tl.float32)
    for start in range(0, count, BM):
        p_x += step * stride_xm
        p_mask += BM
        b_next = _rows(p_x, p_mask, count - start - BM, m_d, HAS_MASK, BM)
        b_sum = tl.dot(tl.trans(b_x), b_x, b_sum, input_precision=PRECISION)
        b_x = b_next
    return b_sum


@triton.jit
def _rows(p_x, p_mask, left, m_d, HAS_MASK: tl.constexpr, BM: tl.constexpr):
    m_m = tl.arange(0, BM) < left
    if HAS_MASK:
        m_m = m_m & (tl.load(p_mask, mask=m_m, other=0) != 0)
    return tl.load(p_x, mask=m_m[:, None] & m_d, other=0.0)


@triton.jit
def store_symmetric(
    out_ptr,
    b_value,  # [BD, BD]
    i,
    j,
    width,
    stride_o0,
    stride_o1,
    ACCUMULATE: tl.constexpr,
    MIRROR: tl.constexpr,
    BD: tl.constexpr,
):
    """Write (or add) the part of a tile on and below the diagonal, and the same numbers to its mirror image.

    On the diagonal the upper half of the tile is dropped, so that the symmetry does not rest on the order in which a
    matrix instruction adds. Launch without fused multiply-add: fused into one of the two additions it would break it.

    Only tiles on the diagonal ask of each element where it is, which forbids to load and store several at once.
    """
    if i > j:
        _store(out_ptr, b_value, i, j * BD, width, stride_o0, stride_o1, False, ACCUMULATE, MIRROR, BD, BD)
    else:
        _store(out_ptr, b_value, i, j * BD, width, stride_o0, stride_o1, True, ACCUMULATE, MIRROR, BD, BD)


@triton.jit
def _store(
    out_ptr,
    b_value,  # [BD, BC]
    i,
    column,
    width,
    stride_o0,
    stride_o1,
    DIAGONAL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    MIRROR: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    # A wide tile goes out in pieces: all at once, addresses and old values would take as many registers as the sums,
    # and one program less would fit a multiprocessor.
    if BD * BC > 2048:
        HALF: tl.constexpr = BC // 2
        b_left, b_right = tl.split(tl.permute(tl.reshape(b_value, [BD, 2, HALF]), [0, 2, 1]))
        _store(out_ptr, b_left, i, column, width, stride_o0, stride_o1, DIAGONAL, ACCUMULATE, MIRROR, BD, HALF)
        _store(out_ptr, b_right, i, column + HALF, width, stride_o0, stride_o1, DIAGONAL, ACCUMULATE, MIRROR, BD, HALF)
    else:
        o_i = i * BD + tl.arange(0, BD)
        o_j = column + tl.arange(0, BC)
        m_lower = (o_i < width)[:, None] & (o_j < width)[None, :]
        m_upper = (o_j < width)[:, None] & (o_i < width)[None, :]
        if DIAGONAL:
            m_lower = m_lower & (o_i[:, None] >= o_j[None, :])
            m_upper = m_upper & (o_j[:, None] < o_i[None, :])
        p_lower = out_ptr + o_i[:, None].to(tl.int64) * stride_o0 + o_j[None, :].to(tl.int64) * stride_o1  # [BD, BC]
        b_lower = b_value
        if ACCUMULATE:
            b_lower += tl.load(p_lower, mask=m_lower, other=0.0)
        tl.store(p_lower, b_lower, mask=m_lower)
        if MIRROR:
            p_upper = out_ptr + o_j[:, None].to(tl.int64) * stride_o0 + o_i[None, :].to(tl.int64) * stride_o1
            b_upper = tl.trans(b_value)  # [BC, BD]
            if ACCUMULATE:
                b_upper += tl.load(p_upper, mask=m_upper, other=0.0)
            tl.store(p_upper, b_upper, mask=m_upper)
