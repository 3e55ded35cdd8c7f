"""Compiles every kernel as `benchmarks.launches` saw it launched, for every architecture, without a GPU:
`python -m benchmarks.aot`.

For each: registers, bytes of stack (spills), shared memory, matrix and FMA instructions. Ends with an error where a
kernel needs stack without a listed reason, more shared memory than a block gets, or lacks the matrix instruction that
is meant. `--write benchmarks/results/aot.md` keeps the table. Compiles in several processes; results come in order.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import math
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.launches import recorded
from benchmarks.recorder import ARCHITECTURES, Launch

# Compute capability and shared memory per block, in bytes. sm_86 and sm_89 get the same code: not one number of
# the table differs, and a check of one is a check of both.
CAPABILITIES = {
    **{"sm_80": (80, 166912), "sm_86": (86, 101376), "sm_89": (89, 101376)},
    **{"sm_90": (90, 232448), "sm_100": (100, 232448), "sm_120": (120, 101376)},
}
MATRIX = {"wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync"}
FMA = r"\bfma\.rn\.(?:f32x2|f32|f64)\b"
BEST = dict.fromkeys(CAPABILITIES, "mma") | {"sm_90": "wgmma", "sm_100": "tcgen05"}

# The constants whose product is the height of a kernel's matrix product.
HEIGHTS = {
    "outer_product_kernel": ("BD",),
    "project_kernel": ("BM",),
    "back_project_kernel": ("BD",),
    "touch_kernel": ("BM",),
    "wide_input_kernel": ("C_", "O_"),
    "wide_output_kernel": ("C_", "O_"),
    "kept_rows_kernel": ("C_",),
    "narrow_rows_kernel": ("C_", "O_"),
    "similarities_kernel": ("T_",),
    "remainder_similarities_kernel": ("T_",),
    "token_gram_kernel": ("C_", "O_"),
    "product_kernel": ("BV",),
    "squares_kernel": ("BV",),
    "attention_kernel": ("M_",),
    "tangents_kernel": ("M_",),
}
OF_FLOAT32 = {
    "product_kernel",
    "squares_kernel",
    "attention_kernel",
    "tangents_kernel",
}  # any matrix instruction will do, in tf32x3
_CONSUMER = ("sm_86", "sm_89", "sm_120")
# Kernel, constants, and why bytes on the stack are accepted, per architecture or on all.
STACK: tuple[tuple[str, dict[str, Any], dict[str, str]], ...] = (
    (
        "orthonormalise_kernel",
        {"BL": 128},
        {
            "all": "two 128 x 128 matrices in float64 are the whole register file of a multiprocessor; runs once or "
            "twice per update, one program per stream"
        },
    ),
    ("orthonormalise_kernel", {"BL": 16}, {"sm_120": "8 bytes, with Triton 3.9; one program per stream"}),
    # Ranks over 32 in a small batch on a consumer GPU.
    ("project_kernel", {"BL": 128, "BM": 16}, {"sm_120": "32 bytes of fp32, with Triton 3.9"}),
    # Modules of more than 32 directions on the narrow side, or of more outputs and kept directions than that.
    (
        "kept_rows_kernel",
        {"C_": 64, "K_": 64},
        dict.fromkeys(_CONSUMER, "16 bytes beside all 255 registers"),
    ),
)


@dataclass(frozen=True)
class Expected:
    """What a kernel should be as compiled.

    Args:
        matrix: ``"best"``: the architecture's own matrix instruction is meant (wgmma on sm_90, tcgen05 on sm_100);
            ``"mma"``: any matrix instruction; ``"none"``: none is needed.
        stack: per architecture (or ``"all"``), why bytes on the stack are accepted.
    """

    matrix: str = "none"
    stack: Mapping[str, str] = field(default_factory=dict)


def expected(launch: Launch) -> Expected:
    name, constants = launch.function, launch.constants
    matrix = "none"
    if name in HEIGHTS:
        any_will_do = name in OF_FLOAT32 and constants["PRECISION"] == "tf32x3"
        matrix = "best" if math.prod(constants[one] for one in HEIGHTS[name]) >= 64 and not any_will_do else "mma"
    stack = [why for kernel, some, why in STACK if name == kernel and some.items() <= constants.items()]
    return Expected(matrix, stack[0] if stack else {})


@dataclass(frozen=True)
class Task:
    """Where to find a launch: what a process can hand to another, which a kernel is not."""

    architecture: str
    name: str

    @property
    def launch(self) -> Launch:
        return recorded(self.architecture)[self.name]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch; ``error`` if nothing."""

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
    expected: Expected
    compiled: Compiled

    @property
    def problem(self) -> str:
        return problem(self.task.architecture, self.expected, self.compiled)


