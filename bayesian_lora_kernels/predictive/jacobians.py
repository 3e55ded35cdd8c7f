"""Gradients of chosen logits for all examples of a batch at once, and the Jacobians that they are the parts of."""

from __future__ import annotations

from collections.abc import Collection, Hashable

import torch
from torch import Tensor

from bayesian_lora_kernels.model.capture import Capture, LayerInput
from bayesian_lora_kernels.ops.checks import accumulate_dtype


def logit_gradients(recorded: Capture, indices: Tensor, weight_gradients: Collection[str]) -> dict[str, Tensor]:
    """One backward pass for each chosen logit, summed over the batch: examples do not interact.

    Args:
        recorded: a capture with logits `[N, ...]`, which count as `[N, K]`.
        indices: `[N, C]`, which of the K logits of each example.
        weight_gradients: layers of which the gradients of the weight are wanted.

    Returns:
        `{layer: [N, C, T, d_out]}`, or `[N, C, d_out, d_in]` for `weight_gradients`.
    """
    logits = recorded.logits
    n, count = indices.shape
    collected: dict[str, Tensor] = {}
    for c in range(count):
        cotangent = logits.new_zeros(n, logits[0].numel()).scatter_(1, indices[:, c : c + 1], 1).reshape(logits.shape)
        gradients = recorded.backward(cotangent, weight_gradients=weight_gradients, retain_graph=c + 1 < count)
        for name, gradient in gradients.items():
            if name not in collected:
                collected[name] = gradient.new_empty(n, count, *gradient.shape[1:])
            collected[name][:, c] = gradient
    return collected


def narrow_layers(recorded: Capture) -> set[str]:
    """Layers with fewer inputs than tokens: their weight gradient is smaller than their output gradients."""
    return {name for name, (a, _, _) in recorded.inputs.items() if a.shape[2] < a.shape[1]}


def weight_jacobian(seen: LayerInput, gradients: Tensor) -> Tensor:
    """`sum_t g_t a_t^T` for every example and logit: `[N, C, d_out, d_in]`, float32 (float64 for a float64 model).

    Args:
        seen: the layer's input `[N, T, d_in]`.
        gradients: `[N, C, T, d_out]`, zero where the input's mask is False.
    """
    dtype = accumulate_dtype(seen.a, gradients)
    a = seen.a if seen.mask is None else seen.a.masked_fill(~seen.mask[:, :, None], 0)
    return gradients.to(dtype).mT @ a.to(dtype)[:, None]


def contraction(
    seen: LayerInput, gradients: Tensor, narrow: bool, units: dict[Hashable, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `ops.jacobian_covariance` takes of a layer: `a`, `g` and `mask`.

    To it, a narrow layer with its weight gradient is a layer whose tokens are the unit vectors.

    Args:
        seen: the layer's input.
        gradients: of `logit_gradients`.
        narrow: whether they are weight gradients.
        units: the unit vectors made so far, which layers share.
    """
    if not narrow:
        return seen.a, gradients, seen.mask
    n, width = len(gradients), gradients.shape[-1]
    key = n, width, gradients.dtype, gradients.device
    if key not in units:
        units[key] = torch.eye(width, dtype=gradients.dtype, device=gradients.device).expand(n, -1, -1)
    return units[key], gradients.mT, None
