"""Public ``attention_jvp``: checks, allocation, dispatch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import FLOATS, check_device, check_tensor, describe
from ..device import triton_refuses
from ..dispatch import Implementation, check_impl, choose, register
from ..registration import custom_op
from ..verify.verifier import Evidence

_FOLDER = "bayesian_lora_kernels.ops.attention"
_WIDEST = 256  # a head, in the kernels


def _refuses(out: Tensor, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    if max(query.shape[3], value.shape[3]) > _WIDEST:
        return f"heads of {max(query.shape[3], value.shape[3])} numbers, more than {_WIDEST}"
    return triton_refuses(query)


def _on_gpu(out: Tensor, *others: Any) -> bool:
    return out.is_cuda


_NAME = "attention_jvp"
_EVIDENCE = Evidence(f"{_FOLDER}.problems:SUITE", f"{_FOLDER}.variants:variants")
register(_NAME, "reference", Implementation(f"{_FOLDER}.reference", _NAME))
register(_NAME, "triton", Implementation(f"{_FOLDER}.kernel_launch", _NAME, _refuses, _on_gpu, _EVIDENCE))


def attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dquery: Tensor | None = None,
    dkey: Tensor | None = None,
    dvalue: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention, and its derivative along S tangents, in memory linear in the tokens.

    With ``A = scale q k^T + mask`` and ``P`` its softmax over the keys, ``out = P v`` and ``dout = dP v + P dv``, where
    ``dP = P o (dA - sum_j P dA)`` and ``dA = scale (dq k^T + q dk^T)``. Neither P nor dP is ever whole in memory.

    Args:
        query: ``[N, H, T, d]``, float16, bfloat16, float32 or float64, any strides.
        key: ``[N, H_kv, T_k, d]`` of the same dtype, T_k at least 1. H is a multiple of H_kv: head h has the keys and
            values of ``h // (H / H_kv)``.
        value: ``[N, H_kv, T_k, d_v]``, likewise.
        dquery: ``[S, N, H, T, d]``, tangents of the query, in its dtype; None: zero. At least one of the three
            is there.
        dkey: ``[S, N, H_kv, T_k, d]``, likewise of the key.
        dvalue: ``[S, N, H_kv, T_k, d_v]``, likewise of the value.
        mask: broadcast to ``[N, H, T, T_k]``: bool, True where a query sees a key, or float, added to the scores
            (minus infinity excludes). It is constant. Keys and values that it excludes must be finite.
        causal: query t sees no key after t, counted from the first of both.
        scale: None: ``d^-1/2``.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ``out [N, H, T, d_v]`` and ``dout [S, N, H, T, d_v]`` in the dtype of the query, summed in float32 (or float64).
        Both are zero where a query sees no key, as of PyTorch's own attention. No gradient is recorded.
        ``torch.func.vmap`` over tangents is one call with more of them.

    Raises:
        TypeError: not a tensor, not a float dtype, or not that of the query; a scale that is no number.
        ValueError: a wrong shape or device, no tangent, no key, a scale that is not finite, an unknown ``impl``.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.

    Source: Dao et al. 2022 (FlashAttention) for tiles that are never stored; the derivative is that of a softmax.
    """
    check_impl(_NAME, impl)
    tensors = (query, key, value, dquery, dkey, dvalue, mask)
    scale = _validate(*tensors, causal, scale)
    with torch.no_grad():
        return _attention_jvp(*tensors, causal, scale, impl)


