"""Where a fit is in its passes over the data, so that the next fit goes on there, to the same result bit for bit."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.curvature import takeover
from bayesian_lora_kernels.curvature.checkpoint_folder import CheckpointFolder
from bayesian_lora_kernels.curvature.identity import of_any_device
from bayesian_lora_kernels.curvature.state import (
    Joining,
    Stateful,
    batch_digest,
    loader_state,
    random_state,
    set_random_state,
)
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.processes import ALONE, Processes

SECONDS = 60.0  # between checkpoints where nobody says how many batches,
SHARE = 20  # and no less than so many times what the last took to write
FIT, EXAMPLES = "fit", "examples"


@dataclass
class _Pass:
    """How far a pass came, and the digest of the batches that it counted."""

    what: str
    done: bool = False
    batches: int = 0
    digest: str = ""


class Checkpoint:
    """What a folder holds of a fit, and what is added to it.

    Attributes:
        saved: the state of what is no pass' own; None if the folder has nothing.

    Args:
        folder: for this process alone.
        every: batches between checkpoints; None: after a minute, or after 20 times as long as the last took.
        identity: what two fits must have in common for one to go on where the other was, as JSON; of the
            layers' `devices` only the kinds.
        processes: that share the fit.
        shards: all folders of the same fit by another number of processes.
        read: a user's batch as one of examples.

    Raises:
        ValueError: if the folder holds the checkpoint of another fit.
        OSError: if nothing can be written there.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        every: int | None,
        identity: Mapping[str, Any],
        processes: Processes = ALONE,
        shards: Sequence[CheckpointFolder] = (),
        read: Callable[[Any], Batch] = Batch.of,
    ):
        self._folder, self._every, self._identity = folder, every, json.loads(json.dumps(identity))
        self._processes, self._passes, self._read_batch = processes, list[_Pass](), read
        self._digests: list[Tensor] | None = []  # of the examples that are counted, from the first pass
        self._skip = Counter[bytes]()  # examples that come, and are counted already
        self._start: Any = None
        of_shards = [_saved(shard, self._identity) for shard in shards]
        self._shards = shards if any(of_shards) else ()
        self._saved = None if self._shards else _saved(folder, self._identity)
        self.saved: Any = None if self._saved is None else self._saved["own"]
        if self._shards and processes.rank < len(shards) and (one := of_shards[processes.rank]) is not None:
            self.saved = {**one["own"], "totals": None}
        self._proved, self._took, self._last = False, 0.0, time.monotonic()
        if self._saved is None and not self._shards:  # those stand until all processes have written what they took over
            folder.clear()
            folder.write(self._identity, {FIT: {"passes": [], "examples": 0, "skip": []}})

    def batches(
        self,
        what: str,
        loader: Iterable[Any],
        show: Callable[[Iterator[Any], int], Iterable[Any]],
        sums: Sequence[Stateful],
        fit: Stateful,
    ) -> Iterator[tuple[int, Any]]:
        """One pass: the batches that are not counted yet, and their numbers; writes between them, when it is time.

        What was counted is restored. A pass that is done is gone through all the same: that tells whether the data are
        those that were counted, and leaves the loader where it was. A loader with `state_dict` is asked for that.

        Args:
            what: the name of the pass.
            loader: of the fit.
            show: batches, of which so many came before, with a progress bar.
            sums: the pass' own, up to date whenever the next batch is asked for.
            fit: everything else.

        Raises:
            ValueError: for other batches than those that were counted.
        """
        number = len(self._passes)
        if number == 0 and self._shards:
            self._take_over(what, loader, sums, fit)
        saved: Any = self._saved
        known = [] if saved is None else saved["passes"]
        one = known[number] if number < len(known) else _Pass(what)
        self._passes[number:] = [one]
        if one.what != what:
            raise ValueError(f"{self._folder.folder}: a checkpoint of the pass {one.what!r}, expected {what!r}")
        if number == 0:
            self._start = random_state(loader) if saved is None else saved["start"]
            set_random_state(self._start, loader)
        counted, first, digest = one.batches, 0, ""
        if number == 0 and saved is not None:
            examples = self._folder.read(EXAMPLES)
            self._digests = None if examples is None else [examples]
            self._skip = takeover.counter(saved["skip"])
        if number < len(known):
            for own, state in zip(sums, self._read(self._folder, _name(number)), strict=True):
                own.restore(state)
            if saved["loader"] is not None:
                if one.done:
                    return
                loader.load_state_dict(saved["loader"])  # type: ignore[attr-defined]
                first, digest = counted, one.digest
        iterator = iter(loader)

        def catch_up() -> None:
            """All random numbers that the fit had drawn are drawn."""
            if number == len(known) - 1:
                set_random_state(saved["now"], loader)

        if first == counted and not one.done:
            catch_up()
        index = first - 1
        for index, given in enumerate(show(iterator, first), first):
            digest = batch_digest(digest, given)
            if index >= counted:
                if one.done:
                    raise self._others(counted, f"more than {counted}")
                if number > 0:
                    yield index, given
                else:
                    yield from ((index, part) for part in self._noted(given))
                one.batches, one.digest = index + 1, digest
                if self._is_time(one.batches):
                    self._write(sums, fit, loader)
            elif index == counted - 1:
                if digest != one.digest:
                    raise self._others(counted, "others, or in another order")
                if not one.done:
                    catch_up()
        if index + 1 < counted:
            raise self._others(counted, f"only {index + 1}")
        if one.done:
            catch_up()

    def end_pass(self, sums: Sequence[Stateful], fit: Stateful, loader: Iterable[Any]) -> None:
        """The pass has counted all of the data."""
        if not self._passes[-1].done:
            self._passes[-1].done = True
            self._write(sums, fit, loader)

    def remove(self) -> None:
        """The fit has its result."""
        self._folder.clear()

    def _read(self, folder: CheckpointFolder, part: str) -> Any:
        return _read(folder, part, self._identity)

    def _is_time(self, batches: int) -> bool:
        if self._every is not None:
            return batches % self._every == 0
        return time.monotonic() - self._last >= max(SECONDS, SHARE * self._took)

    def _write(self, sums: Sequence[Stateful], fit: Stateful, loader: Iterable[Any]) -> None:
        started, one = time.monotonic(), self._passes[-1]
        state: dict[str, Any] = {
            "passes": [vars(one) for one in self._passes],
            "start": self._start,
            "now": random_state(loader),
            "loader": None if one.done else loader_state(loader),
            "own": fit.state(),
            "examples": 0 if self._digests is None else sum(map(len, self._digests)),
            "skip": takeover.elements(self._skip),
        }
        try:
            parts: dict[str, Any] = {_name(len(self._passes) - 1): [one.state() for one in sums], FIT: state}
            if len(self._passes) == 1:
                parts[EXAMPLES] = None if self._digests is None else takeover.joined(self._digests)
            self._folder.write(self._identity, parts)
            self._proved = True
        except OSError as error:
            if not self._proved:  # little is lost yet, and none would ever be there
                raise
            warnings.warn(
                f"{self._folder.folder}: the checkpoint after batch {one.batches - 1} could not be written "
                f"({error}); the fit goes on, and the checkpoint before stands",
                stacklevel=2,
            )
        self._last = time.monotonic()
        self._took = self._last - started

    def _noted(self, given: Any) -> Iterator[Any]:
        """A batch, or what is left of it without examples that others had counted; its examples are written down."""
        found = takeover.example_digests(given, self._read_batch)
        if found is None and self._skip.total():
            raise self._not_told()
        if found is None or self._digests is None:
            self._digests = None
            yield given
            return
        for part, digests in takeover.uncounted(given, found, self._skip, self._read_batch):
            self._digests.append(digests)
            yield part

    def _take_over(self, what: str, loader: Iterable[Any], sums: Sequence[Stateful], fit: Stateful) -> None:
        """What other processes, of another number, had counted in the first pass; later passes begin again."""
        if isinstance(loader, Iterator):
            raise ValueError(
                f"{self._folder.folder}: another number of processes goes over the data once more, to see which "
                "examples are counted, expected a loader that can start again, got an iterator"
            )
        examples = [shard.read(EXAMPLES) for shard in self._shards if EXAMPLES in shard.parts]
        if any(one is None for one in examples):
            raise self._not_told()
        own, mine, begun = self._shards[self._processes.rank :: self._processes.size], list[Tensor](), False
        for shard in own:
            if _name(0) in shard.parts:
                for one, state in zip(sums, self._read(shard, _name(0)), strict=True):
                    if not begun:
                        one.restore(state)
                    elif isinstance(one, Joining):
                        one.join(state)
                    else:
                        raise ValueError(
                            f"{type(one).__name__}: expected a method join, for the sums of several processes"
                        )
                mine.append(shard.read(EXAMPLES))
                begun = True
        counted = takeover.counter(takeover.joined(examples))
        skip = takeover.own_part(counted, loader, self._processes, self._read_batch)
        if skip is None:
            raise ValueError(
                f"{self._folder.folder.parent.parent}: the checkpoint of {len(self._shards)} processes has counted "
                "examples that no loader has now; pass the same data, or remove the folder to start the fit again"
            )
        self._digests, self._skip, self._start = mine, skip, random_state(loader)
        self._passes = [_Pass(what)]
        self._write(sums, fit, loader)
        self._processes.values(None)  # everybody has written
        for shard in own:
            shard.clear()
        self._saved, self._shards = _saved(self._folder, self._identity), ()

    def _not_told(self) -> ValueError:
        return ValueError(
            f"{self._folder.folder.parent.parent}: the examples of some batches cannot be told apart, so that only as "
            "many processes as before can go on"
        )

    def _others(self, counted: int, found: str) -> ValueError:
        return ValueError(
            f"{self._folder.folder}: the checkpoint has counted {counted} batches, and the loader has {found}; "
            f"pass the same data in the same order (shuffle=False, or a generator with a seed), or a "
            "loader with state_dict, or remove the folder to start the fit again"
        )


