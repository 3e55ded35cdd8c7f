"""`blk evaluate`: accuracy and calibration on labelled examples, with the posterior and without."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

import torch

from bayesian_lora_kernels.calibration import reliability_diagram, save_figure, summary
from bayesian_lora_kernels.commands import options, output
from bayesian_lora_kernels.commands.errors import as_input_errors
from bayesian_lora_kernels.commands.job import add_job_options, load_job, load_posterior
from bayesian_lora_kernels.commands.probabilities import in_lines, laplace_probs

METRICS = {"accuracy": "ACC", "nll": "NLL", "ece": "ECE", "brier": "Brier"}


def add_parser(subparsers: options.Subparsers) -> ArgumentParser:
    """What `blk evaluate` takes."""
    parser = subparsers.add_parser(
        "evaluate",
        help="accuracy and calibration, with the posterior and without",
        description="Accuracy and calibration on labelled examples, of the adapter alone (MAP) and with the posterior "
        "that blk fit wrote (Laplace).",
    )
    add_job_options(parser, labelled=True)
    options.add_probabilities(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a reliability diagram, PNG, PDF or SVG")
    options.add_json(parser, "also write the results to this file, as JSON")
    return parser


def run(args: Namespace) -> int:
    """Predict, judge, print, write.

    Raises:
        InputError: for whatever the user has to put right.
    """
    folder = args.posterior or args.adapter
    job = load_job(args, labelled=True, posterior=folder)
    logits = job.predict(load_posterior(job, folder))
    labels = torch.tensor(job.labels)
    name, laplace, calibration = laplace_probs(logits, args, folder)
    probs = {"MAP": logits.probs("map"), name: laplace}
    with as_input_errors():
        metrics = {name: summary(values, labels) for name, values in probs.items()}
    if args.plot is not None:
        with as_input_errors("--plot: "):
            save_figure(reliability_diagram({in_lines(name): p for name, p in probs.items()}, labels), args.plot)
    result = {
        "command": "evaluate",
        "adapter": str(args.adapter),
        "base": job.base,
        "posterior": str(folder),
        "data": str(args.data),
        "choices": args.choices,
        "method": args.method,
        "calibration_labels": None if calibration is None else calibration.n_labels,
        "n_examples": len(labels),
        "n_truncated": job.truncated,
        **dict(zip(("map", "laplace"), metrics.values(), strict=True)),
    }
    output.write_json(args.json, result)
    print(f"{len(labels)} examples of {args.data}\n\n{_report(metrics)}")
    if args.plot is not None:
        print(f"\nreliability diagram written to {args.plot}")
    return 0


def _report(metrics: Mapping[str, Mapping[str, float]]) -> str:
    rows = [["", *METRICS.values()]]
    rows += [[name, *(f"{values[key]:.4f}" for key in METRICS)] for name, values in metrics.items()]
    return output.table(rows)
