"""`make fuzz`, or `PYTHONPATH=tests python -m fuzz [COUNT] [--seed SEED] [--case INDEX]`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from fuzz.run import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=100_000, help="how many damaged folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one only, in this process, with the error as it comes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where a file is written at once
    with tempfile.TemporaryDirectory(prefix="blk-fuzz-", dir=memory) as scratch:
        sys.exit(run(Path(scratch), args.count, args.seed, args.case))
