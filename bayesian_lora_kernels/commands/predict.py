"""`blk predict`: probabilities of the choices, and how sure the model can be of them, for every line."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from bayesian_lora_kernels.commands import options, output
from bayesian_lora_kernels.commands.job import add_job_options, load_job, load_posterior
from bayesian_lora_kernels.commands.probabilities import in_lines, laplace_probs

WIDEST = 12


def add_parser(subparsers: options.Subparsers) -> ArgumentParser:
    """What `blk predict` takes."""
    parser = subparsers.add_parser(
        "predict",
        help="probabilities of the choices, line by line",
        description="For every line the probabilities of the choices, of the adapter alone (MAP) and with the "
        "posterior that blk fit wrote (Laplace), and the standard deviation (logit_std in the file) of each choice's "
        "logit less the mean of the choices' logits: what the choices share changes no probability.",
    )
    add_job_options(parser, labelled=False)
    options.add_probabilities(parser)
    options.add_json(parser, "also write the results to this file, as JSON lines: one object for each example")
    return parser


def run(args: Namespace) -> int:
    """Predict, print, write.

    Raises:
        InputError: for whatever the user has to put right.
    """
    folder = args.posterior or args.adapter
    job = load_job(args, labelled=False, posterior=folder)
    logits = job.predict(load_posterior(job, folder))
    name, probs, _ = laplace_probs(logits, args, folder)
    laplace = probs.tolist()
    point = logits.probs("map").tolist()
    deviation = logits.variance.clamp_min(0).sqrt().tolist()
    choices = args.choices
    rows = []
    for i, example in enumerate(job.examples):
        rows.append(
            {
                "line": example.line,
                "label": None if example.label is None else choices[example.label],
                "prediction": choices[max(range(len(choices)), key=laplace[i].__getitem__)],
                "map": dict(zip(choices, point[i], strict=True)),
                "laplace": dict(zip(choices, laplace[i], strict=True)),
                "logit_std": dict(zip(choices, deviation[i], strict=True)),
            }
        )
    output.write_json_lines(args.json, rows)
    print(_report(rows, choices, name))
    return 0


def _report(rows: Sequence[dict[str, Any]], choices: Sequence[str], laplace: str) -> str:
    """A line per example; three groups of columns, one column per choice in each."""
    names = [_short(choice) for choice in choices]
    groups = {"map": "MAP", "laplace": in_lines(laplace), "logit_std": "std of the logit\nless their mean"}
    height = max(title.count("\n") + 1 for title in groups.values())
    header = ["line", "label", "prediction"]
    cells = [[str(row["line"]), _short(row["label"]), _short(row["prediction"])] for row in rows]
    columns = [header, *cells]
    width = max(6, *(len(name) for name in names))
    blocks = [output.table(columns, left=3).split("\n")]
    blocks[0] = [""] * height + blocks[0]
    for key, name in groups.items():
        title = name.split("\n")
        lines = [names, *([f"{value:.3f}" for value in row[key].values()] for row in rows)]
        block = ["  ".join(cell.rjust(width) for cell in line) for line in lines]
        wide = max(map(len, [*title, block[0]]))
        above = [""] * (height - len(title)) + title
        blocks.append([*(line.center(wide) for line in above), *(line.rjust(wide) for line in block)])
    left = max(map(len, blocks[0]))
    return "\n".join(" | ".join([first.ljust(left), *rest]).rstrip() for first, *rest in zip(*blocks, strict=True))


def _short(text: str | None) -> str:
    if text is None:
        return "-"
    text = text.strip()
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."
