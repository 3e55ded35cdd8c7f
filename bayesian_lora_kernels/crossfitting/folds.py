"""Which example is in which fold, and how a part of a data set is taken."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

LABEL_KEYS = ("labels", "label")


def assign_folds(labels: Sequence[int], folds: int, groups: Sequence[Hashable] | None = None, seed: int = 0) -> Tensor:
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
    n = len(labels)
    if not 2 <= folds <= n:
        raise ValueError(f"folds: expected 2 to {n}, one for each example at most, got {folds}")
    if groups is not None and len(groups) != n:
        raise ValueError(f"groups: expected one for each of {n} examples, got {len(groups)}")
    members: dict[Hashable, list[int]] = {}
    for index in torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist():
        members.setdefault(index if groups is None else groups[index], []).append(index)
    if len(members) < folds:
        raise ValueError(f"groups: expected at least {folds}, one for each fold, got {len(members)}")
    values = np.asarray(labels)
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
    return [_label(dataset[i], i) for i in range(len(dataset))]


def _label(example: Any, index: int) -> int:
    if isinstance(example, Mapping):
        value = next((example[key] for key in LABEL_KEYS if key in example), None)
    else:
        value = (
            example[1] if isinstance(example, (tuple, list)) and len(example) == 2 else getattr(example, "label", None)
        )
    try:
        if value is None or (number := int(value)) != float(value):
            raise ValueError(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"dataset: expected a class under {' or '.join(map(repr, LABEL_KEYS))}, or a pair (input, label), as "
            f"example {index}; or pass labels=[...], one for each example"
        ) from None
    return number


def digest(*values: Any) -> str:
    """SHA-256 of what values hold: numbers, text, tensors, and containers of these; of others the type counts."""
    state = hashlib.sha256()
    for value in values:
        _update(state, value)
    return state.hexdigest()


def _update(state: Any, value: Any) -> None:
    if isinstance(value, (Tensor, np.ndarray)):
        value = torch.as_tensor(value).detach().cpu().contiguous()
        state.update(f"{value.dtype}{list(value.shape)}".encode())
        state.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, Mapping):
        state.update(f"{{{len(value)}".encode())
        for key, item in value.items():
            _update(state, key)
            _update(state, item)
    elif isinstance(value, (list, tuple)):
        state.update(f"[{len(value)}".encode())
        for item in value:
            _update(state, item)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        state.update(f"{type(value).__name__} {value!r};".encode())
    else:
        state.update(f"<{type(value).__qualname__}>".encode())
