"""Launches of the outer product kernels: modules that compile to the same kernel and have as many tiles go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..device import SCRATCH_BYTES, architecture, in_vectors, is_aligned, multiprocessors, on_device, widened
from ..kernel_types import TYPES
from ..layouts import addresses, device_table, per_layout
from ..overlaps import spans
from ..tuning import choose_configuration
from .kernel import mirror_lower_kernel, outer_product_kernel, sum_splits_kernel


@dataclass(frozen=True)
class Configuration:
    """Rows of a step, warps, pipeline depth, programs that should be there per multiprocessor, and the registers that
    the assembler may use (left to itself it spills a little to fit more programs).
    """

    block_m: int
    num_warps: int
    num_stages: int
    per_multiprocessor: int = 2
    max_registers: int | None = None


# Tiles of 128: at d = 4096 their triangle is 528 programs, 4.0 waves of 132, where 128 x 256 would need 2.06 and leave
# a wave almost empty. 8 warps keep the 64 KB of sums at 64 registers a thread; 3 stages of 32 KB and 128 registers let
# two programs share a multiprocessor, so that one multiplies while the other stores.
_ALONE = Configuration(128, 8, 2, 1)
_WIDE = {
    "sm_80": (Configuration(32, 8, 3, 1), Configuration(64, 8, 2, 1)),
    "sm_90": (Configuration(64, 8, 3, max_registers=128), _ALONE, Configuration(64, 8, 4, 1)),
    # On sm_100 the sums lie in tensor memory, and 128 registers spill in the epilogue.
    "sm_100": (Configuration(64, 8, 4, 1), _ALONE),
}
# Smaller tiles are bound by the reading of X, on all architectures alike: what counts is bytes in flight, about 16 KB
# per multiprocessor on an H100. At width 8 a step of 512 rows is 8 KB, two programs and the step loaded ahead make 32.
# By tile width; float32 takes twice the room and is split into three products in registers.
_HALF = {
    16: Configuration(512, 4, 1, max_registers=128),
    32: Configuration(64, 4, 1, 4),
    64: Configuration(64, 4, 4, 3),
}
_FLOAT32 = {16: Configuration(64, 4, 1), 32: Configuration(32, 4, 1, 4), 64: Configuration(32, 4, 3, 3)}
# Masks of four rows at once take the registers that 512 rows would.
_PACKED_BY_4 = Configuration(256, 4, 1, max_registers=128)
# Elements loaded one by one take an address each: smaller steps, or registers spill.
_STRIDED_HALF = {16: Configuration(128, 4, 1), 32: Configuration(64, 4, 1, 4), 64: Configuration(32, 4, 2, 3)}
_STRIDED_FLOAT32 = {16: Configuration(64, 4, 1), 32: Configuration(32, 4, 1, 4), 64: Configuration(16, 4, 2, 3)}

# Narrower inputs leave more of a tile of 16 columns empty than they fill. Rows of these widths fill it together.
_PACKED = (4, 8)
# Rows that a split must have at least: fewer, and adding the parts costs more than it saves.
_ROWS_PER_SPLIT = 512
# float32 operands as three TF32 products (error 2^-21 of the size of the terms), never one.
_PRECISION = {torch.float32: "tf32x3", torch.float16: "ieee", torch.bfloat16: "ieee"}


class _Group(NamedTuple):
    """Modules of one launch."""

    dtype: torch.dtype
    block: int  # width of a tile
    vectors: bool  # rows are pieces of 16 aligned bytes
    pack: int  # rows beside each other in a row of the tile
    whole: bool  # the width is a multiple of the widest tile
    masked: bool
    tiles: int  # of each module
    modules: int
    rows: int  # of the longest


class Variant(NamedTuple):
    """What a kernel is compiled for, beside the architecture."""

    dtype: torch.dtype
    block: int
    vectors: bool
    pack: int
    whole: bool
    masked: bool
    split: bool
    accumulate: bool
    mirror: bool

    def __str__(self) -> str:
        flags = [name for name, value in self._asdict().items() if value is True]
        sizes = [f"BD={self.block}"] + [f"PACK={self.pack}"] * (self.pack > 1)
        return " ".join([str(self.dtype).removeprefix("torch."), *sizes, *flags])


class _Plan(NamedTuple):
    groups: tuple[_Group, ...]
    order: Tensor  # of the modules, group by group
    fixed: Tensor  # [modules, 6] int64, the table's columns FIXED in that order


@per_layout
def _plan(outs: Sequence[Tensor], xs: Sequence[Tensor], masked: tuple[bool, ...]) -> _Plan:
    members: dict[tuple[torch.dtype, int, bool, int, bool, bool, int], list[int]] = {}
    for i, (out, x) in enumerate(zip(outs, xs, strict=True)):
        if x.shape[1] == 0:
            continue
        width = x.shape[1]
        packed = in_vectors(out) and width in _PACKED and x.is_contiguous() and is_aligned(x)
        pack = 16 // width if packed else 1
        vectors = in_vectors(out) and (in_vectors(x) or packed)
        block = min(128 if vectors and x.dtype != torch.float32 else 64, max(16, triton.next_power_of_2(width)))
        whole = block == 128 and width % block == 0
        count = triton.cdiv(width, block)
        members.setdefault((x.dtype, block, vectors, pack, whole, masked[i], count * (count + 1) // 2), []).append(i)
    groups = [_Group(*kind, len(of_kind), max(xs[i].shape[0] for i in of_kind)) for kind, of_kind in members.items()]
    order = [i for of_kind in members.values() for i in of_kind]
    fixed = [(*xs[i].shape, *xs[i].stride(), *outs[i].stride()) for i in order]
    return _Plan(tuple(groups), torch.tensor(order, device="cpu"), torch.tensor(fixed, device="cpu"))


def _masked(masks: Sequence[Tensor | None]) -> tuple[bool, ...]:
    return tuple([mask is not None for mask in masks])


def _configurations(group: _Group, name: str) -> tuple[Configuration, ...]:
    """Candidates for an architecture, the known-good one first."""
    if group.block == 128:
        return _WIDE[name]
    if group.dtype == torch.float32:
        return ((_FLOAT32 if group.vectors else _STRIDED_FLOAT32)[group.block],)
    return ((_HALF if group.vectors else _STRIDED_HALF)[group.block],) if group.pack < 4 else (_PACKED_BY_4,)


def _splits(group: _Group, configuration: Configuration, device: torch.device) -> int:
    """Parts of the rows: as many as fit at once beside each other, each of at least 512 rows."""
    tiles = group.modules * group.tiles
    fitting = multiprocessors(device) * configuration.per_multiprocessor // tiles
    room = SCRATCH_BYTES // (4 * tiles * group.block**2)
    # A kernel counts the rows of its part in 32 bits.
    return max(1, triton.cdiv(group.rows, 1 << 30), min(fitting, group.rows // _ROWS_PER_SPLIT, room))


def _variant(group: _Group, splits: int, accumulate: bool, lower: bool) -> Variant:
    return Variant(
        group.dtype,
        group.block,
        group.vectors,
        group.pack,
        group.whole,
        group.masked,
        splits > 1,
        accumulate,
        not lower,
    )


def variants(
    outs: Sequence[Tensor],
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
    accumulate: bool,
    lower: bool = False,
) -> tuple[Variant, ...]:
    """What ``grouped_outer_product`` launches for these arguments (where nothing is tuned)."""
    found = set()
    for group in _plan(outs, xs, _masked(masks)).groups:
        device = xs[0].device
        splits = _splits(group, _configurations(group, architecture(device))[0], device)
        found.add(_variant(group, splits, accumulate, lower))
    return tuple(sorted(found, key=str))


def grouped_outer_product(
    outs: Sequence[Tensor],
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
    accumulate: bool,
    lower: bool = False,
) -> None:
    """As ``reference.grouped_outer_product``, in Triton."""
    plan = _plan(outs, xs, _masked(masks))
    if not plan.groups:
        return
    device = xs[0].device
    with on_device(xs[0]):
        flags = widened(masks)
        bits = torch.tensor(scales, dtype=torch.float32, device="cpu").view(torch.int32).tolist()

        def table(of_outs: Sequence[int]) -> Tensor:
            return device_table((addresses(xs), addresses(flags), of_outs, bits), plan.fixed, plan.order, device)

        def attempt(candidate: Configuration) -> None:
            scratch = torch.empty(int(spans(outs).max()), dtype=torch.uint8, device=device)
            _launch(group, candidate, table([scratch.data_ptr()] * len(outs))[here], accumulate, lower)

        whole, first = table(addresses(outs)), 0
        for group in plan.groups:
            here = slice(first, first + group.modules)
            candidates = _configurations(group, architecture(device))
            like = group._replace(rows=triton.next_power_of_2(group.rows))
            chosen = choose_configuration(("outer_product", architecture(device), *like), candidates, attempt)
            _launch(group, chosen, whole[here], accumulate, lower)
            first += group.modules


def _launch(group: _Group, configuration: Configuration, table: Tensor, accumulate: bool, lower: bool) -> None:
    splits = _splits(group, configuration, table.device)
    one = _variant(group, splits, accumulate, lower)
    parts = table
    if one.split:
        shape = splits, group.modules, group.tiles, group.block, group.block
        parts = torch.empty(shape, dtype=torch.float32, device=table.device)
    outer_product_kernel[(group.tiles, group.modules, splits)](
        table,
        parts,
        DTYPE=TYPES[one.dtype],
        VECTORS=one.vectors,
        WHOLE=one.whole,
        HAS_MASK=one.masked,
        ACCUMULATE=one.accumulate and not one.split,
        MIRROR=one.mirror and not one.split,
        SPLIT=one.split,
        PRECISION=_PRECISION[one.dtype],
        PACK=one.pack,
        BM=configuration.block_m,
        BD=one.block,
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        maxnreg=configuration.max_registers,
        enable_fp_fusion=False,
    )
    if one.split:
        sum_splits_kernel[(group.tiles, group.modules)](
            table,
            parts,
            splits,
            VECTORS=one.vectors,
            ACCUMULATE=one.accumulate,
            MIRROR=one.mirror,
            PACK=one.pack,
            BD=one.block,
            num_warps=8 if one.block == 128 else 4,
            num_stages=2,
            enable_fp_fusion=False,
        )


def mirror_variants(out: Tensor) -> tuple[str, ...]:
    """What ``mirror_lower`` launches: one kernel."""
    return ("float32",)


def mirror_lower(out: Tensor) -> None:
    """Copy what is below the diagonal of ``out: [d, d]`` to above it."""
    if out.numel() == 0:
        return
    tiles = triton.cdiv(out.shape[0], 64)
    with on_device(out):
        mirror_lower_kernel[(tiles * (tiles + 1) // 2,)](
            out, out.shape[0], *out.stride(), BD=64, num_warps=4, num_stages=1, enable_fp_fusion=False
        )
