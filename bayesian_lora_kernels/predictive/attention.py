"""Attention under forward-mode differentiation, without a matrix of all its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from bayesian_lora_kernels.ops import attention_jvp


def plain_attention() -> AbstractContextManager[None]:
    """PyTorch's attention runs inside as its math kernel, which has derivatives of every kind."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def attention_with_tangents() -> Iterator[None]:
    """PyTorch's attention runs inside as `ops.attention_jvp` where its inputs carry tangents, also of many samples.

    What that does not serve (dropout, a mask with a tangent, other layouts) runs as the math kernel.
    """
    with plain_attention(), _WithTangents():
        yield


class _WithTangents(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and (served := _served(*args, **(kwargs or {}))) is not None:
            return served
        return func(*args, **(kwargs or {}))


def _served(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The result with its tangent; None: not served. Arguments are those of PyTorch's function."""
    if torch.is_autocast_enabled(query.device.type):  # which casts them for PyTorch's function
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    inputs, masked = (query, key, value), attn_mask is not None
    if dropout_p or (masked and (is_causal or forward_ad.unpack_dual(attn_mask).tangent is not None)):
        return None
    if not query.ndim == key.ndim == value.ndim == 4 or not query.dtype == key.dtype == value.dtype:
        return None
    alike = key.shape[:3] == value.shape[:3] and key.shape[0] == query.shape[0] and key.shape[1] and key.shape[2]
    if not alike or query.shape[1] % key.shape[1] or not (query.shape[1] == key.shape[1] or enable_gqa):
        return None
    primals, tangents = zip(*(forward_ad.unpack_dual(one) for one in inputs), strict=True)
    if all(tangent is None for tangent in tangents):
        return None
    several = (None if tangent is None else tangent[None] for tangent in tangents)
    out, dout = attention_jvp(*primals, *several, mask=attn_mask, causal=is_causal, scale=scale)
    return forward_ad.make_dual(out, dout[0])
