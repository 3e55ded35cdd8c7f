"""Gradients of tokens that a mask leaves out, in Triton: one launch per dtype and layout.

Bytes: every g is read once, of a only the rows that are left out and have a gradient. B of a Llama of 7B parameters,
8 examples of 256 tokens: 16.8 MB, 6 us at 3 TB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import int64_table, is_aligned, multiprocessors, on_device, widened
from ..kernel_types import TYPES
from .op import ROUNDINGS

_FIELDS = tl.constexpr(13)  # g, a, mask, rows, tokens, widths of g and a, their strides
_WARPS = 4


class Variant(NamedTuple):
    """What is compiled for a module.

    Attributes:
        dtype: of g and a.
        aligned: whether every row of g begins at a multiple of 16 bytes.
        columns: of a step.
    """

    dtype: torch.dtype
    aligned: bool
    columns: int

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), "aligned" * self.aligned, f"BD={self.columns}"]
        return " ".join(filter(None, words))

    @property
    def rows(self) -> int:
        """Of a step; a quarter as many where every element takes an address of its own, or registers spill."""
        elements = 1024 if self.dtype == torch.float32 else 2048
        return elements // self.columns // (1 if self.aligned else 4)


def variants(
    out: Tensor, gs: Sequence[Tensor], inputs: Sequence[Tensor], masks: Sequence[Tensor]
) -> tuple[Variant, ...]:
    """What is compiled for these arguments."""
    return tuple(sorted(set(map(_variant, gs)), key=str))


def _variant(g: Tensor) -> Variant:
    vector = 16 // g.element_size()
    whole = all(size % vector == 0 for size in (g.shape[2], *g.stride()[:2]))
    return Variant(g.dtype, whole and g.stride(2) == 1 and is_aligned(g), 16 if g.shape[2] <= 32 else 256)


@triton.jit
def masked_gradient_kernel(
    table_ptr,  # [modules, 13] int64
    parts_ptr,  # [modules, parts, 2] float32
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Of one part of the rows of one module: the largest element of g, and the largest of those that are left out."""
    module, part = tl.program_id(0), tl.program_id(1)
    row_ptr = table_ptr + module.to(tl.int64) * _FIELDS
    g_ptr = tl.load(row_ptr + 0).to(tl.pointer_type(DTYPE))
    a_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(DTYPE))
    mask_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.int16))
    rows, tokens = tl.load(row_ptr + 3).to(tl.int32), tl.load(row_ptr + 4).to(tl.int32)
    width, width_a = tl.load(row_ptr + 5).to(tl.int32), tl.load(row_ptr + 6).to(tl.int32)
    stride_gn, stride_gt = tl.load(row_ptr + 7), tl.load(row_ptr + 8)
    stride_an, stride_at, stride_ad = tl.load(row_ptr + 10), tl.load(row_ptr + 11), tl.load(row_ptr + 12)
    if ALIGNED:  # what the launcher checked and the compiler needs to know to load 16 bytes at a time
        vector: tl.constexpr = 4 if tl.float32 == DTYPE else 8
        g_ptr = tl.multiple_of(g_ptr, 16)
        stride_gn, stride_gt = tl.multiple_of(stride_gn, vector), tl.multiple_of(stride_gt, vector)
        width = tl.multiple_of(width, vector)
        stride_gd = 1
    else:
        stride_gd = tl.load(row_ptr + 9)

    per_part = tl.cdiv(tl.cdiv(rows, tl.num_programs(1)), BM) * BM
    first = part * per_part
    end = tl.minimum(first + per_part, rows)
    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    b_largest = tl.zeros([BM], dtype=tl.float32)
    b_left = tl.zeros([BM], dtype=tl.float32)
    for row in range(first, end, BM):
        m_m = row + o_m < end  # [BM]
        o_n, o_t = ((row + o_m) // tokens).to(tl.int64), ((row + o_m) % tokens).to(tl.int64)
        p_g = g_ptr + (o_n * stride_gn + o_t * stride_gt)[:, None]
        b_size = tl.zeros([BM], dtype=tl.float32)
        for column in range(0, width, BD):
            m_g = m_m[:, None] & (column + o_d < width)[None, :]
            b_g = tl.load(p_g + (column + o_d)[None, :].to(tl.int64) * stride_gd, mask=m_g, other=0.0).to(tl.float32)
            b_g = tl.where(b_g == b_g, tl.abs(b_g), float("inf"))  # a NaN says nothing of the others, as infinity
            b_size = tl.maximum(b_size, tl.max(b_g, axis=1))
        b_largest = tl.maximum(b_largest, b_size)
        m_left = m_m & (tl.load(mask_ptr + row + o_m, mask=m_m, other=1) == 0) & (b_size > 0)
        if tl.max(m_left.to(tl.int32), axis=0) > 0:
            p_a = a_ptr + (o_n * stride_an + o_t * stride_at)[:, None]
            b_some = tl.zeros([BM], dtype=tl.int32)
            for column in range(0, width_a, BD):
                m_a = m_left[:, None] & (column + o_d < width_a)[None, :]
                b_a = tl.load(p_a + (column + o_d)[None, :].to(tl.int64) * stride_ad, mask=m_a, other=0.0)
                b_some = tl.maximum(b_some, tl.max((b_a != 0).to(tl.int32), axis=1))
            b_left = tl.maximum(b_left, tl.where(m_left & (b_some > 0), b_size, 0.0))
    p_part = parts_ptr + (module.to(tl.int64) * tl.num_programs(1) + part) * 2
    tl.store(p_part, tl.max(b_largest, axis=0))
    tl.store(p_part + 1, tl.max(b_left, axis=0))


def grouped_masked_gradient(
    out: Tensor, gs: Sequence[Tensor], inputs: Sequence[Tensor], masks: Sequence[Tensor]
) -> None:
    """As ``reference.grouped_masked_gradient``, in Triton."""
    wide = widened(masks)
    classes: dict[Variant, list[int]] = {}
    for i, g in enumerate(gs):
        classes.setdefault(_variant(g), []).append(i)
    order = [i for members in classes.values() for i in members]
    with on_device(out):
        table = int64_table([_fields(gs[i], inputs[i], wide[i]) for i in order], out.device)
        found, first = [], 0
        for kind, members in classes.items():
            # Enough programs to fill the device eight times over, each with at least four steps of rows.
            tallest = triton.cdiv(max(gs[i].shape[0] * gs[i].shape[1] for i in members), 4 * kind.rows)
            parts = max(1, min(tallest, triton.cdiv(8 * multiprocessors(out.device), len(members))))
            partial = out.new_empty((len(members), parts, 2), dtype=torch.float32)
            masked_gradient_kernel[(len(members), parts)](
                table[first : first + len(members)],
                partial,
                DTYPE=TYPES[kind.dtype],
                ALIGNED=kind.aligned,
                BM=kind.rows,
                BD=kind.columns,
                num_warps=_WARPS,
                num_stages=2,
                enable_fp_fusion=True,
                maxnreg=128,  # or ptxas spills a few bytes to fit one more block
            )
            largest, left_out = partial.amax(dim=1).unbind(dim=1)
            found.append(left_out > ROUNDINGS * torch.finfo(kind.dtype).eps * largest)
            first += len(members)
        flags = torch.cat(found)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        out.copy_(flags if len(classes) == 1 else flags[int64_table([inverse], out.device)[0]])


def _fields(g: Tensor, a: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    assert mask is not None
    pointers = (g.data_ptr(), a.data_ptr(), mask.data_ptr())
    return *pointers, g.shape[0] * g.shape[1], g.shape[1], g.shape[2], a.shape[2], *g.stride(), *a.stride()
