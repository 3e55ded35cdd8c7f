"""Runs the study: `python -m benchmarks.calibration.labels --out FOLDER`; what it is, `__init__.py` says."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bayesian_lora_kernels.calibration import accuracy, negative_log_likelihood
from bayesian_lora_kernels.plots import save_figure

from ...workload import environment
from ..files import write_json, write_tensors, write_text
from ..scores import labels_of, scores
from ..tasks import NAMES, Splits, Task, make_task
from ..tasks.task import MissingPackage, logits_of
from . import baselines, method, report

LABELS = (10, 25, 50, 100)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration.labels", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, and to go on from")
    parser.add_argument("--cache", type=Path, help="folder for base and fine-tuned models (default: OUT/cache)")
    parser.add_argument("--task", choices=NAMES, action="append", help="only this one; may be repeated")
    parser.add_argument("--seeds", type=int, default=5, help="models of each task")
    parser.add_argument("--curvature", choices=("exact", "ekfac"), default="exact")
    parser.add_argument(
        "--fine-tune-only", action="store_true", help="train, and show accuracy and loss of the plain models"
    )
    parser.add_argument("--report-only", action="store_true", help="tables from what is finished")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    cache = options.cache or options.out / "cache"
    try:
        if not options.report_only:
            for name in options.task or NAMES:
                task = make_task(name, cache)
                for seed in range(options.seeds):
                    if options.fine_tune_only:
                        print(fine_tune_only(task, seed), flush=True)
                    else:
                        run(task, seed, options.curvature, options.out)
        if not options.fine_tune_only:
            write_report(options.out, " ".join(["python -m benchmarks.calibration.labels", *_shown(options)]))
    except (MissingPackage, StudyError) as error:
        print(f"labels: {error}", file=sys.stderr)
        return 1
    return 0


class StudyError(RuntimeError):
    """The folder cannot be used."""


def fine_tune_only(task: Task, seed: int) -> str:
    """One model, and what may be looked at while tasks are built."""
    splits = task.make(seed)
    start = time.perf_counter()
    model = task.fine_tune(splits.train, seed)
    words = [f"{task.name} {seed}: {time.perf_counter() - start:.1f} s"]
    for name in ("train", "test", "shift"):
        examples = getattr(splits, name)
        probs, labels = logits_of(task, model, examples).softmax(dim=-1), labels_of(examples)
        loss, share = negative_log_likelihood(probs, labels), accuracy(probs, labels)
        words.append(f"{name} ({len(examples)}) accuracy {share:.3f} loss {loss:.4f}")
    return "; ".join(words)


def run(task: Task, seed: int, curvature: str, out: Path) -> None:
    """One model: everything about it into a file of tensors and a JSON file, which is written last."""
    path = out / "models" / f"{task.name}-{seed}.json"
    settings = {"curvature": curvature, "labels": list(LABELS)}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        if before != settings:
            raise StudyError(f"{path}: made with {before}, now asked for {settings}; use another folder for --out")
        return
    splits = task.make(seed)
    start = time.perf_counter()
    model = task.fine_tune(splits.train, seed)
    seconds = time.perf_counter() - start
    record, tensors = study(task, splits, model, seed, curvature)
    record |= {"settings": settings, "fine_tuning_seconds": seconds, "environment": environment()}
    write_tensors(path.with_suffix(".safetensors"), tensors)
    write_json(path, record)
    print(f"{task.name} {seed}: {time.perf_counter() - start:.1f} s", flush=True)


def study(
    task: Task, splits: Splits, model: nn.Module, seed: int, curvature: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record of one model for the report, and the tensors that it comes from."""
    logits = {name: logits_of(task, model, getattr(splits, name)) for name in ("train", "held_out", *report.SPLITS)}
    labels = {name: labels_of(getattr(splits, name)) for name in logits}
    probs: dict[str, dict[int, dict[str, Tensor]]] = {
        "map": {0: {name: logits[name].softmax(dim=-1) for name in report.SPLITS}}
    }
    for n in LABELS:
        found = baselines.scaled(
            logits["held_out"][:n], labels["held_out"][:n], {name: logits[name] for name in report.SPLITS}
        )
        for name, one in found.items():
            probs.setdefault(name, {})[n] = one
    package = method.predict(task, splits, model, seed, LABELS, curvature)
    probs |= package.probs
    judged: dict[str, Any] = {
        split: {
            name: {str(n): _plain(scores(one[split], labels[split])) for n, one in by_labels.items()}
            for name, by_labels in probs.items()
        }
        for split in report.SPLITS
    }
    train = logits["train"].softmax(dim=-1)
    record = {
        "task": task.name,
        "seed": seed,
        "sizes": {name: len(one) for name, one in labels.items()},
        "train": {
            "accuracy": accuracy(train, labels["train"]),
            "nll": negative_log_likelihood(train, labels["train"]),
        },
        "facts": package.facts,
        "scores": judged,
    }
    tensors = {f"{name}/logits": one for name, one in logits.items()}
    tensors |= {f"{name}/labels": one for name, one in labels.items()}
    for name, by_labels in package.probs.items():
        for n, one in by_labels.items():
            tensors |= {f"{split}/{name}/{n}": values for split, values in one.items()}
    return record, tensors | package.tensors


def write_report(out: Path, command: str) -> None:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "models").glob("*.json"))]
    if not records:
        raise StudyError(f"{out}: no finished model to report on")
    versions = {name: environment()[name] for name in ("python", "torch", "transformers", "peft")}
    write_text(out / "report.md", report.as_markdown(records, command, versions))
    write_json(out / "report.json", report.summary(records))
    save_figure(report.draw(records), out / "report.png")
    print(out / "report.md")


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    """Without NaN, which JSON has not."""
    return {name: None if value != value else value for name, value in values.items()}


def _shown(options: argparse.Namespace) -> list[str]:
    words = ["--out FOLDER", f"--seeds {options.seeds}", f"--curvature {options.curvature}"]
    return words + [f"--task {name}" for name in options.task or ()]


if __name__ == "__main__":
    sys.exit(main())
