"""Which implementations of an incremental update there are, what they refuse, and where ``auto`` takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..device import triton_refuses
from ..dispatch import Implementation, register
from ..verify.verifier import Evidence

_FOLDER = "bayesian_lora_kernels.ops.incremental_svd"
# Columns of the widest basis, before and after, that the Triton kernels take; WIDEST in kernel.py.
_WIDEST = 128


def native_is_faster(count: int, columns: int) -> bool:
    """Whether the native ``nystrom_eigh`` of ``count`` entries of ``columns`` columns beats PyTorch's on this CPU.

    Measured on one x86 core, in microseconds (minima of interleaved runs, C and K of a stream): PyTorch takes about
    105 for its calls and 0.16 l^2 an entry, one after another; the extension 1 + l / 48 times that, on all threads.
    PyTorch's time over the extension's, one entry: 2.0 at l = 20, 1.3 at 30, 0.4 at 74, 0.25 at 128; eight entries
    on one thread: 1.1 at l = 14, 0.9 at 20, 0.75 at 30, 0.3 at 74 and 128; on two threads: 1.7 at l = 30.
    """
    rounds = -(-count // torch.get_num_threads())
    return rounds * (1 + columns / 48) < count + 650 / columns**2


def _native_suits(outs: Sequence[Tensor], bases: Sequence[Tensor], xs: Sequence[Tensor], *others: Any) -> bool:
    # On a GPU the Triton kernels call the native solver themselves.
    if any(out.device.type != "cpu" for out in outs):
        return False
    sizes = Counter(
        min(out.shape) for out, x in zip(outs, xs, strict=True) if out.numel() and x.shape[0] > out.shape[1]
    )
    return len(sizes) > 0 and all(native_is_faster(count, columns) for columns, count in sizes.items())


def _native_refuses(outs: Sequence[Tensor], *others: Any) -> str | None:
    columns = max(min(out.shape) for out in outs)
    if columns > native.MAX_N:
        return f"it takes up to {native.MAX_N} columns, here are {columns}"
    return native.refuses_device(outs[0])


def _triton_refuses(outs: Sequence[Tensor], bases: Sequence[Tensor], *others: Any) -> str | None:
    widest = max(max(out.shape[1], basis.shape[1]) for out, basis in zip(outs, bases, strict=True))
    if widest > _WIDEST:
        return f"it takes up to {_WIDEST} columns, here are {widest}"
    return next(filter(None, map(triton_refuses, {(out.device, out.dtype): out for out in outs}.values())), None)


def _triton_suits(outs: Sequence[Tensor], *others: Any) -> bool:
    return all(out.is_cuda for out in outs)


def register_all() -> None:
    """Tell ``dispatch`` about them; one stream is a group of one."""
    name = "grouped_incremental_svd"
    evidence = Evidence(f"{_FOLDER}.problems:GROUPED", f"{_FOLDER}.plan:variants")
    for one in ("incremental_svd", name):
        register(one, "reference", Implementation(f"{_FOLDER}.reference", name))
        register(one, "native", Implementation(f"{_FOLDER}.nystrom", name, _native_refuses, _native_suits))
        register(one, "triton", Implementation(f"{_FOLDER}.kernel", name, _triton_refuses, _triton_suits, evidence))
