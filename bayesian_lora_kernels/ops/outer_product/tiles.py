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
    WHOLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """``X[rows, tile i]^T X[rows, tile j]`` over those of ``count`` rows from ``first_row`` on that count, float32.

    ``WHOLE``: no tile ends beyond the width, so that no column needs a mask, which would cost as much as the loads.
    """
    o_i = i * BD + tl.arange(0, BD)
    o_j = j * BD + tl.arange(0, BD)
    o_m = first_row + tl.arange(0, BM)
    p_i = x_ptr + o_m[None, :].to(tl.int64) * stride_xm + o_i[:, None].to(tl.int64) * stride_xd  # [BD, BM]
    p_j = x_ptr + o_m[:, None].to(tl.int64) * stride_xm + o_j[None, :].to(tl.int64) * stride_xd  # [BM, BD]
    p_mask = mask_ptr + o_m
    m_i = (o_i < width)[:, None] | WHOLE
    m_j = (o_j < width)[None, :] | WHOLE
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
    PACK: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """``tile_product`` of a width that fits one tile: X is loaded once for both sides, the next rows while these
    multiply. The compiler's pipeline would load it once per side, and this is bound by loading.

    ``PACK`` rows lie beside each other in one row of the tile, where X is contiguous and its width ``BD // PACK``:
    what is wanted are then the blocks on the diagonal (``sum_of_blocks``).
    """
    o_d = tl.arange(0, BD)[None, :]
    o_m = tl.arange(0, BM)[:, None]
    if PACK > 1:
        p_x = x_ptr + first_row * (BD // PACK) + o_m * BD + o_d  # [BM, BD]
        width = BD
        step = tl.full([], BM * BD, tl.int64)
    else:
        p_x = x_ptr + (first_row + o_m).to(tl.int64) * stride_xm + o_d.to(tl.int64) * stride_xd
        step = tl.full([], BM, tl.int64) * stride_xm
    p_mask = mask_ptr + first_row
    b_x = _rows(p_x, p_mask, count, width, PACK, HAS_MASK, BM, BD)
    b_sum = tl.zeros([BD, BD], dtype=tl.float32)
    for start in range(0, count, BM * PACK):
        p_x += step
        p_mask += BM * PACK
        b_next = _rows(p_x, p_mask, count - start - BM * PACK, width, PACK, HAS_MASK, BM, BD)
        b_sum = tl.dot(tl.trans(b_x), b_x, b_sum, input_precision=PRECISION)
        b_x = b_next
    return b_sum


@triton.jit
def _rows(p_x, p_mask, left, width, PACK: tl.constexpr, HAS_MASK: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """The counted ones of the next rows, at most ``left``, zeros for the others: ``[BM, BD]``."""
    o_d = tl.arange(0, BD)[None, :]
    o_m = tl.arange(0, BM)[:, None]
    if PACK > 1:
        b_x = tl.load(p_x, mask=o_m * PACK + o_d // (BD // PACK) < left, other=0.0)
        if HAS_MASK:
            o_row = o_m * PACK + tl.arange(0, PACK)[None, :]
            b_mask = tl.load(p_mask + o_row, mask=o_row < left, other=0)[:, :, None]  # [BM, PACK, 1]
            b_x = tl.where(tl.reshape(tl.broadcast_to(b_mask, [BM, PACK, BD // PACK]), [BM, BD]) != 0, b_x, 0.0)
        return b_x
    m_row = o_m < left
    if HAS_MASK:
        m_row = m_row & (tl.load(p_mask + o_m, mask=m_row, other=0) != 0)
    return tl.load(p_x, mask=m_row & (o_d < width), other=0.0)


@triton.jit
def sum_of_blocks(b_sum, PACK: tl.constexpr, BD: tl.constexpr):
    """The sum of the ``PACK`` blocks on the diagonal of ``b_sum: [BD, BD]``, in order."""
    WIDTH: tl.constexpr = BD // PACK
    block = tl.arange(0, PACK)
    on_diagonal = block[:, None, None, None] == block[None, None, :, None]
    b_blocks = tl.where(on_diagonal, tl.reshape(b_sum, [PACK, WIDTH, PACK, WIDTH]), 0.0)
    return tl.sum(tl.sum(b_blocks, axis=2), axis=0)


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
    if BD * BC > 1024:
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
