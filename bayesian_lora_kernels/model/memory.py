"""How much memory there is, and how many examples of a batch fit into a share of it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.packed_images import packed_keys

# Beyond this a CPU is hardly faster for more at once, and the graph of the piece only grows: matrix products want a
# few hundred rows, and a small model's operators enough elements to outweigh what each call costs.
CPU_TOKENS = 256
CPU_ELEMENTS = 2**17
# Of an image, the side of the smallest patch that is common.
PATCH = 14


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def default_budget(device: torch.device) -> int:
    """Half of what is free."""
    return free_bytes(device) // 2


def examples_within(
    budget: int | None,
    batch: Batch,
    layers: Sequence[LinearLayer],
    *,
    outputs: int = 1,
    weight_gradients: bool = False,
) -> int:
    """How many examples of a batch can be captured at once; at least 1.

    Args:
        budget: bytes for captured inputs and gradients; None: half of what is free.
        batch: on the device where it will run.
        layers: that are captured.
        outputs: cotangents whose gradients are held together.
        weight_gradients: whether gradients are held as `[d_out, d_in]` per example, rather than per token.
    """
    if budget is None:
        budget = default_budget(layers[0].device)
    tokens = tokens_of(batch)
    weighted = 0 if batch.weights is None else 4  # bytes of an input times the root of its weight
    per_example = 0
    for layer in layers:
        d_out, d_in = layer.shape
        gradient = d_out * d_in if weight_gradients else d_out * min(tokens, max(d_in, 1))
        per_example += (layer.module.weight.element_size() + weighted) * tokens * d_in + 4 * outputs * gradient
    return max(1, min(batch.size, budget // max(per_example, 1)))


def frugal_examples(batch: Batch, layers: Sequence[LinearLayer]) -> int:
    """How many examples a CPU can take at once at full speed; at least 1. Elsewhere, all of them.

    The graph of the whole model, which nobody can size beforehand, takes far more memory than what is captured.
    """
    if layers[0].device.type != "cpu":
        return batch.size
    width = max(max(layer.module.in_features, layer.module.out_features) for layer in layers)
    tokens = max(CPU_TOKENS, CPU_ELEMENTS // width)
    pieces = -(-batch.size // max(1, tokens // tokens_of(batch)))
    return -(-batch.size // pieces)  # of equal size, as far as that goes


def tokens_of(batch: Batch) -> int:
    """Of the longest example, as far as the shapes of a batch tell; packed patches are shared out evenly."""
    inputs, size = batch.inputs, batch.size
    if isinstance(inputs, Mapping):
        packed = packed_keys(inputs, size)
        counts = [
            math.ceil(value.shape[0] / size) if key in packed else _tokens_of(key, value)
            for key, value in inputs.items()
            if isinstance(value, Tensor) and value.ndim
        ]
    else:
        counts = [_tokens_of("", t) for t in (inputs if isinstance(inputs, (tuple, list)) else [inputs])]
    return max(counts, default=1)


def _tokens_of(key: str, value: Any) -> int:
    if not isinstance(value, Tensor) or value.ndim < 2:
        return 1
    if key == "position_ids":  # [3, N, T] for multimodal rotary positions
        return value.shape[-1]
    if not value.is_floating_point():  # [N, T], [N, choices, T]
        return value[0].numel() if len(value) else 1
    if value.ndim == 4:  # images [N, C, H, W]
        return max(value.shape[1], value.shape[2] * value.shape[3] // PATCH**2)
    if key == "input_features":  # [N, T, d], or a spectrogram [N, d, T]
        return max(value.shape[1:])
    return value.shape[1] if value.ndim > 2 else 1
