"""What a Triton launcher asks about the device of its tensors. Triton itself is imported by the kernels only."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .dispatch import interpreting

# A kernel never allocates more scratch than this for the sake of parallelism.
SCRATCH_BYTES = 1 << 28


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of the configuration tables: ``sm_80`` (and 8.x), ``sm_90``, ``sm_100`` (and later).

    In the interpreter, ``sm_90``: its configurations are what is tested.
    """
    if device.type != "cuda":
        return "sm_90"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; 4 in the interpreter, where each program costs time."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(tensor: Tensor) -> AbstractContextManager[None]:
    """Launch on the device of ``tensor``, and on its current stream, whatever the process's current device is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def int64_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Pointers and shapes of many modules on the device; copied from pinned memory, so that the host does not wait."""
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def is_aligned(tensor: Tensor) -> bool:
    """Whether it begins at a multiple of 16 bytes, which Triton sees of a pointer at launch."""
    return tensor.data_ptr() % 16 == 0


def in_vectors(matrix: Tensor) -> bool:
    """Whether the rows of ``matrix: [M, d]`` are pieces of 16 aligned bytes, which a kernel then loads at once."""
    vector = 16 // matrix.element_size()
    strides = matrix.stride(1) == 1 and matrix.stride(0) % vector == 0
    return strides and matrix.shape[1] % vector == 0 and is_aligned(matrix)


def triton_refuses(*tensors: Tensor) -> str | None:
    """Why the Triton kernels cannot take these tensors (device, float64), or None."""
    for tensor in tensors:
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreting()):
            return f"it takes tensors on a CUDA device, these lie on {tensor.device}"
        if tensor.device.type == "cuda" and interpreting():
            return "TRITON_INTERPRET=1 is set, and the interpreter takes CPU tensors"
        if tensor.dtype == torch.float64:
            return "it sums in float32, and the input is float64"
        if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < (8, 0):
            return "it needs compute capability 8.0 or newer"
    return None
