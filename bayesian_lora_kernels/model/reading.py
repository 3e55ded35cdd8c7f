"""What a user's object says: its inputs, its labels, how many examples it has; and whether that can be.

A batch is a mapping of model inputs (`input_ids`, `attention_mask`, `labels`, ...) or a tuple `(inputs, labels)`. Named
tuples and dataclasses are one or the other, by the names of their fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora_kernels.model.containers import as_tensor, is_numbers, is_record, items_of, rebuilt
from bayesian_lora_kernels.model.packed_images import PACKED_KEYS

DECODER_MASK = "decoder_attention_mask"
MASK_KEYS = ("attention_mask", DECODER_MASK)
LABEL_KEYS = ("labels", "label", "label_ids")  # the first that is there; transformers' collators know all three
WEIGHTS = "weights"  # how often each example counts

# Their first dimension is the examples', in this order of trust.
EXAMPLE_KEYS = ("input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids", "input_features", "input_values")
# What models take one row of for each example: numbers under these names must be rectangular.
ROW_KEYS = frozenset({*EXAMPLE_KEYS, DECODER_MASK, "token_type_ids", "position_ids", "mm_token_type_ids"})
INPUT_NAMES = ROW_KEYS | {"pixel_values"}  # by which a named tuple is known to mean its names, not its places
SHAPES = {"input_ids": "[N, T]", "inputs_embeds": "[N, T, d]", "decoder_input_ids": "[N, T]"}
# Their first dimension is something else, or may be.
OTHER_KEYS = PACKED_KEYS | {"position_ids", "cache_position"}


def check_loader(loader: Any, name: str = "loader") -> None:
    """Whether a loader, an argument of this name, can be one.

    Raises:
        TypeError: if it is a single batch, or cannot be iterated over.
    """
    expected = f"{name}: expected an iterable of batches such as a DataLoader or a list of batches"
    iterable = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    if isinstance(loader, (Mapping, Tensor, np.ndarray)) or (is_record(loader) and not iterable):
        raise TypeError(f"{expected}, got one batch ({type(loader).__name__}); pass [batch]")
    if not iterable:
        raise TypeError(f"{expected}, got {type(loader).__name__}")


def parsed(batch: Any, labels: bool = True) -> Any:
    """A batch of the same kind, where that can be, with its numbers as tensors; see `Batch.of`, also for errors."""
    _read(batch)
    batch = _with_tensors(batch if labels else _without_labels(batch))
    inputs, found, name = _read(batch)
    _check_examples(inputs, found, name)
    _check_weights(batch)
    _check_masks(inputs if isinstance(inputs, Mapping) else {})
    return batch


def inputs_and_labels(batch: Any) -> tuple[Any, Tensor | None]:
    """A batch without its labels, and the labels (None where there are none).

    The inputs of a mapping are of its type where that can be; those of a dataclass or named tuple of columns, a dict.

    Raises:
        TypeError: for a batch of a type that means nothing, or labels that are no numbers.
        ValueError: if labels are rows of different lengths.
    """
    inputs, labels, name = _read(batch)
    return inputs, None if labels is None else _label_tensor(name, labels)


def weights_of(batch: Any) -> Tensor | None:
    """How often each example of a batch counts, `[N]`; None: once."""
    if not has_names(batch):
        batch = batch[0] if isinstance(batch, (tuple, list)) and batch and has_names(batch[0]) else {}
    return items_of(batch).get(WEIGHTS)


def unweighted(batch: Any) -> Any:
    """The same kind of batch, without weights: no key in a mapping, None in a field."""
    if weights_of(batch) is None:
        return batch
    items = items_of(batch)
    if not has_names(batch):
        return rebuilt(batch, {**items, 0: unweighted(batch[0])})
    bare = {key: value for key, value in items.items() if key != WEIGHTS}
    return rebuilt(batch, bare if isinstance(batch, Mapping) else {**items, WEIGHTS: None})


def size_of(batch: Any) -> int | None:
    """Number of examples: that of the labels, of inputs known to have examples first, or of the first tensor."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch.shape[0] if batch.ndim else None
    if has_names(batch):
        items = items_of(batch)
        for key in (_label_key(items), *EXAMPLE_KEYS):
            size = _rows(items.get(key))
            if size is not None:
                return size
        keys = [key for key in items if key not in (*LABEL_KEYS, WEIGHTS)]
        keys.sort(key=lambda key: 2 if key in OTHER_KEYS else int(_is_text(items[key])))
        return _first(size_of(items[key]) for key in keys)
    if isinstance(batch, (tuple, list)):
        if _is_text(batch):
            return len(batch)
        labels = _rows(batch[1]) if len(batch) == 2 and not isinstance(batch[0], (Tensor, np.ndarray)) else None
        return labels if labels is not None else _first(size_of(value) for value in batch)
    return None


