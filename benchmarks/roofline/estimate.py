"""The time of a call on a GPU, from what its kernels do and what bounds each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.recorder import Issue

from .gpus import BARRIER, CACHED, GPU, LATENCY, LAUNCH, SHARE, STALL
from .program import Binary, Traffic, Work, binary, work
from .steps import Eigh, Memory, Operation, Step

SWEEPS = 8  # of Jacobi's method
_ROTATION = {torch.float64: 600, torch.float32: 250}  # cycles of its divisions and roots, one after another


@dataclass(frozen=True)
class Time:
    """Of one step, in seconds, by what could bound it; `resident` programs share a multiprocessor."""

    name: str
    bounds: Mapping[str, float]
    device_bytes: float = 0.0
    cache_bytes: float = 0.0
    programs: int = 0
    resident: int = 0

    @property
    def limit(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def seconds(self) -> float:
        """The longest of all, after the launch."""
        return LAUNCH + self.bounds[self.limit]

    @property
    def felt(self) -> str:
        """What to change: a kernel shorter than its launch is bound by that."""
        return self.limit if self.bounds[self.limit] > LAUNCH else "launches"


class Cache:
    """Which tensors of earlier steps are still in L2: the last ones that fit."""

    def __init__(self, size: float) -> None:
        self.size = size
        self.held: dict[int, float] = {}  # by address, the last touched at the end

    def touch(self, first: int, size: float) -> bool:
        """Whether it was there; it is then the last touched."""
        after, there = 0.0, False
        for key, bytes_ in reversed(self.held.items()):
            after += bytes_
            if key == first:
                there = after <= self.size
                break
        self.held.pop(first, None)
        self.held[first] = size
        return there


def resident(gpu: GPU, warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at once."""
    by_registers = gpu.registers // (warps * 32 * max(8, math.ceil(registers / 8) * 8))
    by_shared = gpu.shared // (shared + 1024)  # of which every program takes one kilobyte
    return max(1, min(by_registers, by_shared, gpu.warps // warps, gpu.blocks))


def device_bytes(traffic: Sequence[Traffic], cache: Cache) -> float:
    """What of a launch's traffic passes L2: each tensor once, unless an earlier step left it there."""
    total = 0.0
    for one in traffic:
        moved = min(one.requested, one.distinct) if one.distinct else one.requested
        there = cache.touch(one.first, moved)
        total += moved if one.writes or not there else 0.0
    return total


def cache_bytes(traffic: Sequence[Traffic]) -> float:
    """What of it L2 delivers: several programs that ask for the same line at once are served together, half of them."""
    again = sum(max(0.0, one.requested - one.distinct) for one in traffic if one.distinct and not one.writes)
    return sum(one.requested for one in traffic) - again / 2


def kernel_bounds(gpu: GPU, done: Work, programs: int, at_once: int, warps: int, moved: float) -> dict[str, float]:
    """Seconds by resource, of a launch of so many programs, as many on the busiest multiprocessor as there must be."""
    busiest = math.ceil(programs / gpu.multiprocessors)
    counts, cycles = done.counts, SHARE * gpu.clock
    tensor = tensor64 = 0.0
    for name, operations in counts.items():
        kind, _, type_ = name.partition(" ")
        if type_ == "f64":
            tensor64 += operations / (gpu.tensor64 or gpu.float64 * 2 * gpu.multiprocessors * gpu.clock)
        elif type_:
            rate = gpu.tensor * (gpu.mma if kind == "mma" else 1.0) / (2 if type_ == "tf32" else 1)
            tensor += operations / rate
    on_chip = {
        "issue": counts.get("issue", 0) / (4 * cycles),
        "tensor": tensor * gpu.multiprocessors / SHARE,
        "float64": counts.get("float64", 0) * 32 / (gpu.float64 * cycles) + tensor64 * gpu.multiprocessors / SHARE,
        "special": counts.get("special", 0) * 32 / (16 * cycles),
        "shared memory": counts.get("shared", 0) / (128 * cycles),
    }
    waves = math.ceil(busiest / at_once)
    alone = counts.get("issue", 0) / warps * STALL + done.rounds * LATENCY + done.barriers * BARRIER
    return {
        "memory": moved / gpu.bandwidth,
        "L2": cache_bytes(done.traffic) / gpu.cache_bandwidth,
        **{name: busiest * seconds for name, seconds in on_chip.items()},
        "latency": waves * alone / gpu.clock,
    }


def _kernel(issue: Issue, memory: Memory, gpu: GPU, cache: Cache) -> Time:
    launch = issue.launch
    code: Binary = binary(launch, gpu.architecture)
    done, programs = work(issue, memory, gpu.architecture), math.prod(issue.grid)
    at_once = resident(gpu, launch.num_warps, code.registers, code.shared)
    moved = device_bytes(done.traffic, cache)
    bounds = kernel_bounds(gpu, done, programs, at_once, launch.num_warps, moved)
    name = launch.function.removesuffix("_kernel")
    return Time(name, bounds, moved, cache_bytes(done.traffic), programs, at_once)


def _operation(one: Operation, gpu: GPU, cache: Cache) -> Time:
    traffic = [Traffic(first, size, False, size) for first, size in one.read]
    traffic += [Traffic(first, size, True, size) for first, size in one.written]
    moved = device_bytes(traffic, cache)
    through = sum(size.requested for size in traffic)
    # Measured rates, of cuBLAS, where they are known; float32 multiplies and adds in 128 lanes.
    lanes = {torch.float32: 128, torch.float64: gpu.float64}.get(one.dtype)
    rate = 2 * lanes * gpu.multiprocessors * gpu.clock if lanes else gpu.tensor
    kind = {torch.float32: "issue", torch.float64: "float64"}.get(one.dtype, "tensor")
    bounds = {"memory": moved / gpu.bandwidth, "L2": through / gpu.cache_bandwidth, kind: one.operations / rate}
    return Time(f"torch.{one.name}", bounds, moved, through)


def _eigh(one: Eigh, gpu: GPU) -> Time:
    """By the counts in csrc/small_eigh_cuda.cu: a sweep is n rounds of two barriers and a rotation's latency, about
    4 n^3 operations and 3 n^3 accesses to shared memory.
    """
    n, size = one.n, one.dtype.itemsize
    at_once = max(1, min(3, gpu.shared // (2 * n * n * size + 1024)))
    busiest = math.ceil(one.count / gpu.multiprocessors)
    slow = 64 // gpu.float64 if one.dtype == torch.float64 and gpu.float64 < 8 else 1
    waits = n * (2 * BARRIER + _ROTATION[one.dtype] * slow)
    lanes = gpu.float64 if one.dtype == torch.float64 else 128
    times = SWEEPS * one.decompositions / gpu.clock
    bounds = {
        "latency": times * math.ceil(busiest / at_once) * waits,
        "shared memory": times * busiest * 3 * n**3 * size / 128 / SHARE,
        "float64" if one.dtype == torch.float64 else "issue": times * busiest * 4 * n**3 / lanes / SHARE,
    }
    return Time("eigh", bounds, programs=one.count, resident=at_once)


def times(steps: Sequence[Step], memory: Memory, gpu: GPU) -> list[Time]:
    """Of every step of a call, in order."""
    cache = Cache(CACHED * gpu.cache)
    found = []
    for step in steps:
        if isinstance(step, Issue):
            found.append(_kernel(step, memory, gpu, cache))
        elif isinstance(step, Operation):
            found.append(_operation(step, gpu, cache))
        else:
            found.append(_eigh(step, gpu))
    return found


def limits(found: Sequence[Time]) -> list[tuple[str, float]]:
    """Seconds by what bounds the steps, the largest first; their launches are one of them."""
    total: Counter[str] = Counter()
    for one in found:
        total["launches"] += LAUNCH  # type: ignore[assignment]
        total[one.limit] += one.bounds[one.limit]  # type: ignore[assignment]
    return total.most_common()  # type: ignore[return-value]
