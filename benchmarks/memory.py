"""What a fit and a prediction need, as `memory_estimate` says beforehand and as a fresh process is then measured.

`python -m benchmarks.memory --json FILE` writes the numbers, and a table beside it. Each case runs in a process of its
own, which does the same with a tiny model first, so that code which loads at first use is there. Then the freed heap
goes back to the system, Linux's high-water mark of the resident set is reset, and the model is made, fitted, and
predicts. A peak is the high-water mark less the resident set before the model was made: it has the model in it. glibc
is told to give every larger block back to the system when it is freed; what it would keep is its own, and no need.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.memory_estimate import readable

from .peak_memory import reset_peak, resident
from .workload import Workload

VOCABULARY, SCORE = "vocabulary", "score"
BUDGETS = (None, 8 * 10**6, 2 * 10**6)
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
BATCHES = 3
SMALL = Workload(layers=2, width=256, heads=4, feed_forward=688)
WIDE = Workload(layers=2, width=1024, heads=8, feed_forward=2752, tokens=32)
DEEP = Workload(layers=16, width=128, heads=4, feed_forward=344)
LONG = Workload(layers=2, width=256, heads=4, feed_forward=688, examples=2, tokens=1024)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    workload: Workload
    settings: Mapping[str, Any] = field(default_factory=dict)
    outputs: str | None = None  # VOCABULARY or SCORE

    def laplace(self, workload: Workload) -> LaplaceLoRA:
        ids = {} if self.outputs else {"class_token_ids": workload.class_token_ids}
        return LaplaceLoRA(workload.model(), **ids, **self.settings)

    def batches(self, workload: Workload) -> list[dict[str, Tensor]]:
        batches = workload.batches(BATCHES)
        return [{**batch, "labels": batch["input_ids"]} for batch in batches] if self.outputs else batches

    def predict(self, laplace: LaplaceLoRA, batch: Mapping[str, Tensor]) -> None:
        if self.outputs == SCORE:
            laplace.score(batch)
        elif self.outputs == VOCABULARY:
            laplace.predict_vocabulary(batch).probs()
        else:
            laplace.predict(batch)


def cases() -> list[Case]:
    plain = Workload()  # the speed target's
    kinds: list[Mapping[str, Any]] = [{"curvature": kind} for kind in ("kfac", "ekfac", "exact")]
    named = [("small", SMALL), ("wide", WIDE), ("deep", DEEP), ("long", LONG)]
    found = [Case(f"{name}, {kind['curvature']}", w, kind) for name, w in named for kind in kinds]
    found += [Case(f"batch of {n}", replace(plain, examples=n)) for n in (1, 8, 32)]
    found += [Case(f"{c} logits", replace(SMALL, classes=c), {"fisher": "mc"}) for c in (2, 32)]
    exact = {"curvature": "exact", "memory_budget": 20 * 10**6}
    found.append(Case("exact, rows in files", replace(SMALL, classes=16, examples=16), exact))
    found.append(Case("budget of 2 MB", replace(plain, examples=16), {"memory_budget": 2 * 10**6}))
    found.append(Case("vocabulary", replace(SMALL, examples=4), outputs=VOCABULARY))
    return found


def budget_cases() -> list[Case]:
    """One batch size, three budgets, and batches of one example, which need least."""
    found = []
    kinds = {kind: {"curvature": kind} for kind in ("kfac", "ekfac", "exact")}
    for name, settings in {**kinds, VOCABULARY: {}, SCORE: {}}.items():
        outputs = name if name in (VOCABULARY, SCORE) else None
        for budget in BUDGETS:
            said = "no budget" if budget is None else f"budget {readable(budget)}"
            own = {**settings, "memory_budget": budget}
            found.append(Case(f"{name}, {said}", replace(SMALL, examples=32), own, outputs))
        found.append(Case(f"{name}, one example", replace(SMALL, examples=1), settings, outputs))
    return found


def measure(case: Case) -> dict[str, Any]:
    """In this process, which should be fresh."""
    tiny = replace(case.workload, layers=1, width=32, heads=2, feed_forward=32, examples=2, tokens=4)
    laplace = case.laplace(tiny).fit(case.batches(tiny), progress=False)
    case.predict(laplace, case.batches(tiny)[0])
    del laplace
    batches = case.batches(case.workload)
    before = reset_peak()
    laplace = case.laplace(case.workload)
    model = resident() - before
    reset_peak()
    laplace.fit(batches, progress=False)
    measured = {"fit": resident(peak=True) - before}
    reset_peak()
    case.predict(laplace, batches[0])
    measured["predict"] = resident(peak=True) - before
    seen = {"case": case.name, "model": model, "measured": measured}
    if case in budget_cases():
        return seen
    outputs = VOCABULARY if case.outputs else None
    found = laplace.memory_estimate(batches[0], outputs, n_examples=BATCHES * case.workload.examples)
    estimated = {"fit": found.fit["cpu"], "predict": found.predict["cpu"]}
    return {**seen, "estimated": estimated, **found.as_dict()}


def in_fresh_process(name: str) -> dict[str, Any]:
    """What `measure` finds of a case."""
    command = [sys.executable, "-m", __spec__.name, "--case", name]
    environment = {**os.environ, **GLIBC}
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(results: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| | model | fit, estimated | measured | ratio | predict, estimated | measured | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        cells = [one["case"], readable(one["model"])]
        for use in ("fit", "predict"):
            estimated, measured = one["estimated"][use], one["measured"][use]
            cells += [readable(estimated), readable(measured), f"{estimated / measured:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def budget_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Peaks above the model."""
    lines = ["| | fit | predict |", "|---|---|---|"]
    for one in results:
        above = [readable(one["measured"][use] - one["model"]) for use in ("fit", "predict")]
        lines.append(f"| {' | '.join([one['case'], *above])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    every = {case.name: case for case in [*cases(), *budget_cases()]}
    parser.add_argument("--case", choices=every, help="measure one, in this process")
    parser.add_argument("--budgets", action="store_true", help="what memory_budget does, instead of the estimate")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the numbers, and a table to FILE's name as .md"
    )
    arguments = parser.parse_args()
    if arguments.case is not None:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(every[arguments.case])))
        return
    chosen, as_table = (budget_cases(), budget_table) if arguments.budgets else (cases(), table)
    results = []
    for case in chosen:
        results.append(in_fresh_process(case.name))
        print(as_table(results[-1:]).splitlines()[-1], flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        arguments.json.with_suffix(".md").write_text(f"{as_table(results)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
