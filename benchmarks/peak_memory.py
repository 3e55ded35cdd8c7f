"""Peak memory of one prediction, in a fresh process: `python -m benchmarks.peak_memory` is what `peers` starts.

The process loads the model and the posterior and predicts once for a batch of 2 examples and 4 tokens, so that code
which loads at first use is there. The freed heap goes back to the system, Linux's high-water mark of the resident set
is reset, and the prediction runs. Its peak is the high-water mark less the resident set just before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bayesian_lora_kernels import LaplaceLoRA

from .workload import Workload, published_prediction

PACKAGES = ("bayesian_lora_kernels", "bayesian_lora")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def measurable() -> bool:
    """Whether this system keeps a high-water mark that can be reset (Linux)."""
    return _STATUS.exists() and _CLEAR.exists()


def peak_in_fresh_process(package: str, workload: Workload, folder: Path) -> float:
    """Peak bytes above the loaded model for one prediction of a package.

    Args:
        package: of PACKAGES.
        workload: the sizes.
        folder: holds what `save_pretrained` wrote, and `published.pt`, the same factors for bayesian_lora.
    """
    command = [sys.executable, "-m", __spec__.name, package, str(folder), json.dumps(asdict(workload))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:5])} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def peak_bytes(call: Callable[[], object]) -> int:
    before = reset_peak()
    call()
    return resident(peak=True) - before


def reset_peak() -> int:
    """Give freed memory back to the system and begin a new high-water mark; the bytes that are resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    return resident()


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most since `reset_peak`."""
    key = "VmHWM" if peak else "VmRSS"
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", choices=PACKAGES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("workload", type=json.loads)
    arguments = parser.parse_args()
    workload = Workload(**arguments.workload)
    model = workload.model()
    small = replace(workload, examples=2, tokens=4).batches(1)[0]
    batch = workload.batches(1, seed=2)[0]
    if arguments.package == "bayesian_lora":
        factors = torch.load(arguments.folder / "published.pt")
        published_prediction(model, small, factors, workload)
        print(peak_bytes(lambda: published_prediction(model, batch, factors, workload)))
    else:
        laplace = LaplaceLoRA.from_pretrained(model, arguments.folder)
        laplace.predict(small)
        print(peak_bytes(lambda: laplace.predict(batch)))


if __name__ == "__main__":
    main()
