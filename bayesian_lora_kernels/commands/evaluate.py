"""`blk evaluate`: accuracy and calibration on labelled examples, with the posterior and without."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from bayesian_lora_kernels.calibration import calibration_error_interval, summary
from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.errors import as_input_errors, writing
from bayesian_lora_kernels.commands.job import load_job, load_posterior
from bayesian_lora_kernels.commands.parts import Table
from bayesian_lora_kernels.commands.probabilities import hint_at_calibration, in_lines, laplace_probs
from bayesian_lora_kernels.plots import reliability_diagram, risk_coverage_diagram, save_figure

METRICS = {
    "accuracy": "ACC",
    "nll": "NLL",
    "brier": "Brier",
    "ece": "ECE",
    "ece_adaptive": "ECE, bins of equal mass",
    "ece_debiased": "RMS calibration error, debiased",
    "error_auroc": "AUROC, errors by confidence",
    "aurc": "area under risk-coverage",
}
INTERVAL = "ece_interval"  # of the ECE, in the results beside the metrics


def run(args: Namespace) -> int:
    """Predict, judge, print, write.

    Raises:
        InputError: for whatever the user has to put right.
    """
    folder = args.posterior or args.adapter
    job = load_job(args, labelled=True, posterior=folder)
    logits, labels = job.judged(load_posterior(job.inputs.model, folder))
    name, laplace, calibration = laplace_probs(logits, args)
    hint_at_calibration(logits.calibration, args, folder)
    probs = {"MAP": logits.probs("map"), name: laplace}
    with as_input_errors():
        metrics = {name: metrics_of(values, labels) for name, values in probs.items()}
    drawn = {in_lines(name): values for name, values in probs.items()}
    save_diagrams(args, drawn, labels)
    result = {
        "command": "evaluate",
        "adapter": str(args.adapter),
        "base": job.base,
        "posterior": str(folder),
        "data": str(args.data),
        "task": job.task.kind,
        "choices": job.task.names,
        "method": args.method,
        "calibration_labels": None if calibration is None else calibration.n_labels,
        "n_examples": len(labels),
        "n_truncated": job.inputs.truncated,
        **dict(zip(("map", "laplace"), metrics.values(), strict=True)),
    }
    output.write_json(args.json, result)
    output.show(args, f"{len(labels)} {job.task.examples} of {args.data}", "", _report(metrics), *diagrams(args))
    return 0


def save_diagrams(args: Namespace, probs: Mapping[str, Tensor], labels: Tensor) -> None:
    """Of the methods whose probabilities these are, as far as `--plot` and `--plot-risk` ask for them.

    Raises:
        InputError: if one cannot be written.
    """
    for path, option, diagram in (
        (args.plot, "--plot", reliability_diagram),
        (args.plot_risk, "--plot-risk", risk_coverage_diagram),
    ):
        if path is not None:
            with as_input_errors(f"{option}: "), writing(path, option):
                save_figure(diagram(probs, labels), path)


def diagrams(args: Namespace) -> list[str]:
    """Where they are, in lines."""
    pictures = {"reliability": args.plot, "risk-coverage": args.plot_risk}
    written = [f"{kind} diagram written to {path}" for kind, path in pictures.items() if path is not None]
    return ["", *written] if written else []


def metrics_of(probs: Tensor, labels: Tensor) -> dict[str, Any]:
    """What `METRICS` names, in values that JSON can hold: None where a metric is not defined.

    Args:
        probs: `[N, C]`.
        labels: `[N]`.
    """
    values = summary(probs, labels)
    interval = asdict(calibration_error_interval(probs, labels))
    interval.pop("ece")
    return {key: None if math.isnan(values[key]) else values[key] for key in METRICS} | {INTERVAL: interval}


def _report(metrics: Mapping[str, Mapping[str, Any]]) -> Table:
    """A column for each kind of probabilities, a line for each metric."""
    titles = [in_lines(name).split("\n") for name in metrics]
    height = max(map(len, titles))
    columns = [[""] * (height - len(title)) + title for title in titles]
    for column, values in zip(columns, metrics.values(), strict=True):
        column += ["-" if values[key] is None else f"{values[key]:.4f}" for key in METRICS]
        interval = values[INTERVAL]
        column.insert(height + list(METRICS).index("ece") + 1, f"{interval['low']:.4f} to {interval['high']:.4f}")
    names = [*METRICS.values()]
    level = next(iter(metrics.values()))[INTERVAL]["level"]
    names.insert(list(METRICS).index("ece") + 1, f"  {level:.0%} interval")
    return Table(list(zip([""] * height + names, *columns, strict=True)), header=height)
