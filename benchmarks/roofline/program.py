"""What one program of a launch does on average: its instructions from the machine code, how often from the PTX."""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.aot import compile_one, resources
from benchmarks.recorder import Issue, Launch

from . import ptx, sass
from .steps import Memory

PROGRAMS, THREADS = 5, 2  # of a launch and of a program that are followed
# What the assembler keeps one for one: by it an unrolled loop is recognised.
_KEPT = ("ld.global", "st.global", "cp.async.c", "mma.", "wgmma.mma", "fma.rn.f64")
_KEPT_IN_SASS = ("LDG", "STG", "LDGSTS", "HMMA", "HGMMA", "DMMA", "DFMA")


@dataclass(frozen=True)
class Binary:
    """A compiled launch."""

    blocks: list[ptx.Block]
    instructions: list[tuple[str, str]]
    registers: int
    shared: int


@dataclass(frozen=True)
class Traffic:
    """Bytes of a launch to or from the tensors of one argument, or of one column of a table of pointers.

    ``first`` stands for them: the address of the first. ``requested`` passes through L2, ``distinct`` is their size.
    """

    first: int
    distinct: int
    writes: bool
    requested: float


@dataclass(frozen=True)
class Work:
    """Of one program on average, all warps together; ``traffic`` is of the whole launch.

    ``counts``: warp instructions ("issue", "float64", "special"), bytes of shared memory ("shared"), and operations of
    matrix instructions by kind and type; ``rounds``: how often it waits for what it loads; ``barriers`` likewise.
    """

    counts: Mapping[str, float]
    rounds: float
    barriers: float
    traffic: Sequence[Traffic] = ()


Slot = tuple[str, int | None]  # an argument, or a column of the table that it is
_UNKNOWN: Slot = ("", None)
_binaries: dict[tuple[Any, ...], Binary] = {}


def binary(launch: Launch, architecture: str) -> Binary:
    """Compiled once for each architecture."""
    key = (launch.name, launch.aligned, tuple(launch.types.items()), architecture)
    if key not in _binaries:
        made = compile_one(launch, architecture)
        registers, _ = resources(made.asm["cubin"])
        blocks, code = ptx.parse(made.asm["ptx"]), sass.disassemble(made.asm["cubin"])
        _binaries[key] = Binary(blocks, code, registers, made.metadata.shared)
    return _binaries[key]


def own_parts(loops: Sequence[sass.Loop], size: int) -> list[list[int]]:
    """The numbers below ``size`` outside of all loops, then for each loop, outer ones first, those in no inner one."""

    def part(first: int, last: int, inner: Sequence[sass.Loop]) -> list[int]:
        return [i for i in range(first, last) if not any(one.first <= i <= one.last for one in inner)]

    found = [part(0, size, loops)]
    left = list(loops)
    while left:
        one = left.pop(0)
        found.append(part(one.first, one.last + 1, one.inner))
        left = [*one.inner, *left]
    return found


def _jumps(blocks: Sequence[ptx.Block]) -> list[tuple[int, int]]:
    labels = {block.name: i for i, block in enumerate(blocks) if block.name}
    return [(i, labels[one.target]) for i, block in enumerate(blocks) for one in block.instructions if one.target]


def _shape(loops: Sequence[sass.Loop]) -> tuple[Any, ...]:
    return tuple(_shape(one.inner) for one in loops)


def weights(code: Binary, runs: Mapping[int, float]) -> list[float]:
    """How often each machine instruction runs, from how often each block of the PTX does.

    Loops of both are paired in order, and an unrolled one is divided by its factor. Where the assembler made other
    loops than the PTX has, all instructions together get the average of the PTX's.
    """
    blocks, instructions = code.blocks, code.instructions
    of_ptx, of_sass = sass.loops(_jumps(blocks)), sass.loops(sass.jumps(instructions))
    pairs = [(list(range(len(blocks))), list(range(len(instructions))))]
    if _shape(of_ptx) == _shape(of_sass):
        pairs = list(zip(own_parts(of_ptx, len(blocks)), own_parts(of_sass, len(instructions)), strict=True))
    found = [0.0] * len(instructions)
    for of_blocks, numbers in pairs:
        sizes = {i: len(blocks[i].instructions) for i in of_blocks}
        mean = sum(runs.get(i, 0) * size for i, size in sizes.items()) / max(1, sum(sizes.values()))
        kept = sum(one.name.startswith(_KEPT) for i in of_blocks for one in blocks[i].instructions)
        in_sass = sum(instructions[i][0].split(".")[0] in _KEPT_IN_SASS for i in numbers)
        unrolled = max(1, round(in_sass / kept)) if kept else 1
        for i in numbers:
            found[i] = mean / unrolled
    return found


_followed: dict[tuple[Any, ...], tuple[Work, dict[tuple[Slot, bool], float]]] = {}


