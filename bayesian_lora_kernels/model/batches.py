"""A user's batch, read once (`Batch.of`), and how it is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesian_lora_kernels.model.containers import items_of, map_tensors, rebuilt
from bayesian_lora_kernels.model.host import both, on_host, to_device
from bayesian_lora_kernels.model.packed_images import cut_packed, packed_keys
from bayesian_lora_kernels.model.reading import MASK_KEYS, has_names, inputs_and_labels, parsed, size_of, weights_of

NESTED_KEYS = ("past_key_values", "encoder_outputs")  # tuples of tensors, one per layer
Rows = Callable[[Any, int], Any]
KNOWN = (Tensor, np.ndarray, list, tuple, str, bytes, int, float)
MROPE_AXES = (3, 4)  # time, height, width of multimodal rotary positions, and text


@dataclass(frozen=True, eq=False)
class Batch:
    """A user's batch, parsed: its numbers are tensors, and what it says of labels, masks and examples is consistent.

    Attributes:
        given: the user's own kind of object, which a `forward` of one's own gets.
        inputs: a mapping, a tensor, or positional arguments; those of a dataclass or named tuple of columns are a dict.
        labels: `[N]` or `[N, T]`, or None.
        size: number of examples N; 1 where nothing tells.
    """

    given: Any
    inputs: Any
    labels: Tensor | None
    size: int

    @classmethod
    def of(cls, batch: Any, device: torch.device | None = None, *, labels: bool = True) -> Batch:
        """A user's batch on a device, with tensors that autograd may keep; a `Batch` stays as it is.

        Lists of numbers and NumPy arrays become tensors; in a named tuple or dataclass, only those under the names of
        model inputs and labels. Text and everything else stays as it is.

        Args:
            batch: the user's.
            device: None: where its tensors are.
            labels: whether labels are read; else they are left out, whatever they are.

        Raises:
            TypeError: for a batch or labels of a type that means nothing.
            ValueError: for rows of different lengths, a missing batch dimension, labels of another number than the
                examples, and masks that are not `[N, T]` of 0 and 1; the key is named.
        """
        if isinstance(batch, Batch):
            return batch

        def move(tensor: Tensor) -> Tensor:
            moved = to_device(tensor, device)
            return moved.clone() if moved.is_inference() else moved

        with torch.inference_mode(False):
            return cls.unchecked(map_tensors(parsed(batch, labels), move))

    @classmethod
    def unchecked(cls, given: Any, size: int | None = None) -> Batch:
        """Of an object that is known to be in order, and of how many examples if its own numbers need not tell."""
        known = size_of(given) if size is None else size
        return cls(given, *inputs_and_labels(given), 1 if known is None else known)

    @property
    def weights(self) -> Tensor | None:
        """How often each example counts, `[N]`; None: once."""
        return weights_of(self.given)

    @property
    def rows_of_inputs(self) -> int | None:
        """Number of examples as the inputs alone tell it; None if they do not."""
        return size_of(self.inputs)

    @property
    def masks(self) -> list[Tensor]:
        """The attention masks `[N, T]` as bool.

        Raises:
            ValueError: if an example has no valid token at all.
        """
        found = {key: self.inputs.get(key) for key in MASK_KEYS} if isinstance(self.inputs, Mapping) else {}
        known = {key: mask for key, mask in found.items() if isinstance(mask, Tensor) and mask.ndim == 2}
        masks = {key: both(Tensor.bool, mask) for key, mask in known.items()}
        for key, valid in masks.items():
            empty = ~on_host(valid).any(dim=1)
            if empty.any():
                raise ValueError(
                    f"{key}: expected at least one valid token per example, example {int(empty.nonzero()[0])} of the "
                    "batch has a mask of all False"
                )
        return list(masks.values())

    @property
    def uncut(self) -> list[str]:
        """Keys of tensors that `rows` keeps whole although their first dimension is longer than 1."""
        given, size = self.given, self.size
        items = items_of(given) if has_names(given) else {}
        if not has_names(given):
            parts = given if isinstance(given, (tuple, list)) else [given]
            for name, value in zip(("inputs", "labels"), parts, strict=False):
                if has_names(value):
                    items.update(items_of(value))
                elif isinstance(value, (tuple, list)):
                    items.update({f"{name}[{i}]": part for i, part in enumerate(value)})
                else:
                    items[name] = value
        known = packed_keys(items, size) | {"cache_position"}
        return [
            str(key)
            for key, value in items.items()
            if isinstance(value, Tensor)
            and value.ndim
            and value.shape[0] > 1
            and key not in known
            and _axis(key, value, size, items) is None
            and not (_is_mrope(key, value, items) and value.shape[1] == 1)
        ]

    def rows(self, start: int, stop: int) -> Batch:
        """Examples `start` to `stop`, as views.

        Cut are tensors and lists of leading size N, multimodal positions `[3, N, T]`, and packed images. Kept whole
        are numbers, what all examples share (leading size 1, `cache_position`), and tensors of another leading size:
        `uncut` names those.

        Raises:
            ValueError: for packed images of which nothing consistent tells whose they are.
        """

        def cut(value: Any, axis: int) -> Any:
            return value[(slice(None),) * axis + (slice(start, stop),)] if axis else value[start:stop]

        given = _picked(self.given, cut, lambda items: cut_packed(items, start, stop, self.size), self.size)
        return Batch.unchecked(given, min(stop, self.size) - start)

    def pieces(self, step: int, start: int = 0) -> Iterator[tuple[slice, Batch]]:
        """The examples from `start` on, `step` at a time: which they are, and the batch of them; itself if all are."""
        for first in range(start, self.size, step):
            last = min(first + step, self.size)
            yield slice(first, last), self if last - first == self.size else self.rows(first, last)

    def reversed(self) -> Batch | None:
        """The examples in reversed order; None if that cannot be had (packed images, unknown objects)."""
        items = items_of(self.given) if not isinstance(self.given, (Tensor, np.ndarray)) else {"": self.given}
        known = all(value is None or isinstance(value, KNOWN) or has_names(value) for value in items.values())
        if not known or packed_keys(items, self.size):
            return None
        found: list[bool] = []

        def turn(value: Any, axis: int) -> Any:
            found.append(True)
            if isinstance(value, (list, tuple)):
                return value[::-1]
            return value.flip(axis) if isinstance(value, Tensor) else np.flip(value, axis)

        given = _picked(self.given, turn, lambda _: {}, self.size)
        return Batch.unchecked(given, self.size) if found else None


def _picked(batch: Any, rows: Rows, packed: Callable[[dict[Any, Any]], dict[str, Any]], size: int) -> Any:
    """The batch with `rows(value, axis of the examples)` of everything that has one row for each example."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return _cut("", batch, rows, size, {})
    if has_names(batch):
        items = items_of(batch)
        apart = packed(items)
        return rebuilt(batch, {k: apart[k] if k in apart else _cut(k, v, rows, size, items) for k, v in items.items()})
    if isinstance(batch, (tuple, list)):
        return rebuilt(batch, {k: _cut("", v, rows, size, {}) for k, v in items_of(batch).items()})
    return batch