def has_names(value: Any) -> bool:
    """Whether its parts are known by name: a mapping, a dataclass, a named tuple with a model's names."""
    if isinstance(value, tuple):
        names = getattr(value, "_fields", ())
        return not INPUT_NAMES.isdisjoint(names) or ("inputs" in names and not set(LABEL_KEYS).isdisjoint(names))
    return isinstance(value, Mapping) or is_record(value)


def _read(batch: Any) -> tuple[Any, Any, str]:
    """Inputs, labels and the name of the labels, as they are."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch, None, "labels"
    if has_names(batch):
        items = items_of(batch)
        name = _label_key(items)
        labels = items.get(name)
        if "inputs" in items and not isinstance(batch, Mapping):
            return items["inputs"], labels, name
        bare = {key: value for key, value in items.items() if key not in (*LABEL_KEYS, WEIGHTS)}
        return rebuilt(batch, bare) if isinstance(batch, Mapping) else bare, labels, name
    expected = "batch: expected a mapping (input_ids, attention_mask, labels, ...) or a tuple (inputs, labels), got "
    kind = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        if len(batch) > 1 and all(has_names(one) for one in batch):
            raise TypeError(f"{expected}a {kind} of {len(batch)} examples; collate them")
        if 1 <= len(batch) <= 2:
            labels = batch[1] if len(batch) == 2 else None
            if not has_names(batch[0]):
                return batch[0], labels, "labels"
            inputs, own, name = _read(batch[0])
            return (inputs, own, name) if labels is None else (inputs, labels, "labels")
        kind = f"{kind} of length {len(batch)}"
    raise TypeError(expected + kind)


def _label_key(items: Mapping[Any, Any]) -> str:
    return next((key for key in LABEL_KEYS if items.get(key) is not None), LABEL_KEYS[0])


def _label_tensor(name: str, labels: Any) -> Tensor:
    found = _row_tensor(name, labels)
    if not isinstance(found, Tensor):
        what = f"a {type(labels).__name__}"
        if isinstance(labels, (list, tuple)) and labels:
            what += f" of {type(labels[0]).__name__}"
        kind = "" if name == WEIGHTS else " (class indices or targets)"
        raise TypeError(
            f"{name}: expected numbers{kind} as a tensor, an array or a list, got {what}; map them to indices, or "
            "leave them out"
        )
    return found


def _without_labels(batch: Any) -> Any:
    """The same kind of batch, without labels and weights: no key in a mapping, None in a tuple or a field."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch
    items = items_of(batch)
    if isinstance(batch, Mapping):
        return rebuilt(batch, {key: value for key, value in items.items() if key not in (*LABEL_KEYS, WEIGHTS)})
    if has_names(batch):
        items.update({key: None for key in (*LABEL_KEYS, WEIGHTS) if key in items})
    else:
        inputs, *labels = items
        items.update(dict.fromkeys(labels))
        items[inputs] = _without_labels(items[inputs]) if has_names(items[inputs]) else items[inputs]
    return rebuilt(batch, items)


def _check_examples(inputs: Any, labels: Any, name: str) -> None:
    """Whether there is a batch dimension, and labels have the same."""
    if isinstance(inputs, Mapping):
        for key, shape in SHAPES.items():
            value = inputs.get(key)
            if isinstance(value, Tensor) and value.ndim < shape.count(",") + 1 and (value.numel() or value.ndim == 0):
                raise ValueError(
                    f"{key}: expected a batch dimension, {shape}, got shape {list(value.shape)}; a single example is "
                    f"a batch of one, {key}[None]"
                )
    elif isinstance(inputs, Tensor) and inputs.ndim == 0:
        raise ValueError("inputs: expected a batch dimension, [N, ...], got shape []")
    if not isinstance(labels, Tensor):
        return
    if labels.ndim == 0:
        raise ValueError(f"{name}: expected a batch dimension, [N] or [N, T], got shape []")
    named = {key: inputs.get(key) for key in EXAMPLE_KEYS} if isinstance(inputs, Mapping) else {"inputs": inputs}
    key, rows = next(((k, v) for k, v in named.items() if isinstance(v, Tensor) and v.ndim), ("", labels))
    if rows.shape[0] != labels.shape[0]:
        raise ValueError(
            f"{name}: expected one for each of the {rows.shape[0]} examples of {key} {list(rows.shape)}, got shape "
            f"{list(labels.shape)}"
        )


