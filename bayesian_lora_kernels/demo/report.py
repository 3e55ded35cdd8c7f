"""What the demo says: the tables, sentences computed from them, JSON."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bayesian_lora_kernels.calibration import PairedDifference
from bayesian_lora_kernels.demo.methods import NAMES
from bayesian_lora_kernels.demo.problem import Problem
from bayesian_lora_kernels.demo.results import COMPARED, Results, Run, Statistic, differences

COLUMNS = {"accuracy": "ACC", "nll": "NLL", "ece": "ECE", "brier": "Brier", "error_auroc": "error AUROC"}
LAST = {"ood_auroc": "OOD AUROC"}
POOR_AUROC = 0.7  # what does not reach this tells foreign from own badly


@dataclass(frozen=True)
class Block:
    """A table under a title, as text; `cells` of each method."""

    title: str
    columns: Sequence[str]
    cells: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        first = max(map(len, NAMES.values())) + 2
        wide = max(len(text) for row in (self.columns, *self.cells.values()) for text in row)
        rows = {"": self.columns, **{NAMES[method]: row for method, row in self.cells.items()}}
        lines = [name.ljust(first) + "  ".join(cell.rjust(wide) for cell in row) for name, row in rows.items()]
        return "\n".join([self.title, *lines])

    def rows(self) -> list[Sequence[str]]:
        """Its cells, with the title before the columns."""
        return [(self.title, *self.columns), *((NAMES[method], *row) for method, row in self.cells.items())]


def tables(results: Results, titles: Mapping[str, str]) -> list[Block]:
    """One block for each set, one row for each method; with several runs, mean and standard error."""
    blocks = []
    for name, methods in results.items():
        columns = {key: title for key, title in (COLUMNS | LAST).items() if key in methods["map"]}
        cells = {method: [_cell(row[metric]) for metric in columns] for method, row in methods.items()}
        blocks.append(Block(titles[name], list(columns.values()), cells))
    return blocks


def difference_tables(results: Results) -> list[Block]:
    """Differences to temperature scaling, run by run: mean, standard error, and in how many runs it is lower."""
    blocks = []
    for name, methods in differences(results).items():
        cells = {method: [_difference(row.get(metric)) for metric in COMPARED] for method, row in methods.items()}
        blocks.append(Block(f"{name}, less temperature scaling (lower in)", [COLUMNS[m] for m in COMPARED], cells))
    return blocks


def conclusions(results: Results, labels: int) -> list[str]:
    """What the numbers say, in sentences.

    Args:
        results: of all runs.
        labels: how many are held out.
    """
    sentences = []
    for name, methods in results.items():
        scaled = methods["temperature"]
        found = " ".join(
            f"{_numbers(methods[method])} {text}{'.' if method == 'evidence' else ','}"
            for method, text in (
                ("map", "as fine-tuned"),
                ("temperature", f"by temperature scaling with {labels} labels"),
                ("labels", "by Laplace with the same labels"),
                ("folds", "by Laplace with none held out"),
                ("evidence", "by the evidence alone"),
            )
        )
        better = [
            f"{text} is {_better(methods[method], scaled)}"
            for method, text in (("labels", "Laplace with the same labels"), ("folds", "Laplace without them"))
        ]
        sentences.append(f"On {name}: {found} Beside temperature scaling, {', and '.join(better)}.")
    changes = [
        100 * (methods[method]["accuracy"].mean - methods["map"]["accuracy"].mean)
        for methods in results.values()
        for method in ("labels", "ekfac_labels", "folds")
    ]
    sentences.append(f"Calibrated, Laplace changes accuracy by {min(changes):+.1f} to {max(changes):+.1f} points.")
    if "ood_auroc" not in results["test"]["map"]:
        return sentences
    aurocs = [row["ood_auroc"].mean for row in results["test"].values()]
    verdict = "no method tells them apart well" if max(aurocs) < POOR_AUROC else "the best tells them apart fairly well"
    sentences.append(
        f"Sentences of foreign modules, by entropy: AUROC {min(aurocs):.2f} to {max(aurocs):.2f} (chance is 0.50); "
        f"{verdict}."
    )
    return sentences


def as_json(runs: Sequence[Run], results: Results, problem: Problem, seconds: Mapping[str, float]) -> dict[str, Any]:
    """All of it, in values that JSON can hold."""
    from bayesian_lora_kernels import __version__

    return {
        "command": "demo",
        "versions": {
            "bayesian_lora_kernels": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        "seeds": [run.seed for run in runs],
        "classes": list(problem.classes),
        "results": {
            name: {
                method: {metric: _statistic(statistic) for metric, statistic in row.items()}
                for method, row in methods.items()
            }
            for name, methods in results.items()
        },
        "differences_to_temperature_scaling": {
            name: {
                method: {metric: asdict(difference) for metric, difference in row.items()}
                for method, row in methods.items()
            }
            for name, methods in differences(results).items()
        },
        "chosen": {method: [run.outcomes[method].chosen for run in runs] for method in NAMES},
        "folds": [run.folds for run in runs],
        "conclusions": conclusions(results, runs[0].held_out),
        "settings": problem.as_json(),
        "seconds": {**seconds, **{m: sum(run.outcomes[m].seconds for run in runs) for m in NAMES}},
    }


def _numbers(row: Mapping[str, Statistic]) -> str:
    return f"NLL {row['nll'].mean:.3f} and ECE {row['ece'].mean:.3f}"


def _better(ours: Mapping[str, Statistic], theirs: Mapping[str, Statistic]) -> str:
    """In words, by the means."""
    verdicts = [f"{'better' if ours[m].mean < theirs[m].mean else 'no better'} in {COLUMNS[m]}" for m in ("nll", "ece")]
    return " and ".join(verdicts)


def _statistic(statistic: Statistic) -> dict[str, Any]:
    values = [value if math.isfinite(value) else None for value in statistic.values]
    mean = statistic.mean if math.isfinite(statistic.mean) else None
    return {"mean": mean, "standard_error": statistic.standard_error, "values": values}


def _cell(statistic: Statistic) -> str:
    mean, error = statistic.mean, statistic.standard_error
    return "-" if math.isnan(mean) else f"{mean:.3f}" + ("" if error is None else f" ±{error:.3f}")


def _difference(found: PairedDifference | None) -> str:
    if found is None or found.standard_error is None:
        return "-"
    return f"{found.mean:+.3f} ±{found.standard_error:.3f} ({round(found.share_lower * found.n)}/{found.n})"
