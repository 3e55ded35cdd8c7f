"""What the Triton launcher works out once for the layouts of its arguments: groups of streams, and how to compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import architecture, in_vectors, multiprocessors
from ..layouts import per_layout
from .reference import is_direct

# Bytes of L2 cache where none is known: in the interpreter, and for tensors without memory. Those of an H100.
_L2_BYTES = 50 << 20
_MOST_LAG = 4


class Configuration(NamedTuple):
    """Rows of X per projection, columns of X per step of it and per product, rows per step of that; fused: one
    launch. ``max_registers``: without it the assembler spills to fit one program more.
    """

    block_m: int
    block_k: int
    block_d: int
    step_m: int
    num_warps: int
    num_stages: int
    fused: bool = False
    max_registers: int | None = None


def configurations(
    name: str, dtype: torch.dtype, block: int, programs: int, contiguous: bool = True
) -> tuple[Configuration, ...]:
    """Candidates for an architecture, dtype, padded width, how many blocks of 64 rows there are, and layout; the
    known-good first.

    Blocks of 64 rows and 128 columns read Omega and Z an eighth and a quarter as often as X. Where they would leave
    multiprocessors idle, blocks of 16 and 32 take their place. ``sm_90`` and ``sm_100`` have room for deeper pipelines.
    Elements loaded one by one take an address each: smaller steps, or registers spill.
    """
    stages = 3 if name == "sm_80" else 4
    if programs < 132:
        return (Configuration(16, 64, 32, 32, 4, 3),)
    if block == 128 and contiguous and dtype == torch.bfloat16 and name != "sm_80":
        # Of other sizes both products with Z do not share a layout on sm_90, and their sum goes through shared memory
        # twice a step.
        return (Configuration(64, 64, 128, 64, 8, 3),)
    if block == 128 or not contiguous:
        most = 255 if dtype == torch.float16 else None
        return (Configuration(64, 32, 64, 32 if contiguous else 16, 8, 3, max_registers=most),)
    if dtype == torch.float32:
        return (Configuration(64, 32, 64, 32, 4, 3, max_registers=168 if block <= 16 else None),)
    if dtype == torch.float16:  # multiplied in float32 with Z, which float16 might not hold
        return (Configuration(64, 64, 64, 32, 4, 3, max_registers=168 if block <= 32 else 255),)
    return (
        Configuration(64, 128, 128, 64, 8 if block == 64 else 4, stages),
        Configuration(128, 64, 128, 64, 8, stages),
        Configuration(64, 64, 64, 64, 8, stages, fused=True)
        if block == 64
        else Configuration(64, 128, 64, 64, 4, stages, fused=True, max_registers=192),
    )


class Variant(NamedTuple):
    """What the kernels are compiled for, beside the architecture."""

    dtype: torch.dtype
    block: int  # columns of B before and after, padded to a power of two
    contiguous: bool  # the rows of X are pieces of 16 aligned bytes
    masked: bool
    configuration: Configuration

    def __str__(self) -> str:
        one = self.configuration
        sizes = [f"BL={self.block}", f"BM={one.block_m}", f"BD={one.block_d}"]
        flags = [name for name, on in zip(("contiguous", "masked"), self[2:4], strict=True) if on]
        return " ".join([str(self.dtype).removeprefix("torch."), *sizes, *flags, *["fused"] * one.fused])


class Group(NamedTuple):
    """Streams that are updated together: those without a basis first, which are touched twice."""

    variant: Variant
    candidates: tuple[Configuration, ...]
    members: tuple[int, ...]
    beginners: int
    lag: int  # of the fused kernel, in modules
    rows_of_x: tuple[int, ...]
    columns_of_x: tuple[int, ...]
    columns: int  # most that a result has
    order: Tensor  # the members once more, for `device_table`
    fixed: Tensor  # [members, F]: the fields of the table after the addresses


class Plan(NamedTuple):
    """What goes which way in a call."""

    groups: tuple[Group, ...]
    direct: tuple[int, ...]  # streams that take the direct route


@per_layout
def plan(
    outs: Sequence[Tensor], bases: Sequence[Tensor], xs: Sequence[Tensor], masked: Sequence[bool], fresh: int
) -> Plan:
    """The groups of a call with these layouts, and who goes the direct route; streams without a result are in none."""
    direct, kinds = [], dict[tuple[torch.dtype, int, bool, bool], list[int]]()
    for i, (out, basis, x) in enumerate(zip(outs, bases, xs, strict=True)):
        if out.numel() == 0:
            continue
        if is_direct(x.shape[0], out.shape[1]):
            direct.append(i)
            continue
        block = 1 << (max(16, out.shape[1], basis.shape[1]) - 1).bit_length()
        kinds.setdefault((x.dtype, block, in_vectors(x), masked[i]), []).append(i)
    groups = []
    for kind, some in kinds.items():
        members = sorted(some, key=lambda i: bases[i].shape[1] > 0)
        groups.append(_group(kind, [(outs[i], bases[i], xs[i]) for i in members], members, fresh))
    return Plan(tuple(groups), tuple(direct))


def _group(
    kind: tuple[torch.dtype, int, bool, bool],
    streams: Sequence[tuple[Tensor, Tensor, Tensor]],
    members: Sequence[int],
    fresh: int,
) -> Group:
    dtype, block, contiguous, _ = kind
    rows, first_m, first_d = [], 0, 0
    for out, basis, x in streams:
        columns = min(out.shape)
        few = fresh if fresh <= columns else columns // 2
        sizes = (*x.shape, *x.stride(), basis.shape[1], *basis.stride(), out.shape[1], columns, columns - few)
        rows.append((*sizes, first_m, first_d))
        first_m, first_d = first_m + x.shape[0], first_d + x.shape[1]
    heights, widths = (tuple(x.shape[i] for _, _, x in streams) for i in (0, 1))
    device = streams[0][2].device
    programs = sum(-(-height // 64) for height in heights) * 132 // multiprocessors(device)
    candidates = configurations(architecture(device), dtype, block, programs, contiguous)
    # The fused kernel comes first where the second reading of X finds it in the cache. Programs in flight span about
    # `lag` modules: then nobody waits. So many are between the two readings of one, and in flight around each.
    height, width = max(heights), max(widths)
    one = candidates[-1]
    lag = -(-2 * multiprocessors(device) // (-(-height // one.block_m) - (-width // one.block_d)))
    lag = min(_MOST_LAG, max(1, lag))
    if (2 * lag + 1) * height * width * dtype.itemsize <= _l2_bytes(device):
        candidates = tuple(sorted(candidates, key=lambda one: not one.fused))
    return Group(
        variant=Variant(*kind, candidates[0]),
        candidates=candidates,
        members=tuple(members),
        beginners=sum(basis.shape[1] == 0 for _, basis, _ in streams),
        lag=lag,
        rows_of_x=heights,
        columns_of_x=widths,
        columns=max(min(out.shape) for out, _, _ in streams),
        order=torch.tensor(members, device="cpu"),
        fixed=torch.tensor(rows, device="cpu"),
    )


def _l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else _L2_BYTES


def variants(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    rows: Sequence[Tensor],
    signs: Sequence[Tensor],
    fresh: int,
) -> tuple[Variant, ...]:
    """What the kernels are compiled for in a call with these arguments."""
    masked = [mask is not None for mask in masks]
    return tuple(sorted({group.variant for group in plan(outs, bases, xs, masked, fresh).groups}, key=str))
