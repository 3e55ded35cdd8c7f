"""``out + scale * x^T diag(mask) x`` as a symmetric rank-k update in Triton.

One program per tile on or below the diagonal, so that half of the products of a GEMM are never made; mask and scale are
fused; a tile and its mirror image get the same numbers. Where the triangle has fewer tiles than the device has room
for, the rows are split: every part writes its sums to scratch, and a second launch adds them in order (deterministic,
no atomics).

Bytes and operations, X of M rows and d columns of b bytes, ``n = ceil(d / 128)`` tile rows: ``n (n + 1) / 2 * 128^2 *
2 M`` operations (a GEMM: ``2 M d^2``); traffic ``M d b`` for X when it stays in L2 between the tiles of a band,
otherwise up to ``n / band`` times that, plus ``4 d^2`` bytes for the store, as many again to accumulate, half of both
with ``lower``; a split over S parts writes and reads ``4 S d^2 / 2`` bytes more. At M = 8192, d = 4096, bf16: 528
tiles, 141.7 GFLOP, 177 us at 798 TFLOP/s; traffic 67 + 67 MB, 45 us at 3 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import SCRATCH_BYTES, architecture, is_aligned, multiprocessors, on_device
from ..tuning import choose_configuration
from .tiles import lower_tile, lower_tile_in_bands, narrow_product, store_symmetric, tile_product


@triton.jit
def outer_product_kernel(
    out_ptr,  # [d, d], or scratch [splits, tiles, BD, BD] if SPLIT
    x_ptr,  # [M, d]
    mask_ptr,  # [M] uint8
    scale,
    rows,
    width,
    rows_per_split,
    stride_xm,
    stride_xd,
    stride_mask,
    stride_o0,
    stride_o1,
    HAS_MASK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    MIRROR: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile on or below the diagonal, of one part of the rows."""
    p, split = tl.program_id(0), tl.program_id(1)
    i, j = lower_tile_in_bands(p, tl.cdiv(width, BD), BAND)
    first_row = split * rows_per_split
    end_row = tl.minimum(first_row + rows_per_split, rows)
    if BD <= 32:
        b_sum = narrow_product(
            x_ptr, mask_ptr, stride_xm, stride_xd, stride_mask, first_row, end_row, width, HAS_MASK, PRECISION, BM, BD
        )
    else:
        b_sum = tile_product(
            x_ptr,
            mask_ptr,
            stride_xm,
            stride_xd,
            stride_mask,
            first_row,
            end_row,
            width,
            i,
            j,
            HAS_MASK,
            PRECISION,
            BM,
            BD,
        )
    if SPLIT:
        o_tile = (split.to(tl.int64) * tl.num_programs(0) + p) * BD * BD
        o = tl.arange(0, BD)
        tl.store(out_ptr + o_tile + o[:, None] * BD + o[None, :], b_sum)
    else:
        store_symmetric(out_ptr, b_sum * scale, i, j, width, stride_o0, stride_o1, ACCUMULATE, MIRROR, BD)


@triton.jit
def sum_splits_kernel(
    out_ptr,  # [d, d]
    parts_ptr,  # [splits, tiles, BD, BD]
    scale,
    width,
    splits,
    stride_o0,
    stride_o1,
    ACCUMULATE: tl.constexpr,
    MIRROR: tl.constexpr,
    BD: tl.constexpr,
    BAND: tl.constexpr,
):
    """Add the parts of a tile in order; scale, add to ``out``, mirror."""
    p = tl.program_id(0)
    i, j = lower_tile_in_bands(p, tl.cdiv(width, BD), BAND)
    o = tl.arange(0, BD)
    p_part = parts_ptr + p.to(tl.int64) * BD * BD + o[:, None] * BD + o[None, :]  # [BD, BD]
    step = tl.num_programs(0).to(tl.int64) * BD * BD
    b_sum = tl.zeros([BD, BD], dtype=tl.float32)
    for _ in range(splits):
        b_sum += tl.load(p_part)
        p_part += step
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


@dataclass(frozen=True)
class Configuration:
    """Tile of rows and columns, warps, pipeline depth, tile rows per band, programs that fit a multiprocessor, and the
    registers that the assembler may use (left to itself it spills a little to fit more programs).
    """

    block_m: int
    block_d: int
    num_warps: int
    num_stages: int
    band: int = 8
    per_multiprocessor: int = 2
    max_registers: int | None = None


# 128^2 tiles: at d = 4096 their triangle is 528 programs, 4.0 waves of 132, where 128 x 256 would need 2.06 and leave a
# wave almost empty. 8 warps keep the 64 KB of sums at 64 registers a thread; 3 stages of 32 KB and 128 registers let
# two programs share a multiprocessor, so that one multiplies while the other stores.
_PAIRED = Configuration(64, 128, 8, 3, max_registers=128)
_ALONE = Configuration(128, 128, 8, 2, per_multiprocessor=1)
_WIDE = {
    "sm_80": (Configuration(32, 128, 8, 3, per_multiprocessor=1), Configuration(64, 128, 8, 2, per_multiprocessor=1)),
    "sm_90": (_PAIRED, _ALONE, Configuration(64, 128, 8, 4, per_multiprocessor=1)),
    # On sm_100 the sums lie in tensor memory, and 128 registers spill in the epilogue.
    "sm_100": (Configuration(64, 128, 8, 4, per_multiprocessor=1), _ALONE),
}
# float32 takes twice the room and is split into three products in registers: smaller tiles.
_WIDE_FLOAT32 = {name: (Configuration(32, 64, 4, 3, per_multiprocessor=3),) for name in _WIDE}
# One tile, bound by the reading of X: long pieces of few columns.
_NARROW = {
    16: Configuration(512, 16, 4, 1, per_multiprocessor=4),
    32: Configuration(128, 32, 4, 1, per_multiprocessor=4, max_registers=128),
    64: Configuration(64, 64, 4, 4, per_multiprocessor=3),
}
_NARROW_FLOAT32 = {
    16: Configuration(64, 16, 4, 1, per_multiprocessor=4),
    32: Configuration(32, 32, 4, 1, per_multiprocessor=4),
    64: Configuration(32, 64, 4, 3, per_multiprocessor=3),
}

