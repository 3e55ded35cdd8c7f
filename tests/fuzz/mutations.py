"""Ways in which a file can be damaged, or made by someone who means harm; each is a function of a random generator."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

DEPTHS = (10, 500, 5_000, 100_000)
NUMBERS = (0, 1, -1, 2, 7, 2**31, 2**32 + 1, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**18, 10**30, 10**400)
FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf)
TEXTS = ("", "x", "F64", "I8", "BOOL", "../../etc/passwd", "/etc/passwd", "\0", "\ud800", "é", "exact", "kfac", "LORA")
FLOAT_BITS = (math.nan, math.inf, -math.inf, 1e308, -1e308, -1.0, 0.0, 5e-324, 3.0)


def bytes_of(data: bytes, random: Random) -> bytes:
    """Some bytes changed, cut out, repeated, or put elsewhere."""
    content = bytearray(data)
    if not content:
        return bytes(random.randbytes(random.randrange(20)))
    start = random.randrange(len(content))
    stop = min(len(content), start + random.choice((1, 2, 8, 64, 1000)))
    kind = random.randrange(9)
    if kind == 0:
        content[start] ^= 1 << random.randrange(8)
    elif kind == 1:
        content[start:stop] = random.randbytes(stop - start)
    elif kind == 2:
        del content[start:]
    elif kind == 3:
        del content[start:stop]
    elif kind == 4:
        content[start:start] = content[start:stop] * random.choice((1, 2, 50))
    elif kind == 5:
        other = random.randrange(len(content))
        there = slice(other, other + stop - start)
        content[start:stop], content[there] = content[there], content[start:stop]
    elif kind == 6:
        content[start:stop] = bytes(stop - start)
    elif kind == 7:
        content += random.randbytes(random.choice((1, 8, 1000)))
    else:
        content[:8] = struct.pack("<Q", random.choice((0, 1, len(data), len(data) - 8, 2**31, 2**40, 2**63, 2**64 - 1)))
    return bytes(content)


def json_of(data: bytes, random: Random) -> bytes:
    """A value, key or type changed somewhere in a JSON document."""
    document = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        places = list(_places(document))
        if not places:
            break
        owner, key = random.choice(places)
        kind = random.randrange(6)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[random.choice((*TEXTS, key + "x", key[:-1], *owner))] = owner.pop(key)
        elif kind == 2 and isinstance(owner, list):
            owner.insert(random.randrange(len(owner) + 1), _value(random))
        elif kind == 3:
            other, place = random.choice(places)
            owner[key], other[place] = other[place], owner[key]
        elif kind == 4 and isinstance(owner[key], (int, float)) and not isinstance(owner[key], bool):
            owner[key] = random.choice((owner[key] + 1, -owner[key], owner[key] * 2, owner[key] / 2, str(owner[key])))
        else:
            owner[key] = _value(random)
        if _is_circular(document):
            return data[: random.randrange(len(data))]
    text = json.dumps(document)
    if random.random() < 0.1:
        key = random.choice(list(document) or ["x"])
        text = "{" + json.dumps(key) + ":" + json.dumps(_value(random)) + "," + text[1:]  # a key that is there twice
    if random.random() < 0.03:
        depth = random.choice(DEPTHS)
        text = text.replace("0", random.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)), 1)
    if random.random() < 0.03:
        text = text.replace("1", "9" * random.choice((20, 400, 10_000)), 1)
    return text.encode()


def tensors_of(data: bytes, random: Random) -> bytes:
    """The header or the numbers of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header, numbers = data[8 : 8 + length], bytearray(data[8 + length :])
    kind = random.randrange(4)
    if kind == 0:
        header = json_of(header, random)
    elif kind == 1:  # two tensors change places, or share theirs
        entries = json.loads(header)
        names = [name for name in entries if name != "__metadata__"]
        one, other = random.choice(names), random.choice(names)
        field = random.choice(("data_offsets", "shape", "dtype", None))
        if field is None:
            entries[one], entries[other] = entries[other], entries[one]
        elif random.random() < 0.5:
            entries[one][field] = entries[other][field]
        else:
            entries[one][field], entries[other][field] = entries[other][field], entries[one][field]
        header = json.dumps(entries).encode()
    elif kind == 2 and len(numbers) >= 8:
        for _ in range(random.choice((1, 1, 10))):
            code, size = random.choice((("<d", 8), ("<f", 4)))
            place = random.randrange(len(numbers) // size) * size
            value = random.choice(FLOAT_BITS)
            numbers[place : place + size] = struct.pack(code, value if size == 8 else max(min(value, 3e38), -3e38))
    else:
        numbers = bytearray(bytes_of(bytes(numbers), random))
    return len(header).to_bytes(8, "little") + header + bytes(numbers)


def file_of(path: Path, random: Random) -> None:
    """Another kind of file in its place: none, an empty one, a folder, a pipe, a link."""
    others = [other for other in path.parent.iterdir() if other != path and not other.is_symlink() and other.is_file()]
    kind = random.randrange(7)
    path.unlink()
    if kind == 0:
        path.touch()
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(random.choice(("/dev/zero", "/dev/null", "/etc/passwd", "/", path.name, "nowhere")))
    elif kind == 4 and others:
        path.write_bytes(random.choice(others).read_bytes())
    elif kind == 5 and others:
        path.symlink_to(random.choice(others).name)


def mutate(path: Path, random: Random) -> None:
    """Change one file of a folder in one of these ways."""
    if random.random() < 0.05:
        file_of(path, random)
        return
    data = path.read_bytes()
    change: Callable[[bytes, Random], bytes] = bytes_of
    if path.suffix == ".json" and random.random() < 0.7:
        change = json_of
    elif path.suffix == ".safetensors" and random.random() < 0.7:
        change = tensors_of
    try:
        path.write_bytes(change(data, random))
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ):  # it was damaged before
        path.write_bytes(bytes_of(data, random))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every `(owner, key)` of a document."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _value(random: Random) -> Any:
    kind = random.randrange(5)
    if kind == 0:
        return random.choice(NUMBERS)
    if kind == 1:
        return random.choice(FLOATS)
    if kind == 2:
        return random.choice(TEXTS) * random.choice((1, 1, 1000))
    if kind == 3:
        return random.choice((None, True, False))
    return random.choice(([], {}, [[]], {"": None}, [1, 2], [-1], [2**62, 2**62], ["weight"], [None], {"x": [1]}))


def _is_circular(document: Any) -> bool:
    try:
        json.dumps(document)
    except ValueError:
        return True
    return False
