"""The tables of the study, and what its decision rule says of each way to calibrate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Record = dict[str, Any]

TITLES = {
    "MAP": "MAP",
    "T100": "T, 100 labels",
    "LOO-T (lin)": "LOO T",
    "LOO-Tb (lin)": "LOO (T, b)",
    "evidence": "evidence",
}
# What was asked is `lin`: the linearised network, refitted at the precision of the best leave-one-out. Others: the
# kernel of its Jacobian alone (`map`), or of the Jacobian before fine-tuning (`init`); `matched`: at the precision at
# which the refit has the network's training NLL.
REPAIRS = {
    "LOO-T (map)": "kernel: T",
    "LOO-Tb (map)": "kernel: (T, b)",
    "LOO-T (lin, matched)": "matched: T",
    "LOO-Tb (lin, matched)": "matched: (T, b)",
    "LOO-T (map, matched)": "kernel, matched: T",
    "LOO-T (init)": "kernel before: T",
    "LOO-T (init, matched)": "kernel before, matched: T",
    "LOO-Tb (init, matched)": "kernel before, matched: (T, b)",
}
OTHERS = {"Tb100": "(T, b), 100 labels"}
SUMMARY = (
    "MAP",
    "T100",
    "LOO-T (lin)",
    "LOO-Tb (lin)",
    "evidence",
    "LOO-T (lin, matched)",
    "LOO-T (map)",
    "LOO-T (init, matched)",
    "LOO-Tb (init, matched)",
)
GAIN = 0.02  # of NLL: where temperature scaling with labels helps
SETS = ("test", "shift")


def cells(records: Sequence[Record]) -> dict[str, list[Record]]:
    """By cell, in the order of their first model."""
    result: dict[str, list[Record]] = {}
    for record in records:
        result.setdefault(record["cell"], []).append(record)
    return result


def mean(records: Sequence[Record], value: Callable[[Record], float]) -> float:
    return statistics.fmean(value(record) for record in records)


def number(name: str, key: str, metric: str) -> Callable[[Record], float]:
    return lambda record: record["results"][name][key][metric]


def difference(records: Sequence[Record], key: str, other: str, name: str = "test") -> tuple[float, float]:
    """Mean and standard error of the paired difference of NLL."""
    values = [r["results"][name][key]["nll"] - r["results"][name][other]["nll"] for r in records]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def decision(records: Sequence[Record], key: str) -> dict[str, Any]:
    """What the rule that was fixed beforehand says of one way to calibrate."""
    by_cell = cells(records)
    worse = {}
    for cell, models in by_cell.items():
        value, error = difference(models, key, "MAP")
        if value > error:
            worse[cell] = [value, error]
    helped = [cell for cell, models in by_cell.items() if difference(models, "T100", "MAP")[0] < -GAIN]
    gaps = [difference(by_cell[cell], key, "T100")[0] for cell in helped]
    behind = statistics.fmean(gaps) if gaps else math.nan
    over = [difference(models, key, "T100")[0] for models in by_cell.values()]
    return {
        "cells": len(by_cell),
        "worse_than_map": worse,
        "cells_where_labels_help": len(helped),
        "behind_T100_there": behind,
        "worst_behind_T100_there": max(gaps, default=math.nan),
        "behind_T100_everywhere": statistics.fmean(over),
        "behind_MAP_everywhere": statistics.fmean(difference(m, key, "MAP")[0] for m in by_cell.values()),
        "passes": not worse and behind <= GAIN,
    }


def decisions(records: Sequence[Record]) -> dict[str, Any]:
    keys = [*TITLES, *REPAIRS, *OTHERS]
    return {key: decision(records, key) for key in keys if key != "MAP"}


def _row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_row(head), _row(["---"] * len(head)), *map(_row, rows)])


def results_table(records: Sequence[Record], name: str, titles: dict[str, str]) -> str:
    rows = []
    for cell, models in cells(records).items():
        row = [cell, f"{mean(models, number(name, 'MAP', 'accuracy')):.2f}"]
        for key in titles:
            nll, ece = mean(models, number(name, key, "nll")), mean(models, number(name, key, "ece"))
            worse = ""
            if key != "MAP":
                value, error = difference(models, key, "MAP", name)
                worse = " *" if value > error else ""
            row.append(f"{nll:.3f}/{ece:.3f}{worse}")
        rows.append(row)
    by_cell = cells(records).values()
    last = ["mean of cells", ""]
    for key in titles:
        nll, ece = (statistics.fmean(mean(m, number(name, key, x)) for m in by_cell) for x in ("nll", "ece"))
        last.append(f"{nll:.3f}/{ece:.3f}")
    return _table(["model", "accuracy", *titles.values()], [*rows, last])


def group(cell: str) -> str:
    """What a cell has in common with others: task, clean or noisy labels, moment of the training."""
    if cell.startswith("sentences"):
        return f"sentences, {cell.rsplit(', ', 1)[1]}"
    task = "sequences" if cell.startswith("sequences") else f"digits, C {'10' if ', C 10,' in cell else '2, 4'}"
    return f"{task}, {'clean' if 'clean' in cell else 'noisy'}, {cell.rsplit(' ', 1)[1]}"


def summary_table(records: Sequence[Record], name: str) -> str:
    """NLL/ECE by group: means over their models, of which every cell has as many."""
    titles = {key: {**TITLES, **REPAIRS}[key] for key in SUMMARY}
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(group(record["cell"]), []).append(record)
    rows = []
    for title, models in groups.items():
        numbers = (
            f"{mean(models, number(name, key, 'nll')):.3f}/{mean(models, number(name, key, 'ece')):.3f}"
            for key in titles
        )
        rows.append([title, str(len({m["cell"] for m in models})), *numbers])
    return _table(["models", "cells", *titles.values()], rows)


def decision_table(records: Sequence[Record]) -> str:
    rows = []
    for key, found in decisions(records).items():
        rows.append(
            [
                {**TITLES, **REPAIRS, **OTHERS}[key],
                f"{len(found['worse_than_map'])} of {found['cells']}",
                f"{max((v for v, _ in found['worse_than_map'].values()), default=0):.3f}",
                f"{found['behind_T100_there']:+.3f} ({found['cells_where_labels_help']} cells)",
                f"{found['worst_behind_T100_there']:+.3f}",
                f"{found['behind_MAP_everywhere']:+.3f}",
                "yes" if found["passes"] else "no",
            ]
        )
    head = ["", "cells worse than MAP", "worst of them", "NLL over T's, 100 labels, where labels help", "worst there"]
    return _table([*head, "NLL over MAP's, all cells", "passes"], rows)


def why_table(records: Sequence[Record]) -> str:
    """Temperatures, and what leave-one-out believes of the accuracy."""
    rows = []
    refits = {"lin": "", "map": ", kernel", "init, matched": ", kernel before, matched"}
    keys = ("LOO-T (lin)", "LOO-T (lin, matched)", "LOO-T (map)", "LOO-T (init)", "LOO-T (init, matched)")
    temperatures = ("best T", "T100", *keys)
    for cell, models in cells(records).items():
        row = [cell, f"{mean(models, lambda m: m['train_nll']):.3f}"]
        row.append(f"{mean(models, number('test', 'MAP', 'accuracy')):.2f}")
        row += [f"{statistics.fmean(m['refits'][key]['loo_accuracy'] for m in models):.2f}" for key in refits]
        row += [f"{statistics.geometric_mean(m['temperatures'][key] for m in models):.2f}" for key in temperatures]
        rows.append(row)
    head = ["model", "training NLL", "accuracy", *(f"LOO accuracy{title}" for title in refits.values()), "best T"]
    return _table([*head, *({**TITLES, **REPAIRS}[key].removesuffix(": T") for key in temperatures[1:])], rows)


def verification_table(verification: dict[str, Any]) -> str:
    rows = []
    for cell, found in verification.items():
        for kind, row in ((kind, row) for kind, each in found["leave_one_out"].items() for row in each):
            rows.append(
                [
                    cell,
                    kind,
                    f"{row['variance']:g}",
                    f"{row['relative_error_of_change']:.3f}",
                    *(f"{row[key]:.3f}" for key in ("nll_fitted", "nll_cavity", "nll_refitted")),
                    *(f"{row[key]:.2f}" for key in ("T_cavity", "T_refitted")),
                ]
            )
    head = ["model", "refit", "prior variance of a logit", "relative error of the change", "NLL fitted", "NLL cavity"]
    return _table([*head, "NLL refitted", "T cavity", "T refitted"], rows)


def as_markdown(records: Sequence[Record], verification: dict[str, Any], command: str, versions: str) -> str:
    seeds = len({record["seed"] for record in records})
    return f"""# Calibration without labels: leave-one-out on the refitted linearised model

Written by `{command}` with {versions}. {len(records)} models, {seeds} seeds a cell. Entries: NLL/ECE; * : NLL worse
than MAP's by more than the standard error of the paired difference. docs/label-free.md says what the columns are.

## Test, by groups of cells

{summary_table(records, "test")}

## Test

{results_table(records, "test", TITLES)}

## Test, other refits

{results_table(records, "test", {"MAP": "MAP", **OTHERS, **REPAIRS})}

## Shift

{results_table(records, "shift", {**TITLES, **REPAIRS})}

## The decision rule

{decision_table(records)}

## Why

{why_table(records)}

## Leave-one-out by the cavity, against refitting without each example

{verification_table(verification)}
"""
