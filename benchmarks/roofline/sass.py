"""The machine code of a kernel: instructions, and which of them repeat together."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.aot import cuobjdump

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Loop:
    """First and last instruction, and the loops inside."""

    first: int
    last: int
    inner: tuple[Loop, ...] = field(default=())


def disassemble(cubin: bytes) -> list[tuple[str, str]]:
    """Name and operands of every instruction, without the padding behind the last."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([cuobjdump(), "-sass", path], check=True, capture_output=True, text=True).stdout
    return parse(text)


def parse(text: str) -> list[tuple[str, str]]:
    """As ``disassemble``, of what cuobjdump printed; branch targets become numbers of instructions."""
    lines = [(int(at, 16), name, rest.strip()) for at, name, rest in _LINE.findall(text)]
    number = {at: i for i, (at, _, _) in enumerate(lines)}
    found = []
    for _, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)$", rest) if name.startswith("BRA") else None
        found.append((name, str(number.get(int(target[1], 16), -1)) if target else rest))
    while found and found[-1][0] in ("NOP", "BRA"):
        found.pop()
    return found


def loops(jumps: Sequence[tuple[int, int]]) -> tuple[Loop, ...]:
    """The loops that jumps, each from where to where, make by going back; those with one head are one loop."""
    ends: dict[int, int] = {}
    for source, target in jumps:
        if target <= source:
            ends[target] = max(ends.get(target, -1), source)
    return _nest(sorted(ends.items(), key=lambda one: (one[0], -one[1])))


def _nest(intervals: list[tuple[int, int]]) -> tuple[Loop, ...]:
    found = []
    while intervals:
        first, last = intervals[0]
        inside = [one for one in intervals[1:] if one[0] <= last]
        intervals = [one for one in intervals[1:] if one[0] > last]
        found.append(Loop(first, last, _nest([(a, min(b, last)) for a, b in inside])))
    return tuple(found)


def jumps(instructions: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Of every branch, but those to itself."""
    return [
        (i, int(rest))
        for i, (name, rest) in enumerate(instructions)
        if name.startswith("BRA") and rest.lstrip("-").isdigit() and 0 <= int(rest) != i
    ]


def count(instructions: Sequence[tuple[str, str]]) -> Counter[str]:
    """Warp instructions by what they occupy: all ("issue"), bytes of shared memory, float64, special functions,
    barriers.
    """
    found: Counter[str] = Counter()
    for name, _ in instructions:
        found["issue"] += 1
        root = name.split(".")[0]
        if root in ("LDS", "STS", "LDSM", "STSM", "ATOMS"):
            found["shared"] += _shared_bytes(name)
        elif root in ("DFMA", "DADD", "DMUL", "DSETP", "DMNMX"):
            found["float64"] += 1
        elif root == "MUFU":
            found["special"] += 1
        elif root == "BAR":
            found["barriers"] += 1
    return found


def _shared_bytes(name: str) -> int:
    """Of a warp's 32 threads; an instruction takes a cycle of 128 bytes at least."""
    if name.startswith(("LDSM", "STSM")):
        matrices = name.rsplit(".")[-1]
        return 128 * (int(matrices) if matrices.isdigit() else 1)
    wide = re.search(r"\.(64|128)\b", name)
    return 32 * (int(wide[1]) // 8 if wide else 4)
