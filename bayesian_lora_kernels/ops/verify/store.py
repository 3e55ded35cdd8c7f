"""The file that remembers verdicts and choices, one for each kind of machine; safe with many processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .judge import Verdict

logger = logging.getLogger("bayesian_lora_kernels")

FORMAT = 1


class Store:
    """Verdicts by unit and choices by call, for the machine that ``facts`` describe.

    What cannot be read (no such file, damaged, of another machine) counts as empty and is replaced by the next write.
    Where nothing can be written, what is found out lasts as long as the process.
    """

    def __init__(self, folder: Path, facts: Mapping[str, str]) -> None:
        self.facts = dict(facts)
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:20]
        self.path = folder / f"verified-{digest}.json"
        self._verdicts: dict[str, Verdict] = {}
        self._choices: dict[str, str] = {}
        self._thread = threading.RLock()
        self._locks = 0  # how many of this process's are inside of each other
        self._refresh()

    def verdict(self, unit: str) -> Verdict | None:
        """What is known of a unit."""
        return self._verdicts.get(unit)

    def choice(self, call: str) -> str | None:
        """The implementation that was chosen by time for a kind of call."""
        return self._choices.get(call)

    def keep_verdict(self, unit: str, verdict: Verdict) -> None:
        """Remember a verdict; in the file too, unless it is inconclusive."""
        with self.locked():
            self._verdicts[unit] = verdict
            if verdict.state != "inconclusive":
                self._write()

    def keep_choice(self, call: str, name: str) -> str:
        """Remember a choice, unless another process was first; returns the one that holds."""
        with self.locked():
            held = self._choices.setdefault(call, name)
            self._write()
        return held

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among threads and processes that use this file, with what they wrote; may be entered again inside."""
        with self._thread:
            self._locks += 1
            try:
                with contextlib.nullcontext() if self._locks > 1 else self._alone():
                    yield
            finally:
                self._locks -= 1

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Among processes; where there are no locks, at once."""
        try:
            import fcntl

            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except (ImportError, OSError):
            self._refresh()
            yield
            return
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._refresh()
            yield
        finally:
            os.close(descriptor)

    def _refresh(self) -> None:
        """Take over what other processes wrote; what failed in this one stays failed."""
        verdicts, choices = self._read()
        failed = {unit: verdict for unit, verdict in self._verdicts.items() if verdict.state == "failed"}
        self._verdicts |= verdicts | failed
        self._choices |= choices

    def _read(self) -> tuple[dict[str, Verdict], dict[str, str]]:
        try:
            content = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}, {}
        except (OSError, ValueError) as error:
            logger.info("%s: not readable, and left out: %s", self.path, error)
            return {}, {}
        try:
            return self._parse(content)
        except ValueError as error:
            logger.info("%s: not of this machine and version, and left out: %s", self.path, error)
            return {}, {}

    def _parse(self, content: Any) -> tuple[dict[str, Verdict], dict[str, str]]:
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("machine") != self.facts:
            raise ValueError(f"expected format {FORMAT} and the facts of this machine")
        verdicts, choices = content.get("verdicts"), content.get("choices")
        if not isinstance(verdicts, dict) or not isinstance(choices, dict):
            raise ValueError("expected verdicts and choices")
        if not all(isinstance(name, str) for name in choices.values()):
            raise ValueError("expected choices to be names")
        return {unit: Verdict.from_json(values) for unit, values in verdicts.items()}, choices

    def _write(self) -> None:
        """The whole file, in one step."""
        verdicts = {u: v.as_json() for u, v in sorted(self._verdicts.items()) if v.state != "inconclusive"}
        content = {"format": FORMAT, "machine": self.facts, "verdicts": verdicts, "choices": self._choices}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(content, file, indent=1, sort_keys=True)
                os.replace(name, self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            logger.info("%s: cannot be written, so that the next process verifies again: %s", self.path, error)
