"""The demo from beginning to end."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm.auto import tqdm

from bayesian_lora_kernels.calibration.plots import reliability_diagrams, risk_coverage_diagram, save_figure
from bayesian_lora_kernels.demo.methods import FOLDS, NAMES, compare_methods
from bayesian_lora_kernels.demo.report import TITLES, as_json, conclusions, format_differences, format_table
from bayesian_lora_kernels.demo.results import MEASURED, Run, make_run, measure
from bayesian_lora_kernels.demo.sentences import read_standard_library
from bayesian_lora_kernels.demo.settings import CLASSES, FOREIGN, DemoSettings
from bayesian_lora_kernels.demo.task import Example, Task
from bayesian_lora_kernels.demo.training import add_lora, fine_tune, make_base_model, train_base_model
from bayesian_lora_kernels.posterior.storage import write_text

DRAWN = ("map", "temperature", "labels", "folds", "evidence")
JSON_NAME, PLOT_NAME, RISK_NAME = "results.json", "reliability.png", "risk-coverage.png"
MOST_THREADS = 4  # the model is small: more of them wait for each other


def run_demo(settings: DemoSettings, seeds: int, seed: int, out: Path, progress: bool = True) -> dict[str, Any]:
    """Train, fine-tune, compare, report.

    One base model serves all runs; each run draws its own sets, and fine-tunes anew.

    Args:
        settings: sizes.
        seeds: how many runs.
        seed: of the base model and the first run; the others count on from it.
        out: folder for `results.json`, `reliability.png` and `risk-coverage.png`; made if it is not there.
        progress: whether to show progress bars.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: if `seeds` is not positive.
        RuntimeError: if this Python lacks the text that is needed.
        ImportError: without matplotlib.
        OSError: if `out` cannot be written to.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    check_packages()
    out.mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    seconds = {}
    with _few_threads():
        only = None if settings.modules is None else (*CLASSES, *FOREIGN, *settings.modules)
        modules = read_standard_library(
            only, lambda files: tqdm(files, desc="reading the standard library", unit="file", disable=not progress)
        )
        task = Task(modules, settings)
        seconds["data"] = perf_counter() - start
        base = _base_model(task, settings, seed, progress)
        seconds["base model"] = perf_counter() - start - seconds["data"]
        runs = [_one_run(task, base, settings, seed + i, f"run {i + 1}/{seeds}", progress) for i in range(seeds)]
    results = measure(runs)
    figure = reliability_diagrams({title: _pooled(runs, name) for name, title in TITLES.items()})
    seconds["total"] = perf_counter() - start
    content = as_json(runs, results, settings, seconds)
    save_figure(figure, out / PLOT_NAME)
    save_figure(risk_coverage_diagram(*_pooled(runs, "test"), title=TITLES["test"]), out / RISK_NAME)
    write_text(out / JSON_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    print(_heading(settings, seeds))
    print(format_table(results, settings))
    print()
    if seeds > 1:
        print(format_differences(results) + "\n")
    for sentence in conclusions(results, settings):
        print(sentence)
    print(f"\n{out / PLOT_NAME}, {out / RISK_NAME}, {out / JSON_NAME}; {seconds['total']:.0f} s")
    return content


def check_packages() -> None:
    """Before long work: is there what is needed at its end?

    Raises:
        ImportError: without matplotlib.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ImportError("the demo needs matplotlib: pip install matplotlib")


def _base_model(task: Task, settings: DemoSettings, seed: int, progress: bool) -> torch.nn.Module:
    base = make_base_model(settings.base, len(task.tokenizer), task.tokenizer.pad_token_id, seed)
    with tqdm(total=settings.base.steps, desc="training the base model", unit="step", disable=not progress) as bar:

        def show(numbers: dict[str, float]) -> None:
            bar.set_postfix({name: f"{value:.2f}" for name, value in numbers.items()}, refresh=False)
            bar.update()

        train_base_model(base, task.base_examples, settings.base, seed, show)
    return base


def _one_run(task: Task, base: torch.nn.Module, settings: DemoSettings, seed: int, name: str, progress: bool) -> Run:
    splits = task.splits(seed)
    total = (FOLDS + 1) * settings.tuning.epochs  # without each fold, and with all
    with tqdm(total=total, desc=name, unit="epoch", disable=not progress) as bar:

        def show(numbers: dict[str, float]) -> None:
            bar.set_postfix({key: f"{value:.3f}" for key, value in numbers.items()}, refresh=False)
            bar.update()

        def tuned(examples: Sequence[Example]) -> torch.nn.Module:
            model = add_lora(copy.deepcopy(base), settings.tuning, seed)
            fine_tune(model, task.class_token_ids, examples, settings.tuning, seed, show)
            return model

        outcomes, folds = compare_methods(tuned, task, splits, settings, seed, bar.set_postfix_str)
    return make_run(seed, splits, outcomes, folds)


def _pooled(runs: Sequence[Run], name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Predictions of all runs, one after the other."""
    assert name in MEASURED
    probs = {NAMES[m]: torch.cat([run.outcomes[m].probs[name] for run in runs]) for m in DRAWN}
    return probs, torch.cat([run.labels[name] for run in runs])


def _heading(settings: DemoSettings, seeds: int) -> str:
    sizes = f"{len(CLASSES) * settings.train} sentences to fine-tune on"
    spread = f"; mean ± standard error of {seeds} fine-tunings of one base model" if seeds > 1 else ""
    return (
        f"\nWhich module is a sentence from: {', '.join(CLASSES)}? {sizes}{spread}.\n"
        f"The labels of {len(CLASSES) * settings.held_out} more are held out, for temperature scaling, averaged "
        "temperatures and where it says so.\n"
        "Laplace: exact curvature, or EKFAC where it says so; pairwise probabilities.\n"
    )


@contextmanager
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, MOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
