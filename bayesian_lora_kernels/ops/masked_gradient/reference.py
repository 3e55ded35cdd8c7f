"""Whether tokens that a mask leaves out have a gradient, in plain PyTorch: the definition, and what CPU users run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .op import ROUNDINGS


def grouped_masked_gradient(
    out: Tensor, gs: Sequence[Tensor], inputs: Sequence[Tensor], masks: Sequence[Tensor]
) -> None:
    """Write to ``out: [len(gs)]`` whether a token that is left out, and whose input is not zero, has a gradient."""
    for i, (g, a, mask) in enumerate(zip(gs, inputs, masks, strict=True)):
        size = g.abs().amax(dim=2)  # [N, T]
        left_out = ~mask & (size > ROUNDINGS * torch.finfo(g.dtype).eps * size.amax())
        out[i] = (left_out & (a != 0).any(dim=2)).any()
