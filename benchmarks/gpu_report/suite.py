"""The tests section: build the native extension, run the `gpu` tests file by file, then compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .environment import ROOT
from .report import Report, each

LAUNCH = ("-m", "benchmarks.gpu_report.launch_all")
# Ours first, then those whose kernels are also tested in the interpreter or on the CPU.
FIRST = ("test_gpu_kernels.py", "test_native.py", "test_kernels_outer_product.py", "test_kernels_incremental_svd.py")


@dataclass(frozen=True)
class Step:
    """A command, the most seconds it may take, and why it cannot run here (None: it can)."""

    command: tuple[str, ...]
    seconds: float
    absent: str | None = None


def run(report: Report, device: torch.device, dry: bool, only: str) -> None:
    """A dry run collects the tests instead of running them, and builds nothing."""
    found = {name: step for name, step in steps(device, dry).items() if re.search(only, name)}
    log = report.folder / "tests.log"
    each(report, list(found), lambda name: _step(report, name, found[name], log), reserve=5.0)


def steps(device: torch.device, dry: bool) -> dict[str, Step]:
    python = sys.executable
    found = {
        "build": Step((python, "setup.py", "build_ext", "--inplace"), 170, "a dry run builds nothing" if dry else None)
    }
    launch = (python, *LAUNCH, device.type)
    found["every kernel once"] = Step(launch, 150)
    for path in test_files():
        options = ("--collect-only", "-q") if dry else ("-v", "--maxfail=40")
        found[path.name] = Step(
            (python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *options, str(path)), 150
        )
        if path.name == FIRST[0]:
            found["memcheck"] = sanitizer("memcheck", launch, dry)
    found["racecheck"] = sanitizer("racecheck", launch, dry)
    return found


def sanitizer(tool: str, launch: tuple[str, ...], dry: bool) -> Step:
    """compute-sanitizer over every kernel; PyTorch's own probing of the driver is not what is looked for."""
    program = shutil.which("compute-sanitizer")
    absent = "compute-sanitizer is not on PATH" if program is None else "a dry run has no device" if dry else None
    options = ("--tool", tool, "--error-exitcode", "9", "--print-limit", "20", "--target-processes", "application-only")
    if tool == "memcheck":
        options += ("--report-api-errors", "no")
    return Step((program or "compute-sanitizer", *options, *launch), 120, absent)


def test_files() -> list[Path]:
    """Those with a test marked gpu."""
    tests = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    return sorted(tests, key=lambda path: FIRST.index(path.name) if path.name in FIRST else len(FIRST))


def _step(report: Report, name: str, step: Step, log: Path) -> None:
    if step.absent:
        report.add(name, "step", "skipped", step.absent)
        return
    with report.attempt(name, "step"):
        seconds = max(5.0, min(step.seconds, report.left() - 5))
        start = time.time()
        code, output = _output(step.command, seconds)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n==== {name}: {' '.join(step.command[1:])}: {code}\n{output}")
        values: dict[str, Any] = {"seconds": time.time() - start, **counts(output)}
        # pytest's 5: nothing of this file was selected.
        status = "failed" if code not in (0, 5) else "skipped" if _nothing_ran(values) else "passed"
        report.add(name, "step", status, _detail(code, output, seconds), **values)


def _output(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit code (None: out of time) and output; the caching allocator would hide accesses out of bounds."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if "compute-sanitizer" in command[0]:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the group that this command started, compilers and all
        output, _ = process.communicate()
        return None, output


def counts(output: str) -> dict[str, int]:
    """How many tests did what, from pytest's lines, which are there even if it was ended."""
    found = {}
    for word in ("passed", "failed", "error", "skipped"):
        lines = re.findall(rf"^tests/\S+.* {word.upper()}\b", output, re.MULTILINE)
        said = re.findall(rf"(\d+) {word}", output.splitlines()[-1] if output.strip() else "")
        number = int(said[0]) if said else len(lines)
        if number:
            found[word] = number
    return found


def _nothing_ran(values: dict[str, Any]) -> bool:
    return "skipped" in values and "passed" not in values


def _detail(code: int | None, output: str, seconds: float) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    failed = [line for line in lines if re.match(r"(FAILED|ERROR) |.*(=========|ERROR SUMMARY)", line)]
    if code is None:
        return f"ended after {seconds:.0f} s; " + " / ".join(failed[-6:] or lines[-2:])
    if code not in (0, 5):
        return " / ".join(failed[-20:] or lines[-4:])[-1500:]
    return lines[-1][:300] if lines else ""