def _is_mrope(key: Any, value: Tensor | np.ndarray[Any, Any], items: Mapping[Any, Any]) -> bool:
    choices = getattr(items.get("input_ids"), "ndim", 2) == 3  # [N, choices, T]
    return key == "position_ids" and value.ndim == 3 and value.shape[0] in MROPE_AXES and not choices


def _axis(key: Any, value: Tensor | np.ndarray[Any, Any], size: int, items: Mapping[Any, Any]) -> int | None:
    """The dimension of the examples; None: all of them share it, or nobody knows."""
    if value.ndim == 0 or key == "cache_position":
        return None
    axis = 1 if _is_mrope(key, value, items) else 0
    return axis if value.shape[axis] == size else None


def _cut(key: Any, value: Any, rows: Rows, size: int, items: Mapping[Any, Any]) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        axis = _axis(key, value, size, items)
        return value if axis is None else rows(value, axis)
    if has_names(value):
        return _picked(value, rows, lambda _: {}, size)
    if isinstance(value, (list, tuple)):
        first = next((one.shape[0] for one in value if isinstance(one, Tensor) and one.ndim), None)
        if len(value) == size and key not in NESTED_KEYS and not (key == "" and first == size):  # no positional inputs
            return rows(value, 0)
        return rebuilt(value, {k: _cut(key, v, rows, size, items) for k, v in items_of(value).items()})
    return value
