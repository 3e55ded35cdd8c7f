"""Weight gradients of many modules in Triton: one launch per class of modules that have sizes and strides in common.

Bytes: each g and a is read once per tile of the other side, which a LoRA has one of. B of a Llama of 7B parameters,
8 examples of 256 tokens: 16.8 MB of g, 0.26 MB written, 6 us at 3 TB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import int64_table, is_aligned, on_device, widened
from ..kernel_types import TYPES

_FIELDS = tl.constexpr(4)  # g, a, mask, out
_NARROW = 16
_PRECISION = {torch.bfloat16: "ieee", torch.float16: "ieee", torch.float32: "tf32x3"}


class Variant(NamedTuple):
    """What is compiled for a module.

    Attributes:
        dtype: of g and a.
        masked: whether it has a mask.
        aligned: whether every row of g and a begins at a multiple of 16 bytes.
        rows: of the tile of the result (d_out).
        columns: of the tile of the result (d_in).
    """

    dtype: torch.dtype
    masked: bool
    aligned: bool
    rows: int
    columns: int

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), "masked" * self.masked, "aligned" * self.aligned]
        return " ".join(filter(None, [*words, f"BO={self.rows}", f"BI={self.columns}"]))


def variants(
    outs: Sequence[Tensor], gs: Sequence[Tensor], inputs: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> tuple[Variant, ...]:
    """What is compiled for these arguments."""
    return tuple(sorted({_variant(*entry) for entry in zip(gs, inputs, masks, strict=True)}, key=str))


def _variant(g: Tensor, a: Tensor, mask: Tensor | None) -> Variant:
    d_out, d_in = g.shape[2], a.shape[2]
    if d_in <= _NARROW:
        rows, columns = 128, _NARROW
    elif d_out <= _NARROW:
        rows, columns = _NARROW, 128
    else:
        rows = columns = 64
    return Variant(g.dtype, mask is not None, _in_vectors(g) and _in_vectors(a), rows, columns)


def _in_vectors(x: Tensor) -> bool:
    vector = 16 // x.element_size()
    return is_aligned(x) and all(size % vector == 0 for size in (x.shape[2], *x.stride()[:2])) and x.stride(2) == 1


@triton.jit
def weight_gradient_kernel(
    table_ptr,  # [modules, 4] int64
    tokens,
    d_out,
    d_in,
    stride_gn,
    stride_gt,
    stride_gd,
    stride_an,
    stride_at,
    stride_ad,
    DTYPE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    """One tile of the gradient of one example in one module."""
    tile, example, module = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    row_ptr = table_ptr + module.to(tl.int64) * _FIELDS
    g_ptr = tl.load(row_ptr + 0).to(tl.pointer_type(DTYPE))
    a_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(DTYPE))
    mask_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.int16)) + example * tokens
    out_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32)) + example * d_out * d_in
    vector: tl.constexpr = 4 if tl.float32 == DTYPE else 8
    if ALIGNED:  # what the launcher checked and the compiler needs to know to load 16 bytes at a time
        g_ptr, a_ptr = tl.multiple_of(g_ptr, 16), tl.multiple_of(a_ptr, 16)
        stride_gn, stride_an = tl.multiple_of(stride_gn, vector), tl.multiple_of(stride_an, vector)
        stride_gt, stride_at = tl.multiple_of(stride_gt, vector), tl.multiple_of(stride_at, vector)
        d_out, d_in = tl.multiple_of(d_out, vector), tl.multiple_of(d_in, vector)
        stride_gd = 1
        stride_ad = 1

    columns = tl.cdiv(d_in, BI)
    o_o = (tile // columns) * BO + tl.arange(0, BO)
    o_i = (tile % columns) * BI + tl.arange(0, BI)
    m_o, m_i = o_o < d_out, o_i < d_in
    o_t = tl.arange(0, BT)
    p_g = g_ptr + example * stride_gn + o_o[None, :].to(tl.int64) * stride_gd
    p_a = a_ptr + example * stride_an + o_i[None, :].to(tl.int64) * stride_ad
    b_sum = tl.zeros([BO, BI], dtype=tl.float32)
    for start in range(0, tokens, BT):
        m_t = start + o_t < tokens  # [BT]
        if HAS_MASK:
            m_t &= tl.load(mask_ptr + start + o_t, mask=m_t, other=0) != 0
        o_row = (start + o_t)[:, None].to(tl.int64)
        b_g = tl.load(p_g + o_row * stride_gt, mask=m_t[:, None] & m_o[None, :], other=0.0)  # [BT, BO]
        b_a = tl.load(p_a + o_row * stride_at, mask=m_t[:, None] & m_i[None, :], other=0.0)  # [BT, BI]
        b_sum = tl.dot(tl.trans(b_g), b_a, b_sum, input_precision=PRECISION)
    p_out = out_ptr + o_o[:, None].to(tl.int64) * d_in + o_i[None, :]
    tl.store(p_out, b_sum, mask=m_o[:, None] & m_i[None, :])


def grouped_weight_gradient(
    outs: Sequence[Tensor], gs: Sequence[Tensor], inputs: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> None:
    """As ``reference.grouped_weight_gradient``, in Triton."""
    masks = widened(masks)
    classes: dict[tuple[object, ...], list[int]] = {}
    for i, (g, a, mask) in enumerate(zip(gs, inputs, masks, strict=True)):
        if outs[i].numel():
            of_class = _variant(g, a, mask), g.shape, a.shape, g.stride(), a.stride()
            classes.setdefault(of_class, []).append(i)
    if not classes:
        return
    with on_device(outs[0]):
        order = [i for members in classes.values() for i in members]
        table = int64_table([_pointers(outs[i], gs[i], inputs[i], masks[i]) for i in order], outs[0].device)
        first = 0
        for members in classes.values():
            g, a, mask = gs[members[0]], inputs[members[0]], masks[members[0]]
            kind = _variant(g, a, mask)
            tiles = triton.cdiv(g.shape[2], kind.rows) * triton.cdiv(a.shape[2], kind.columns)
            weight_gradient_kernel[(tiles, g.shape[0], len(members))](
                table[first : first + len(members)],
                g.shape[1],
                g.shape[2],
                a.shape[2],
                *g.stride(),
                *a.stride(),
                DTYPE=TYPES[kind.dtype],
                HAS_MASK=kind.masked,
                ALIGNED=kind.aligned,
                PRECISION=_PRECISION[kind.dtype],
                BT=_tokens(kind),
                BO=kind.rows,
                BI=kind.columns,
                num_warps=4,
                num_stages=3,
                enable_fp_fusion=True,
                maxnreg=255,  # or ptxas spills a few bytes to fit one more block
            )
            first += len(members)


def _tokens(kind: Variant) -> int:
    """Of a step; half as many where every element takes an address of its own, or registers spill."""
    return (32 if kind.dtype == torch.float32 else 64) // (1 if kind.aligned else 2)


def _pointers(out: Tensor, g: Tensor, a: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    return g.data_ptr(), a.data_ptr(), 0 if mask is None else mask.data_ptr(), out.data_ptr()
