"""What the processes of one fit say to each other, over a torch.distributed process group."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 64 * 2**20  # tensors that travel together


class Processes:
    """The processes of a group, each of which calls the same methods in the same order; or this one alone.

    Attributes:
        rank: of this process in the group, from 0.
        size: how many there are.
        sent: bytes that this process gave to others, as the operations count them, whatever the network does.

    Args:
        group: a process group; None: this process alone, which talks to no one.

    Raises:
        TypeError: for what is no process group.
        ValueError: for a group that this process is not in.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.rank, self.size, self.sent = 0, 1, 0
        if group is None:
            return
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group: expected a torch.distributed process group, such as torch.distributed.group.WORLD, or None for "
                f"this process alone, got {type(group).__name__}"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process is not in it")

    def values(self, own: Any) -> list[Any]:
        """What JSON can hold, of every process."""
        if self.size == 1:
            return [own]
        text = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
        return [json.loads(bytes(part.numpy().data)) for part in self.gather(text)]

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Sums over all processes, in place: the same tensors everywhere, in the same order."""
        for bucket in _buckets(tensors if self.size > 1 else ()):
            joined = self._here(torch.cat([tensor.reshape(-1) for tensor in bucket]))
            dist.all_reduce(joined, group=self.group)
            self.sent += 2 * (self.size - 1) * _bytes(joined) // self.size
            _hand_out(joined, bucket)

    def share(self, tensors: Iterable[Tensor], source: int) -> None:
        """The source's values, in place: tensors of the same shapes everywhere, in the same order."""
        for bucket in _buckets(tensors if self.size > 1 else ()):
            joined = self._here(torch.cat([tensor.reshape(-1) for tensor in bucket]))
            dist.broadcast(joined, group_src=source, group=self.group)
            self.sent += _bytes(joined) if self.rank == source else 0
            _hand_out(joined, bucket)

    def gather(self, own: Tensor) -> list[Tensor]:
        """Every process' tensor, on the device of one's own: alike but for their first dimension."""
        if self.size == 1:
            return [own]
        lengths = self._all(torch.tensor([len(own)]))
        longest = max(int(length) for length in lengths)
        padded = own.new_zeros(longest, *own.shape[1:])
        padded[: len(own)] = own
        found = self._all(padded)
        return [part[: int(length)].to(own.device) for part, length in zip(found, lengths, strict=True)]

    def _all(self, own: Tensor) -> list[Tensor]:
        own = self._here(own.contiguous())
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        self.sent += (self.size - 1) * _bytes(own)
        return found

    def _here(self, tensor: Tensor) -> Tensor:
        """Where the group's backend takes it."""
        backend = dist.get_backend(self.group)
        if backend == "gloo":
            return tensor.cpu()
        if backend == "nccl":
            return tensor.cuda()
        return tensor


ALONE = Processes()


def _buckets(tensors: Iterable[Tensor]) -> Iterable[Sequence[Tensor]]:
    """Tensors of one dtype and device that travel together, in an order that all processes have."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bucket = kinds.setdefault((tensor.dtype, tensor.device), [])
        bucket.append(tensor)
        if sum(map(_bytes, bucket)) >= BUCKET_BYTES:
            yield kinds.pop((tensor.dtype, tensor.device))
    yield from kinds.values()


def _hand_out(joined: Tensor, bucket: Sequence[Tensor]) -> None:
    for tensor, part in zip(bucket, joined.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.reshape(tensor.shape))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
