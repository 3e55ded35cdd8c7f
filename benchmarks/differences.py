"""What predictions of differences and a calibration cost: `python -m benchmarks.differences [--json FILE]`."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .peers import OURS, PEER, interleaved
from .workload import Workload, environment, published_factors, published_prediction, relative_error

DIFFERENCES = f"{OURS}, differences"


def compare(workload: Workload, rounds: int, labels: int) -> dict[str, Any]:
    """Seconds of a prediction in three ways, and of a calibration beside predictions of the same batches."""
    model = workload.model()
    laplace = workload.published_posterior(model)
    factors = published_factors(laplace, workload)
    batch = workload.batches(1, seed=2)[0]
    held_out = workload.batches(-(-labels // workload.examples), seed=3)
    whole, found = laplace.predict(batch).covariance, laplace.predict(batch, differences=True).covariance
    centre = torch.eye(workload.classes) - 1 / workload.classes
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: laplace.predict(batch),
        DIFFERENCES: lambda: laplace.predict(batch, differences=True),
        PEER: lambda: published_prediction(model, batch, factors, workload),
    }
    passes: dict[str, Callable[[], object]] = {
        "predictions": lambda: [laplace.predict(one, differences=True) for one in held_out],
        "calibrate": lambda: laplace.calibrate(held_out, progress=False),
    }
    return {
        "workload": asdict(workload),
        "seconds": interleaved(calls, rounds),
        "difference_of_covariances": relative_error(found, centre @ whole @ centre),
        "labels": len(held_out) * workload.examples,
        "calibration_seconds": interleaved(passes, max(2, rounds // 2)),
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'logits':>6}  {'prediction':36}{'median s':>10}{'min s':>10}"]
    for one in results:
        for name, seconds in one["seconds"].items():
            row = f"{statistics.median(seconds):>10.3f}{min(seconds):>10.3f}"
            lines.append(f"{one['workload']['classes']:>6}  {name:36}{row}")
        medians = {name: statistics.median(seconds) for name, seconds in one["seconds"].items()}
        lines.append(
            f"{'':8}differences take {medians[DIFFERENCES] / medians[OURS]:.2f} of a prediction's time, and "
            f"{medians[PEER] / medians[DIFFERENCES]:.1f} times less than {PEER}; relative difference of covariances "
            f"{one['difference_of_covariances']:.1e}"
        )
        seconds = {name: statistics.median(values) for name, values in one["calibration_seconds"].items()}
        lines.append(
            f"{'':8}calibrate with {one['labels']} labels: {seconds['calibrate']:.3f} s, "
            f"{seconds['calibrate'] - seconds['predictions']:+.3f} s beside predictions of the same batches"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.differences", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--labels", type=int, default=96)
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = [compare(replace(Workload(), classes=c), arguments.rounds, arguments.labels) for c in (2, 4)]
    print(table(results))
    if arguments.json:
        packages = {"bayesian_lora": version("bayesian-lora")}
        content = {"environment": environment() | packages, "results": results}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
