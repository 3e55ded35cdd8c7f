"""Compiles every kernel as it is shipped, for every architecture, without a GPU: `python -m benchmarks.aot`.

For each: registers, bytes of stack (spills), shared memory, matrix and FMA instructions. Ends with an error where a
kernel needs stack without a listed reason, more shared memory than a block gets, or lacks the matrix instruction that
is meant. `--write docs/aot.md` keeps the table. Compiles in several processes; results come in order.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bayesian_lora_kernels.ops.shipped import ARCHITECTURES, KERNEL_MODULES, Shipped

MATRIX = {"wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync"}
FMA = r"\bfma\.rn\.(?:f32x2|f32|f64)\b"
BEST = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}


@dataclass(frozen=True)
class Task:
    """Where to find a configuration: what a process can hand to another, which a kernel is not."""

    module: str
    architecture: str
    name: str


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one configuration; ``error`` if nothing."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    ptx: dict[str, int] | None = None  # instructions by name, those that occur
    error: str = ""
    seconds: float = 0.0  # of processor time

    def instructions(self) -> str:
        return " ".join(f"{count} {name}" for name, count in (self.ptx or {}).items()) or "-"


@dataclass(frozen=True)
class Row:
    task: Task
    shipped: Shipped
    compiled: Compiled

    @property
    def problem(self) -> str:
        return problem(self.task.architecture, self.shipped, self.compiled)


def problem(architecture: str, shipped: Shipped, compiled: Compiled) -> str:
    """What is wrong with a kernel as compiled, or nothing."""
    if compiled.error:
        return f"does not compile: {compiled.error}"
    found = []
    ptx = compiled.ptx or {}
    if compiled.stack and not (shipped.stack.get(architecture) or shipped.stack.get("all")):
        found.append(f"{compiled.stack} bytes of stack")
    if compiled.shared > ARCHITECTURES[architecture][1]:
        found.append(f"{compiled.shared} bytes of shared memory, a block gets {ARCHITECTURES[architecture][1]}")
    if shipped.matrix == "best" and BEST[architecture] not in ptx:
        found.append(f"no {BEST[architecture]}")
    of_matrix = [name for name in MATRIX if name in ptx]
    if shipped.matrix == "mma" and not of_matrix:
        found.append("no matrix instruction")
    if shipped.matrix == "fma" and of_matrix:
        found.append(f"{of_matrix[0]} where multiply-adds are meant")
    return "; ".join(found)


def count_instructions(ptx: str) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in {**MATRIX, "fma": FMA}.items()}
    return {name: count for name, count in counts.items() if count}


@functools.cache
def cuobjdump() -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        raise SystemExit("cuobjdump: neither in Triton nor on PATH")
    return found


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([cuobjdump(), "-res-usage", path], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage says something else than it did:\n{text}")
    return int(found[1]), int(found[2])


def compile_one(shipped: Shipped, architecture: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = shipped.kernel.arg_names
    missing = [name for name in names if name not in shipped.types and name not in shipped.constants]
    unknown = [name for name in (*shipped.types, *shipped.constants) if name not in names]
    if missing or unknown:
        raise ValueError(f"{shipped.name}: arguments missing {missing}, unknown {unknown}")
    signature = {name: "constexpr" if name in shipped.constants else shipped.types[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in shipped.aligned}
    source = ASTSource(shipped.kernel, signature, dict(shipped.constants), attrs)
    options = {
        "num_warps": shipped.num_warps,
        "num_stages": shipped.num_stages,
        "enable_fp_fusion": shipped.enable_fp_fusion,
        "maxnreg": shipped.max_registers,
    }
    return triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[architecture][0], 32), options=options)


@functools.cache
def shipped_by(module: str, architecture: str) -> dict[str, Shipped]:
    """What a module ships, by name."""
    found = importlib.import_module(module).shipped(architecture)
    by_name = {one.name: one for one in found}
    if len(by_name) < len(found):
        raise ValueError(f"{module}: two configurations have the same name")
    return by_name


def measure(task: Task) -> Compiled:
    """Compile one configuration; runs in a process of the pool."""
    start = _processor_seconds()
    try:
        compiled = compile_one(shipped_by(task.module, task.architecture)[task.name], task.architecture)
        registers, stack = resources(compiled.asm["cubin"])
    except Exception as error:  # any failure of the compiler is a row of the table, and the others go on
        return Compiled(error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}")
    counts = count_instructions(compiled.asm["ptx"])
    return Compiled(registers, stack, compiled.metadata.shared, counts, seconds=_processor_seconds() - start)


def _processor_seconds() -> float:
    """Of this process and of those that it waited for: the assembler is one of its own."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def tasks(architectures: Sequence[str], modules: str = "", names: str = "") -> list[Task]:
    """Everything that is shipped, as far as regular expressions for modules and names ask for it."""
    return [
        Task(module, architecture, name)
        for architecture in architectures
        for module in KERNEL_MODULES
        if re.search(modules, module)
        for name in shipped_by(module, architecture)
        if re.search(names, name)
    ]


