"""Sums of squares of the rows of many inputs in Triton: one launch per dtype and layout.

Bytes and operations: every X is read once, ``sum of M_i d_i b`` bytes; two operations an element. 96 inputs of
2048 x 4096 in bf16 (a Llama of 7B parameters with LoRA on q and v): 1.6 GB, 0.54 ms at 3 TB/s. The table is 56 bytes an
input, one partial sum per program 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import in_vectors, int64_table, multiprocessors, on_device
from ..kernel_types import TYPES

_FIELDS = tl.constexpr(7)  # x, mask, rows, width, and the strides of x and of the mask
_ELEMENTS = {torch.bfloat16: 4096, torch.float16: 4096, torch.float32: 2048}  # of a step: two or four vectors a thread
_WIDTHS = (16, 256)  # columns of a step
_WARPS = 4


@triton.jit
def square_sum_kernel(
    table_ptr,  # [modules, 7] int64
    parts_ptr,  # [modules, parts] float64
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
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
    if CONTIGUOUS:  # what the launcher checked and the compiler needs to know to load 16 bytes at a time
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


def grouped_square_sum(out: Tensor, xs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    """As ``reference.grouped_square_sum``, in Triton."""
    classes: dict[tuple[torch.dtype, bool, bool, int], list[int]] = {}
    for i, (x, mask) in enumerate(zip(xs, masks, strict=True)):
        kind = x.dtype, in_vectors(x), mask is not None, _WIDTHS[x.shape[1] > 2 * _WIDTHS[0]]
        classes.setdefault(kind, []).append(i)
    order = [i for members in classes.values() for i in members]
    with on_device(out):
        table = int64_table([_fields(xs[i], masks[i]) for i in order], out.device)
        sums, first = [], 0
        for (dtype, contiguous, has_mask, block_d), members in classes.items():
            block_m = _rows(dtype, contiguous, block_d)
            # Enough programs to fill the device eight times over, each with at least four steps of rows.
            tallest = triton.cdiv(max(xs[i].shape[0] for i in members), 4 * block_m)
            parts = max(1, min(tallest, triton.cdiv(8 * multiprocessors(out.device), len(members))))
            partial = out.new_empty(len(members), parts)
            square_sum_kernel[(len(members), parts)](
                table[first : first + len(members)],
                partial,
                DTYPE=TYPES[dtype],
                CONTIGUOUS=contiguous,
                HAS_MASK=has_mask,
                BM=block_m,
                BD=block_d,
                num_warps=_WARPS,
                num_stages=2,
                enable_fp_fusion=True,
            )
            sums.append(partial.sum(1))
            first += len(members)
        found = torch.cat(sums)
        out.copy_(found if len(classes) == 1 else found[int64_table([_inverse(order)], out.device)[0]])


def _rows(dtype: torch.dtype, contiguous: bool, block_d: int) -> int:
    """Rows of a step; a quarter as many where every element takes an address of its own, or registers spill."""
    return _ELEMENTS[dtype] // block_d // (1 if contiguous else 4)


def _fields(x: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    pointers = (x.data_ptr(), 0 if mask is None else mask.data_ptr())
    return *pointers, *x.shape, *x.stride(), 0 if mask is None else mask.stride(0)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