# Elements loaded one by one take an address each: smaller tiles and steps, or registers spill.
_STRIDED = {
    16: Configuration(128, 16, 4, 1, per_multiprocessor=4),
    32: Configuration(64, 32, 4, 1, per_multiprocessor=4),
    64: Configuration(32, 64, 4, 2, per_multiprocessor=3),
}
_STRIDED_FLOAT32 = {
    16: Configuration(64, 16, 4, 1, per_multiprocessor=4),
    32: Configuration(32, 32, 4, 1, per_multiprocessor=4),
    64: Configuration(16, 64, 4, 2, per_multiprocessor=3),
}

# Rows that a split must have at least: fewer, and adding the parts costs more than it saves.
_ROWS_PER_SPLIT = 512
# float32 operands as three TF32 products (error 2^-21 of the size of the terms), never one.
PRECISION = {torch.float32: "tf32x3", torch.float16: "ieee", torch.bfloat16: "ieee"}


def configurations(name: str, dtype: torch.dtype, width: int, strided: bool = False) -> tuple[Configuration, ...]:
    """Candidates for an architecture, dtype, width and layout (``is_strided``), the known-good one first."""
    if width > 64 and not strided:
        return (_WIDE_FLOAT32 if dtype == torch.float32 else _WIDE)[name]
    if dtype == torch.float32:
        table = _STRIDED_FLOAT32 if strided else _NARROW_FLOAT32
    else:
        table = _STRIDED if strided else _NARROW
    return (table[min(64, max(16, triton.next_power_of_2(width)))],)


def is_strided(x: Tensor) -> bool:
    """Whether the compiler does not see at launch that rows of ``x`` are pieces of 16 aligned bytes."""
    return x.stride(1) != 1 or x.stride(0) % 16 != 0 or not is_aligned(x)


def choose_splits(tiles: int, rows: int, programs: int) -> int:
    """Parts of the rows: as many as fit at once beside each other, each of at least 512 rows."""
    return max(1, min(programs // tiles, rows // _ROWS_PER_SPLIT))


def outer_product(
    out: Tensor, x: Tensor, mask: Tensor | None, scale: float, accumulate: bool, lower: bool = False
) -> None:
    """As ``reference.outer_product``, in Triton."""
    if out.numel() == 0:
        return
    name = architecture(x.device)
    with on_device(x):
        strided = is_strided(x)
        candidates = configurations(name, x.dtype, x.shape[1], strided)
        key = ("outer_product", name, x.dtype, triton.next_power_of_2(x.shape[0]), x.shape[1], strided)
        chosen = choose_configuration(key, candidates, lambda one: _launch(one, torch.empty_like(out), x, mask, 1.0))
        _launch(chosen, out, x, mask, scale, accumulate, lower)


def mirror_lower(out: Tensor) -> None:
    """Copy what is below the diagonal of ``out: [d, d]`` to above it."""
    if out.numel() == 0:
        return
    tiles = triton.cdiv(out.shape[0], 64)
    with on_device(out):
        mirror_lower_kernel[(tiles * (tiles + 1) // 2,)](
            out, out.shape[0], *out.stride(), BD=64, num_warps=4, num_stages=1, enable_fp_fusion=False
        )


def _launch(
    configuration: Configuration,
    out: Tensor,
    x: Tensor,
    mask: Tensor | None,
    scale: float,
    accumulate: bool = False,
    lower: bool = False,
) -> None:
    rows, width = x.shape
    block = configuration.block_d
    count = triton.cdiv(width, block)
    tiles = count * (count + 1) // 2
    splits = choose_splits(tiles, rows, multiprocessors(x.device) * configuration.per_multiprocessor)
    splits = min(splits, max(1, SCRATCH_BYTES // (tiles * block * block * 4)))
    rows_per_split = triton.cdiv(triton.cdiv(rows, splits), configuration.block_m) * configuration.block_m
    parts = out.new_empty((splits, tiles, block, block), dtype=torch.float32) if splits > 1 else out
    flags = mask.view(torch.uint8) if mask is not None else x
    outer_product_kernel[(tiles, splits)](
        parts,
        x,
        flags,
        scale,
        rows,
        width,
        max(rows_per_split, 1),
        *x.stride(),
        flags.stride(0),
        *out.stride(),
        HAS_MASK=mask is not None,
        ACCUMULATE=accumulate and splits == 1,
        MIRROR=not lower,
        SPLIT=splits > 1,
        PRECISION=PRECISION[x.dtype],
        BM=configuration.block_m,
        BD=block,
        BAND=configuration.band,
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        maxnreg=configuration.max_registers,
        enable_fp_fusion=False,
    )
    if splits > 1:
        sum_splits_kernel[(tiles,)](
            out,
            parts,
            scale,
            width,
            splits,
            *out.stride(),
            ACCUMULATE=accumulate,
            MIRROR=not lower,
            BD=block,
            BAND=configuration.band,
            num_warps=8 if block == 128 else 4,
            num_stages=2,
            enable_fp_fusion=False,
        )
