"""Sums of squares of the rows of many inputs in Triton: one launch per dtype and layout.

Bytes and operations: every X is read once, ``sum of M_i d_i b`` bytes; two operations an element. 96 inputs of
2048 x 4096 in bf16 (a Llama of 7B parameters with LoRA on q and v): 1.6 GB, 0.54 ms at 3 TB/s. The table is 64 bytes an
input, one partial sum per program 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import in_vectors, multiprocessors, on_device
from ..kernel_types import TYPES
from ..layouts import addresses, device_table, per_layout

_FIELDS = tl.constexpr(8)  # x, mask, rows, width, the strides of x and of the mask, and whose sum it is
_ELEMENTS = {torch.bfloat16: 4096, torch.float16: 4096, torch.float32: 2048}  # of a step: two or four vectors a thread
_WIDTHS = (16, 256)  # columns of a step
_WARPS = 4


@triton.jit
def square_sum_kernel(
    table_ptr,  # [modules, 8] int64
    parts_ptr,  # [modules, parts] float64
    DTYPE: tl.constexpr,
    VECTORS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """One part of the rows of one input."""
    module, part = tl.program_id(0), tl.program_id(1)
    row_ptr = table_ptr + module.to(tl.int64) * _FIELDS
    x_ptr = tl.load(row_ptr + 0).to(tl.pointer_type(DTYPE))
    mask_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.uint8))
    rows = tl.load(row_ptr + 2)
    width = tl.load(row_ptr + 3).to(tl.int32)
    stride_m = tl.load(row_ptr + 4)
    if VECTORS:  # what the launcher checked and the compiler needs to know to load 16 bytes at a time
        x_ptr = tl.multiple_of(x_ptr, 16)
        stride_m = tl.multiple_of(stride_m, 4 if tl.float32 == DTYPE else 8)
        width = tl.multiple_of(width, 4 if tl.float32 == DTYPE else 8)
        stride_d = 1
    else:
        stride_d = tl.load(row_ptr + 5)
    stride_mask = tl.load(row_ptr + 6)

    per_part = tl.cdiv(tl.cdiv(rows, tl.num_programs(1)), BM) * BM
    first = part * per_part
    end = tl.minimum(first + per_part, rows)
    o_m, o_d = tl.arange(0, BM).to(tl.int64), tl.arange(0, BD)
    total = tl.zeros([BM], dtype=tl.float64)
    for row in range(first, end, BM):
        m_m = row + o_m < end  # [BM]
        if HAS_MASK:
            m_m &= tl.load(mask_ptr + (row + o_m) * stride_mask, mask=m_m, other=0) != 0
        b_sum = tl.zeros([BM, BD], dtype=tl.float32)
        for column in range(0, width, BD):
            p_x = x_ptr + (row + o_m)[:, None] * stride_m + (column + o_d)[None, :].to(tl.int64) * stride_d
            b_x = tl.load(p_x, mask=m_m[:, None] & (column + o_d < width)[None, :], other=0.0).to(tl.float32)
            b_sum += b_x * b_x
        total += tl.sum(b_sum, axis=1).to(tl.float64)
    tl.store(parts_ptr + module.to(tl.int64) * tl.num_programs(1) + part, tl.sum(total, axis=0))


class Variant(NamedTuple):
    """What the kernel is compiled for, beside the architecture."""

    dtype: torch.dtype
    vectors: bool  # rows are pieces of 16 aligned bytes
    masked: bool
    block: int  # columns of a step

    def __str__(self) -> str:
        flags = [name for name in ("vectors", "masked") if getattr(self, name)]
        return " ".join([str(self.dtype).removeprefix("torch."), f"BD={self.block}", *flags])


class _Plan(NamedTuple):
    classes: dict[Variant, tuple[int, int]]  # how many inputs, and the rows of the longest
    order: Tensor  # of the inputs, class by class
    fixed: Tensor  # [modules, 6] int64


@per_layout
def _plan(xs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> _Plan:
    members: dict[Variant, list[int]] = {}
    for i, (x, mask) in enumerate(zip(xs, masks, strict=True)):
        kind = Variant(x.dtype, in_vectors(x), mask is not None, _WIDTHS[x.shape[1] > 2 * _WIDTHS[0]])
        members.setdefault(kind, []).append(i)
    classes = {kind: (len(some), max(xs[i].shape[0] for i in some)) for kind, some in members.items()}
    order = [i for some in members.values() for i in some]
    strides = [0 if mask is None else mask.stride(0) for mask in masks]
    fixed = [(*xs[i].shape, *xs[i].stride(), strides[i], i) for i in order]
    return _Plan(classes, torch.tensor(order, device="cpu"), torch.tensor(fixed, device="cpu"))


def variants(out: Tensor, xs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Variant, ...]:
    """What ``grouped_square_sum`` launches for these arguments."""
    return tuple(sorted(_plan(xs, masks).classes, key=str))


def grouped_square_sum(out: Tensor, xs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    """As ``reference.grouped_square_sum``, in Triton."""
    plan = _plan(xs, masks)
    with on_device(out):
        table = device_table((addresses(xs), addresses(masks)), plan.fixed, plan.order, out.device)
        sums, first = torch.empty_like(out), 0
        for kind, (count, rows) in plan.classes.items():
            here = slice(first, first + count)
            block_m = _rows(kind)
            # Enough programs to fill the device eight times over, each with at least four steps of rows.
            parts = max(1, min(triton.cdiv(rows, 4 * block_m), triton.cdiv(8 * multiprocessors(out.device), count)))
            partial = out.new_empty(count, parts)
            square_sum_kernel[(count, parts)](
                table[here],
                partial,
                DTYPE=TYPES[kind.dtype],
                VECTORS=kind.vectors,
                HAS_MASK=kind.masked,
                BM=block_m,
                BD=kind.block,
                num_warps=_WARPS,
                num_stages=2,
                enable_fp_fusion=True,
            )
            torch.sum(partial, 1, out=sums[here])
            first += count
        out.index_copy_(0, table[:, -1], sums)


def _rows(kind: Variant) -> int:
    """Rows of a step; a quarter as many where every element takes an address of its own, or registers spill."""
    return _ELEMENTS[kind.dtype] // kind.block // (1 if kind.vectors else 4)
