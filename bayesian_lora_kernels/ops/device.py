"""What a Triton launcher asks about the device of its tensors. Triton itself is imported by the kernels only."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

# A kernel never allocates more scratch than this for the sake of parallelism.
SCRATCH_BYTES = 1 << 28


# Tables of configurations go by the matrix instructions: sm_80 stands for all that multiply with mma.sync, as consumer
# GPUs of every generation do. Those give a block 99 KB of shared memory, so no configuration of it may take more.
TABLES = {"sm_80": "sm_80", "sm_86": "sm_80", "sm_89": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_120": "sm_80"}


def interpreting() -> bool:
    """Whether Triton's interpreter is on (``TRITON_INTERPRET=1``), which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of the configuration tables, one of the values of ``TABLES``.

    In the interpreter, ``sm_90``: its configurations are what is tested.
    """
    if device.type != "cuda":
        return "sm_90"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


@functools.cache
def gpu_refuses(device: torch.device) -> str | None:
    """Why no kernel of this package runs on this CUDA device, or None. The one place that knows which GPUs do."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is built for AMD (HIP)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, {device} has {capability[0]}.{capability[1]}"
    return None


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
    # Where the table is made is said: a default device of the process must not decide it.
    table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def is_aligned(tensor: Tensor) -> bool:
    """Whether it begins at a multiple of 16 bytes, which Triton sees of a pointer at launch."""
    return tensor.data_ptr() % 16 == 0


def in_vectors(matrix: Tensor) -> bool:
    """Whether the rows of ``matrix: [M, d]`` are pieces of 16 aligned bytes, which a kernel then loads at once."""
    vector = 16 // matrix.element_size()
    strides = matrix.stride(1) == 1 and matrix.stride(0) % vector == 0
    return strides and matrix.shape[1] % vector == 0 and is_aligned(matrix)


def widened(masks: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each distinct mask as contiguous int16, made once.

    A mask of bytes beside bfloat16 operands makes the compiler give every thread four neighbours of a row, and the
    operands of ``mma.sync`` are then put together element by element.
    """
    made: dict[tuple[object, ...], Tensor] = {}
    result: list[Tensor | None] = []
    for mask in masks:
        if mask is None:
            result.append(None)
            continue
        key = (mask.data_ptr(), mask.shape, mask.stride())
        if key not in made:
            made[key] = mask.to(torch.int16, memory_format=torch.contiguous_format)
        result.append(made[key])
    return result


def triton_refuses(*tensors: Tensor) -> str | None:
    """Why the Triton kernels cannot take these tensors (device, float64), or None."""
    for device, dtype in {(tensor.device, tensor.dtype): None for tensor in tensors}:
        if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
            return f"it takes tensors on a CUDA device, these lie on {device}"
        if dtype == torch.float64:
            return "it sums in float32, and the input is float64"
        if device.type == "cuda":
            if interpreting():
                return "TRITON_INTERPRET=1 is set, and the interpreter takes CPU tensors"
            if reason := gpu_refuses(device):
                return reason
            if torch.cuda.is_current_stream_capturing():
                return "a CUDA graph is being captured, and it would keep this call's table of pointers"
    return None