def work(issue: Issue, memory: Memory, architecture: str) -> Work:
    """Of the average program, from some that are followed; once for launches that differ in addresses only."""
    slots = _slots(issue, memory)
    numbers = tuple(value for value in issue.values.values() if not isinstance(value, torch.Tensor))
    tables = tuple(shape for _, shape in sorted((str(slot), size) for slot, size in slots.values()))
    key = (issue.launch.name, issue.launch.aligned, architecture, issue.grid, numbers, tables)
    if key not in _followed:
        _followed[key] = _follow(issue, memory, architecture, slots)
    done, requested = _followed[key]
    places = {slot: (start, size) for start, (slot, size) in reversed(slots.items())}
    traffic = [
        Traffic(*places.get(slot, (0, 0)), writes=writes, requested=size) for (slot, writes), size in requested.items()
    ]
    return replace(done, traffic=traffic)


def _follow(
    issue: Issue, memory: Memory, architecture: str, slots: Mapping[int, tuple[Slot, int]]
) -> tuple[Work, dict[tuple[Slot, bool], float]]:
    code, launch = binary(issue.launch, architecture), issue.launch
    threads, programs = 32 * launch.num_warps, math.prod(issue.grid)
    traces = [
        _thread(code, issue, memory, program, thread, threads)
        for program in _spread(programs, PROGRAMS)
        for thread in _spread(threads, THREADS)
    ]
    scale = programs * threads / len(traces)
    runs: dict[int, float] = defaultdict(float)
    requested: dict[tuple[Slot, bool], float] = defaultdict(float)
    for trace in traces:
        for i, times in trace.blocks.items():
            runs[i] += times / len(traces)
        for access in trace.accesses:
            place = None if access.address is None else memory.find(access.address)
            slot = slots[place[0]][0] if place and place[0] in slots else _UNKNOWN
            requested[slot, access.writes] += access.bytes * access.times * scale
    counts: dict[str, float] = defaultdict(float)
    times = weights(code, runs)
    for each, instruction in zip(times, code.instructions, strict=True):
        for name, number in sass.count([instruction]).items():
            counts[name] += each * number * (1 if name == "barriers" else launch.num_warps)
    for i, block in enumerate(code.blocks):
        for name, number in ptx.matrix_work(block).items():
            counts[name] += runs[i] * number * launch.num_warps
    rounds = _rounds(code, times, launch.num_stages)
    barriers = counts.pop("barriers", 0.0)
    return Work(dict(counts), rounds, barriers), dict(requested)


def _rounds(code: Binary, times: Sequence[float], stages: int) -> float:
    """How often a program waits for loads: once in each round of a loop that has any, and one time in as many as are in
    flight where they go to shared memory by themselves.
    """
    found = 0.0
    for part in own_parts(sass.loops(sass.jumps(code.instructions)), len(code.instructions)):
        names = {code.instructions[i][0].split(".")[0] for i in part}
        share = 1.0 if "LDG" in names else 1 / max(1, stages - 1) if "LDGSTS" in names else 0.0
        found += share * sum(times[i] for i in part) / max(1, len(part))
    return found


def _spread(size: int, most: int) -> list[int]:
    most = min(size, most)
    return [int((i + 0.5) * size / most) for i in range(most)]


def _thread(code: Binary, issue: Issue, memory: Memory, program: int, thread: int, threads: int) -> ptx.Trace:
    special = {"%tid.x": thread, "%tid.y": 0, "%tid.z": 0, "%ntid.x": threads, "global_smem": 0}
    for i, axis in enumerate("xyz"):
        size = issue.grid[i] if i < len(issue.grid) else 1
        special |= {f"%ctaid.{axis}": program % size, f"%nctaid.{axis}": size}
        program //= size
    values = [_bits(value, memory) for value in issue.values.values()]
    return ptx.Thread(code.blocks, values, special, memory.words).run()


def _bits(value: Any, memory: Memory) -> int:
    if isinstance(value, torch.Tensor):
        return memory.address(value)
    return int(struct.unpack("<I", struct.pack("<f", value))[0]) if isinstance(value, float) else int(value)


def _slots(issue: Issue, memory: Memory) -> dict[int, tuple[Slot, int]]:
    """For every storage that a launch reaches: the argument, or column of a table, that leads there, and the bytes of
    all that it leads to.
    """
    found: dict[int, tuple[Slot, int]] = {}
    for name, value in issue.values.items():
        if not isinstance(value, torch.Tensor):
            continue
        start = memory.start(value)
        size = min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
        if start not in found or found[start][1] < size:
            found[start] = ((name, None), size)
        if value.dtype == torch.int64 and value.dim() == 2:
            for column in range(value.shape[1]):
                places = _column(value, column, memory)
                for start in sorted(places):
                    found.setdefault(start, ((name, column), sum(places.values())))
    return found


def _column(table: torch.Tensor, column: int, memory: Memory) -> dict[int, int]:
    """First byte and size of the storages that a column points to, if it does."""
    first = memory.address(table) + 8 * column * table.stride(1)
    words = (memory.words.get(first + 8 * row * table.stride(0), 0) for row in range(table.shape[0]))
    return dict(place for place in map(memory.find, words) if place)
