"""Times of single launches, interleaved, by CUDA events; on a CPU by the clock."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

MOST_ROUNDS = 30
HOST_ROUNDS = 5
LONGEST = 0.4  # seconds that the device is kept busy for the host to issue a call
COPIED = 1 << 30  # bytes of the tensor that measures the copy bandwidth
MULTIPLIED = 8192  # the width of the square product that measures the matmul rate


@dataclass
class Samples:
    """Seconds of every launch: on the device, from first to last kernel; on the host, until the call came back, with
    the device idle before it. ``late``: launches that the device began before all of the call was issued.
    """

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    late: int = 0

    def values(self, share: float = 1.0) -> dict[str, float]:
        """Median, 20th and 80th percentile in microseconds, for the whole of which `share` was run."""
        micro = 1e6 / share
        low, middle, high = (quantile(self.device, q) * micro for q in (0.2, 0.5, 0.8))
        host = quantile(self.host, 0.5) * micro
        times = {"us": middle, "us_p20": low, "us_p80": high, "host_us": host}
        return {**times, "launches": len(self.device), "late": self.late}


def quantile(values: Sequence[float], q: float) -> float:
    """By linear interpolation between order statistics."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Times one call at a time.

    Before a call on a GPU, the stream is given something to do for longer than the host needs to issue the call's
    launches. So the events see the device's time, without gaps that are the host's; the host's is taken apart. Of a
    thousand launches and more this may fail: the stream's queue is full, and the host has to wait for the device. So
    each call is asked whether the device had begun before it was all issued.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._cycles = self._cycles_per_second() if device.type == "cuda" else 0.0

    def time(self, call: Callable[[], object], busy: float = 0.0) -> tuple[float, float, bool]:
        """Seconds on the device and on the host, and whether the device began before the host was done; `busy`: seconds
        that the device is kept busy before.
        """
        synchronise(self.device)
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            return elapsed, elapsed, False
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if busy:
            torch.cuda._sleep(int(busy * self._cycles))
        first.record()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        began = first.query()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3, host, began

    def _cycles_per_second(self) -> float:
        cycles = 10_000_000
        rates = []
        for _ in range(3):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            torch.cuda._sleep(cycles)
            last.record()
            last.synchronize()
            rates.append(cycles / (first.elapsed_time(last) / 1e3))
        return max(rates)


def interleaved(
    watch: Stopwatch,
    calls: Mapping[str, Callable[[Any], object]],
    inputs: Sequence[Any],
    seconds: float,
    rounds: int = MOST_ROUNDS,
) -> dict[str, Samples]:
    """Time every call in turns, each on the next of the inputs, which together exceed the cache.

    `seconds` is what all may take together; a slow call gets fewer rounds, and at least one.
    """
    samples = {name: Samples() for name in calls}
    count, busy = {}, {}
    for name, call in calls.items():
        device, host, _ = watch.time(lambda call=call: call(inputs[-1]))
        started = time.perf_counter()
        if device < 1:
            device, host, _ = watch.time(lambda call=call: call(inputs[0]))
        whole = max(time.perf_counter() - started, device, host)
        count[name] = max(1, min(rounds, int(seconds / len(calls) / whole) - 1))
        busy[name] = min(LONGEST, 1.5 * host + 1e-4)
        if count[name] == 1:
            samples[name].device.append(device)
            samples[name].host.append(host)
    for turn in range(max(count.values(), default=0)):
        for name, call in calls.items():
            if count[name] > 1 and turn < count[name]:
                run = functools.partial(call, inputs[turn % len(inputs)])
                device, host, late = watch.time(run, busy[name])
                if late and busy[name] < LONGEST:  # once more, with more time for the host
                    busy[name] = min(LONGEST, 4 * busy[name])
                    device, host, late = watch.time(run, busy[name])
                samples[name].device.append(device)
                samples[name].late += late
                if watch.device.type == "cuda" and turn < HOST_ROUNDS:  # a call that waits would wait for `busy` too
                    _, host, _ = watch.time(run)
                if turn < HOST_ROUNDS:
                    samples[name].host.append(host)
    return samples


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before the device's memory; 0 on a CPU, whose figures are not about its memory."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    # Its name depends on PyTorch's version.
    return int(getattr(properties, "L2_cache_size", 0) or getattr(properties, "last_level_cache_size", 0) or 1 << 27)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call allocates at its peak, results included; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    synchronise(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def measure_roofs(watch: Stopwatch, dry: bool) -> dict[str, float]:
    """Copy bandwidth (read and written bytes counted) and bf16 matmul rate of this run, on random data."""
    device = watch.device
    size, width = (1 << 16, 64) if dry else (COPIED, MULTIPLIED)
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    factors = [torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2)]
    calls = {"copy": lambda _: target.copy_(source), "product": lambda _: factors[0] @ factors[1]}
    samples = interleaved(watch, calls, [None], seconds=5.0)
    return {
        "bytes_per_second": 2 * size / quantile(samples["copy"].device, 0.5),
        "operations_per_second": 2 * width**3 / quantile(samples["product"].device, 0.5),
    }
