"""Which share of the data a loader gives to this process, where that can be seen."""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.utils.data import BatchSampler, DistributedSampler

from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.processes import Processes

logger = logging.getLogger(__name__)

PARTS = ("sampler", "batch_sampler", "dataset", "base_dataloader")  # of loaders and samplers, and what they wrap
EVERY_ONE = (
    "DataLoader(Subset(dataset, range(rank, len(dataset), size)), ...) gives every process its share and no example "
    "twice"
)


@dataclass(frozen=True)
class Share:
    """One process' part of the examples of a loader.

    Attributes:
        source: the name of the class that makes it.
        size: among how many processes the examples are shared.
        rank: which of the shares it is; None where that cannot be seen.
        repeats: whether some examples are in two shares, so that these are equally long.
    """

    source: str
    size: int
    rank: int | None
    repeats: bool


def share_of(loader: Any) -> Share | None:
    """The share that a loader gives; None where it shows none: it gives all, or was made from a part of the data.

    Seen are PyTorch's `DistributedSampler` and what is like it, accelerate's shards and dispatcher, and datasets'
    `split_dataset_by_node` of a stream.
    """
    return next(
        (share for share in map(_own_share, parts_of_loader(loader)) if share is not None and share.size > 1), None
    )


def own_share(loader: Any, processes: Processes, what: str, read: Callable[[Any], Batch] = Batch.of) -> Any:
    """The loader, without the examples that it repeats so that the shares of all processes are equally long.

    Raises:
        ValueError: with a group, for a share of another number of processes or rank, and for repeated examples where
            it cannot be told which these are.

    Warns:
        UserWarning: without a group, for a share.
    """
    share = share_of(loader)
    if processes.group is None:
        _say_alone(what)
        if share is not None:
            warnings.warn(
                f"{what}: the loader's {share.source} gives this process one of {share.size} shares of the data, and "
                f"the result is of that share only; pass {what}(..., group=torch.distributed.group.WORLD) on all "
                "processes, or a loader of all the data",
                stacklevel=4,
            )
        return loader
    if share is None:
        return loader
    if share.size != processes.size or share.rank not in (processes.rank, None):
        raise ValueError(
            f"loader: expected share {processes.rank} of {processes.size}, as this process is in the group, its "
            f"{share.source} gives share {share.rank} of {share.size}"
        )
    if not share.repeats:
        return loader
    shards = _positions(loader, share.size)
    if shards is None:
        raise ValueError(
            f"loader: its {share.source} repeats examples to make the shares equally long, and they would count twice. "
            f"{EVERY_ONE}; or even_batches=False of accelerate's DataLoaderConfiguration"
        )
    return WithoutRepeats(loader, _counted(shards, processes.rank), read)


class WithoutRepeats:
    """The batches of a loader, cut to the examples that no other process has and no earlier batch had.

    Args:
        loader: of a share.
        counted: of each batch, how many examples it has, and how many of them are new: the first ones.
        read: a user's batch as one of examples.
    """

    def __init__(self, loader: Any, counted: Sequence[tuple[int, int]], read: Callable[[Any], Batch] = Batch.of):
        self.loader, self.counted, self.read = loader, counted, read
        self.batch_sampler, self.generator = loader.batch_sampler, getattr(loader, "generator", None)

    def __len__(self) -> int:
        return len(self.counted)

    def __iter__(self) -> Iterator[Any]:
        for given, known in itertools.zip_longest(self.loader, self.counted):
            size = 0 if given is None else self.read(given).size
            if known is None or size != known[0]:
                raise ValueError(
                    "loader: expected the examples that its sampler chose, to leave out those that it repeats, got a "
                    f"batch of {size} in place of {known[0] if known else 0}. {EVERY_ONE}"
                )
            if known[1] == size:
                yield given
            elif known[1] > 0:
                yield self.read(given).rows(0, known[1]).given


@functools.cache
def _say_alone(what: str) -> None:
    """Once: `group=None` where there are other processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        logger.info(
            "%s: by this process alone, of %d; group=torch.distributed.group.WORLD shares it among them",
            what,
            dist.get_world_size(),
        )


def parts_of_loader(loader: Any) -> Iterator[Any]:
    """The loader, and what it takes its examples from."""
    found, seen = [loader], set()
    while found:
        part = found.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        found += [inner for name in PARTS if (inner := getattr(part, name, None)) is not None]


def _own_share(part: Any) -> Share | None:
    name = type(part).__name__
    if isinstance(size := getattr(part, "num_replicas", None), int):
        n, total = _length(getattr(part, "dataset", None)), getattr(part, "total_size", None)
        return Share(name, size, getattr(part, "rank", None), n is None or total is None or total > n)
    if isinstance(size := getattr(part, "num_processes", None), int):  # accelerate's shards
        return Share(name, size, getattr(part, "process_index", None), _shard_repeats(part, size))
    if name == "DataLoaderDispatcher":
        return Share(name, part.state.num_processes, part.state.process_index, True)
    node = getattr(part, "_distributed", None)
    if isinstance(size := getattr(node, "world_size", None), int):
        return Share(name, size, getattr(node, "rank", None), False)
    return None


def _shard_repeats(shard: Any, size: int) -> bool:
    """Whether an accelerate shard goes back to the beginning of the data to end with whole batches."""
    if getattr(shard, "drop_last", False) or not getattr(shard, "even_batches", True):
        return False
    inner = getattr(shard, "batch_sampler", shard)
    n, batch = _length(getattr(inner, "sampler", getattr(shard, "dataset", None))), getattr(shard, "batch_size", None)
    if n is None or not batch:
        return True
    return n % (batch if getattr(shard, "split_batches", False) else batch * size) != 0


def _positions(loader: Any, size: int) -> list[list[list[int]]] | None:
    """Which places in the order of all examples each batch of each process takes; None where nobody knows.

    The samplers say it themselves: twins of them, of numbers in their order.
    """
    batches: Any = getattr(loader, "batch_sampler", None)
    inner: Any = getattr(batches, "batch_sampler", None)
    sampler: Any = getattr(batches, "sampler", None)
    twins: list[Any] = []
    if getattr(loader, "in_order", True) is False or getattr(loader, "skip_batches", None):
        return None
    if type(batches) is BatchSampler and type(sampler) is DistributedSampler:
        places: Any = range(_length(sampler.dataset) or 0)
        for rank in range(size):
            twin: Any = DistributedSampler(places, size, rank, shuffle=False, drop_last=sampler.drop_last)
            twins.append(BatchSampler(twin, batches.batch_size, batches.drop_last))
    elif type(inner) is BatchSampler and type(batches).__name__ == "BatchSamplerShard":
        order = BatchSampler(range(_length(inner.sampler) or 0), inner.batch_size, inner.drop_last)
        twins += [type(batches)(order, size, rank, batches.split_batches, batches.even_batches) for rank in range(size)]
    else:
        return None
    return [[[*batch] for batch in twin] for twin in twins]


def _counted(shards: Sequence[Sequence[Sequence[int]]], rank: int) -> list[tuple[int, int]]:
    """Of each batch of a process, its size and how many of its examples have not been there before."""
    seen: set[int] = set()
    found = []
    for turn in range(max(map(len, shards))):
        for owner, batches in enumerate(shards):
            batch = batches[turn] if turn < len(batches) else ()
            new = len({*batch} - seen)
            assert not {*batch[:new]} & seen, "repeated examples come last"
            seen.update(batch)
            if owner == rank and turn < len(batches):
                found.append((len(batch), new))
    return found


def _length(value: Any) -> int | None:
    try:
        return len(value)
    except TypeError:
        return None
