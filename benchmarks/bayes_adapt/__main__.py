"""Runs the sweep: `python -m benchmarks.bayes_adapt --out FOLDER`; what it is, `__init__.py` says."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from bayesian_lora_kernels.plots import save_figure

from ..calibration.files import write_json, write_text
from ..workload import environment
from . import report
from .filled import LENGTHS, Filled, of_length
from .points import Point, measure

RESULTS = "lengths.json"
PADDED, WIDER = 32, (2, 4)  # tokens, and times as many columns


def points(seed: int) -> list[Point]:
    """Every length without padding, and one length with it."""
    return [Point(seed, tokens, tokens) for tokens in LENGTHS] + [
        Point(seed, PADDED, PADDED * times) for times in WIDER
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bayes_adapt", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, and to go on from")
    parser.add_argument("--cache", type=Path, help="folder for models (default: OUT/cache)")
    parser.add_argument("--checkout", type=Path, metavar="FOLDER", help="of BayesAdapt, for its own code")
    parser.add_argument("--seeds", type=int, default=3, help="models")
    parser.add_argument("--report-only", action="store_true", help="table and picture from what is finished")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    path = options.out / RESULTS
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not options.report_only:
        found = _run(options, path, found)
    if not found.get("points"):
        print(f"{path}: no finished point to report on", file=sys.stderr)
        return 1
    write_text(options.out / "lengths.md", report.as_markdown(found["points"]))
    save_figure(report.draw(found["points"]), options.out / "lengths.svg")
    print(options.out / "lengths.md")
    return 0


def _run(options: argparse.Namespace, path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Whatever is not finished; every point is written down when it is."""
    task = Filled(options.cache or options.out / "cache")
    found = {"environment": environment(), "task": task.identity(), "points": found.get("points", [])}
    done = {(one["seed"], one["tokens"], one["columns"]) for one in found["points"]}
    waiting = {
        seed: [p for p in points(seed) if tuple(asdict(p).values()) not in done] for seed in range(options.seeds)
    }
    with tqdm(total=sum(map(len, waiting.values())), desc="points") as bar:
        for seed, own in waiting.items():
            if not own:
                continue
            splits = task.make(seed)
            model = task.fine_tune(of_length(splits.train, LENGTHS), seed)
            for point in own:
                bar.set_postfix_str(f"model {seed}, {point.tokens} tokens in {point.columns} columns")
                rows = measure(task, model, splits, point, options.checkout)
                found["points"].append({**asdict(point), "methods": rows})
                write_json(path, found)
                bar.update()
    return found


if __name__ == "__main__":
    logging.getLogger("bayesian_lora_kernels").setLevel(logging.ERROR)
    sys.exit(main())
