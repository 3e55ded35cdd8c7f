"""What the processes of one fit say to each other, over a torch.distributed process group.

Numbers travel by the group's collective operations, everything else through its store. The store is also where they
meet: a process that does not come, or that failed on its way, is known there by name, whatever the backend.
"""

from __future__ import annotations

import hashlib
import json
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 64 * 2**20  # of tensors that travel together
LONGEST_PAUSE = 0.05  # seconds between two looks whether all have come,
LOOK = 2.0  # and whether one of those that have come has failed
PATIENCE = 10.0  # seconds that the others have to say what they know of a failure


class OtherProcessError(RuntimeError):
    """Another process of the group failed, or did not come."""


class Processes:
    """The processes of a group, each of which calls the same methods in the same order; or this one alone.

    Attributes:
        group: see below.
        rank: of this process in the group, from 0.
        size: how many there are.
        sent: bytes of numbers that this process gave to others, as the operations count them.
        told: bytes of text that others read of this process.

    Args:
        group: a process group; None: this process alone, which talks to no one.

    Raises:
        TypeError: for what is no process group.
        ValueError: for a group that this process is not in.
    """

    # Of each group, how many have met: those that say nothing to others do not count.
    _met: ClassVar[weakref.WeakKeyDictionary[Any, int]] = weakref.WeakKeyDictionary()

    def __init__(self, group: Any = None):
        self.group = group
        self.rank, self.size, self.sent, self.told = 0, 1, 0, 0
        if group is None:
            return
        if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:  # what `new_group` gives to others
            raise ValueError("group: this process is not in it")
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group: expected a torch.distributed process group, such as torch.distributed.group.WORLD, or None for "
                f"this process alone, got {type(group).__name__}"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._number, self._step = 0, 0

    # ---- meeting ----------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one process raises inside, all of them raise: itself its own error, the others one that repeats it."""
        try:
            yield
        except OtherProcessError:
            raise
        except BaseException as error:
            self._fail(error)
            raise
        self.values(None)

    def values(self, own: Any) -> list[Any]:
        """What JSON can hold, of every process.

        Raises:
            OtherProcessError: if one failed, or did not come within the group's timeout; it is named.
        """
        if self.size == 1:
            return [own]
        step, text = self._step, json.dumps({"value": own})
        self._step += 1
        found: dict[int, Any] = {}
        with self._store_there():
            self._post(step, text)
            self.told += (self.size - 1) * len(text)
            missing = self._wait(step, self._timeout, lambda rank, said: found.update({rank: self._read(rank, said)}))
            if missing:
                raise OtherProcessError(
                    f"{_ranks(missing)} of the group did not come within its timeout of {self._timeout:g} s: killed, "
                    "stopped, or still busy with its share (init_process_group(timeout=...) waits for longer)"
                )
            # All have come here, so all have read the step before.
            self._store.delete_key(self._key(step - 1, self.rank))
        read = torch.ones(1)
        self.add([read])
        read.item()  # all have: the store may be gone with the first process that leaves
        return [found[rank] for rank in range(self.size)]

    def check_alike(self, own: Mapping[str, Any]) -> None:
        """Whether all processes say the same.

        Raises:
            ValueError: if they do not; on all of them. The key, the first process that differs, and both values are
                named.
        """
        digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()
        if len(set(self.values(digest))) == 1:
            return
        first, *others = self.values(own)
        for rank, other in enumerate(others, start=1):
            for key in first | other:
                if first.get(key) != other.get(key):
                    raise ValueError(
                        f"group: expected the same on all processes, {key} is {first.get(key)!r:.200} on rank 0 and "
                        f"{other.get(key)!r:.200} on rank {rank}"
                    )

    # ---- numbers ----------------------------------------------------------------------------------------------------

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Sums over all processes, in place: the same tensors everywhere, in the same order."""
        for bucket in _buckets(tensors if self.size > 1 else ()):
            joined = self._joined(bucket)
            self._call(dist.all_reduce, joined)
            self.sent += 2 * (self.size - 1) * _bytes(joined) // self.size
            _hand_out(joined, bucket)

    def share(self, tensors: Iterable[Tensor], source: int) -> None:
        """The source's values, in place: tensors of the same shapes everywhere, in the same order."""
        for bucket in _buckets(tensors if self.size > 1 else ()):
            joined = self._joined(bucket)
            self._call(dist.broadcast, joined, group_src=source)
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

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Part `i` goes to process `i`, and what all of them had for this one comes back.

        Args:
            parts: one-dimensional, of one dtype everywhere.
            sizes: how many numbers come from each process.
        """
        if self.size == 1:
            return [*parts]
        joined = self._here(torch.cat([*parts]))
        found = joined.new_empty(sum(sizes))
        lengths = [len(part) for part in parts]
        self._call(dist.all_to_all_single, found, joined, [*sizes], lengths)
        self.sent += _bytes(joined) - _bytes(parts[self.rank])
        return [*found.to(parts[0].device).split([*sizes])]

    def agree(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same tensors; those of rank 0 where another process differs in a bit, because it rounds otherwise.

        Tensors may be there several times; dtypes and number are the same on all processes, shapes may differ.
        """
        distinct = {id(tensor): tensor for tensor in tensors}
        shapes = [list(tensor.shape) for tensor in distinct.values()]
        digest = hashlib.sha256(json.dumps(shapes).encode())
        for tensor in distinct.values() if self.size > 1 else ():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if len(set(self.values(digest.hexdigest()))) == 1:
            return [*tensors]
        for (key, tensor), shape in zip(distinct.items(), self.values(shapes)[0], strict=True):
            distinct[key] = tensor.clone() if self.rank == 0 else tensor.new_empty(shape)
        self.share(distinct.values(), source=0)
        return [distinct[id(tensor)] for tensor in tensors]

    def seed(self, seed: int) -> int:
        """For the random numbers of this process: rank 0 has the seed itself, streams of the others are independent."""
        if self.rank == 0:
            return seed
        return int.from_bytes(hashlib.sha256(f"{seed} of rank {self.rank}".encode()).digest()[:8], "big") >> 1

    def _all(self, own: Tensor) -> list[Tensor]:
        own = self._here(own.contiguous())
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._call(dist.all_gather, found, own)
        self.sent += (self.size - 1) * _bytes(own)
        return found

    def _joined(self, bucket: Sequence[Tensor]) -> Tensor:
        device = bucket[0].device
        return self._here(torch.cat([tensor.reshape(-1).to(device) for tensor in bucket]))

    def _here(self, tensor: Tensor) -> Tensor:
        """Where the group's backend takes it."""
        backend = dist.get_backend(self.group)
        if backend == "gloo":
            return tensor.cpu()
        if backend == "nccl":
            return tensor.cuda()
        return tensor

    def _call(self, collective: Callable[..., Any], *arguments: Any, **more: Any) -> None:
        """A collective operation of the group, and if it fails, who is the reason."""
        try:
            collective(*arguments, **more, group=self.group)
        except RuntimeError as error:
            self._fail(error, seen=True)
            with self._store_there():
                missing = self._wait(self._step - 1, PATIENCE, self._read_cause)
            who = f"{_ranks(missing)} of the group did not answer; killed or stopped? " if missing else ""
            raise OtherProcessError(f"{who}{error}") from error

    # ---- the store --------------------------------------------------------------------------------------------------

    @property
    def _store(self) -> Any:
        return dist.distributed_c10d._get_process_group_store(self.group)

    @property
    def _timeout(self) -> float:
        """Seconds: the group's own."""
        try:
            backend = self.group._get_backend(self._here(torch.empty(0)).device)
            seconds: float = backend.options._timeout.total_seconds()
        except (AttributeError, RuntimeError):  # a backend that does not say
            seconds = self._store.timeout.total_seconds()
        return seconds

    def _key(self, step: int, rank: int) -> str:
        if not self._number:
            self._number = self._met[self.group] = self._met.get(self.group, 0) + 1
        return f"bayesian_lora_kernels/{self._number}/{step}/{rank}"

    def _post(self, step: int, text: str) -> None:
        self._store.set(self._key(step, self.rank), text)

    def _fail(self, error: BaseException, seen: bool = False) -> None:
        """Say so where the others will look next; `seen`: they may have seen the same."""
        if self.size > 1:
            step, self._step = self._step, self._step + 1
            with suppress(RuntimeError):  # the error itself matters more than a store that is gone
                self._post(step, json.dumps({"error": f"{type(error).__name__}: {error}", "seen": seen}))

    def _wait(self, step: int, seconds: float, read: Callable[[int, str], None]) -> list[int]:
        """Reads what the processes post for a step; those that have not come in time."""
        missing, pause = [*range(self.size)], LONGEST_PAUSE / 64
        now = time.monotonic()
        end, look = now + seconds, now + LOOK
        while missing:
            now = time.monotonic()
            if now > min(end, look) or self._store.check([self._key(step, rank) for rank in missing]):
                for rank in [rank for rank in missing if self._store.check([self._key(step, rank)])]:
                    read(rank, self._store.get(self._key(step, rank)).decode())
                    missing.remove(rank)
                look = now + LOOK
            if now > end:
                break
            if missing:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        return missing

    def _read(self, rank: int, said: str) -> Any:
        content = json.loads(said)
        if "error" in content:
            raise OtherProcessError(f"rank {rank} of the group failed: {content['error']}")
        return content["value"]

    def _read_cause(self, rank: int, said: str) -> None:
        if not json.loads(said).get("seen"):
            self._read(rank, said)

    @contextmanager
    def _store_there(self) -> Iterator[None]:
        try:
            yield
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise OtherProcessError(
                "the store of the group does not answer; the process that keeps it, as a rule rank 0, was killed or "
                f"has left ({error})"
            ) from error


ALONE = Processes()


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype that travel together, in an order that all processes have."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = kinds.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if sum(map(_bytes, bucket)) >= BUCKET_BYTES:
            yield kinds.pop(tensor.dtype)
    yield from kinds.values()


def _hand_out(joined: Tensor, bucket: Sequence[Tensor]) -> None:
    for tensor, part in zip(bucket, joined.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(part.reshape(tensor.shape))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
