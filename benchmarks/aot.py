"""Compiles every kernel as it is shipped, for every architecture, without a GPU: `python -m benchmarks.aot`.

For each: registers, bytes of stack (spills), shared memory, matrix and FMA instructions. Ends with an error where a
kernel needs stack without a listed reason, more shared memory than a block gets, or lacks the matrix instruction that
is meant. `--write docs/aot.md` keeps the table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bayesian_lora_kernels.ops.shipped import ARCHITECTURES, KERNEL_MODULES, Shipped

MATRIX = {"wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync"}
BEST = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}


@dataclass
class Row:
    architecture: str
    shipped: Shipped
    registers: int = 0
    stack: int = 0
    shared: int = 0
    matrix: str = ""
    fma: int = 0
    problem: str = ""


def cuobjdump() -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        raise SystemExit("cuobjdump: neither in Triton nor on PATH")
    return found


def compile_one(shipped: Shipped, architecture: str) -> Any:
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


def measure(shipped: Shipped, architecture: str) -> Row:
    row = Row(architecture, shipped)
    try:
        compiled = compile_one(shipped, architecture)
    except Exception as error:  # any failure of the compiler is a row of the table, and the others go on
        row.problem = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
        return row
    ptx = compiled.asm["ptx"]
    row.registers, row.stack = resources(compiled.asm["cubin"])
    row.shared = compiled.metadata.shared
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in MATRIX.items()}
    row.matrix = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    row.fma = len(re.findall(r"\bfma\.rn\.(?:f32|f64)|\bfma\.rn\.f32x2", ptx))
    problems = []
    if row.stack and not (shipped.stack.get(architecture) or shipped.stack.get("all")):
        problems.append(f"{row.stack} bytes of stack")
    if row.shared > ARCHITECTURES[architecture][1]:
        problems.append(f"{row.shared} bytes of shared memory, a block gets {ARCHITECTURES[architecture][1]}")
    if shipped.matrix == "best" and not counts[BEST[architecture]]:
        problems.append(f"no {BEST[architecture]}")
    if shipped.matrix == "mma" and not any(counts.values()):
        problems.append("no matrix instruction")
    row.problem = "; ".join(problems)
    return row


def shipped_by(module: str, architecture: str, wanted: str) -> list[Shipped]:
    found = importlib.import_module(module).shipped(architecture)
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise ValueError(f"{module}: two configurations have the same name")
    return [one for one in found if re.search(wanted, one.name)]


def table(rows: list[Row]) -> str:
    lines = [
        "| kernel | architecture | warps | stages | registers | stack | shared | matrix instructions | FMA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.shipped.name} | {row.architecture} | {row.shipped.num_warps} | {row.shipped.num_stages} | "
        f"{row.registers} | {row.stack} | {row.shared} | {row.matrix or '-'} | {row.fma or '-'} |"
        + (f" **{row.problem}**" if row.problem else "")
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def document(rows: list[Row]) -> str:
    reasons = sorted(
        {f"- {row.shipped.name}, {where}: {why}" for row in rows for where, why in row.shipped.stack.items()}
    )
    return (
        "# Kernels as compiled\n\n"
        f"Written by `make aot` with Triton {triton.__version__}, without a GPU. Every configuration a launcher can "
        "choose: registers\nper thread, bytes of stack (spills) and of shared memory, matrix and FMA instructions in "
        "the PTX (static counts).\n\n"
        + table(rows)
        + ("\nStack that is accepted, and why:\n\n" + "\n".join(reasons) + "\n" if reasons else "")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression for names")
    parser.add_argument("--module", default="", help="a regular expression for modules")
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), action="append")
    parser.add_argument("--write", type=Path, help="the markdown file to write")
    arguments = parser.parse_args()
    rows = []
    for architecture in arguments.architecture or ARCHITECTURES:
        for module in KERNEL_MODULES:
            if not re.search(arguments.module, module):
                continue
            for shipped in shipped_by(module, architecture, arguments.only):
                row = measure(shipped, architecture)
                rows.append(row)
                print(
                    f"{architecture:7} {shipped.name:52} {row.registers:4} registers {row.stack:5} stack "
                    f"{row.shared:7} shared  {row.matrix or '-'}{f', {row.fma} fma' if row.fma else ''}  {row.problem}",
                    flush=True,
                )
    if arguments.write:
        rows.sort(key=lambda row: (row.shipped.name, list(ARCHITECTURES).index(row.architecture)))
        arguments.write.write_text(document(rows))
    failed = [row for row in rows if row.problem]
    print(f"Triton {triton.__version__}: {len(rows)} kernels, {len(failed)} with a problem")
    return 1 if failed else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
