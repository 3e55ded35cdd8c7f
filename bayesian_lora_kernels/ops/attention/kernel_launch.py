"""Launches the kernels of `kernel.py`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..device import is_aligned, on_device
from . import kernel
from .variants import COLUMNS, mask_dtype, variants


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
    if value.shape[3] % COLUMNS:
        wide, dwide = (x.new_empty(*x.shape[:-1], -(-x.shape[-1] // COLUMNS) * COLUMNS) for x in (out, dout))
        value, dvalue = _in_vectors(value), None if dvalue is None else _in_vectors(dvalue)
        attention_jvp(wide, dwide, query, key, value, dquery, dkey, dvalue, mask, causal, scale)
        for narrow, padded in ((out, wide), (dout, dwide)):
            narrow.copy_(padded[..., : narrow.shape[-1]])
        return
    (chosen,) = variants(out, dout, query, key, value, dquery, dkey, dvalue, mask, causal, scale)
    one, tangents = chosen.configuration, len(dout)
    examples, heads, queries = query.shape[:3]
    tensors = [_in_vectors(x) for x in (query, key, value)]
    pairs = zip((dquery, dkey, dvalue), (query, key, value), strict=True)
    changes = [_in_vectors(_zeros(like, tangents) if x is None else x) for x, like in pairs]
    seen = query if mask is None else _as_read(mask, mask_dtype(query, mask))
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


def _as_read(mask: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In that dtype, a bool as bytes; what it is expanded over is not copied."""
    one = mask[tuple(slice(1 if stride == 0 else None) for stride in mask.stride())].to(dtype)
    return (one.view(torch.uint8) if one.dtype == torch.bool else one).expand(mask.shape)


def _zeros(like: Tensor, tangents: int) -> Tensor:
    """A tangent that is zero: one row."""
    return like.new_zeros(like.shape[-1]).expand(tangents, *like.shape)


def _strides(x: Tensor) -> list[int]:
    """Of all but the columns; of what there is one, 0."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def _in_vectors(x: Tensor) -> Tensor:
    """As it is, if rows lie without gaps and begin and end at multiples of 16 columns; else a copy of which they do."""
    width = x.shape[-1]
    if x.stride(-1) == 1 and is_aligned(x) and not any(one % COLUMNS for one in (width, *_strides(x))):
        return x
    return torch.nn.functional.pad(x, (0, -width % COLUMNS)).contiguous()
