"""The kernels section: every case, correctness first, then all providers side by side."""

from __future__ import annotations

import gc
import json
import math
import re
import time
from typing import Any

import torch

from benchmarks.cases import Case, Provider, all_cases, interpretable
from benchmarks.roofline.gpus import ALL, RESULTS

from .report import Report, each
from .timing import Stopwatch, cache_bytes, interleaved, measure_roofs, peak_bytes

ROOFS = ("bytes_per_second", "operations_per_second")
SECONDS_PER_CASE = 6.0
# A first call that took longer is not repeated to see its peak memory without what it loaded or compiled.
SLOW = 2.0
# Compiling with Inductor is left out once less than this share of the section's time is left.
COMPILES_ABOVE = 0.35


def run(report: Report, device: torch.device, dry: bool, only: str) -> None:
    watch = Stopwatch(device)
    if not report.roofs:
        report.roofs = measure_roofs(watch, dry)
    cases = {case.name: case for case in all_cases() if re.search(only, case.name)}
    total = max(1.0, report.left())
    each(report, list(cases), lambda name: _case(report, watch, name, cases[name], dry, total))


def _case(report: Report, watch: Stopwatch, name: str, case: Case, dry: bool, total: float) -> None:
    device = watch.device
    if dry:
        case = interpretable(case.dry())
    work = case.work()
    report.cases[name] = {
        "operation": case.operation,
        "shape": case.shape,
        "bytes": work.bytes,
        "flops": work.flops,
        "floor_us_of_this_run": 1e6 * work.floor(*(report.roofs[roof] for roof in ROOFS)),
        "floor_us_of_gpu_md": case.floor_us,
        "targets": [str(target) for target in case.targets],
    }
    try:
        # One at a time: an error in one says nothing of the others.
        good, memory = _gate(report, name, case, device, total)
        if good:
            _time(report, watch, name, case, good, memory, dry)
            _targets(report, name, case)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _gate(
    report: Report, name: str, case: Case, device: torch.device, total: float
) -> tuple[list[tuple[Provider, float]], dict[str, int | None]]:
    """Providers whose results are right, with their errors, and the peak memory of each."""
    inputs, truth, providers = None, None, []
    with report.attempt(name, "truth"):
        providers = case.providers(device)
        if all(provider.absent for provider in providers if provider.name in ("triton", "native", "reference")):
            for provider in providers:
                report.add(name, provider.name, "skipped", provider.absent or "nothing of this package to compare with")
            return [], {}
        inputs = case.inputs(device, seed=0)
        truth = case.truth(inputs)
    if truth is None:
        return [], {}
    good: list[tuple[Provider, float]] = []
    memory: dict[str, int | None] = {}
    for provider in providers:
        reason = provider.absent or report.why_excluded(name, provider.name)
        if reason is None and provider.compiles and report.left() < COMPILES_ABOVE * total:
            reason = "too little of the section's time was left to compile"
        if reason is not None:
            crashed = report.why_excluded(name, provider.name) is not None and not provider.absent
            report.add(name, provider.name, "failed" if crashed else "skipped", reason)
            continue
        with report.attempt(name, provider.name):
            if case.mutates:
                inputs = case.inputs(device, seed=0)
            error = 0.0
            start = time.perf_counter()
            results: list[Any] = []
            peak = peak_bytes(lambda call=provider.call, i=inputs, to=results: to.append(call(i)), device)
            slow = time.perf_counter() - start > SLOW
            if provider.gated:
                error = case.error(truth, provider.comparable(results.pop()))
            results.clear()
            tolerance = case.tolerance if provider.tolerance is None else provider.tolerance
            if not error <= tolerance:
                detail = f"error {error:.2e}, allowed {tolerance:.0e}: no speed is reported"
                report.add(name, provider.name, "red", detail, error=error)
                continue
            if not slow:
                peak = peak_bytes(lambda call=provider.call, i=inputs: call(i), device)
            memory[provider.name] = peak
            good.append((provider, error))
    return good, memory


def _time(
    report: Report,
    watch: Stopwatch,
    name: str,
    case: Case,
    good: list[tuple[Provider, float]],
    memory: dict[str, int | None],
    dry: bool,
) -> None:
    device = watch.device
    work = case.work()
    with report.attempt(name, "timing"):
        copies = 2 if dry else _copies(work.bytes, device)
        inputs = [case.inputs(device, seed=1 + i) for i in range(copies)]
        calls = {provider.name: provider.call for provider, _ in good}
        rounds = 2 if dry else 30
        samples = interleaved(watch, calls, inputs, min(SECONDS_PER_CASE, report.left()), rounds)
        for provider, error in good:
            values: dict[str, Any] = samples[provider.name].values(provider.share)
            seconds = values["us"] / 1e6
            values["peak_mib"] = None if memory[provider.name] is None else memory[provider.name] / 2**20
            if provider.gated:
                values["bandwidth_share"] = work.bytes / seconds / report.roofs["bytes_per_second"]
                values["matmul_share"] = work.flops / seconds / report.roofs["operations_per_second"]
                values["error"] = error
            if estimated := estimated_us(name, provider.name, device):
                values["estimated_us"] = estimated
            said = [] if provider.share == 1 else [f"ran {provider.share:.3g} of the case; its time is extrapolated"]
            if late := values.pop("late"):
                said.append(f"in {late:g} of {values['launches']} the device waited for the host: us holds such gaps")
            report.add(name, provider.name, "measured", "; ".join(said), **values)


def estimated_us(name: str, provider: str, device: torch.device) -> float | None:
    """What `python -m benchmarks.roofline` made of the case for this GPU, without one."""
    if provider not in ("triton", "native") or device.type != "cuda" or not RESULTS.exists():
        return None
    found = json.loads(RESULTS.read_text())["cases"].get(name, {})
    named = torch.cuda.get_device_name(device)
    return next((found[gpu.name]["us"] for gpu in ALL if gpu.name in found and gpu.name in named), None)


def _copies(size: int, device: torch.device) -> int:
    """Sets of inputs that together are four times the L2 cache: each is cold when its turn comes."""
    wanted = 4 * cache_bytes(device)
    return 1 + min(16, math.ceil(wanted / max(size, 1))) if size < wanted else 1


def _targets(report: Report, name: str, case: Case) -> None:
    """What became of the targets, in the row of the provider that they are for."""
    rows = {row.provider: row for row in report.rows if row.case == name and row.status == "measured"}
    for target in case.targets:
        row, other = rows.get(target.provider), rows.get(target.over)
        if row is None:
            continue
        if target.microseconds is not None:
            said = "reached" if row.values["us"] <= target.microseconds else "missed"
        elif other is None:
            said = f"open, {target.over} was not measured"
        elif target.times is not None:
            ratio = other.values["us"] / row.values["us"]
            said = f"{'reached' if ratio >= target.times else 'missed'} with {ratio:.3g}x"
        elif row.values["peak_mib"] is None:
            said = "open, no memory is counted here"
        else:
            share = row.values["peak_mib"] / other.values["peak_mib"]
            said = f"{'reached' if share <= target.memory else 'missed'} with {share:.3g}"
        row.values["targets"] = "; ".join(filter(None, [row.values.get("targets"), f"{target}: {said}"]))
    report.write()
