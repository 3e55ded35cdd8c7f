"""Instructions of the innermost loops of kernels as compiled: `python -m benchmarks.loops --only REGEX`, without a GPU.

For each kernel that `benchmarks.launches` records: instructions a warp issues in a round of each innermost loop,
barriers among them, and in the whole kernel loads and stores of global memory by their width in bits.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from benchmarks import aot
from benchmarks.roofline import sass


def innermost(found: Sequence[sass.Loop]) -> Iterator[sass.Loop]:
    """The loops without a loop inside."""
    for one in found:
        if one.inner:
            yield from innermost(one.inner)
        else:
            yield one


def widths(instructions: Sequence[tuple[str, str]]) -> str:
    """How many loads and stores of global memory of each width."""
    counts: Counter[str] = Counter()
    for name, _ in instructions:
        if name.split(".")[0] in ("LDG", "STG"):
            wide = re.search(r"\.(16|64|128)\b|\.(U8|U16)\b", name)
            counts[f"{name[:3]}.{next(filter(None, wide.groups())) if wide else 32}"] += 1
    return " ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def line(task: aot.Task) -> str:
    """What there is to say of one launch."""
    instructions = sass.disassemble(aot.compile_one(task.launch, task.architecture).asm["cubin"])
    rounds = []
    for loop in innermost(sass.loops(sass.jumps(instructions))):
        counts = sass.count(instructions[loop.first : loop.last + 1])
        rounds.append(f"{counts['issue']} ({counts['barriers']} barriers)")
    return f"{task.architecture:7} {task.name}: loops {', '.join(rounds) or '-'}; {widths(instructions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", required=True, help="a regular expression for names")
    parser.add_argument("--architecture", choices=aot.ARCHITECTURES, action="append")
    arguments = parser.parse_args()
    for task in aot.tasks(arguments.architecture or ("sm_80", "sm_90"), names=arguments.only):
        print(line(task), flush=True)


if __name__ == "__main__":
    main()
