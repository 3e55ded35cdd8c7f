"""What a batch is: a mapping of tensors, or a tuple (inputs, labels)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DECODER_MASK = "decoder_attention_mask"
MASK_KEYS = ("attention_mask", DECODER_MASK)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`, as one that autograd may keep; tuples and lists keep their kind."""
    if isinstance(batch, Tensor):
        moved = batch.to(device)
        return moved.clone() if moved.is_inference() else moved
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
    """The `[N, T]` masks of valid tokens that come with a batch, as bool; a decoder's ids without a mask are all valid.

    Raises:
        ValueError: if an example has no valid token at all, or if an encoder's and a decoder's mask differ in nothing
            but their content: by its shape alone is known which of them describes a layer's tokens.
    """
    inputs = inputs_and_labels(batch)[0]
    masks = []
    if isinstance(inputs, Mapping):
        for key in MASK_KEYS:
            mask = inputs.get(key)
            if mask is None and key == DECODER_MASK and isinstance(inputs.get("decoder_input_ids"), Tensor):
                mask = torch.ones_like(inputs["decoder_input_ids"])
            if isinstance(mask, Tensor) and mask.ndim == 2:
                valid = mask.bool()
                empty = ~valid.any(dim=1)
                if empty.any():
                    raise ValueError(
                        f"{key}: expected at least one valid token per example, example {int(empty.nonzero()[0])} of "
                        "the batch has a mask of all False"
                    )
                masks.append(valid)
    if len(masks) == 2 and masks[0].shape == masks[1].shape and not torch.equal(*masks):
        raise ValueError(
            f"{' and '.join(MASK_KEYS)}: both have the shape {list(masks[0].shape)} but differ, so that nothing tells "
            "which of them describes a layer's tokens; pad one of the two by another column"
        )
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
