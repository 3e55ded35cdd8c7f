"""``out + scale * x^T diag(mask) x`` of many modules as symmetric rank-k updates in Triton.

One program per tile on or below the diagonal, so that half of the products of a GEMM are never made; mask and scale are
fused; a tile and its mirror image get the same numbers. Where there are fewer tiles than the device has room for, the
rows are split: every part writes its sums to scratch, and a second launch adds them in order (deterministic, no
atomics). Everything about a module that is not known when a kernel is compiled, its pointers included, is a row of a
table in device memory, copied there once per call.

Bytes and operations, X of M rows and d columns of b bytes, ``n = ceil(d / 128)`` tile rows: ``n (n + 1) / 2 * 128^2 *
2 M`` operations (a GEMM: ``2 M d^2``); traffic ``M d b`` for X when it stays in L2 between the tiles of a band,
otherwise up to ``n / band`` times that, plus ``4 d^2`` bytes for the store, as many again to accumulate, half of both
with ``lower``; a split over S parts writes and reads ``4 S d^2 / 2`` bytes more. At M = 8192, d = 4096, bf16: 528
tiles, 141.7 GFLOP, 177 us at 798 TFLOP/s; traffic 67 + 67 MB, 45 us at 3 TB/s. 256 modules of 8192 x 8 in bf16: 33.6
MB, 11 us at 3 TB/s; 0.5 GFLOP as multiplied, nothing. The table is 80 bytes a module.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import lower_tile, lower_tile_in_bands, narrow_product, store_symmetric, sum_of_blocks, tile_product

# Columns of the table, one row of int64 per module: what a call brings, then what follows from the layouts.
GIVEN = ("x", "mask", "out", "scale")  # three addresses, and the bits of a float32
FIXED = ("rows", "width", "stride_xm", "stride_xd", "stride_o0", "stride_o1")
_FIELDS = tl.constexpr(len(GIVEN) + len(FIXED))
_BAND = tl.constexpr(8)  # tile rows whose programs run beside each other


@triton.jit
def outer_product_kernel(
    table_ptr,  # [modules, 10] int64
    parts_ptr,  # [splits, modules, tiles, BD, BD] float32, if SPLIT
    DTYPE: tl.constexpr,
    VECTORS: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    MIRROR: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PACK: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """One tile of one module, of one part of its rows."""
    p, module, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Loaded in place, not by a function: the compiler forgets what it is told about the result of a call.
    row_ptr = table_ptr + module.to(tl.int64) * _FIELDS
    x_ptr = tl.load(row_ptr + 0).to(tl.pointer_type(DTYPE))
    mask_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.int16))
    rows = tl.load(row_ptr + 4)
    width = tl.load(row_ptr + 5).to(tl.int32)
    stride_xm = tl.load(row_ptr + 6)
    if VECTORS:  # what the launcher checked and the compiler needs to know to load 16 bytes at a time
        x_ptr = tl.multiple_of(x_ptr, 16)
        stride_xm = tl.multiple_of(stride_xm, 4 if tl.float32 == DTYPE or PACK == 4 else 8)
        width = tl.multiple_of(width, 4 if tl.float32 == DTYPE or PACK == 4 else 8)
        stride_xd = 1
    else:
        stride_xd = tl.load(row_ptr + 7)

    STEP: tl.constexpr = BM * PACK
    rows_per_split = tl.cdiv(tl.cdiv(rows, tl.num_programs(2)), STEP) * STEP
    first_row = split * rows_per_split
    count = tl.maximum(tl.minimum(rows_per_split, rows - first_row), 0).to(tl.int32)
    if BD <= 32:
        b_sum = narrow_product(
            x_ptr, mask_ptr, stride_xm, stride_xd, first_row, count, width, PACK, HAS_MASK, PRECISION, BM, BD
        )
    else:
        i, j = lower_tile_in_bands(p, tl.cdiv(width, BD), _BAND)
        b_sum = tile_product(
            x_ptr, mask_ptr, stride_xm, stride_xd, first_row, count, width, i, j, WHOLE, HAS_MASK, PRECISION, BM, BD
        )
    if SPLIT:
        o = tl.arange(0, BD)
        o_part = ((split.to(tl.int64) * tl.num_programs(1) + module) * tl.num_programs(0) + p) * BD * BD
        tl.store(parts_ptr + o_part + o[:, None] * BD + o[None, :], b_sum)
    else:
        _scale_and_store(row_ptr, b_sum, p, width, VECTORS, ACCUMULATE, MIRROR, PACK, BD)


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(
    table_ptr,  # [modules, 10] int64
    parts_ptr,  # [splits, modules, tiles, BD, BD] float32
    splits,
    VECTORS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    MIRROR: tl.constexpr,
    PACK: tl.constexpr,
    BD: tl.constexpr,
):
    """Add the parts of a tile in order; scale, add to ``out``, mirror."""
    p, module = tl.program_id(0), tl.program_id(1)
    row_ptr = table_ptr + module.to(tl.int64) * _FIELDS
    width = tl.load(row_ptr + 5).to(tl.int32)
    if VECTORS:
        width = tl.multiple_of(width, 4)
    o = tl.arange(0, BD)
    o_part = (module.to(tl.int64) * tl.num_programs(0) + p) * BD * BD
    p_part = parts_ptr + o_part + o[:, None] * BD + o[None, :]  # [BD, BD]
    step = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * BD * BD
    b_sum = tl.zeros([BD, BD], dtype=tl.float32)
    for _ in range(splits):
        b_sum += tl.load(p_part)
        p_part += step
    _scale_and_store(row_ptr, b_sum, p, width, VECTORS, ACCUMULATE, MIRROR, PACK, BD)


@triton.jit
def _scale_and_store(
    row_ptr,
    b_sum,
    p,
    width,
    VECTORS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    MIRROR: tl.constexpr,
    PACK: tl.constexpr,
    BD: tl.constexpr,
):
    out_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    scale = tl.load(row_ptr + 3).to(tl.int32).to(tl.float32, bitcast=True)
    stride_o0 = tl.load(row_ptr + 8)
    if VECTORS:
        out_ptr = tl.multiple_of(out_ptr, 16)
        stride_o0 = tl.multiple_of(stride_o0, 4)
        stride_o1 = 1
    else:
        stride_o1 = tl.load(row_ptr + 9)
    if BD <= 32:
        b_sum = sum_of_blocks(b_sum, PACK, BD)
        store_symmetric(out_ptr, b_sum * scale, 0, 0, width, stride_o0, stride_o1, ACCUMULATE, MIRROR, BD // PACK)
    else:
        i, j = lower_tile_in_bands(p, tl.cdiv(width, BD), _BAND)
        store_symmetric(out_ptr, b_sum * scale, i, j, width, stride_o0, stride_o1, ACCUMULATE, MIRROR, BD)


@triton.jit
def mirror_lower_kernel(out_ptr, width, stride_o0, stride_o1, BD: tl.constexpr):
    """Copy one tile from below the diagonal to above it."""
    i, j = lower_tile(tl.program_id(0))
    o_i = i * BD + tl.arange(0, BD)
    o_j = j * BD + tl.arange(0, BD)
    m_lower = (o_i[:, None] > o_j[None, :]) & (o_i < width)[:, None]
    m_upper = (o_j[:, None] < o_i[None, :]) & (o_i < width)[None, :]
    b_lower = tl.load(
        out_ptr + o_i[:, None].to(tl.int64) * stride_o0 + o_j[None, :].to(tl.int64) * stride_o1, mask=m_lower, other=0.0
    )
    tl.store(
        out_ptr + o_j[:, None].to(tl.int64) * stride_o0 + o_i[None, :].to(tl.int64) * stride_o1,
        tl.trans(b_lower),
        mask=m_upper,
    )
