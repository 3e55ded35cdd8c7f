"""What the demo says: the table, sentences computed from it, JSON."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bayesian_lora_kernels.demo.methods import LAPLACE, NAMES, PREDICTIVES
from bayesian_lora_kernels.demo.results import Results, Run, Statistic, measure
from bayesian_lora_kernels.demo.settings import CLASSES, DemoSettings

COLUMNS = {"accuracy": "ACC", "nll": "NLL", "ece": "ECE", "brier": "Brier", "ood_auroc": "OOD AUROC"}
TITLES = {"test": "test: docstrings", "shift": "shift: comments of the same modules"}
POOR_AUROC = 0.7  # what does not reach this tells foreign from own badly


def format_table(results: Results, settings: DemoSettings) -> str:
    """One block for each set, one row for each method; with several runs, mean and standard error."""
    width = max(map(len, NAMES.values())) + 2
    blocks = []
    for name, methods in results.items():
        metrics = list(next(iter(methods.values())))
        cells = {method: [_cell(row[metric]) for metric in metrics] for method, row in methods.items()}
        wide = max(len(COLUMNS["ood_auroc"]), *(len(cell) for row in cells.values() for cell in row))
        size = len(CLASSES) * getattr(settings, name)
        lines = [f"{TITLES[name]} ({size} examples)"]
        lines.append(" " * width + "  ".join(COLUMNS[metric].rjust(wide) for metric in metrics))
        for method, row in cells.items():
            lines.append(NAMES[method].ljust(width) + "  ".join(cell.rjust(wide) for cell in row))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def conclusions(results: Results, settings: DemoSettings) -> list[str]:
    """What the numbers say, in sentences."""
    labels = len(CLASSES) * settings.held_out
    sentences = []
    for name, methods in results.items():
        map_row, scaled = methods["map"], methods["temperature"]
        found = [f"{COLUMNS[m]} {_range(methods, m)} (MAP {map_row[m].mean:.3f})" for m in ("nll", "ece")]
        wins = [f"{_verdict(methods, m)} in {COLUMNS[m]} ({scaled[m].mean:.3f})" for m in ("nll", "ece")]
        sentences.append(
            f"On {name}, Laplace has {' and '.join(found)}, with no extra labels; temperature scaling, with {labels}, "
            f"{', and '.join(wins)}."
        )
    same = ", ".join(
        f"on {name} NLL {methods['ekfac_labels']['nll'].mean:.3f} and ECE {methods['ekfac_labels']['ece'].mean:.3f}"
        for name, methods in results.items()
    )
    sentences.append(f"With the same {labels} labels to choose its prior precision, EKFAC has {same}.")
    changes = [
        100 * (methods[method]["accuracy"].mean - methods["map"]["accuracy"].mean)
        for methods in results.values()
        for method in LAPLACE
    ]
    sentences.append(f"Laplace changes accuracy by {min(changes):+.1f} to {max(changes):+.1f} points.")
    aurocs = [row["ood_auroc"].mean for row in results["test"].values()]
    verdict = "no method tells them apart well" if max(aurocs) < POOR_AUROC else "the best tells them apart fairly well"
    sentences.append(
        f"Sentences of foreign modules, by entropy: AUROC {min(aurocs):.2f} to {max(aurocs):.2f} (chance is 0.50); "
        f"{verdict}."
    )
    return sentences


def as_json(
    runs: Sequence[Run], results: Results, settings: DemoSettings, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """All of it, in values that JSON can hold."""
    from bayesian_lora_kernels import __version__

    return {
        "versions": {
            "bayesian_lora_kernels": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        "seeds": [run.seed for run in runs],
        "classes": list(CLASSES),
        "predictive": PREDICTIVES[0],
        "results": _plain(results),
        "results_by_monte_carlo": _plain(measure(runs, by_sampling=True)),
        "chosen": {
            method: {
                "what": "temperature" if method == "temperature" else "prior precision",
                "values": [run.outcomes[method].chosen for run in runs],
                "log_marginal_likelihood": [run.outcomes[method].evidence for run in runs],
            }
            for method in NAMES
            if method != "map"
        },
        "conclusions": conclusions(results, settings),
        "settings": asdict(settings),
        "seconds": {**seconds, **{m: sum(run.outcomes[m].seconds for run in runs) for m in NAMES}},
    }


def _range(methods: Mapping[str, Mapping[str, Statistic]], metric: str) -> str:
    values = [methods[method][metric].mean for method in LAPLACE]
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def _verdict(methods: Mapping[str, Mapping[str, Statistic]], metric: str) -> str:
    """How temperature scaling's mean compares with the three of Laplace, where smaller is better."""
    theirs = methods["temperature"][metric].mean
    ours = [methods[method][metric].mean for method in LAPLACE]
    if theirs < min(ours):
        return "is better than all of them"
    return "is worse than all of them" if theirs > max(ours) else "lies among them"


def _cell(statistic: Statistic) -> str:
    error = statistic.standard_error
    return f"{statistic.mean:.3f}" + ("" if error is None else f" ±{error:.3f}")


def _plain(results: Results) -> dict[str, Any]:
    return {
        name: {
            method: {
                metric: {"mean": s.mean, "standard_error": s.standard_error, "values": list(s.values)}
                for metric, s in row.items()
            }
            for method, row in methods.items()
        }
        for name, methods in results.items()
    }