def _saved(folder: CheckpointFolder, identity: Any) -> Any:
    """What a folder says of a fit; None if nothing is counted: then nothing is lost.

    Raises:
        ValueError: if it is another fit.
    """
    if FIT not in folder.parts:
        return None
    saved = _read(folder, FIT, identity)
    saved["passes"] = [_Pass(**one) for one in saved["passes"]]
    if not saved["examples"] and not len(saved["skip"]) and not any(one.batches for one in saved["passes"]):
        return None
    _check_identity(folder.folder, of_any_device(folder.identity), of_any_device(identity))
    return saved


def _read(folder: CheckpointFolder, part: str, identity: Any) -> Any:
    """What a folder holds of a part, on the devices that the layers have now."""
    now = dict(zip(folder.identity["devices"], identity["devices"], strict=False))
    return folder.read(part, lambda name: torch.device(now.get(name, name)))


def _name(number: int) -> str:
    return f"pass {number}"


def _check_identity(folder: Path, saved: Any, own: Any, path: str = "") -> None:
    """Whether two are the same; the first difference is named."""
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in {**saved, **own}:
            _check_identity(folder, saved.get(key), own.get(key), f"{path}.{key}" if path else key)
    elif saved != own:
        raise ValueError(
            f"{folder}: the checkpoint of another fit: {path}: it has {saved!r}, this fit {own!r}; pass another "
            "folder, or remove this one"
        )
