"""When the host looks at numbers of the device: at once, or a batch later, so that it need not wait for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Error = Callable[[int], Exception | None]


class AtOnce:
    """Looks at flags as they come."""

    def add(self, bad: Tensor, error: Error) -> None:
        """Raises `error(i)` if a flag of `bad [k]` is set, i the first of them; None is no error after all."""
        flags = bad.tolist()
        if True in flags and (found := error(flags.index(True))) is not None:
            raise found

    def end(self) -> None:
        """Looks at what has not been looked at."""


AT_ONCE = AtOnce()


class Deferred(AtOnce):
    """Looks at the flags of a batch when the next one has ended; those on the CPU, where nothing waits, at once.

    Errors come in the order in which flags were added, so that the first cause is the one that is named.

    Attributes:
        prefix: of the errors of flags that are added from now on and looked at later.
    """

    def __init__(self) -> None:
        self.prefix = ""
        self._new: list[tuple[Tensor, Error]] = []
        self._sent: list[tuple[Tensor, Any, list[tuple[int, Error]]]] = []  # flags on the host, when, whose they are

    def add(self, bad: Tensor, error: Error) -> None:
        """See `AtOnce`; raised by `end_batch` or `end`."""
        if bad.device.type == "cpu":
            super().add(bad, error)
        else:
            self._new.append((bad, functools.partial(_prefixed, self.prefix, error)))

    def end_batch(self) -> None:
        """Raises what was wrong with the batch before this one."""
        sent, self._sent = self._sent, []
        self._raise(sent)
        new, self._new = self._new, []
        for device in dict.fromkeys(bad.device for bad, _ in new):
            here = [(bad, error) for bad, error in new if bad.device == device]
            flags, done = _to_host(torch.cat([bad for bad, _ in here]))
            self._sent.append((flags, done, [(len(bad), error) for bad, error in here]))

    def end(self) -> None:
        """Raises what was wrong with any batch."""
        self.end_batch()
        self.end_batch()

    def _raise(self, sent: Sequence[tuple[Tensor, Any, list[tuple[int, Error]]]]) -> None:
        for flags, done, owners in sent:
            if done is not None:
                done.synchronize()
            for part, (_, error) in zip(flags.split([count for count, _ in owners]), owners, strict=True):
                super().add(part, error)


def _prefixed(prefix: str, error: Error, index: int) -> Exception | None:
    found = error(index)
    return type(found)(f"{prefix}{found}") if prefix and found is not None else found


def _to_host(flags: Tensor) -> tuple[Tensor, Any]:
    """A copy under way to the host, and an event that says when it is there."""
    if flags.device.type != "cuda":
        return flags.cpu(), None
    copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    with torch.cuda.device(flags.device):
        copy.copy_(flags, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
    return copy, done
