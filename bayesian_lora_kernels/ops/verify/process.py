"""The other end of ``worker``: starts it, asks with a limit of time, ends it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

from .judge import Verdict

SECONDS = 300.0  # for a unit, most of which are for compiling


class Worker:
    """A process that judges units; started by the first question, and again after one that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def ask(self, request: dict[str, str], seconds: float = SECONDS) -> Verdict:
        """The verdict on a unit; failed if the process crashes or takes longer than ``seconds``."""
        start = time.perf_counter()
        try:
            process = self._started()
        except OSError as error:
            return Verdict("inconclusive", reason=f"no process could be started: {error}")
        try:
            line = self._exchange(process, json.dumps(request).encode() + b"\n", seconds)
        except TimeoutError:
            self.close()
            return Verdict("failed", seconds=seconds, reason=f"no result within {seconds:g} s")
        except BaseException:
            self.close()
            raise
        took = round(time.perf_counter() - start, 3)
        if line is None:
            how = self._ended(process)
            return Verdict("failed", seconds=took, reason=f"the process that tried it ended: {how}")
        try:
            return Verdict.from_json(json.loads(line))
        except ValueError as error:
            self.close()
            return Verdict("inconclusive", seconds=took, reason=f"its process answered something else: {error}"[:300])

    def close(self) -> None:
        """End the process, and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the process
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "BLK_VERIFY": "0"}
        for name in ("BLK_IMPL", "BLK_AUTOTUNE"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, and its compilers end with it
        )
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], question: bytes, seconds: float) -> bytes | None:
        """One line for another; None if the process ended first."""
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(question)
            process.stdin.flush()
        end, line = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                if not (part := os.read(process.stdout.fileno(), 1 << 16)):
                    return None
                line += part
        return line

    def _ended(self, process: subprocess.Popen[bytes]) -> str:
        """Signal or exit status, and the last line that it said."""
        code = process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        assert self._errors is not None
        self._errors.seek(0)
        said: list[Any] = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        self.close()
        return f"{how}; {last[:200]}" if last else how
