"""Whether processes were given the same examples: each of them would count several times."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.host import on_host
from bayesian_lora_kernels.model.reading import EXAMPLE_KEYS, MASK_KEYS

KEPT = 64  # hashes of a process
FEW = 8  # examples of which the same may be there by chance


def sketch(known: Sequence[int], batch: Batch) -> list[int]:
    """The least of the hashes of all examples: where these are the same, the examples are.

    Source: Broder 1997, "On the resemblance and containment of documents".

    Args:
        known: those of the batches before, ascending.
        batch: its examples are known by their tokens without padding, or their first tensor.
    """
    inputs = batch.inputs
    if isinstance(inputs, Mapping):
        values = [inputs.get(key) for key in EXAMPLE_KEYS] + [*inputs.values()]
    else:
        values = [inputs] if isinstance(inputs, Tensor) else [*inputs] if isinstance(inputs, (list, tuple)) else []
    rows = next((v for v in values if isinstance(v, Tensor) and v.ndim and len(v) == batch.size), None)
    if rows is None:
        return [*known]
    rows = on_host(rows.detach()).cpu()
    given = [inputs.get(key) for key in MASK_KEYS] if isinstance(inputs, Mapping) else []
    masks = [on_host(mask).cpu().bool() for mask in given if isinstance(mask, Tensor) and mask.shape == rows.shape]
    contents = [row if not masks else row[masks[0][i]] for i, row in enumerate(rows)]
    digests = [hashlib.blake2b(repr(one.tolist()).encode(), digest_size=8).digest() for one in contents]
    return joined(known, [int.from_bytes(digest, "big") for digest in digests])


def joined(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The sketch of the examples of two."""
    return sorted({*one, *other})[:KEPT]


def warn_of_repeats(sketches: Sequence[Sequence[int]]) -> None:
    """Of two processes most of whose examples are the same.

    Warns:
        UserWarning: that names the first two.
    """
    for (one, first), (other, second) in itertools.combinations(enumerate(sketches), 2):
        union = sorted({*first, *second})[:KEPT]
        if len(union) >= FEW and 2 * len({*first} & {*second} & {*union}) > len(union):
            warnings.warn(
                f"fit: ranks {one} and {other} of the group were given the same examples, each of which then counts "
                "several times; give every process its own share, "
                "DataLoader(Subset(dataset, range(rank, len(dataset), size)), ...)",
                stacklevel=2,
            )
            return
