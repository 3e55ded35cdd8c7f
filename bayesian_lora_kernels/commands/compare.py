"""`blk compare`: what makes an adapter's probabilities calibrated, side by side on the user's own data."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from torch import Tensor

from bayesian_lora_kernels.calibration import temperature_scale
from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.dataset import Example, read_examples
from bayesian_lora_kernels.commands.errors import InputError, as_input_errors
from bayesian_lora_kernels.commands.evaluate import diagrams, metrics_of, save_diagrams
from bayesian_lora_kernels.commands.job import FEW_LABELS, Job, check_classes, load_parts, open_task
from bayesian_lora_kernels.commands.parts import Table
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.predictive.calibrate import LabelLikelihood
from bayesian_lora_kernels.predictive.distribution import LogitPosterior

COLUMNS = {
    "accuracy": "ACC",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
    "error_auroc": "AUROC of errors",
    "aurc": "AURC",
}
NAMES = {
    "map": "MAP",
    "temperature": "temperature scaling",
    "kfac": "Laplace, K-FAC",
    "ekfac": "Laplace, EKFAC",
    "exact": "Laplace, exact",
    "last": "Laplace, last block",
}


@dataclass(frozen=True)
class Data:
    """The three files, on one model.

    Attributes:
        train: what the curvature is measured on.
        held_out: whose labels set the level.
        test: what is judged.
    """

    train: Job
    held_out: Job
    test: Job


def run(args: Namespace) -> int:
    """Fit, calibrate, judge, print, draw, write.

    Raises:
        InputError: for whatever the user has to put right.
    """
    repeated = next((method for i, method in enumerate(args.methods) if method in args.methods[:i]), None)
    if repeated is not None:
        raise InputError(f"--methods: {repeated!r} is there twice")
    data = _load(args)
    labels, outcomes = _outcomes(data, args.methods, args.seed)
    with as_input_errors():
        metrics = {method: metrics_of(probs, labels) for method, (probs, _) in outcomes.items()}
    drawn = {NAMES[method].replace(", ", ",\n"): probs for method, (probs, _) in outcomes.items()}
    save_diagrams(args, drawn, labels)
    result = {
        "command": "compare",
        "adapter": str(args.adapter),
        "base": data.test.base,
        "data": str(args.data),
        "held_out": str(args.held_out),
        "test": str(args.test),
        "task": data.test.task.kind,
        "choices": data.test.task.names,
        "n_train": len(data.train.examples),
        "n_held_out": len(data.held_out.examples),
        "n_test": len(data.test.examples),
        "n_truncated": data.train.inputs.truncated,
        "seed": args.seed,
        "methods": {method: {**metrics[method], "seconds": seconds} for method, (_, seconds) in outcomes.items()},
    }
    output.write_json(args.json, result)
    about = (
        f"{result['n_test']} {data.test.task.examples} of {args.test}; temperature and Laplace know "
        f"{result['n_held_out']} labels of {args.held_out}"
    )
    output.show(args, about, "", _report(result["methods"]), *diagrams(args))
    return 0


def _load(args: Namespace) -> Data:
    folder, task = open_task(args, None)
    parts: list[list[Example]] = []
    files = (args.data, args.held_out, args.test)
    for i, path in enumerate(files):
        same = next((other for other in files[:i] if path.exists() and other.exists() and path.samefile(other)), None)
        if same is not None:
            raise InputError(f"{path}: the same file as {same}; expected examples that were not used before")
        parts.append(read_examples(path, task.names, True, task.pairs))
        check_classes(path, task, parts[-1], 2 if i == 1 else 1)
    if len(parts[1]) < FEW_LABELS:
        output.warn(f"{args.held_out}: {len(parts[1])} labels say little; {FEW_LABELS} do, a hundred are good")
    return Data(*load_parts(args, folder, task, parts))


def _outcomes(data: Data, methods: Sequence[str], seed: int) -> tuple[Tensor, dict[str, tuple[Tensor, float]]]:
    """Labels of the test examples; of each method their probabilities, and the seconds that it took."""
    outcomes: dict[str, tuple[Tensor, float]] = {}
    with output.bar(methods, desc="methods", unit="method") as bar:
        for method in bar:
            bar.set_postfix_str(NAMES[method])
            start = perf_counter()
            held_out, labels, test, test_labels = _laplace(data, method, seed)
            outcomes[method] = test.probs(), perf_counter() - start
    temperature = temperature_scale(held_out.mean, labels)
    plain = {"map": test.probs("map"), "temperature": (test.mean / temperature).softmax(dim=1)}
    return test_labels, {**{method: (probs, 0.0) for method, probs in plain.items()}, **outcomes}


def _laplace(data: Data, method: str, seed: int) -> tuple[LogitPosterior, Tensor, LogitPosterior, Tensor]:
    """Calibrated predictions of the held-out and the test examples, each with their labels."""
    config = LaplaceConfig(seed=seed, curvature="exact" if method == "last" else method)
    with as_input_errors():
        laplace = data.train.laplace(config)
        if method == "last":
            laplace = data.train.laplace(replace(config, modules=last_block([layer.name for layer in laplace.layers])))
        laplace.fit(data.train.batches(), progress=output.watched()).optimize_prior_precision()
    held_out, labels = data.held_out.judged(laplace)
    evidence = LabelLikelihood()
    with as_input_errors():
        evidence.add(held_out.mean, held_out.covariance, labels, laplace.variance_scale)
        laplace.calibrate(evidence)
    return held_out, labels, *data.test.judged(laplace)


def last_block(names: Sequence[str]) -> list[str]:
    """Of the layers, those of the last numbered block; and all that are in none, such as a classifier's head."""
    places = {name: next((int(part) for part in name.split(".") if part.isdecimal()), None) for name in names}
    last = max((place for place in places.values() if place is not None), default=None)
    return [name for name, place in places.items() if place in (None, last)]


def _report(methods: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [["", *COLUMNS.values(), "seconds"]]
    for method, values in methods.items():
        numbers = ["-" if values[key] is None else f"{values[key]:.4f}" for key in COLUMNS]
        rows.append([NAMES[method], *numbers, f"{values['seconds']:.1f}" if values["seconds"] else ""])
    return Table(rows)
