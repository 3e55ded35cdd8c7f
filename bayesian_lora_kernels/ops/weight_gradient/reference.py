"""``sum_t g_t a_t^T`` of every example in plain PyTorch: the definition, and what CPU users run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masking import zero_masked

# Since PyTorch 2.8, and on CUDA only: 16-bit operands, sums and result in float32.
_WIDE_RESULT = "dtype_out" in torch.ops.aten.bmm.overloads()


def grouped_weight_gradient(
    outs: Sequence[Tensor], gs: Sequence[Tensor], inputs: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> None:
    """Write to each of ``outs: [N, d_out, d_in]`` the products of ``g: [N, T, d_out]`` and ``a: [N, T, d_in]``."""
    for out, g, a, mask in zip(outs, gs, inputs, masks, strict=True):
        g, a = zero_masked(g, mask), zero_masked(a, mask)
        if _WIDE_RESULT and out.is_cuda and g.dtype == a.dtype and g.dtype != out.dtype:
            torch.bmm(g.mT, a, out_dtype=out.dtype, out=out)
        else:
            torch.bmm(g.to(out.dtype).mT, a.to(out.dtype), out=out)
