"""`blk` in a process of its own, as a user calls it, with its seconds and its peak memory."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from subprocess import Popen
from time import perf_counter

from bayesian_lora_kernels.posterior.storage import write_text


def blk(command: str, *arguments: object, json_file: Path) -> None:
    """Run it with its output on the screen; its JSON file gets `process`: seconds, CPU seconds, peak bytes.

    Raises:
        SystemExit: if the command fails, which then has said why.
    """
    words = [sys.executable, "-m", "bayesian_lora_kernels.cli", command, *map(str, arguments)]
    unfinished = json_file.with_suffix(".part.json")
    start = perf_counter()
    process = Popen([*words, "--json", str(unfinished)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {shlex.join(words[2:])}")
    content = json.loads(unfinished.read_text(encoding="utf-8"))
    content["process"] = {
        "seconds": perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    write_text(json_file, json.dumps(content))
    unfinished.unlink()
