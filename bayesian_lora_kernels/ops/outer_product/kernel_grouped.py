"""All the small factors of a model at once: ``outer_product`` of any mixture of widths in a handful of launches.

Inputs are sorted by dtype, by the power of two that holds their width (16 to 128) and by layout (rows of contiguous
columns, or any strides), which are known when a kernel is compiled; everything else about a module, its pointers
included, is a row of a table in device memory, copied there once per call. One program sums one module; where modules
are few, the rows are split and a second launch adds the parts in order (deterministic, no atomics). Wider inputs fill
a GPU alone and go to ``outer_product``.

Bytes and operations: X is read once, ``sum of M_i d_i b`` bytes, and ``4 d_i^2`` bytes written per module (as many read
to accumulate); 2 M w^2 operations at a width w padded to its power of two. 256 modules of 8192 x 8 in bf16: 33.6 MB,
11 us at 3 TB/s; 1.1 GFLOP as multiplied, nothing. The table is 88 bytes a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import in_vectors, int64_table, multiprocessors, on_device
from ..kernel_types import TYPES
from .kernel import PRECISION, choose_splits
from .kernel import outer_product as outer_product_alone
from .tiles import narrow_product, store_symmetric, tile_product

# Columns of the table, one row of int64 per module.
_COLUMNS = (
    "x",
    "mask",
    "out",
    "rows",
    "width",
    "stride_xm",
    "stride_xd",
    "stride_mask",
    "stride_o0",
    "stride_o1",
    "scale",
)
_FIELDS = tl.constexpr(len(_COLUMNS))
WIDEST = 128


@triton.jit
def _scale_and_store(
    table_ptr, b_sum, module, width, CONTIGUOUS: tl.constexpr, ACCUMULATE: tl.constexpr, BD: tl.constexpr
):
    row_ptr = table_ptr + module.to(tl.int64) * _FIELDS
    out_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    stride_o0 = tl.load(row_ptr + 8)
    if CONTIGUOUS:
        out_ptr = tl.multiple_of(out_ptr, 16)
        stride_o0 = tl.multiple_of(stride_o0, 4)
        stride_o1 = 1
    else:
        stride_o1 = tl.load(row_ptr + 9)
    scale = tl.load(row_ptr + 10).to(tl.int32).to(tl.float32, bitcast=True)  # its bits in the low half
    store_symmetric(out_ptr, b_sum * scale, 0, 0, width, stride_o0, stride_o1, ACCUMULATE, True, BD)


@triton.jit
def grouped_outer_product_kernel(
    table_ptr,  # [modules, 11] int64
    parts_ptr,  # [splits, modules, BD, BD] float32, if SPLIT
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """One module, or one part of its rows."""
    module, split = tl.program_id(0), tl.program_id(1)
    # Loaded in place, not by a function: the compiler forgets what it is told about the result of a call.
    row_ptr = table_ptr + module.to(tl.int64) * _FIELDS
    x_ptr = tl.load(row_ptr + 0).to(tl.pointer_type(DTYPE))
    mask_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.uint8))
    rows = tl.load(row_ptr + 3)
    width = tl.load(row_ptr + 4).to(tl.int32)
    stride_xm = tl.load(row_ptr + 5)
    if CONTIGUOUS:  # what the launcher checked and the compiler needs to know to load 16 bytes at a time
        x_ptr = tl.multiple_of(x_ptr, 16)
        stride_xm = tl.multiple_of(stride_xm, 4 if tl.float32 == DTYPE else 8)
        width = tl.multiple_of(width, 4 if tl.float32 == DTYPE else 8)
        stride_xd = 1
    else:
        stride_xd = tl.load(row_ptr + 6)
    stride_mask = tl.load(row_ptr + 7)

    rows_per_split = tl.cdiv(tl.cdiv(rows, tl.num_programs(1)), BM) * BM
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
            0,
            0,
            HAS_MASK,
            PRECISION,
            BM,
            BD,
        )
    if SPLIT:
        o = tl.arange(0, BD)
        o_part = (split.to(tl.int64) * tl.num_programs(0) + module) * BD * BD
        tl.store(parts_ptr + o_part + o[:, None] * BD + o[None, :], b_sum)
    else:
        _scale_and_store(table_ptr, b_sum, module, width, CONTIGUOUS, ACCUMULATE, BD)


@triton.jit
def grouped_sum_splits_kernel(
    table_ptr,  # [modules, 11] int64
    parts_ptr,  # [splits, modules, BD, BD] float32
    splits,
    CONTIGUOUS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BD: tl.constexpr,
):
    """Add the parts of a module in order; scale, add to its ``out``, mirror."""
    module = tl.program_id(0)
    o = tl.arange(0, BD)
    p_part = parts_ptr + module.to(tl.int64) * BD * BD + o[:, None] * BD + o[None, :]  # [BD, BD]
    step = tl.num_programs(0).to(tl.int64) * BD * BD
    b_sum = tl.zeros([BD, BD], dtype=tl.float32)
    for _ in range(splits):
        b_sum += tl.load(p_part)
        p_part += step
    width = tl.load(table_ptr + module.to(tl.int64) * _FIELDS + 4).to(tl.int32)
    if CONTIGUOUS:
        width = tl.multiple_of(width, 4)
    _scale_and_store(table_ptr, b_sum, module, width, CONTIGUOUS, ACCUMULATE, BD)


@dataclass(frozen=True)
class Configuration:
    """Rows per step, warps, pipeline depth, how many programs should be there per multiprocessor, and the registers
    that the assembler may use: left to itself it spills to fit programs that are not there.
    """

    block_m: int
    num_warps: int
    num_stages: int
    per_multiprocessor: int = 2
    max_registers: int | None = None


# Bound by the reading of X: what counts is bytes in flight, about 16 KB per multiprocessor on an H100. At width 8 a
# step of 512 rows is 8 KB, two programs and the step loaded ahead make 32 KB.
_HALF = {
    16: Configuration(512, 4, 1, max_registers=128),
    32: Configuration(64, 4, 1, 4),
    64: Configuration(64, 4, 4),
    128: Configuration(64, 8, 3),
}
_FLOAT32 = {
    16: Configuration(64, 4, 1),
    32: Configuration(32, 4, 1),
    64: Configuration(32, 4, 3),
    128: Configuration(16, 8, 4),
}


# Elements loaded one by one take an address each: smaller steps, or registers spill.
_STRIDED = {
    16: Configuration(128, 4, 1),
    32: Configuration(64, 4, 1),
    64: Configuration(32, 4, 2),
    128: Configuration(32, 8, 2),
}


def configuration(dtype: torch.dtype, block: int, contiguous: bool) -> Configuration:
    """For all architectures alike: this is bound by memory."""
    if dtype == torch.float32:
        return _FLOAT32[block]
    return (_HALF if contiguous else _STRIDED)[block]


@dataclass(frozen=True)
class _Class:
    dtype: torch.dtype
    block: int
    contiguous: bool
    has_mask: bool

    def is_alone(self) -> bool:
        """Whether it is too wide, or would spill registers: float32 in tiles of 128, an address for each element."""
        return self.block > (WIDEST if self.contiguous or self.dtype != torch.float32 else 64)


def _class_of(out: Tensor, x: Tensor, mask: Tensor | None) -> _Class:
    contiguous = in_vectors(x) and in_vectors(out)
    return _Class(x.dtype, max(16, triton.next_power_of_2(x.shape[1])), contiguous, mask is not None)


def grouped_outer_product(
    outs: Sequence[Tensor],
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
    accumulate: bool,
    lower: bool = False,
) -> None:
    """As ``reference.grouped_outer_product``, in Triton; narrow outputs are written whole, ``lower`` or not."""
    classes: dict[_Class, list[int]] = {}
    for i, (x, mask) in enumerate(zip(xs, masks, strict=True)):
        if x.shape[1] == 0:
            continue
        one = _class_of(outs[i], x, mask)
        if one.is_alone():
            outer_product_alone(outs[i], x, mask, scales[i], accumulate, lower)
        else:
            classes.setdefault(one, []).append(i)
    if not classes:
        return
    order = [i for members in classes.values() for i in members]
    with on_device(xs[0]):
        table = _table([(outs[i], xs[i], masks[i], scales[i]) for i in order], xs[0].device)
        first = 0
        for one, members in classes.items():
            rows = max(xs[i].shape[0] for i in members)
            _launch(one, table[first : first + len(members)], rows, accumulate)
            first += len(members)


def _table(modules: Sequence[tuple[Tensor, Tensor, Tensor | None, float]], device: torch.device) -> Tensor:
    """``[modules, 11]`` int64 on the device."""
    scales = torch.tensor([scale for *_, scale in modules], dtype=torch.float32).view(torch.int32).tolist()
    values = []
    for (out, x, mask, _), scale in zip(modules, scales, strict=True):
        pointers = (x.data_ptr(), 0 if mask is None else mask.data_ptr(), out.data_ptr())
        stride_mask = 0 if mask is None else mask.stride(0)
        values.append((*pointers, *x.shape, *x.stride(), stride_mask, *out.stride(), scale))
    return int64_table(values, device)


def _launch(one: _Class, table: Tensor, rows: int, accumulate: bool) -> None:
    chosen = configuration(one.dtype, one.block, one.contiguous)
    modules = table.shape[0]
    splits = choose_splits(modules, rows, multiprocessors(table.device) * chosen.per_multiprocessor)
    parts = table
    if splits > 1:
        parts = table.new_empty((splits, modules, one.block, one.block), dtype=torch.float32)
    grouped_outer_product_kernel[(modules, splits)](
        table,
        parts,
        DTYPE=TYPES[one.dtype],
        CONTIGUOUS=one.contiguous,
        HAS_MASK=one.has_mask,
        ACCUMULATE=accumulate and splits == 1,
        SPLIT=splits > 1,
        PRECISION=PRECISION[one.dtype],
        BM=chosen.block_m,
        BD=one.block,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        maxnreg=chosen.max_registers,
        enable_fp_fusion=False,
    )
    if splits > 1:
        grouped_sum_splits_kernel[(modules,)](
            table,
            parts,
            splits,
            CONTIGUOUS=one.contiguous,
            ACCUMULATE=accumulate,
            BD=one.block,
            num_warps=8 if one.block == 128 else 4,
            num_stages=2,
            enable_fp_fusion=False,
        )
