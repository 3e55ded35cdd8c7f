"""Memory and time of `score` for longer and longer texts: `python -m benchmarks.long_scores [--json FILE]`.

A random Llama (width 256, 8 heads, 4 layers), one text, 32 samples. Attention with tangents in tiles, as it is, and as
PyTorch's math kernel, which keeps a matrix of T x T of every head and sample. Each case runs in a process of its own,
which scores a short text first; seconds are of processor time. Peaks are above the loaded model and its posterior;
*hidden* is what of a peak must grow with the tokens, the hidden states of 16 samples (each has a mirror image).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.predictive import attention, jvp

from .memory import GLIBC
from .peak_memory import peak_bytes
from .workload import Workload, environment

MIB = 2**20
TOKENS = (512, 1024, 2048)
KINDS = ("tiles", "math kernel")
SAMPLES = 32


@contextlib.contextmanager
def attending(kind: str) -> Iterator[None]:
    """With PyTorch's math kernel for everything, or as it is."""
    if kind == KINDS[0]:
        yield
        return
    with mock.patch.object(jvp, "attention_with_tangents", attention.plain_attention), attention.plain_attention():
        yield


def measure(kind: str, tokens: int) -> dict[str, Any]:
    """In this process, which should be fresh."""
    workload = Workload(width=256, heads=8, layers=4, feed_forward=688, examples=1, tokens=tokens)
    short = Workload(examples=4, tokens=16)
    laplace = LaplaceLoRA(workload.model(), class_token_ids=workload.class_token_ids)
    laplace.fit(short.batches(2), progress=False)
    batch, few = workload.batches(1)[0], short.batches(1)[0]
    with attending(kind):
        laplace.score({"input_ids": few["input_ids"]}, n_samples=SAMPLES)
        started = time.process_time()
        peak = peak_bytes(lambda: laplace.score({"input_ids": batch["input_ids"]}, n_samples=SAMPLES))
        seconds = time.process_time() - started
    hidden = SAMPLES // 2 * tokens * workload.width * 4
    sizes = {"peak_mib": round(peak / MIB, 1), "hidden_mib": round(hidden / MIB, 1)}
    return {"attention": kind, "tokens": tokens, **sizes, "seconds": round(seconds, 1)}


def in_fresh_process(kind: str, tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, "--case", kind, str(tokens)]
    folder, variables = Path(__file__).parents[1], {**os.environ, **GLIBC, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=variables)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(results: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| attention | tokens | peak MiB | of it hidden states | s |", "|---|---|---|---|---|"]
    for one in results:
        numbers = f"{one['tokens']} | {one['peak_mib']} | {one['hidden_mib']} | {one['seconds']}"
        lines.append(f"| {one['attention']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=2, metavar=("KIND", "TOKENS"), help="measure one, in this process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    arguments = parser.parse_args()
    if arguments.case is not None:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(arguments.case[0], int(arguments.case[1]))))
        return
    results = []
    for kind in KINDS:
        for tokens in TOKENS:
            results.append(in_fresh_process(kind, tokens))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    if arguments.json is not None:
        content = {"environment": environment(), "samples": SAMPLES, "cases": results}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
