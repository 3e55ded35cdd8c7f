"""Named tensors in a safetensors file: written piece by piece, and read one at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PIECE_BYTES = 64 * 2**20  # of a matrix that is written in pieces
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Columns:
    """A matrix `[n, d]` that is handed over in slices of its columns: the whole may be more than memory holds.

    Attributes:
        width: d.
        read: `callable(slice) -> [n, columns]`, of one dtype and n, also for an empty slice.
    """

    width: int
    read: Callable[[slice], Tensor]


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Columns]) -> None:
    """Write a safetensors file, which the library itself cannot do without all of the tensors at hand.

    Args:
        path: of the file.
        tensors: of floats, on any device; one after the other is copied to the host, or a piece of it.

    Raises:
        TypeError: for a tensor of something else.
        OSError: if the file cannot be written.
    """
    kinds = {name: _kind(name, tensor) for name, tensor in tensors.items()}
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))  # so that all of them are aligned
    entries, end = {}, 0
    for name in order:
        dtype, shape = kinds[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            tensor = tensors[name]
            if isinstance(tensor, Tensor):
                file.write(_bytes(tensor).data)
            else:
                _write_columns(file, tensor, *kinds[name])


def values_digest(tensors: Mapping[str, Tensor | Columns]) -> str:
    """SHA-256 over dtypes, shapes and values, in this order, whatever the names; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        dtype, shape = _kind(name, tensor)
        digest.update(f"{dtype} {shape}\n".encode())
        pieces = [(0, tensor)] if isinstance(tensor, Tensor) else _pieces(tensor, dtype, shape)
        for _, piece in pieces:
            digest.update(_bytes(piece).data)
    return digest.hexdigest()


class TensorFile:
    """The tensors of a safetensors file, whose header is checked against its length before any is read.

    Args:
        path: of the file.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if its header is damaged, or says of sizes what the file does not hold.
    """

    def __init__(self, path: Path):
        self.path = path
        with _errors_name(self.path):
            self._file = _opened(path)
            self._slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, as the header has it."""
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> str:
        """Of a tensor, by safetensors' name of it."""
        return str(self._slices[name].get_dtype())

    def read(self, name: str, device: torch.device = CPU, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows, in memory of its own, so that nothing that happens to the file changes it."""
        with _errors_name(self.path):
            found = self._file.get_tensor(name) if rows is None else self._slices[name][rows]
            return found.to(device, copy=True)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:  # PyTorch opens and maps it once more, and says what happened by a number
        code = re.search(r"\((\d+)\)$", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Errors of the library over a file, as a ValueError that names it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def _kind(name: str, tensor: Tensor | Columns) -> tuple[torch.dtype, list[int]]:
    example = tensor if isinstance(tensor, Tensor) else tensor.read(slice(0, 0))
    shape = list(tensor.shape) if isinstance(tensor, Tensor) else [len(example), tensor.width]
    if example.dtype not in DTYPES:
        raise TypeError(f"{name}: expected a tensor of {', '.join(map(str, DTYPES))}, got {example.dtype}")
    return example.dtype, shape


def _write_columns(file: BinaryIO, columns: Columns, dtype: torch.dtype, shape: list[int]) -> None:
    n, width = shape
    start, row = file.tell(), width * dtype.itemsize
    for first, piece in _pieces(columns, dtype, shape):
        for i, part in enumerate(_bytes(piece).reshape(n, -1)):
            file.seek(start + i * row + first * dtype.itemsize)
            file.write(part.data)
    file.seek(start + n * row)


def _pieces(columns: Columns, dtype: torch.dtype, shape: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Slices of the columns, and the first column of each."""
    n, width = shape
    step = max(1, PIECE_BYTES // max(1, n * dtype.itemsize))
    for first in range(0, width, step):
        yield first, columns.read(slice(first, min(first + step, width)))


def _bytes(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    """The numbers of a tensor on the host, `[bytes]` uint8, without a copy if they are there and in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
