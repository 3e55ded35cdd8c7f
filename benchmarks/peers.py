"""Side by side with bayesian_lora 0.0.6 and with a plain training pass: `python -m benchmarks.peers [--json FILE]`."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bayesian_lora_kernels import LaplaceLoRA

from .peak_memory import PACKAGES, measurable, peak_in_fresh_process
from .workload import (
    Workload,
    environment,
    plain_pass,
    published_factors,
    published_fit,
    published_prediction,
    relative_error,
)

OURS, PEER = PACKAGES
FIT_RANK = 32


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns, so that what disturbs the machine disturbs all; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Of the medians, of the minima."""
    return {
        "of_medians": statistics.median(numerator) / statistics.median(denominator),
        "of_minima": min(numerator) / min(denominator),
    }


def compare_predictions(workload: Workload, rounds: int) -> dict[str, Any]:
    """Jacobian and covariance given the same factors: seconds, difference, peak memory."""
    model = workload.model()
    laplace = workload.published_posterior(model)
    factors = published_factors(laplace, workload)
    batch = workload.batches(1, seed=2)[0]
    ours = laplace.predict(batch)
    mean, covariance = published_prediction(model, batch, factors, workload)
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: laplace.predict(batch),
        PEER: lambda: published_prediction(model, batch, factors, workload),
    }
    seconds = interleaved(calls, rounds)
    result: dict[str, Any] = {
        "seconds": seconds,
        "times_faster": ratio(seconds[PEER], seconds[OURS]),
        "difference_of_means": relative_error(ours.mean, mean),
        "difference_of_covariances": relative_error(ours.covariance, covariance),
        "peak_bytes": None,
    }
    if measurable():
        with tempfile.TemporaryDirectory() as name:
            laplace.save_pretrained(name)
            torch.save(factors, Path(name) / "published.pt")
            peak = {p: peak_in_fresh_process(p, workload, Path(name)) for p in PACKAGES}
        result |= {"peak_bytes": peak, "share_of_peak": peak[OURS] / peak[PEER]}
    return result


def compare_fits(workload: Workload, rounds: int, batches: int) -> dict[str, Any]:
    """A whole fit against a plain forward and backward of the same batches, and against the peer's pass."""
    model, loader, ids = workload.model(), workload.batches(batches), workload.class_token_ids
    laplace = LaplaceLoRA(model, class_token_ids=ids, fisher="mc", rank=FIT_RANK)
    calls: dict[str, Callable[[], object]] = {
        "plain forward and backward": lambda: plain_pass(model, loader, ids),
        OURS: lambda: laplace.fit(loader, progress=False),
        PEER: lambda: published_fit(model, loader, FIT_RANK, ids),
    }
    seconds = interleaved(calls, rounds)
    plain = seconds["plain forward and backward"]
    return {
        "seconds": seconds,
        "batches": batches,
        "times_a_plain_pass": {name: ratio(seconds[name], plain) for name in PACKAGES},
    }


def table(prediction: Mapping[str, Any], fit: Mapping[str, Any]) -> str:
    rows = [("", "median s", "min s", "peak MiB")]
    peak = prediction["peak_bytes"] or {}
    for name in PACKAGES:
        memory = f"{peak[name] / 2**20:.0f}" if name in peak else "-"
        rows.append((f"predict, {name}", *_seconds(prediction["seconds"][name]), memory))
    for name, seconds in fit["seconds"].items():
        rows.append((f"fit {fit['batches']} batches, {name}", *_seconds(seconds), ""))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:{width}}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows]
    faster, pass_ratio = prediction["times_faster"], fit["times_a_plain_pass"][OURS]
    lines += [
        "",
        f"predict: {faster['of_medians']:.1f} times faster by medians, {faster['of_minima']:.1f} by minima "
        "(wanted: at least 10)",
        f"predict: relative difference of means {prediction['difference_of_means']:.1e}, of covariances "
        f"{prediction['difference_of_covariances']:.1e} (wanted: at most 1e-4)",
    ]
    if peak:
        lines.append(f"predict: {prediction['share_of_peak']:.2f} of the peer's peak memory (wanted: at most 0.25)")
    lines.append(
        f"fit: {pass_ratio['of_medians']:.2f} times a plain pass by medians, {pass_ratio['of_minima']:.2f} by minima "
        "(wanted: at most 1.25); the peer's pass sees the last token only"
    )
    return "\n".join(lines)


def _seconds(values: list[float]) -> tuple[str, str]:
    return f"{statistics.median(values):.3f}", f"{min(values):.3f}"


def missed(prediction: Mapping[str, Any], fit: Mapping[str, Any]) -> list[str]:
    """Which of the wanted figures were not reached."""
    reached = {
        "speed of predict": prediction["times_faster"]["of_medians"] >= 10,
        "equality": max(prediction["difference_of_means"], prediction["difference_of_covariances"]) <= 1e-4,
        "peak memory": prediction["peak_bytes"] is None or prediction["share_of_peak"] <= 0.25,
        "speed of fit": fit["times_a_plain_pass"][OURS]["of_medians"] <= 1.25,
    }
    return [name for name, ok in reached.items() if not ok]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=16, help="of a fit")
    parser.add_argument("--vocabulary", type=int, default=Workload.vocabulary)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default=Workload.attention)
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a wanted figure is missed")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    workload = Workload(vocabulary=arguments.vocabulary, attention=arguments.attention)
    prediction = compare_predictions(workload, arguments.rounds)
    fit = compare_fits(workload, arguments.rounds, arguments.batches)
    print(table(prediction, fit))
    if arguments.json:
        packages = {"bayesian_lora": version("bayesian-lora")}
        content = {
            "environment": environment() | packages,
            "workload": asdict(workload),
            "predict": prediction,
            "fit": fit,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.check and (names := missed(prediction, fit)):
        raise SystemExit(f"missed: {', '.join(names)}")


if __name__ == "__main__":
    main()