def _validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> float:
    """The scale."""
    check_tensor(f"{_NAME}: query", query, ("N", "H", "T", "d"))
    examples, heads, queries, width = query.shape
    check_tensor(f"{_NAME}: key", key, (examples, "H_kv", "T_k", width), (query.dtype,))
    kv_heads, keys = key.shape[1:3]
    check_tensor(f"{_NAME}: value", value, (examples, kv_heads, keys, "d_v"), (query.dtype,))
    if not keys or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{_NAME}: key: expected at least one key, and heads that divide the {heads} of the query, "
            f"got {describe(key)}"
        )
    given = {"dquery": (dquery, query), "dkey": (dkey, key), "dvalue": (dvalue, value)}
    tangents: int | str = "S"
    for name, (tangent, primal) in given.items():
        if tangent is not None:
            check_tensor(f"{_NAME}: {name}", tangent, (tangents, *primal.shape), (query.dtype,))
            tangents = len(tangent)
    if tangents in ("S", 0):
        raise ValueError(f"{_NAME}: expected at least one tangent of the query, the key or the value")
    for name, one in {"key": key, "value": value, **{name: one for name, (one, _) in given.items()}}.items():
        if one is not None:
            check_device(f"{_NAME}: {name}", one, query.device)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, *FLOATS):
            raise TypeError(f"{_NAME}: mask: expected a tensor, bool or float, got {describe(mask)}")
        check_device(f"{_NAME}: mask", mask, query.device)
        whole = (examples, heads, queries, keys)
        if mask.ndim > 4 or any(size not in (1, of) for size, of in zip(mask.shape[::-1], whole[::-1], strict=False)):
            raise ValueError(f"{_NAME}: mask: expected a shape that broadcasts to {list(whole)}, got {describe(mask)}")
    if not isinstance(causal, bool):
        raise TypeError(f"{_NAME}: causal: expected True or False, got {describe(causal)}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"{_NAME}: scale: expected a number or None, got {describe(scale)}")
    found = max(width, 1) ** -0.5 if scale is None else float(scale)
    if not math.isfinite(found):
        raise ValueError(f"{_NAME}: scale: expected a finite number, got {scale}")
    return found


def _allocate(
    query: Tensor, value: Tensor, dquery: Tensor | None, dkey: Tensor | None, dvalue: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:3], value.shape[3])
    tangents = next(len(one) for one in (dquery, dkey, dvalue) if one is not None)
    return query.new_empty(shape), query.new_empty((tangents, *shape))


@custom_op(
    f"bayesian_lora_kernels::{_NAME}",
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor? dquery, Tensor? dkey, Tensor? dvalue, Tensor? mask, "
        "bool causal, float scale, str impl) -> (Tensor, Tensor)"
    ),
)
def _attention_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    _validate(query, key, value, dquery, dkey, dvalue, mask, causal, scale)
    out, dout = _allocate(query, value, dquery, dkey, dvalue)
    whole = None if mask is None else mask.expand(*query.shape[:3], key.shape[2])
    arguments = (out, dout, query, key, value, dquery, dkey, dvalue, whole, causal, scale)
    function = choose(_NAME, impl, *arguments)
    if out.numel():
        function(*arguments)
    return out, dout


@_attention_jvp.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    _validate(query, key, value, dquery, dkey, dvalue, mask, causal, scale)
    return _allocate(query, value, dquery, dkey, dvalue)


@_attention_jvp.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, Tensor], tuple[None, int]]:
    """Over tangents, of which the batch makes more."""
    query, key, value, *tangents = arguments[:6]
    mask, *rest = arguments[6:]
    if any(in_dims[i] is not None for i in (0, 1, 2, 6)):
        raise NotImplementedError(f"{_NAME}: expected vmap over tangents alone, not over query, key, value or mask")
    batch = info.batch_size

    def joined(tangent: Tensor | None, at: int | None) -> Tensor | None:
        if tangent is None:
            return None
        return (tangent.expand(batch, *tangent.shape) if at is None else tangent.movedim(at, 0)).flatten(0, 1)

    more = [joined(tangent, at) for tangent, at in zip(tangents, in_dims[3:6], strict=True)]
    out, dout = _attention_jvp(query, key, value, *more, mask, *rest)
    return (out, dout.unflatten(0, (batch, -1))), (None, 0)
