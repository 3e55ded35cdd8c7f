"""What a batch is: a mapping of tensors, or a tuple (inputs, labels)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MASK_KEYS = ("attention_mask", "decoder_attention_mask")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on `device`; mappings, tuples and lists keep their kind."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def inputs_and_labels(batch: Any) -> tuple[Any, Tensor | None]:
    """A batch without its labels, and the labels (None where there are none).

    Raises:
        TypeError: if the batch is neither a mapping, a tensor nor a tuple of one or two.
    """
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}, batch.get("labels")
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2:
        return batch[0], batch[1] if len(batch) == 2 else None
    raise TypeError(
        f"batch: expected a mapping (input_ids, attention_mask, labels, ...) or a tuple (inputs, labels), got "
        f"{type(batch).__name__}" + (f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    )


def token_masks(batch: Any) -> list[Tensor]:
    """The `[N, T]` masks of valid tokens that come with a batch, as bool.

    Raises:
        ValueError: if an example has no valid token at all.
    """
    inputs = inputs_and_labels(batch)[0]
    masks = []
    if isinstance(inputs, Mapping):
        for key in MASK_KEYS:
            mask = inputs.get(key)
            if isinstance(mask, Tensor) and mask.ndim == 2:
                valid = mask.bool()
                empty = ~valid.any(dim=1)
                if empty.any():
                    raise ValueError(
                        f"{key}: expected at least one valid token per example, example {int(empty.nonzero()[0])} of "
                        "the batch has a mask of all False"
                    )
                masks.append(valid)
    return masks


def batch_size(batch: Any) -> int | None:
    """Number of examples, read off the first tensor; None if there is no tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    for value in values:
        size = batch_size(value)
        if size is not None:
            return size
    return None


def slice_batch(batch: Any, start: int, stop: int, size: int) -> Any:
    """Examples `start` to `stop` of a batch of `size`; tensors of another leading size are kept whole."""
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.ndim and batch.shape[0] == size else batch
    if isinstance(batch, Mapping):
        return {key: slice_batch(value, start, stop, size) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(slice_batch(value, start, stop, size) for value in batch)
    return batch