def line(row: Row) -> str:
    one = row.compiled
    return (
        f"{row.task.architecture:7} {row.shipped.name:52} {one.registers:4} registers {one.stack:5} stack "
        f"{one.shared:7} shared {one.seconds:6.1f} s  {one.instructions()}  {row.problem}"
    )


def table(rows: Sequence[Row]) -> str:
    """One line per kernel, its architectures beside each other."""
    by_name: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows:
        key = row.shipped.name, row.shipped.num_warps, row.shipped.num_stages
        by_name.setdefault(key, {})[row.task.architecture] = row
    shown = [name for name in ARCHITECTURES if any(row.task.architecture == name for row in rows)]
    lines = [f"| kernel | warps | stages | {' | '.join(shown)} |", "|---|---|---|" + "---|" * len(shown)]
    for (name, warps, stages), of_name in by_name.items():
        cells = [_cell(of_name[one]) if one in of_name else "" for one in shown]
        lines.append(f"| {name} | {warps} | {stages} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    one = row.compiled
    text = f"{one.registers} / {one.stack} / {one.shared} / {one.instructions()}"
    return text + (f" **{row.problem}**" if row.problem else "")


HEAD = """# Kernels as compiled

Written by `make aot`, with Triton {version} and without a GPU. `make aot-check`, which CI runs, makes the same check
with every Triton version of the Makefile. It fails on stack (spills) without a reason below, on more shared memory than
a block gets, on a missing matrix instruction where one is meant (wgmma on sm_90 and tcgen05 on sm_100 for products of
64 rows and more), and on a matrix instruction where float32 multiply-adds are meant.

A row is a kernel, a dtype and a tile configuration; `tests/test_kernels_shipped.py` runs the launchers over a grid of
sizes and finds no other. Of masked and unmasked, accumulating and not, it is the variant with the most code (outer
products: with masks and without); the others are not compiled. Some fp16 kernels that differ from bf16 only in the
type of the matrix instruction have no row.

A cell: registers per thread / bytes of stack / bytes of shared memory / instructions in the PTX (static counts).

"""


def document(rows: Sequence[Row], triton_version: str) -> str:
    reasons = sorted(
        {f"- {row.shipped.name}, {where}: {why}" for row in rows for where, why in row.shipped.stack.items()}
    )
    listed = "\nStack that is accepted, and why:\n\n" + "\n".join(reasons) + "\n" if reasons else ""
    return HEAD.format(version=triton_version) + table(rows) + listed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression for names")
    parser.add_argument("--module", default="", help="a regular expression for modules")
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), action="append")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: all cores")
    parser.add_argument("--write", type=Path, help="the markdown file to write")
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.module or arguments.architecture):
        parser.error("--write keeps the whole table: no --only, --module or --architecture with it")
    triton_version = version("triton")
    wanted = tasks(arguments.architecture or list(ARCHITECTURES), arguments.module, arguments.only)
    rows = []
    # New processes, not copies of this one: PyTorch and the compiler have threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        for task, compiled in zip(wanted, pool.map(measure, wanted), strict=True):
            rows.append(Row(task, shipped_by(task.module, task.architecture)[task.name], compiled))
            print(line(rows[-1]), flush=True)
    if arguments.write:
        rows.sort(key=lambda row: row.shipped.name)
        arguments.write.write_text(document(rows, triton_version))
    failed = [row for row in rows if row.problem]
    for row in failed if len(failed) < len(rows) else []:
        print(line(row))
    seconds = sum(row.compiled.seconds for row in rows)
    print(f"Triton {triton_version}: {len(rows)} kernels in {seconds:.0f} s of CPU, {len(failed)} with a problem")
    return 1 if failed else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
