"""Launches the kernels of `kernel.py`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..device import is_aligned, on_device
from . import kernel
from .variants import mask_dtype, variants

_COLUMNS = 16  # that rows begin at multiples of, so that they are loaded 16 bytes at a time


def attention_jvp(
    out: Tensor,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> None:
    """As ``reference.attention_jvp``, in Triton."""
    if value.shape[3] % _COLUMNS:
        wide = [one.new_empty(*one.shape[:-1], -(-one.shape[-1] // _COLUMNS) * _COLUMNS) for one in (out, dout)]
        value, dvalue = _in_vectors(value), None if dvalue is None else _in_vectors(dvalue)
        attention_jvp(*wide, query, key, value, dquery, dkey, dvalue, mask, causal, scale)
        for one, padded in zip((out, dout), wide, strict=True):
            one.copy_(padded[..., : one.shape[-1]])
        return
    (chosen,) = variants(out, dout, query, key, value, dquery, dkey, dvalue, mask, causal, scale)
    one, tangents = chosen.configuration, len(dout)
    examples, heads, queries = query.shape[:3]
    tensors = [_in_vectors(x) for x in (query, key, value)]
    pairs = zip((dquery, dkey, dvalue), (query, key, value), strict=True)
    changes = [_in_vectors(_zeros(like, tangents) if x is None else x) for x, like in pairs]
    # What the mask is expanded over has stride 0, and is not copied.
    seen = query if mask is None else mask.to(mask_dtype(query, mask))
    seen = seen.view(torch.uint8) if seen.dtype == torch.bool else seen
    mask_strides = (0, 0, 0, 0) if mask is None else seen.stride()
    largest, total = (query.new_empty(examples, heads, queries, dtype=torch.float32) for _ in range(2))
    sizes = (heads, heads // key.shape[1], queries, key.shape[2], tensors[0].shape[3], value.shape[3])
    strides = [stride for x in tensors for stride in _strides(x)]
    programs = triton.cdiv(queries, one.queries) * triton.cdiv(value.shape[3], chosen.value_width) * examples * heads
    constants = {
        "MASK": "none" if mask is None else "bool" if mask.dtype == torch.bool else "added",
        "CAUSAL": causal,
        "EVEN": chosen.even,
        "PARTS": chosen.parts,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "ieee",
        "M_": one.queries,
        "N_": one.keys,
        "D_": chosen.width,
        "V_": chosen.value_width,
        "num_warps": one.num_warps,
        "num_stages": one.num_stages,
        "enable_fp_fusion": True,
        "maxnreg": one.max_registers,
    }
    with on_device(out):
        kernel.attention_kernel[(programs,)](
            *tensors, seen, out, largest, total, scale, *sizes, *strides, *mask_strides, **constants
        )  # fmt: skip
        kernel.tangents_kernel[(programs * triton.cdiv(tangents, one.tangents),)](
            *tensors, seen, *changes, out, largest, total, dout, scale, tangents, examples * heads, *sizes,
            *strides, *(stride for x in changes for stride in _strides(x)), *mask_strides,
            G_=one.tangents, **constants,
        )  # fmt: skip


def _zeros(like: Tensor, tangents: int) -> Tensor:
    """A tangent that is zero: one row."""
    return like.new_zeros(like.shape[-1]).expand(tangents, *like.shape)


def _strides(x: Tensor) -> list[int]:
    """Of all but the columns; of what there is one, 0."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def _in_vectors(x: Tensor) -> Tensor:
    """As it is, if rows lie without gaps and begin and end at multiples of 16 columns; else a copy of which they do."""
    width = x.shape[-1]
    if x.stride(-1) == 1 and is_aligned(x) and not any(one % _COLUMNS for one in (width, *_strides(x))):
        return x
    return torch.nn.functional.pad(x, (0, -width % _COLUMNS)).contiguous()
