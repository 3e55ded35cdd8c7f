"""Several answers to one prompt as one example, `[N, K, T]`: how they come, and how a model of one score takes them.

Pairs are columns for either side (`input_ids_chosen` and `input_ids_rejected`, or `chosen_input_ids`, ...), or stand
below each other, `[2 N, T]` with the chosen ones first, as TRL's collator has them. Lists are `[N, K, T]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.arguments import is_left_padded
from bayesian_lora_kernels.model.containers import as_tensor, items_of, rebuilt
from bayesian_lora_kernels.model.masks import MASK
from bayesian_lora_kernels.model.reading import ROW_KEYS, SHAPES, has_names

SIDES = ("chosen", "rejected")
COLUMNS = sorted(ROW_KEYS)  # in an order that is the same in every process
BESIDE = ("margin",)  # what belongs to a pair, and not to the model


def grouped(batch: Any, *, pairs: bool, labelled: bool, pad: int | None) -> Any:
    """A batch with its answers as `[N, K, T]`; one of single answers `[N, T]` stays as it is.

    Args:
        batch: the user's.
        pairs: whether examples are pairs, rather than lists of any length.
        labelled: whether it is one to learn from, where columns `[2 N, T]` are pairs below each other; else these are
            single answers, and nobody asks for margins.
        pad: the id of padding tokens, with which the shorter side of a pair is filled up, and masked; None: there is
            none.

    Raises:
        TypeError: for a batch that is no mapping.
        ValueError: for one side without the other, sides of another number, an odd number of rows, and an answer
            without a token.
    """
    if not has_names(batch):
        raise TypeError(
            "batch: expected a mapping with input_ids_chosen and input_ids_rejected, or input_ids [N, K, T], got "
            f"{type(batch).__name__}; or pass forward=callable(model, batch) -> rewards [N, K]"
        )
    items = {key: value for key, value in items_of(batch).items() if labelled or key not in BESIDE}
    sides = {key: names for key in COLUMNS if (names := _names(items, key)) is not None}
    if not sides:
        key = next((key for key in SHAPES if items.get(key) is not None), None)
        if key is None:
            raise ValueError(f"batch: expected input_ids_chosen and input_ids_rejected, or input_ids, got {[*items]}")
        shape = _tensor(key, items[key]).shape
        if len(shape) == SHAPES[key].count(",") + 1 and pairs and labelled:
            items |= _unstacked(items, key, shape[0])
    else:
        if both := sorted(sides.keys() & items.keys()):
            raise ValueError(f"{both[0]}: expected it, or {' and '.join(sides[both[0]])}, got all three")
        parts = [{key: _tensor(names[side], items[names[side]]) for key, names in sides.items()} for side in (0, 1)]
        for key, names in sides.items():
            counts = [len(part[key]) for part in parts]
            if counts[0] != counts[1]:
                raise ValueError(f"{names[1]}: expected one for each of {counts[0]} of {names[0]}, got {counts[1]}")
        width = max(_width(part) for part in parts)
        if items.get(MASK) is None and MASK not in sides and any(_width(part) < width for part in parts):
            parts = [{**part, MASK: _ones(part)} for part in parts]  # of what is filled up below
        filled = [_filled(part, width, pad or 0) for part in parts]
        items = {key: value for key, value in items.items() if not any(key in names for names in sides.values())}
        items |= {key: torch.stack([part[key] for part in filled], dim=1) for key in filled[0]}
    _check_masks(items.get(MASK))
    items = {key: items[key] for key in (*(key for key in COLUMNS if key in items), *items)}
    return rebuilt(batch, items) if isinstance(batch, Mapping) else items


def below_each_other(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Columns `[N, K, T]` as the model takes them, `[N K, T]`, and K; of single answers as they are, and None."""
    kept, count = {key: value for key, value in inputs.items() if key not in BESIDE}, answers_in(inputs)
    if count is None:
        return kept, None
    rows = {name: x.flatten(0, 1) for name, x in kept.items() if name in ROW_KEYS and isinstance(x, Tensor)}
    return {**kept, **rows}, count


