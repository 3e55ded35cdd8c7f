"""`blk predict`: probabilities of the choices, and how sure the model can be of them, for every line."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.dataset import SIDES, Example, stream_examples
from bayesian_lora_kernels.commands.errors import InputError, as_input_errors, writing
from bayesian_lora_kernels.commands.inputs import load_model
from bayesian_lora_kernels.commands.job import Job, load_posterior, open_task
from bayesian_lora_kernels.commands.partial import PartialLines
from bayesian_lora_kernels.commands.parts import Groups
from bayesian_lora_kernels.commands.probabilities import (
    calibration_used,
    hint_at_calibration,
    in_lines,
    laplace_probs,
    name_of,
)
from bayesian_lora_kernels.commands.task import Task
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.plots import logit_diagram, save_figure
from bayesian_lora_kernels.plots.logits import MOST_QUESTIONS
from bayesian_lora_kernels.posterior.storage import JSON_NAME
from bayesian_lora_kernels.predictive.distribution import LogitPosterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDEST = 12
TOGETHER = 1024  # examples that are sorted by length, predicted and written together

_Group: TypeAlias = tuple[str, Sequence[str], Sequence[Sequence[float]]]  # title, names of the columns, lines


def run(args: Namespace) -> int:
    """Predict, print and write, some examples after the others; go on where an earlier run was interrupted.

    Raises:
        InputError: for whatever the user has to put right.
    """
    folder = args.posterior or args.adapter
    adapter, task = open_task(args, folder)
    read = partial(stream_examples, args.data, task.names, False, task.pairs, task.texts)
    total, last = _count(read(), args.data)
    about = {"data": _digest(args.data), "posterior": _digest(folder / JSON_NAME), "options": _options(args)}
    with PartialLines(args.json, about) as results:
        if results.done:
            output.hint(f"{results.done} of {total} lines are there already")
        loaded = load_model(adapter, task, args.device, args.dtype, args.max_length, folder)
        posterior = load_posterior(loaded.model, folder)
        truncated, examples = 0, islice(read(), results.done, None)
        table, first = _Table(task, last), results.first(MOST_QUESTIONS)
        name = name_of(args.method, calibration_used(posterior.calibration, args))
        with output.bar(total=total, initial=results.done, desc="predict", unit="example") as bar:
            while some := list(islice(examples, TOGETHER)):
                job = Job(adapter.base, task, some, loaded.inputs(some), args.batch_size)
                rows = _rows(job, posterior, args)
                truncated += job.inputs.truncated
                results.write(rows)
                first += rows[: MOST_QUESTIONS - len(first)]
                with bar.external_write_mode():
                    _show(args, table.part(rows, name))
                bar.update(len(some))
    if args.plot is not None:
        with writing(args.plot, "--plot"):
            save_figure(picture(first, task.names, in_lines(name)), args.plot)
        output.show(args, f"\nlogits of the first {len(first)} of {total} lines drawn in {args.plot}")
    loaded.warn_of_truncation(truncated, total - results.done)
    hint_at_calibration(posterior.calibration, args, folder)
    return 0


def _show(args: Namespace, part: Groups) -> None:
    """Who reads no more of the table, such as `head`, does not end a run that writes a file."""
    try:
        output.show(args, part)
    except BrokenPipeError:
        if args.json is None or args.json == output.STDOUT:
            raise
        output.give_up_stdout()


def _count(examples: Iterator[Example], path: Path) -> tuple[int, int]:
    """How many, and the line of the last; a line that is no example is found before anything is written."""
    count = last = 0
    for example in examples:
        count, last = count + 1, example.line
    if not count:
        raise InputError(f"{path}: no examples; expected a JSON object on every line")
    return count, last


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with as_input_errors(), open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _options(args: Namespace) -> dict[str, str]:
    """What of the options changes the numbers, or their names."""
    left_out = ("run", "json", "plot", "data", "posterior", "device", "batch_size", "command")
    return {name: str(value) for name, value in vars(args).items() if name not in left_out}


def _rows(job: Job, posterior: LaplaceLoRA, args: Namespace) -> list[dict[str, Any]]:
    """One for each example."""
    logits = job.predict(posterior, progress=False)
    _, probs, _ = laplace_probs(logits, args)
    names = job.task.names
    labels = [None if example.label is None else names[example.label] for example in job.examples]
    values = {"map": _by_name(names, logits.probs("map")), "laplace": _by_name(names, probs)}
    if job.task.pairs:
        scores = job.predict(posterior, differences=False, progress=False)
        values["score"], values["score_std"] = _by_name(names, scores.mean), _by_name(names, _std(scores.variance))
        values["difference"] = _by_name(["mean", "std"], _differences(logits))
    else:
        values["logit_std"] = _by_name(names, _std(logits.variance))
    rows = []
    for i, (example, label) in enumerate(zip(job.examples, labels, strict=True)):
        sure = values["laplace"][i]
        row = {"line": example.line, "label": label, "prediction": max(names, key=sure.__getitem__)}
        rows.append(row | {key: found[i] for key, found in values.items()})
    return rows


class _Table:
    """The rows as a table that is printed in parts of equal widths, the first of them with its header."""

    def __init__(self, task: Task, last: int):
        self.task, self.begun = task, False
        longest = max(len(_short(name)) for name in task.names)
        self.widths = {"line": len(str(last)), "label": longest, "prediction": longest}

    def part(self, rows: Sequence[dict[str, Any]], laplace: str) -> Groups:
        """The next part; `laplace` is what the probabilities are called."""
        words = ["line", "prediction"] if self.task.pairs else ["line", "label", "prediction"]
        first = [words, *([_short(row[word]).ljust(self.widths[word]) for word in words] for row in rows)]
        groups = _pairs(rows, laplace) if self.task.pairs else _choices(rows, self.task.names, laplace)
        header, self.begun = not self.begun, True
        return Groups(first, [(title, names, _formatted(values)) for title, names, values in groups], header)


def picture(rows: Sequence[Mapping[str, Any]], names: Sequence[str], laplace: str) -> Figure:
    """Of some rows the Gaussians of the logits less their mean, and the probabilities.

    Args:
        rows: at most `MOST_QUESTIONS` of those that are written.
        names: of the choices.
        laplace: what the probabilities are called.
    """
    probs = {title: _tensor(rows, key, names) for title, key in (("MAP", "map"), (laplace, "laplace"))}
    logits = probs["MAP"].log().clamp_min(-745)  # the least that float64 has
    mean = logits - logits.mean(dim=1, keepdim=True)
    if "difference" in rows[0]:  # of pairs: each side lies half of it away from their mean
        std = torch.tensor([[row["difference"]["std"] / 2] * 2 for row in rows], dtype=torch.float64)
    else:
        std = _tensor(rows, "logit_std", names)
    answers = [None if row["label"] is None else names.index(row["label"]) for row in rows]
    return logit_diagram(mean, std, probs, names, answers=answers, titles=[f"line {row['line']}" for row in rows])


def _tensor(rows: Sequence[Mapping[str, Any]], key: str, names: Sequence[str]) -> Tensor:
    return torch.tensor([[row[key][name] for name in names] for row in rows], dtype=torch.float64)


def _by_name(names: Sequence[str], values: Tensor) -> list[dict[str, float]]:
    return [dict(zip(names, row, strict=True)) for row in values.tolist()]


def _std(variance: Tensor) -> Tensor:
    return variance.clamp_min(0).sqrt()


def _differences(logits: LogitPosterior) -> Tensor:
    """Mean and standard deviation `[N, 2]` of the first logit less the second, from those less their mean."""
    return torch.stack([2 * logits.mean[:, 0], 2 * _std(logits.variance[:, 0])], dim=1)


def _choices(rows: Sequence[dict[str, Any]], choices: Sequence[str], laplace: str) -> list[_Group]:
    """Three groups, a column for each choice in each."""
    names = [_short(choice) for choice in choices]
    titles = {"map": "MAP", "laplace": in_lines(laplace), "logit_std": "std of the logit\nless their mean"}
    return [(title, names, [[*row[key].values()] for row in rows]) for key, title in titles.items()]


def _pairs(rows: Sequence[dict[str, Any]], laplace: str) -> list[_Group]:
    """Scores, their difference, and the probability that the chosen one is better."""
    groups: list[_Group] = [
        (f"score of\n{side}", ["mean", "std"], [[row["score"][side], row["score_std"][side]] for row in rows])
        for side in SIDES
    ]
    groups.append(("difference", ["mean", "std"], [[*row["difference"].values()] for row in rows]))
    for key, title in (("map", "MAP"), ("laplace", in_lines(laplace))):
        groups.append((title, [SIDES[0]], [[row[key][SIDES[0]]] for row in rows]))
    return groups


def _formatted(rows: Sequence[Sequence[float]]) -> list[list[str]]:
    return [[f"{value:.3f}" for value in row] for row in rows]


def _short(value: str | int | None) -> str:
    if value is None:
        return "-"
    text = str(value).strip()
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."
