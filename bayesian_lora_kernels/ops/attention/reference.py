"""Attention and its tangents in plain PyTorch, some queries at a time: the definition, and what CPU users run."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulate_dtype

# Numbers in a tile of weights: what a core's cache holds; on other devices, what is worth a launch.
_ELEMENTS = {"cpu": 1 << 19}
_ELEMENTS_ELSEWHERE = 1 << 24


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
    """Write ``P v`` to ``out`` and, for every tangent, ``dP v + P dv`` to ``dout``, with ``P`` the softmax of ``A =
    scale q k^T + mask``, ``dA = scale (dq k^T + q dk^T)`` and ``dP = P o (dA - sum_j P dA)``.

    A tile has some queries of all heads of an example, and the keys that they may see. Sums are in float32 or float64.
    """
    dtype = accumulate_dtype(query)
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    step = max(1, _ELEMENTS.get(query.device.type, _ELEMENTS_ELSEWHERE) // (heads * keys))
    for n in range(len(query)):
        k, v = key[n].to(dtype), value[n].to(dtype)
        for first in range(0, queries, step):
            rows = slice(first, first + step)
            seen = slice(min(first + step, keys) if causal else keys)  # no query of these sees a later key
            kt, v_seen = k[:, seen].mT, v[:, seen]
            q = _grouped(query[n, :, rows], scale, kt)
            weights = torch.bmm(q, kt)
            _softmax(
                weights.view(heads, -1, kt.shape[2]), None if mask is None else mask[n, :, rows, seen], first, causal
            )
            result = torch.bmm(weights, v_seen)
            out[n, :, rows] = result.view(heads, -1, v.shape[2])
            for s in range(len(dout)):
                change = torch.zeros_like(result) if dvalue is None else weights @ dvalue[s, n, :, seen].to(dtype)
                scores = None if dquery is None else torch.bmm(_grouped(dquery[s, n, :, rows], scale, kt), kt)
                if dkey is not None:
                    dkt = dkey[s, n, :, seen].to(dtype).mT
                    scores = torch.bmm(q, dkt) if scores is None else scores.baddbmm_(q, dkt)
                if scores is not None:  # the Jacobian of a softmax is its own transpose
                    change.baddbmm_(torch.ops.aten._softmax_backward_data(scores, weights, -1, dtype), v_seen)
                dout[s, n, :, rows] = change.view(heads, -1, v.shape[2])


def _grouped(x: Tensor, scale: float, like: Tensor) -> Tensor:
    """``x [heads, rows, d]`` as ``[kv heads, rows of all heads that share keys, d]``, times the scale."""
    return x.to(like.dtype).mul(scale).unflatten(0, (len(like), -1)).flatten(1, 2)


def _softmax(scores: Tensor, mask: Tensor | None, first: int, causal: bool) -> None:
    """In place, of ``scores [heads, rows, keys]`` with rows from ``first`` on; zero where a row may see no key."""
    if causal:
        later = scores[:, :, first:]
        later.masked_fill_(torch.ones(later.shape[1:], dtype=torch.bool, device=later.device).triu(1), -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores += mask
    empty = None if mask is None else scores.amax(-1, keepdim=True) == -torch.inf
    torch.softmax(scores, -1, out=scores)
    if empty is not None:
        scores.masked_fill_(empty, 0.0)
