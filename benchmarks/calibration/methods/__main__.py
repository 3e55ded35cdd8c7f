"""Runs the study: `python -m benchmarks.calibration.methods --out FOLDER`; what it is, `__init__.py` says."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from bayesian_lora_kernels.calibration import accuracy, negative_log_likelihood
from bayesian_lora_kernels.plots import save_figure

from ...workload import environment
from ..files import write_json, write_text
from ..tasks import CHOICES, COMPARED, make_task
from ..tasks.task import MissingPackage, logits_of
from . import report
from .case import Case
from .registry import METHODS
from .runs import Runs, StudyError, record

RUNS = "runs.jsonl"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration.methods", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, and to go on from")
    parser.add_argument("--cache", type=Path, help="folder for models and posteriors (default: OUT/cache)")
    parser.add_argument("--ratings", type=Path, metavar="FILE", help="vaderSentiment-3.3.2.tar.gz, for `sentiment-...`")
    parser.add_argument("--task", choices=(*COMPARED, CHOICES), action="append", help="only this one; may be repeated")
    parser.add_argument("--method", choices=tuple(METHODS), action="append", help="only this one; may be repeated")
    parser.add_argument("--seeds", type=int, default=5, help="models of each task")
    parser.add_argument("--first-seed", type=int, default=0, help="the others count on from it")
    parser.add_argument(
        "--fine-tune-only", action="store_true", help="train, and show accuracy and loss of the plain models"
    )
    parser.add_argument("--report-only", action="store_true", help="tables from what is finished")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if options.fine_tune_only:
            for case in _cases(options):
                print(fine_tune_only(case), flush=True)
            return 0
        runs = Runs(options.out / RUNS)
        if not options.report_only:
            run_all(options, runs)
        write_report(options.out, runs)
    except (MissingPackage, StudyError) as error:
        print(f"methods: {error}", file=sys.stderr)
        return 1
    return 0


def run_all(options: argparse.Namespace, runs: Runs) -> None:
    """Whatever is not finished, with a bar that says how long it will take."""
    methods = {name: METHODS[name] for name in options.method or METHODS}
    tasks = options.task or COMPARED
    versions = environment()
    with tqdm(total=len(tasks) * options.seeds * len(methods), desc="runs", smoothing=0.1) as bar:
        for case in _cases(options):
            for name, method in methods.items():
                settings = case.settings | {"method": method.settings(case)}
                if runs.has(case.task.name, case.seed, name, settings):
                    bar.total -= 1
                    bar.refresh()
                    continue
                bar.set_postfix_str(f"{case.task.name} {case.seed}, {name}")
                runs.add(record(case, name, method.run(case), settings, versions))
                bar.update()


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for name in options.task or COMPARED:
        task = make_task(name, options.cache or options.out / "cache", options.ratings)
        task.autocast = True
        for number in range(options.seeds):
            yield Case(task, options.first_seed + number)


def fine_tune_only(case: Case) -> str:
    """One model, and what may be looked at while tasks are built."""
    model, seconds = case.fine_tuned()
    words = [f"{case.task.name} {case.seed}: {seconds:.1f} s"]
    for name in ("train", "test", "shift"):
        examples = getattr(case.splits, name)
        probs, labels = logits_of(case.task, model, examples).softmax(dim=-1), case.labels(name)
        loss, share = negative_log_likelihood(probs, labels), accuracy(probs, labels)
        words.append(f"{name} ({len(examples)}) accuracy {share:.3f} loss {loss:.4f}")
    return "; ".join(words)


def write_report(out: Path, runs: Runs) -> None:
    if not runs.all:
        raise StudyError(f"{out}: no finished run to report on")
    write_text(out / "report.md", report.as_markdown(runs.all))
    write_json(out / "report.json", report.summary(runs.all))
    save_figure(report.draw(runs.all), out / "report.png")
    print(out / "report.md")


if __name__ == "__main__":
    logging.getLogger("bayesian_lora_kernels").setLevel(logging.ERROR)
    sys.exit(main())
