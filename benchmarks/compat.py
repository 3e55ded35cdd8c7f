"""Our drop-in interfaces beside the packages they stand in for: `python -m benchmarks.compat [--json FILE]`.

Seconds (every package in a process of its own, taking turns, after one run to warm up), peak memory, and the difference
of the results. A peer that is not there is left out, with the reason. laplace-lora is not in the package registry:
`--sources` (or BLK_PEER_SOURCES) names the folder with a checkout `laplace-lora`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .peak_memory import measurable
from .peers import ratio
from .workload import Workload, environment, relative_error

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "bayesian_lora": ("ours", "theirs"),
    "laplace_torch": ("ours", "theirs"),
    "laplace_lora": ("ours", "ours, published scale", "theirs"),
}
CALLS = {
    "bayesian_lora": "jacobian_mean and variance",
    "laplace_torch": "backend.jacobians",
    "laplace_lora": "_glm_predictive_distribution",
}
# (peer, examples): how many times faster at least; for bayesian_lora more with every N.
WANTED = {("bayesian_lora", 8): 10.0, ("laplace_torch", 16): 5.0, ("laplace_lora", 16): 5.0}


class Worker:
    """A process of `benchmarks.peer_worker`."""

    def __init__(self, job: str, package: str, workload: Workload, threads: int, sources: str | None):
        path = [str(ROOT)]
        if job == "laplace_lora" and package == "theirs":
            assert sources is not None
            path.insert(0, str(Path(sources) / "laplace-lora"))
        environment_of = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": str(threads)}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer_worker", job, package, json.dumps(asdict(workload)), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env=environment_of,
        )
        self._answer()

    def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{' '.join(self.process.args[3:5])} failed:\n{self.errors.read()[-3000:]}")  # type: ignore[index]
        return line.strip()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def absent(job: str, sources: str | None) -> str | None:
    """Why a peer cannot run here, or None."""
    if job == "laplace_lora":
        if find_spec("asdl") is None:
            return "asdl is not installed"
        if not sources or not (Path(sources) / "laplace-lora" / "laplace").is_dir():
            return "no checkout of laplace-lora: --sources names no folder that has one"
        return None
    module = {"bayesian_lora": "bayesian_lora", "laplace_torch": "laplace"}[job]
    return None if find_spec(module) else f"{module} is not installed"


def compare(job: str, workload: Workload, rounds: int, threads: int, sources: str | None) -> dict[str, Any]:
    """Seconds, peak bytes and relative difference of one job at one size."""
    workers = {package: Worker(job, package, workload, threads, sources) for package in PACKAGES[job]}
    seconds: dict[str, list[float]] = {package: [] for package in workers}
    try:
        for _ in range(rounds):
            for package, worker in workers.items():
                seconds[package].append(float(worker.ask("time")))
        peak = {p: int(w.ask("peak")) for p, w in workers.items()} if measurable() else None
        results = {}
        with tempfile.TemporaryDirectory() as folder:
            for i, (package, worker) in enumerate(workers.items()):
                path = Path(folder) / str(i)
                worker.ask(f"save {path}")
                results[package] = torch.load(path)
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "examples": workload.examples,
        "seconds": seconds,
        "times_faster": {p: ratio(seconds["theirs"], seconds[p]) for p in workers if p != "theirs"},
        "peak_bytes": peak,
        "difference": {p: relative_error(results[p], results["theirs"]) for p in workers if p != "theirs"},
    }


def table(comparisons: dict[str, list[dict[str, Any]]], left_out: dict[str, str]) -> str:
    lines = [f"{'':44}{'N':>4}{'median s':>10}{'min s':>9}{'peak MiB':>10}{'faster':>9}{'(min)':>8}{'difference':>12}"]
    for job, measured in comparisons.items():
        for entry in measured:
            for package in PACKAGES[job]:
                seconds = entry["seconds"][package]
                peak = f"{entry['peak_bytes'][package] / 2**20:.0f}" if entry["peak_bytes"] else "-"
                name = f"{job}, {package}"
                line = (
                    f"{name:44}{entry['examples']:>4}{statistics.median(seconds):>10.4f}{min(seconds):>9.4f}{peak:>10}"
                )
                if package in entry["times_faster"]:
                    faster = entry["times_faster"][package]
                    line += f"{faster['of_medians']:>9.1f}{faster['of_minima']:>8.1f}"
                    line += f"{entry['difference'][package]:>12.1e}"
                lines.append(line)
        lines.append(f"  ({CALLS[job]})")
    lines += [f"{job}: left out, {reason}" for job, reason in left_out.items()]
    return "\n".join(lines)


def missed(comparisons: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Which wanted figures were not reached."""
    failures = []
    for job, measured in comparisons.items():
        for entry in measured:
            wanted = WANTED.get((job, entry["examples"]))
            reached = entry["times_faster"]["ours"]["of_medians"]
            if wanted and reached < wanted:
                failures.append(f"{job} at N = {entry['examples']}: {reached:.1f} times, wanted {wanted:.0f}")
            for package, difference in entry["difference"].items():
                # laplace-lora has only full factors, on its own scale.
                comparable = job != "laplace_lora" or package != "ours"
                if comparable and difference > 1e-4:
                    failures.append(f"{job}, {package}: differs by {difference:.1e}, wanted 1e-4")
    growth = [e["times_faster"]["ours"]["of_minima"] for e in comparisons.get("bayesian_lora", [])]
    if growth != sorted(growth):
        failures.append(f"bayesian_lora: the ratio does not grow with N: {growth}")
    return failures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compat", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--examples", type=int, nargs="+", default=[2, 8, 16], metavar="N")
    parser.add_argument("--jobs", nargs="+", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--sources", default=os.environ.get("BLK_PEER_SOURCES"), metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a wanted figure is missed")
    options = parser.parse_args(arguments)
    comparisons: dict[str, list[dict[str, Any]]] = {}
    left_out = {}
    for job in options.jobs:
        if reason := absent(job, options.sources):
            left_out[job] = reason
            continue
        for n in options.examples:
            workload = replace(Workload(), examples=n)
            measured = compare(job, workload, options.rounds, options.threads, options.sources)
            comparisons.setdefault(job, []).append(measured)
            if options.json:  # as far as it has come
                _write(options, comparisons, left_out)
    print(table(comparisons, left_out))
    if options.json:
        _write(options, comparisons, left_out)
    if options.check and (failures := missed(comparisons)):
        raise SystemExit("missed: " + "; ".join(failures))


def _write(options: argparse.Namespace, comparisons: dict[str, list[dict[str, Any]]], left_out: dict[str, str]) -> None:
    content = {
        "environment": environment() | {"threads": options.threads},
        "workload": asdict(Workload()),
        "comparisons": comparisons,
        "left_out": left_out,
    }
    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