def answers_in(inputs: Mapping[str, Any]) -> int | None:
    """K, of columns `[N, K, T]`; None for single answers."""
    key = next((key for key in SHAPES if isinstance(inputs.get(key), Tensor)), None)
    several = key is not None and inputs[key].ndim == SHAPES[key].count(",") + 2
    return inputs[key].shape[1] if several and key is not None else None


def each_answer(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The columns of one example, `[1, K, T]`, as those of K examples `[1, T]`."""
    flat, count = below_each_other(inputs)
    if count is None:
        return [flat]
    return [
        {key: x[i : i + 1] if key in ROW_KEYS and isinstance(x, Tensor) else x for key, x in flat.items()}
        for i in range(count)
    ]


def token_mask(inputs: Any) -> Tensor | None:
    """A batch's attention mask `[N, T]`, or `[N K, T]` of several answers; None if there is none."""
    mask = inputs.get(MASK) if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3):
        return None
    return mask if mask.ndim == 2 else mask.flatten(0, 1)


def pad_of(model: nn.Module) -> int | None:
    """The id of a model's padding tokens."""
    return getattr(getattr(model, "config", None), "pad_token_id", None)


def _names(items: Mapping[Any, Any], key: str) -> tuple[str, str] | None:
    """What the two sides of a column are called here; None if it has no sides."""
    for pattern in (f"{key}_{{}}", f"{{}}_{key}"):
        names = tuple(pattern.format(side) for side in SIDES)
        here = [items.get(name) is not None for name in names]
        if all(here):
            return names[0], names[1]
        if any(here):
            raise ValueError(f"{names[here[0]]}: missing, the batch has {names[not here[0]]}; a pair has two sides")
    return None


def _tensor(name: str, value: Any) -> Tensor:
    found = as_tensor(value)
    if found is None or found.ndim < 2:
        what = "rows that do not make a tensor" if found is None else f"shape {list(found.shape)}"
        raise ValueError(f"{name}: expected rows of the same length, [N, T], got {what}; pad them")
    return found


def _unstacked(items: Mapping[Any, Any], key: str, rows: int) -> dict[str, Tensor]:
    if rows % 2:
        raise ValueError(
            f"{key}: expected an even number of rows, the chosen answers and then the rejected, got {rows}"
        )
    found = {name: _tensor(name, items[name]) for name in COLUMNS if items.get(name) is not None}
    for name, value in found.items():
        if len(value) != rows:
            raise ValueError(f"{name}: expected a row for each of the {rows} of {key}, got {len(value)}")
    return {name: value.unflatten(0, (2, -1)).transpose(0, 1) for name, value in found.items()}


def _width(columns: Mapping[str, Tensor]) -> int:
    return max(x.shape[1] for x in columns.values())


def _ones(columns: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(columns.values()))
    return first.new_ones((len(first), _width(columns)), dtype=torch.long)


def _filled(columns: Mapping[str, Tensor], width: int, pad: int) -> dict[str, Tensor]:
    """The columns of one side, filled up to a number of tokens on the side on which they are padded."""
    missing, mask = width - _width(columns), columns.get(MASK)
    left = mask is not None and is_left_padded(mask)
    found = {}
    for key, x in columns.items():
        space = x.new_full((len(x), missing, *x.shape[2:]), pad if key == "input_ids" else 0)
        found[key] = torch.cat([space, x] if left else [x, space], dim=1)
    return found


def _check_masks(mask: Any) -> None:
    found = as_tensor(mask)
    if found is None or found.ndim != 3:
        return
    empty = ~found.bool().any(dim=2)
    if empty.any():
        example, answer = empty.nonzero()[0].tolist()
        raise ValueError(
            f"{MASK}: answer {answer} of example {example} has no token; all lists of a batch have as many answers, so "
            "put lists of another length into other batches"
        )