def problem(architecture: str, expected: Expected, compiled: Compiled) -> str:
    """What is wrong with a kernel as compiled, or nothing."""
    if compiled.error:
        return f"does not compile: {compiled.error}"
    found = []
    ptx = compiled.ptx or {}
    if compiled.stack and not (expected.stack.get(architecture) or expected.stack.get("all")):
        found.append(f"{compiled.stack} bytes of stack")
    if compiled.shared > CAPABILITIES[architecture][1]:
        found.append(f"{compiled.shared} bytes of shared memory, a block gets {CAPABILITIES[architecture][1]}")
    if expected.matrix == "best" and BEST[architecture] not in ptx:
        found.append(f"no {BEST[architecture]}")
    if expected.matrix == "mma" and not any(name in ptx for name in MATRIX):
        found.append("no matrix instruction")
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


def compile_one(launch: Launch, architecture: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, signature, dict(launch.constants), attrs)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": launch.enable_fp_fusion,
        "maxnreg": launch.max_registers,
    }
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITIES[architecture][0], 32), options=options)


def measure(task: Task) -> Compiled:
    """Compile one launch; runs in a process of the pool."""
    launch, start = task.launch, _processor_seconds()
    try:
        compiled = compile_one(launch, task.architecture)
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
    """Everything that is launched, as far as regular expressions for modules and names ask for it."""
    return [
        Task(architecture, name)
        for architecture in architectures
        for name, launch in recorded(architecture).items()
        if re.search(modules, launch.module) and re.search(names, name)
    ]


def line(row: Row) -> str:
    one = row.compiled
    return (
        f"{row.task.architecture:7} {row.task.name:110} {one.registers:4} registers {one.stack:5} stack "
        f"{one.shared:7} shared {one.seconds:6.1f} s  {one.instructions()}  {row.problem}"
    )


def table(rows: Sequence[Row]) -> str:
    """One line per kernel, its architectures beside each other."""
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row.task.name, {})[row.task.architecture] = row
    shown = [name for name in ARCHITECTURES if any(row.task.architecture == name for row in rows)]
    lines = [f"| kernel | {' | '.join(shown)} |", "|---|" + "---|" * len(shown)]
    for name, of_name in by_name.items():
        cells = [_cell(of_name[one]) if one in of_name else "" for one in shown]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    one = row.compiled
    text = f"{one.registers} / {one.stack} / {one.shared} / {one.instructions()}"
    return text + (f" **{row.problem}**" if row.problem else "")


HEAD = """# Kernels as compiled

Written by `make aot`, with Triton {version} and without a GPU. `make aot-check`, which CI runs, makes the same check
with every Triton version of the Makefile. It fails on stack (spills) without a reason below, on more shared memory than
a block gets, and on a missing matrix instruction where one is meant (wgmma on sm_90 and tcgen05 on sm_100 for products
of 64 rows and more, mma elsewhere).

A row is a kernel as a launcher launches it (`benchmarks/launches.py`): operation and dtype, the constants that it is
compiled for, warps (w), stages (s), and where they are limited its registers (r). Of masked and unmasked, accumulating
and not, it is the variant with the most code (outer products: with masks and without); few others are compiled.
Some fp16 kernels that differ from bf16 only in the type of the matrix instruction have no row.

A cell: registers per thread / bytes of stack / bytes of shared memory / instructions in the PTX (static counts).

"""


def document(rows: Sequence[Row], triton_version: str) -> str:
    reasons = sorted(
        {f"- {row.task.name}, {where}: {why}" for row in rows for where, why in row.expected.stack.items()}
    )
    listed = "\nStack that is accepted, and why:\n\n" + "\n".join(reasons) + "\n" if reasons else ""
    return HEAD.format(version=triton_version) + table(rows) + listed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression for names")
    parser.add_argument("--module", default="", help="a regular expression for modules")
    parser.add_argument("--architecture", choices=ARCHITECTURES, action="append")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: all cores")
    parser.add_argument("--write", type=Path, help="the markdown file to write")
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.module or arguments.architecture):
        parser.error("--write keeps the whole table: no --only, --module or --architecture with it")
    triton_version = version("triton")
    wanted = tasks(arguments.architecture or ARCHITECTURES, arguments.module, arguments.only)
    rows = []
    # New processes, not copies of this one: PyTorch and the compiler have threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        for task, compiled in zip(wanted, pool.map(measure, wanted), strict=True):
            rows.append(Row(task, expected(task.launch), compiled))
            print(line(rows[-1]), flush=True)
    if arguments.write:
        rows.sort(key=lambda row: row.task.name)
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
