"""The demo from beginning to end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bayesian_lora_kernels.demo.methods import NAMES, compare_methods
from bayesian_lora_kernels.demo.problem import Problem
from bayesian_lora_kernels.demo.report import Block, as_json, conclusions, difference_tables, tables
from bayesian_lora_kernels.demo.results import Run, make_run, measure
from bayesian_lora_kernels.plots import reliability_diagrams, risk_coverage_diagram, save_figure
from bayesian_lora_kernels.posterior.storage import write_text

DRAWN = ("map", "temperature", "labels", "folds")
JSON_NAME, PLOT_NAME, RISK_NAME = "results.json", "reliability.png", "risk-coverage.png"


def run_demo(
    make_problem: Callable[[], Problem], seeds: int, seed: int, out: Path, progress: bool = True
) -> tuple[dict[str, Any], list[str | Block]]:
    """Fine-tune, compare, report.

    One base model serves all runs; each run draws its own sets, and fine-tunes anew.

    Args:
        make_problem: reads the data and gets the base model.
        seeds: how many runs.
        seed: of the first run; the others count on from it.
        out: folder for `results.json`, `reliability.png` and `risk-coverage.png`; made if it is not there.
        progress: whether to show progress bars.

    Returns:
        What `results.json` holds, and the same to read, in parts.

    Raises:
        ValueError: if `seeds` is not positive.
        RuntimeError: if there is not the model or the text that is needed.
        ImportError: without matplotlib.
        OSError: if `out` cannot be written to.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    check_packages()
    start = perf_counter()
    problem = make_problem()
    out.mkdir(parents=True, exist_ok=True)
    runs = [_one_run(problem, seed + i, progress) for i in range(seeds)]
    results = measure(runs)
    figure = reliability_diagrams({problem.titles[name]: _pooled(runs, name) for name in results})
    seconds = {**problem.seconds, "total": perf_counter() - start}
    content = as_json(runs, results, problem, seconds)
    save_figure(figure, out / PLOT_NAME)
    save_figure(risk_coverage_diagram(*_pooled(runs, "test"), title=problem.titles["test"]), out / RISK_NAME)
    write_text(out / JSON_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    titles = {name: f"{problem.titles[name]} ({len(labels)} examples)" for name, labels in runs[0].labels.items()}
    report: list[str | Block] = [_heading(problem, runs)]
    for block in (*tables(results, titles), *(difference_tables(results) if seeds > 1 else ())):
        report += [block, ""]
    report += conclusions(results, runs[0].held_out)
    report += ["", f"{out / PLOT_NAME}, {out / RISK_NAME}, {out / JSON_NAME}; {seconds['total']:.0f} s"]
    return content, report


def check_packages() -> None:
    """Before long work: is there what is needed at its end?

    Raises:
        ImportError: without matplotlib.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ImportError("the demo needs matplotlib: pip install matplotlib")


def _one_run(problem: Problem, seed: int, progress: bool) -> Run:
    splits = problem.splits(seed)
    outcomes, folds = compare_methods(problem, splits, seed, progress)
    return make_run(seed, splits, outcomes, folds)


def _pooled(runs: Sequence[Run], name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Predictions of all runs, one after the other."""
    probs = {NAMES[m]: torch.cat([run.outcomes[m].probs[name] for run in runs]) for m in DRAWN}
    return probs, torch.cat([run.labels[name] for run in runs])


def _heading(problem: Problem, runs: Sequence[Run]) -> str:
    spread = f"; mean ± standard error of {len(runs)} fine-tunings of one base model" if len(runs) > 1 else ""
    return (
        f"\n{problem.question} {runs[0].train} examples to fine-tune on{spread}.\n"
        f"The labels of {runs[0].held_out} more are held out, for temperature scaling, averaged temperatures and where "
        "it says so.\nLaplace: exact curvature, or EKFAC where it says so; pairwise probabilities.\n"
    )
