"""A JSON-lines file that is written as results come, takes its place when it is whole, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.errors import InputError, writing


class PartialLines:
    """Beside the file a `NAME.part`, whose first line says of what run it is; it is gone when the file is there.

    Attributes:
        done: rows that an earlier run of the same kind has left.

    Args:
        path: of the file; `-`: rows go to stdout, and a run begins anew; None: nothing is written.
        about: what the rows follow from: only a run with equal values goes on.

    Raises:
        InputError: if there is a part of another run, or it cannot be written.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]):
        self.path, self.about = path, json.loads(json.dumps(about))
        self.done = 0
        self._written = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> PartialLines:
        if self.path is not None and self.path != output.STDOUT:
            with writing(self.path, "--json"):
                part = self.path.with_name(f"{self.path.name}.part")
                self._file = open(part, "r+b" if part.exists() else "w+b")
                self._go_on()
        return self

    def first(self, count: int) -> list[Any]:
        """Of the rows that are there already, at most that many."""
        if self._file is None or not self.done:
            return []
        end = self._file.tell()
        self._file.seek(0)
        self._file.readline()
        found = [json.loads(self._file.readline()) for _ in range(min(count, self.done))]
        self._file.seek(end)
        return found

    def write(self, rows: Sequence[Any]) -> None:
        """Add rows; they are in the file when this returns."""
        lines = "".join(json.dumps(output.finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        if self.path == output.STDOUT:
            output.write(lines)
        elif self.path is not None and self._file is not None:
            with writing(self.path, "--json"):
                self._file.write(lines.encode())
                self._file.flush()
            self._written += len(rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None or self.path is None:
            return
        part = Path(self._file.name)
        with self._file as file:
            if error is not None and not self.done + self._written:
                part.unlink()
                return
            if error is not None:
                output.hint(f"{part} has what was done; the same command goes on from there")
                return
            with writing(self.path, "--json"):
                whole = part.with_name(f"{part.name}.whole")
                try:
                    with open(whole, "wb") as copy:
                        file.seek(0)
                        file.readline()
                        shutil.copyfileobj(file, copy)
                        copy.flush()
                        os.fsync(copy.fileno())
                    os.replace(whole, self.path)
                finally:
                    whole.unlink(missing_ok=True)
        part.unlink()

    def _go_on(self) -> None:
        """Leave the file at the end of its last whole row."""
        assert self._file is not None
        first = self._file.readline()
        try:
            about = json.loads(first) if first.endswith(b"\n") else None
        except ValueError:
            about = {}
        if about is None:  # new, or stopped before it was begun
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(self.about).encode() + b"\n")
            self._file.flush()
            return
        if about != self.about:
            other = ", ".join(
                sorted(key for key in self.about if not isinstance(about, dict) or about.get(key) != self.about[key])
            )
            raise InputError(
                f"{self._file.name}: left by a run with other {other}; remove it, or give --json another name"
            )
        end = self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            end, self.done = end + len(line), self.done + 1
        self._file.seek(end)
        self._file.truncate()
