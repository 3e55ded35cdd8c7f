"""`blk predict`: probabilities of the choices, and how sure the model can be of them, for every line."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.dataset import SIDES
from bayesian_lora_kernels.commands.job import load_job, load_posterior
from bayesian_lora_kernels.commands.probabilities import in_lines, laplace_probs
from bayesian_lora_kernels.predictive.distribution import LogitPosterior

WIDEST = 12

_Group: TypeAlias = tuple[str, Sequence[str], Sequence[Sequence[float]]]  # title, names of the columns, lines


def run(args: Namespace) -> int:
    """Predict, print, write.

    Raises:
        InputError: for whatever the user has to put right.
    """
    folder = args.posterior or args.adapter
    job = load_job(args, labelled=False, posterior=folder)
    posterior = load_posterior(job, folder)
    logits = job.predict(posterior)
    name, probs, _ = laplace_probs(logits, args, folder)
    names = job.task.names
    labels = [None if example.label is None else names[example.label] for example in job.examples]
    values = {"map": _by_name(names, logits.probs("map")), "laplace": _by_name(names, probs)}
    if job.task.pairs:
        scores = job.predict(posterior, differences=False)
        values["score"], values["score_std"] = _by_name(names, scores.mean), _by_name(names, _std(scores.variance))
        values["difference"] = _by_name(["mean", "std"], _differences(logits))
    else:
        values["logit_std"] = _by_name(names, _std(logits.variance))
    rows = []
    for i, (example, label) in enumerate(zip(job.examples, labels, strict=True)):
        sure = values["laplace"][i]
        row = {"line": example.line, "label": label, "prediction": max(names, key=sure.__getitem__)}
        rows.append(row | {key: found[i] for key, found in values.items()})
    output.write_json_lines(args.json, rows)
    print(_report_pairs(rows, name) if job.task.pairs else _report(rows, names, name))
    return 0


def _by_name(names: Sequence[str], values: Tensor) -> list[dict[str, float]]:
    return [dict(zip(names, row, strict=True)) for row in values.tolist()]


def _std(variance: Tensor) -> Tensor:
    return variance.clamp_min(0).sqrt()


def _differences(logits: LogitPosterior) -> Tensor:
    """Mean and standard deviation `[N, 2]` of the first logit less the second, from those less their mean."""
    return torch.stack([2 * logits.mean[:, 0], 2 * _std(logits.variance[:, 0])], dim=1)


def _report(rows: Sequence[dict[str, Any]], choices: Sequence[str], laplace: str) -> str:
    """A line per example; three groups of columns, one column per choice in each."""
    first = [["line", "label", "prediction"]]
    first += [[str(row["line"]), _short(row["label"]), _short(row["prediction"])] for row in rows]
    names = [_short(choice) for choice in choices]
    titles = {"map": "MAP", "laplace": in_lines(laplace), "logit_std": "std of the logit\nless their mean"}
    return _columns(first, [(title, names, [[*row[key].values()] for row in rows]) for key, title in titles.items()])


def _report_pairs(rows: Sequence[dict[str, Any]], laplace: str) -> str:
    """A line per pair: scores, their difference, and the probability that the chosen one is better."""
    first = [["line", "prediction"], *([str(row["line"]), row["prediction"]] for row in rows)]
    groups: list[_Group] = [
        (f"score of\n{side}", ["mean", "std"], [[row["score"][side], row["score_std"][side]] for row in rows])
        for side in SIDES
    ]
    groups.append(("difference", ["mean", "std"], [[*row["difference"].values()] for row in rows]))
    for key, title in (("map", "MAP"), ("laplace", in_lines(laplace))):
        groups.append((title, [SIDES[0]], [[row[key][SIDES[0]]] for row in rows]))
    return _columns(first, groups)


def _columns(first: Sequence[Sequence[str]], groups: Sequence[_Group]) -> str:
    """Words on the left, with a header, and groups of numbers under titles that may have several lines."""
    height = max(title.count("\n") + 1 for title, _, _ in groups)
    blocks = [[""] * height + output.table(first, left=len(first[0])).split("\n")]
    for name, names, values in groups:
        title = name.split("\n")
        width = max(6, *(len(one) for one in names))
        lines = [names, *([f"{value:.3f}" for value in row] for row in values)]
        block = ["  ".join(cell.rjust(width) for cell in line) for line in lines]
        wide = max(map(len, [*title, *block]))
        above = [""] * (height - len(title)) + title
        blocks.append([*(line.center(wide) for line in above), *(line.rjust(wide) for line in block)])
    left = max(map(len, blocks[0]))
    return "\n".join(" | ".join([head.ljust(left), *rest]).rstrip() for head, *rest in zip(*blocks, strict=True))


def _short(text: str | None) -> str:
    if text is None:
        return "-"
    text = text.strip()
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."
