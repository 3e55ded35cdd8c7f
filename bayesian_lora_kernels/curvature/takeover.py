"""What a fit needs to go on from the checkpoints of another number of processes: which examples they had counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.curvature.state import UNKNOWN, parts_of
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.containers import items_of
from bayesian_lora_kernels.model.forward import IGNORED_LABEL
from bayesian_lora_kernels.model.reading import DECODER_MASK, LABEL_KEYS, MASK_KEYS, ROW_KEYS, has_names
from bayesian_lora_kernels.processes import Processes

WIDTH = 16  # bytes of a digest


def example_digests(given: Any, read: Callable[[Any], Batch] = Batch.of) -> Tensor | None:
    """Digests `[N, 16]` uint8 of the examples of a batch, the same in batches that pad them otherwise.

    None where nothing tells them apart: numbers of which it is not known whose they are, objects of unknown values.
    """
    batch = read(given)
    if batch.uncut:
        return None
    digests = bytearray()
    for i in range(batch.size):
        digest = hashlib.blake2b(digest_size=WIDTH)
        for part in parts_of(_without_padding(batch.rows(i, i + 1).given)):
            if part.startswith(UNKNOWN):
                return None
            digest.update(part)
        digests += digest.digest()
    return _rows(digests)


def counter(digests: Tensor) -> Counter[bytes]:
    """How often each of `[n, 16]` is there."""
    return Counter(row.tobytes() for row in digests.cpu().numpy())


def elements(counted: Counter[bytes]) -> Tensor:
    """What `counter` counted."""
    return _rows(bytearray(b"".join(counted.elements())))


def joined(digests: Iterable[Tensor]) -> Tensor:
    """Of several batches, or of none."""
    return torch.cat([_rows(bytearray()), *digests])


def own_part(
    counted: Counter[bytes], loader: Iterable[Any], processes: Processes, read: Callable[[Any], Batch] = Batch.of
) -> Counter[bytes] | None:
    """Of the examples that are counted, those that are now in this process' share; goes over the loader once.

    None if some of them are in nobody's.
    """
    own = [found for given in loader if (found := example_digests(given, read)) is not None]
    shares = processes.gather(joined(own))
    left, mine = counted.copy(), Counter[bytes]()
    for rank, share in enumerate(shares):
        taken = counter(share) & left
        left -= taken
        if rank == processes.rank:
            mine = taken
    return None if left else mine


def uncounted(
    given: Any, digests: Tensor, skip: Counter[bytes], read: Callable[[Any], Batch] = Batch.of
) -> Iterator[tuple[Any, Tensor]]:
    """What is left of a batch without the examples to skip, which are crossed off, and the digests of that."""
    new = []
    for row in digests.numpy():
        key = row.tobytes()
        new.append(not skip[key])
        skip[key] -= 0 if new[-1] else 1
    if all(new):
        yield given, digests
        return
    batch, start = read(given), 0
    while start < len(new):
        stop = next((i for i in range(start, len(new)) if new[i] != new[start]), len(new))
        if new[start]:
            yield batch.rows(start, stop).given, digests[start:stop]
        start = stop


def _rows(digests: bytearray) -> Tensor:
    flat = torch.frombuffer(digests, dtype=torch.uint8) if digests else torch.empty(0, dtype=torch.uint8)
    return flat.reshape(-1, WIDTH)


def _without_padding(example: Any) -> Any:
    """One example: its tokens without those that its mask excludes; labels from the first to the last that is one."""
    if isinstance(example, (tuple, list)) and not has_names(example):
        return [_without_padding(part) for part in example]
    if not has_names(example):
        return example
    items = items_of(example)
    masks = {key: value.bool() for key, value in items.items() if key in MASK_KEYS and _is_row(value)}
    found = dict(items)
    for key, value in items.items():
        mask = masks.get(DECODER_MASK if str(key).startswith("decoder") else MASK_KEYS[0])
        if key in ROW_KEYS and _is_row(value) and mask is not None and mask.shape == value.shape:
            found[key] = value[mask] if value.ndim == 2 else (mask.sum(dim=-1), value[mask])
        elif key in LABEL_KEYS and _is_row(value) and not value.is_floating_point():
            labelled = (value[0] != IGNORED_LABEL).nonzero().flatten().tolist() or [0]
            before = masks.get(MASK_KEYS[0])
            aligned = before is not None and before.shape == value.shape
            first = int(before[0, : labelled[0]].sum()) if before is not None and aligned else labelled[0]
            found[key] = first, value[0, labelled[0] : labelled[-1] + 1]
    return found


def _is_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim in (2, 3)  # of one text, or of several answers
