"""Which example is in which fold, and how a part of a data set is taken."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

LABEL_KEYS = ("labels", "label")


def assign_folds(labels: Sequence[int] | Tensor, folds: int, groups: Any = None, seed: int = 0) -> Tensor:
    """`[N]`, the fold of every example: classes spread evenly, and no group in two folds.

    Largest group first, each goes to the fold that has least of its classes, relative to how many of them there are.

    Args:
        labels: `[N]`, class indices.
        folds: how many.
        groups: `[N]`, what examples share that may not be split (an author, a document); None: nothing.
        seed: of the order of groups of one size.

    Raises:
        TypeError, ValueError: for arguments other than those; if training without some fold would leave a class out.
    """
    if isinstance(folds, bool) or not isinstance(folds, int):
        raise TypeError(f"folds: expected an int, got {folds!r}")
    values = np.asarray([as_class(label, index) for index, label in enumerate(_listed(labels))])
    n = len(values)
    if not 2 <= folds <= n:
        raise ValueError(f"folds: expected 2 to {n}, one for each example at most, got {folds}")
    keys: list[Hashable] = list(range(n)) if groups is None else _listed(groups)
    if len(keys) != n:
        raise ValueError(f"groups: expected one for each of {n} examples, got {len(keys)}")
    members: dict[Hashable, list[int]] = {}
    for index in torch.randperm(n, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist():
        key = keys[index]
        if not isinstance(key, Hashable) or key is None or key != key:
            raise ValueError(f"groups: expected names or numbers, got {key!r} for example {index}")
        members.setdefault(key, []).append(index)
    if len(members) < folds:
        raise ValueError(f"groups: expected at least {folds}, one for each fold, got {len(members)}")
    classes, codes = np.unique(values, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels: expected at least two classes, all {n} are {classes[0]}")
    totals = np.bincount(codes)
    counts = np.zeros((folds, len(classes)))
    found = np.empty(n, dtype=np.int64)
    for rows in sorted(members.values(), key=lambda rows: -len(rows)):
        own = np.bincount(codes[rows], minlength=len(classes))
        cost = (counts * (own / totals)).sum(axis=1)
        fold = min(range(folds), key=lambda f: (cost[f], counts[f].sum()))
        counts[fold] += own
        found[rows] = fold
    if (empty := counts.sum(axis=1) == 0).any():
        raise ValueError(f"groups: fold {int(empty.argmax())} of {folds} has no example; expected fewer folds")
    alone = (counts == totals) & (totals > 0)
    if alone.any():
        fold, which = (int(i) for i in np.argwhere(alone)[0])
        raise ValueError(
            f"labels: all {totals[which]} examples of class {classes[which]} are in fold {fold} of {folds}, and a "
            "model trained without it would not know the class; expected more of them, or in more groups"
        )
    return torch.from_numpy(found)


def subset(dataset: Any, indices: Sequence[int]) -> Any:
    """A part of a data set: of a list a list, of one of `datasets` its `select`, of others a `torch` Subset."""
    if hasattr(dataset, "select"):
        return dataset.select(list(indices))
    if isinstance(dataset, (list, tuple)):
        return [dataset[i] for i in indices]
    return Subset(dataset, list(indices))


def labels_of(dataset: Any) -> list[int]:
    """The class of every example: `example["labels"]` or `["label"]`, or the second of a pair.

    Raises:
        ValueError: if there is none, or none that is a class.
    """
    found = []
    for index in range(len(dataset)):
        example = dataset[index]
        if isinstance(example, Mapping):
            value = next((example[key] for key in LABEL_KEYS if key in example), None)
        elif isinstance(example, (tuple, list)) and len(example) == 2:
            value = example[1]
        else:
            value = getattr(example, "label", None)
        if value is None:
            raise ValueError(
                f"dataset: expected a class under {' or '.join(map(repr, LABEL_KEYS))}, or a pair (input, label), as "
                f"example {index}; or pass labels=[...], one for each example"
            )
        found.append(as_class(value, index))
    return found


def as_class(value: Any, index: int) -> int:
    """A class index.

    Raises:
        ValueError: if it is none; says of which example.
    """
    try:
        if (number := int(value)) == float(value):
            return number
    except (TypeError, ValueError):
        pass
    raise ValueError(f"labels: expected a class index, got {value!r} for example {index}")


def _listed(values: Any) -> list[Any]:
    """Of a tensor or an array, numbers that are equal to each other where they are equal."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def digest(*values: Any) -> str:
    """SHA-256 of what values hold: numbers, text, tensors, containers of these, functions; of others, their pickle."""
    state = hashlib.sha256()
    for value in values:
        _update(state, value)
    return state.hexdigest()


def _update(state: Any, value: Any) -> None:
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.dtype.kind not in "biufc"):
        value = value.tolist()
    if isinstance(value, (Tensor, np.ndarray)):
        value = torch.as_tensor(value).detach().cpu().contiguous()
        state.update(f"{value.dtype}{list(value.shape)}".encode())
        state.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, Mapping):
        state.update(f"{{{len(value)}".encode())
        for key, item in value.items():
            _update(state, key)
            _update(state, item)
    elif isinstance(value, (list, tuple, Iterator)):
        state.update(b"[")
        for item in value:
            _update(state, item)
        state.update(b"]")
    elif isinstance(value, (set, frozenset)):
        _update(state, sorted(map(repr, value)))
    elif isinstance(value, CodeType):
        state.update(value.co_code)
        _update(state, (value.co_consts, value.co_names))
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _holds(cell)]
        _update(state, (value.__code__, value.__defaults__, value.__kwdefaults__, cells))
    elif isinstance(value, partial):
        _update(state, (value.func, value.args, value.keywords))
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        state.update(f"{type(value).__name__} {value!r};".encode())
    else:
        state.update(f"<{type(value).__module__}.{type(value).__qualname__}>".encode())
        if not callable(value):  # of models and other objects that do something, the type
            with suppress(Exception):  # what has no pickle counts by its type too
                state.update(pickle.dumps(value))


def _holds(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises where there is none)
    except ValueError:
        return False
    return True
