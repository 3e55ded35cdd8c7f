"""One thread of a compiled program, followed through its PTX: how often every block of instructions runs, and what it
reads and writes.

Only what decides branches, predicates and addresses is computed; what was loaded from anything but a table of pointers
is unknown, and so is all that follows from it. A branch that depends on it is not taken, but for one past all loops to
the end of the program: where a flag in memory decides whether a program has anything to do, it has nothing.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Value = int | None
Registers = dict[str, Value]
MOST_STEPS = 3_000_000

_ROUND = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq}
_COMPARE = {**_ROUND, "ne": operator.ne, "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
_MATRIX = re.compile(r"m(\d+)n(\d+)k(\d+).*?\.(bf16|f16|tf32|f64|e4m3|s8)\b")


@dataclass
class Instruction:
    """``predicate`` is a register, or empty; the instruction runs where it is not ``negated``."""

    name: str
    operands: list[str]
    predicate: str = ""
    negated: bool = False
    needed: bool = False

    @functools.cached_property
    def root(self) -> str:
        return self.name.split(".")[0]

    @functools.cached_property
    def width(self) -> int:
        """Bits of its type."""
        return _width(self.name)

    @functools.cached_property
    def target(self) -> str | None:
        return self.operands[0] if self.root == "bra" else None

    @functools.cached_property
    def is_global(self) -> bool:
        """Whether it reads or writes device memory."""
        return ".global" in self.name and self.root in ("ld", "st", "cp", "atom", "red")

    @functools.cached_property
    def written(self) -> list[str]:
        if self.root in ("st", "bra", "cp", "bar", "ret", "red", "prefetch"):
            return []
        return re.findall(r"%[a-z]+\d+", self.operands[0]) if self.operands else []

    @functools.cached_property
    def read(self) -> list[str]:
        first = 0 if not self.written else 1
        return re.findall(r"%[a-z]+\d+", ",".join(self.operands[first:])) + [self.predicate] * bool(self.predicate)

    @functools.cached_property
    def element_bytes(self) -> int:
        """Of one thread: what is loaded or stored."""
        if self.name.startswith("cp.async.bulk"):
            raise NotImplementedError(f"{self.name}: its bytes are in a descriptor, which nothing here reads")
        if self.name.startswith("cp.async"):
            return int(self.operands[2], 0)
        lanes = re.search(r"\.v(\d)", self.name)
        return int(lanes[1] if lanes else 1) * self.width // 8


@dataclass
class Block:
    name: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass(frozen=True)
class Access:
    """An instruction that reads or writes device memory: how often this thread ran it, and where it first did."""

    bytes: int
    writes: bool
    times: int
    address: Value


@dataclass(frozen=True)
class Trace:
    """What one thread did: how often each block ran, and its accesses."""

    blocks: Counter[int]
    accesses: list[Access]


def _width(name: str) -> int:
    found = re.search(r"\.(?:pred|[busf](\d+)(?:x2)?|bf16|tf32)$", name)
    return int(found[1]) if found and found[1] else {"pred": 1, "bf16": 16, "tf32": 32}.get(name.rsplit(".")[-1], 32)


def parse(text: str) -> list[Block]:
    """The blocks of the one kernel in a PTX module, in order."""
    body = text[text.index(".entry") :]
    body = body[body.index("\n{") + 2 :]
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^\s*\.(?:loc|file|pragma)[^\n]*", "", body, flags=re.M)
    blocks = [Block("")]
    for statement in re.split(r";|(?<=:)\s", body.split("\n}")[0]):
        statement = " ".join(statement.replace("\t", " ").split()).lstrip("{} ")
        label = re.fullmatch(r"([$\w.]+):", statement)
        if label:
            blocks.append(Block(label[1]))
        elif statement and not statement.startswith("."):
            blocks[-1].instructions.append(_instruction(statement))
            if blocks[-1].instructions[-1].target:
                blocks.append(Block(""))
    found = [block for block in blocks if block.instructions or block.name]
    _mark_needed([one for block in found for one in block.instructions])
    return found


def _instruction(statement: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%?\w+) )?([\w.:]+) ?(.*)", statement)
    if found is None:
        raise ValueError(f"no PTX instruction: {statement}")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", found[4])
    return Instruction(found[3], [one.strip() for one in operands if one.strip()], found[2] or "", found[1] == "!")


def _mark_needed(instructions: list[Instruction]) -> None:
    """What branches, predicates and addresses follow from."""
    writers: dict[str, list[Instruction]] = {}
    for one in instructions:
        for register in one.written:
            writers.setdefault(register, []).append(one)
    left: list[str] = []
    for one in instructions:
        if one.target or one.is_global:
            one.needed = True
            left += one.read
        elif one.predicate:
            left.append(one.predicate)
    seen: set[str] = set()
    while left:
        register = left.pop()
        if register in seen:
            continue
        seen.add(register)
        for one in writers.get(register, []):
            one.needed = True
            left += one.read


def matrix_work(block: Block) -> dict[str, int]:
    """Operations of the matrix instructions of a block for one warp, by the type of their operands and by kind."""
    found: Counter[str] = Counter()
    for one in block.instructions:
        kind = one.root
        shape = _MATRIX.search(one.name) if kind in ("mma", "wgmma") else None
        if shape:
            m, n, k = map(int, shape.groups()[:3])
            type_ = "f64" if one.name.endswith("f64") else shape[4]
            found[f"{kind} {type_}"] += 2 * m * n * k // (4 if kind == "wgmma" else 1)
    return dict(found)


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0])


def _signed(value: int, width: int) -> int:
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value


class Thread:
    """Runs a kernel's blocks for one thread of one program.

    Args:
        blocks: as ``parse`` returns them.
        parameters: the values of the kernel's arguments in order; floats as bits.
        special: ``%tid.x``, ``%ctaid.x``, ... and what else is known by name.
        memory: the 64-bit integers that are known, by address.
    """

    def __init__(
        self, blocks: list[Block], parameters: list[Value], special: Mapping[str, int], memory: Mapping[int, int]
    ) -> None:
        self.blocks, self.parameters, self.special, self.memory = blocks, parameters, special, memory
        self.labels = {block.name: i for i, block in enumerate(blocks) if block.name}
        self.registers: Registers = {}
        jumps = [
            (i, self.labels[one.target]) for i, block in enumerate(blocks) for one in block.instructions if one.target
        ]
        self.last_loop = max((source for source, target in jumps if target <= source), default=-1)

    def run(self) -> Trace:
        at, steps, counts = 0, 0, Counter[int]()
        times: dict[int, list[object]] = {}
        while at < len(self.blocks):
            counts[at] += 1
            following = at + 1
            for one in self.blocks[at].instructions:
                if not one.needed and one.root != "ret":
                    continue
                steps += 1
                runs = self._runs(one)
                if one.target:
                    if runs or (runs is None and at <= self.last_loop < self.labels[one.target] and self._ends(one)):
                        following = self.labels[one.target]
                elif one.root == "ret":
                    if runs:
                        return Trace(counts, self._accesses(times))
                elif one.is_global:
                    if runs is not False:
                        self._access(one, times)
                elif runs is not False:
                    self._compute(one)
            if steps > MOST_STEPS:
                raise RuntimeError("the thread does not end")
            at = following
        return Trace(counts, self._accesses(times))

    def _ends(self, branch: Instruction) -> bool:
        """Whether it leads to the end without anything read or written."""
        rest = [one for block in self.blocks[self.labels[branch.target or ""] :] for one in block.instructions]
        return not any(one.is_global or one.target for one in rest)

    def _runs(self, one: Instruction) -> bool | None:
        """None: unknown; a branch is then not taken."""
        if not one.predicate:
            return True
        value = self.registers.get(one.predicate)
        return None if value is None else bool(value) != one.negated

    def _accesses(self, times: dict[int, list[object]]) -> list[Access]:
        return [Access(*one) for one in times.values()]  # type: ignore[arg-type]

    def _access(self, one: Instruction, times: dict[int, list[object]]) -> None:
        source = 1 if one.name.startswith(("cp", "ld", "atom")) else 0
        address = self._address(one.operands[source])
        writes, size = one.root in ("st", "red"), one.element_bytes
        if one.name.startswith("cp.async") and len(one.operands) > 3:  # fewer are read where a row is masked
            given = self._value(one.operands[3])
            size = size if given is None else given
        entry = times.setdefault(id(one), [size, writes, 0, address])
        entry[2] += 1  # type: ignore[operator]
        if one.name.startswith("ld"):
            width = one.width // 8
            for i, register in enumerate(one.written):
                known = None if address is None else self.memory.get(address + i * width)
                self.registers[register] = None if known is None else known & ((1 << 8 * width) - 1)
        elif one.name.startswith("atom"):
            # Tickets are drawn in order; what is waited for is there.
            self.registers[one.written[0]] = self.special["%ctaid.x"] if one.operands[-1] == "1" else None

    def _address(self, text: str) -> Value:
        base, _, offset = text.strip("[] ").replace(" ", "").partition("+")
        value = self._value(base)
        return None if value is None else value + int(offset or "0", 0)

    def _value(self, text: str) -> Value:
        if text in self.registers:
            return self.registers[text]
        if text in self.special:
            return self.special[text]
        return _constant(text)

    def _compute(self, one: Instruction) -> None:
        registers = one.written
        if one.name.startswith("ld.param"):
            index = re.search(r"_param_(\d+)", one.operands[1])
            self.registers[registers[0]] = self.parameters[int(index[1])] if index else None
            return
        if one.name.startswith("mov.b") and len(registers) == 2:  # one register into two
            value, half = self._value(one.operands[1]), one.width // 2
            for i, register in enumerate(registers):
                self.registers[register] = None if value is None else (value >> (i * half)) & ((1 << half) - 1)
            return
        for register in registers[1:]:
            self.registers[register] = None
        if registers:
            self.registers[registers[0]] = self._result(one, [self._value(text) for text in one.operands[1:]])

    def _result(self, one: Instruction, values: list[Value]) -> Value:
        root, width = one.root, one.width
        if root in ("and", "or") and width == 1:  # one of two may decide
            return _logic(root == "and", values)
        if root == "selp" and values[2] is not None:
            return values[0] if values[2] else values[1]
        if not values or any(value is None for value in values):
            return None
        known = [value for value in values if value is not None]
        result = _float_result(one, known) if re.search(r"\.f(16|32|64)", one.name) else _integer(one, known, width)
        if result is None:
            return None
        if root == "cvt":
            width = _width("." + one.name.split(".")[-2])
        return result & ((1 << (2 * width if ".wide" in one.name else width)) - 1)


@functools.cache
def _constant(text: str) -> Value:
    if re.fullmatch(r"-?(0x[\da-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return int(text[2:], 16) if text.startswith("0f") else None


def _logic(both: bool, values: list[Value]) -> Value:
    decides = 0 if both else 1
    if any(value is not None and value == decides for value in values):
        return decides
    return None if None in values else 1 - decides


def _integer(one: Instruction, values: list[int], width: int) -> Value:
    parts = one.name.split(".")
    root = parts[0]
    signed = parts[-1].startswith("s")
    x = [_signed(v, width) if signed else v & ((1 << width) - 1) for v in values]
    if root == "cvt":
        bits = int(parts[-1][1:])
        return _signed(values[0], bits) if signed else values[0] & ((1 << bits) - 1)
    if root == "setp":
        if len(parts) > 3 or parts[1] not in _COMPARE:
            return None
        return int(_COMPARE[parts[1]](x[0], x[1]))
    if root == "shr":
        return x[0] >> min(values[1], width)
    if root in ("div", "rem"):
        if x[1] == 0:
            return None
        quotient = abs(x[0]) // abs(x[1]) * (1 if (x[0] < 0) == (x[1] < 0) else -1)
        return quotient if root == "div" else x[0] - quotient * x[1]
    if root == "bfe":
        field_ = (values[0] & ((1 << width) - 1)) >> values[1] & ((1 << values[2]) - 1)
        return _signed(field_, values[2]) if signed and values[2] else field_
    if root in ("mul", "mad") and parts[1] == "hi":
        return (x[0] * x[1] >> width) + (x[2] if root == "mad" else 0)
    if root == "mad" and parts[1] == "wide":
        x[2] = values[2]
    function = _INTEGER.get(root)
    return None if function is None else function(x)


_INTEGER: dict[str, Callable[[list[int]], int]] = {
    "mov": lambda x: x[0],
    "cvta": lambda x: x[0],
    "add": lambda x: x[0] + x[1],
    "sub": lambda x: x[0] - x[1],
    "mul": lambda x: x[0] * x[1],
    "mad": lambda x: x[0] * x[1] + x[2],
    "min": min,
    "max": max,
    "neg": lambda x: -x[0],
    "abs": lambda x: abs(x[0]),
    "not": lambda x: ~x[0],
    "and": lambda x: x[0] & x[1],
    "or": lambda x: x[0] | x[1],
    "xor": lambda x: x[0] ^ x[1],
    "shl": lambda x: x[0] << min(x[1] & 0xFFFFFFFF, 64),
    "shfl": lambda x: x[0],  # of a number that all threads share
}


def _float_result(one: Instruction, values: list[int]) -> Value:
    """float32 arithmetic of addresses: square roots of tile numbers."""
    parts = one.name.split(".")
    root = parts[0]
    if root == "cvt" and parts[-1] == "f32" and parts[-2][0] in "su":
        number = _float(values[0])
        return (math.floor if "rmi" in parts else math.trunc)(number) if math.isfinite(number) else None
    if root == "cvt" and parts[-2] == "f32" and parts[-1][0] in "su":
        bits = int(parts[-1][1:])
        return _bits(float(_signed(values[0], bits) if parts[-1][0] == "s" else values[0] & ((1 << bits) - 1)))
    if parts[-1] != "f32" or root not in ("add", "sub", "mul", "fma", "sqrt", "mov"):
        return None
    x = [_float(value) for value in values]
    if root == "sqrt":
        return _bits(math.sqrt(x[0])) if x[0] >= 0 else None
    made = {"add": lambda: x[0] + x[1], "sub": lambda: x[0] - x[1], "mul": lambda: x[0] * x[1]}
    made |= {"fma": lambda: x[0] * x[1] + x[2], "mov": lambda: x[0]}
    return _bits(made[root]())