def _check_weights(batch: Any) -> None:
    """Whether there is one for each example, not negative."""
    weights, size = weights_of(batch), size_of(batch)
    if weights is None:
        return
    if weights.shape != (size,):
        raise ValueError(f"{WEIGHTS}: expected one number for each of {size} examples, got {list(weights.shape)}")
    wrong = ~(torch.isfinite(weights) & (weights >= 0))
    if wrong.any():
        raise ValueError(f"{WEIGHTS}: expected finite numbers, not negative, got {float(weights[wrong][0]):g}")


def _check_masks(inputs: Mapping[Any, Any]) -> None:
    """Whether attention masks are `[N, T]` of 0 and 1, or `[N, choices, T]` like 3-D `input_ids`."""
    ids = inputs.get("input_ids")
    for key in MASK_KEYS:
        mask = inputs.get(key)
        if mask is None or _rows(mask) == 0:
            continue
        advice = "pass [N, T] of 0 and 1, or a mask of another kind under another name together with forward=..."
        if not isinstance(mask, Tensor):
            raise ValueError(f"{key}: expected a tensor [N, T], got {type(mask).__name__}; {advice}")
        choices = isinstance(ids, Tensor) and ids.ndim == 3 and mask.shape == ids.shape
        if mask.ndim != 2 and not choices:
            raise ValueError(f"{key}: expected shape [N, T], got {list(mask.shape)}; {advice}")
        if mask.dtype != torch.bool:
            wrong = (mask != 0) & (mask != 1)
            if wrong.any():
                raise ValueError(
                    f"{key}: expected values 0 (padding) and 1, got {mask[wrong][0].item():g} in a mask of shape "
                    f"{list(mask.shape)}; {advice}"
                )


def _with_tensors(batch: Any) -> Any:
    """The batch with numbers as tensors, of the same type where that can be."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return _input_tensor(batch)
    items = items_of(batch)
    if has_names(batch):
        label = _label_key(items)
        for key, value in items.items():
            if key in (label, WEIGHTS) and value is not None:
                items[key] = _label_tensor(key, value)
            elif key in ROW_KEYS:
                items[key] = _row_tensor(key, value)
            elif isinstance(batch, Mapping):
                items[key] = _list_tensor(value)
            elif key == "inputs":
                items[key] = _input_tensor(value)
    else:
        keys = list(items)
        items[keys[0]] = _input_tensor(items[keys[0]])
        if len(keys) == 2 and items[keys[1]] is not None:
            items[keys[1]] = _label_tensor("labels", items[keys[1]])
    return rebuilt(batch, items)


def _input_tensor(value: Any) -> Any:
    """Of a tuple's inputs: numbers, a batch of its own, or positional arguments, each of which may be numbers."""
    if has_names(value):
        return _with_tensors(value)
    if isinstance(value, (tuple, list)):
        if any(isinstance(one, (Tensor, np.ndarray)) for one in value):
            return rebuilt(value, {key: _list_tensor(one) for key, one in items_of(value).items()})
        return _row_tensor("inputs", value)
    return _list_tensor(value)


def _row_tensor(key: str, value: Any) -> Any:
    """Numbers as a tensor; rows of different lengths are refused."""
    found = as_tensor(value)
    if found is None and is_numbers(value):
        lengths = [_rows(row) or 0 for row in value]
        raise ValueError(
            f"{key}: expected rows of the same length, got rows of {min(lengths)} to {max(lengths)} that do not make a "
            "tensor; pad them (transformers' DataCollatorWithPadding does)"
        )
    return value if found is None else found


def _list_tensor(value: Any) -> Any:
    """Arrays and rectangular lists of numbers as a tensor; everything else, and lists of tensors, as it is."""
    numbers = isinstance(value, np.ndarray) or (
        isinstance(value, list) and bool(value) and not any(isinstance(one, Tensor) for one in value)
    )
    found = as_tensor(value) if numbers else None
    return value if found is None else found


def _first(sizes: Iterable[int | None]) -> int | None:
    return next((size for size in sizes if size is not None), None)


def _is_text(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, str) for one in value)


def _rows(value: Any) -> int | None:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.shape[0] if value.ndim else None
    return len(value) if isinstance(value, (list, tuple)) else None
