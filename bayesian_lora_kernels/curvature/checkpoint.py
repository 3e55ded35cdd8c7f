"""Where a fit is in its passes over the data, so that the next fit goes on there, to the same result bit for bit."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesian_lora_kernels.curvature.checkpoint_folder import CheckpointFolder, held
from bayesian_lora_kernels.curvature.state import (
    Stateful,
    batch_digest,
    loader_state,
    random_state,
    set_random_state,
)
from bayesian_lora_kernels.processes import ALONE, Processes

SECONDS = 60.0  # between checkpoints where nobody says how many batches,
SHARE = 20  # and no less than so many times what the last took to write
FIT = "fit"


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
        identity: what two fits must have in common for one to go on where the other was, as JSON.

    Raises:
        ValueError: if the folder holds the checkpoint of another fit.
        OSError: if nothing can be written there.
    """

    def __init__(self, folder: CheckpointFolder, every: int | None, identity: Mapping[str, Any]):
        self._folder, self._every, self._identity = folder, every, json.loads(json.dumps(identity))
        self._passes: list[_Pass] = []
        saved: Any = folder.read(FIT) if FIT in folder.parts else {"passes": []}
        saved["passes"] = [_Pass(**one) for one in saved["passes"]]
        if not any(one.batches for one in saved["passes"]):
            saved = None  # nothing was counted: nothing is lost
        self._saved: Any = saved
        self._start: Any = None
        self.saved: Any = None if saved is None else saved["own"]
        if saved is not None:
            _check_identity(folder.folder, folder.identity, self._identity)
        self._proved, self._took, self._last = False, 0.0, time.monotonic()
        if saved is None:
            folder.clear()
            folder.write(self._identity, {FIT: {"passes": [], "own": None}})

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
        saved, number = self._saved, len(self._passes)
        known = [] if saved is None else saved["passes"]
        one = known[number] if number < len(known) else _Pass(what)
        self._passes.append(one)
        if one.what != what:
            raise ValueError(f"{self._folder.folder}: a checkpoint of the pass {one.what!r}, expected {what!r}")
        if number == 0:
            self._start = random_state(loader) if saved is None else saved["start"]
            set_random_state(self._start, loader)
        counted, first, digest = one.batches, 0, ""
        if number < len(known):
            for own, state in zip(sums, self._folder.read(_name(number)), strict=True):
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
                yield index, given
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

    def _is_time(self, batches: int) -> bool:
        if self._every is not None:
            return batches % self._every == 0
        return time.monotonic() - self._last >= max(SECONDS, SHARE * self._took)

    def _write(self, sums: Sequence[Stateful], fit: Stateful, loader: Iterable[Any]) -> None:
        started, one = time.monotonic(), self._passes[-1]
        state = {
            "passes": [vars(one) for one in self._passes],
            "start": self._start,
            "now": random_state(loader),
            "loader": None if one.done else loader_state(loader),
            "own": fit.state(),
        }
        try:
            parts = {_name(len(self._passes) - 1): [one.state() for one in sums], FIT: state}
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

    def _others(self, counted: int, found: str) -> ValueError:
        return ValueError(
            f"{self._folder.folder}: the checkpoint has counted {counted} batches, and the loader has {found}; "
            f"pass the same data in the same order (shuffle=False, or a generator with a seed), or a "
            "loader with state_dict, or remove the folder to start the fit again"
        )


@contextmanager
def checkpoint_in(
    folder: str | os.PathLike[str] | None,
    every: int | None,
    identity: Callable[[], Mapping[str, Any]],
    processes: Processes = ALONE,
) -> Iterator[Checkpoint | None]:
    """The checkpoint of a fit, in a folder that no other fit can write to meanwhile; None without a folder.

    Each process of a group has a folder of its own in it, `rank-0` and so on.

    Raises:
        ValueError: for a checkpoint that is damaged, or of another fit.
        OSError: if another fit writes to the folder, or nothing can be written there.
    """
    if folder is None:
        yield None
        return
    with held(Path(folder) / f"rank-{processes.rank}") as own:
        yield Checkpoint(own, every, {**identity(), "processes": processes.size})


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
