"""From the posterior to probabilities of the choices, and what these are called."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.errors import as_input_errors
from bayesian_lora_kernels.commands.job import FEW_LABELS, how_to_calibrate
from bayesian_lora_kernels.predictive.calibrate import METHODS as CALIBRATED
from bayesian_lora_kernels.predictive.calibrate import Calibration
from bayesian_lora_kernels.predictive.distribution import LogitPosterior


def laplace_probs(logits: LogitPosterior, args: Namespace) -> tuple[str, Tensor, Calibration | None]:
    """What `options.add_probabilities` asks for.

    Args:
        logits: of some examples.
        args: of the command.

    Returns:
        A name that says what the probabilities are; themselves, `[N, C]`; and the calibration that is in them.

    Raises:
        InputError: if the method cannot make them.
    """
    calibration = calibration_used(logits.calibration, args)
    with as_input_errors():
        generator = torch.Generator().manual_seed(args.seed)
        probs = logits.probs(args.method, args.samples, generator, calibrated=calibration is not None)
    return name_of(args.method, calibration), probs, calibration


def calibration_used(calibration: Calibration | None, args: Namespace) -> Calibration | None:
    """That of the posterior, if the options leave it in."""
    return None if args.uncalibrated or args.method not in CALIBRATED else calibration


def hint_at_calibration(calibration: Calibration | None, args: Namespace, folder: Path) -> None:
    """On stderr, where labels could set the level of the probabilities of this posterior and did not."""
    if args.method in CALIBRATED and calibration is None and not args.uncalibrated:
        text = f"these probabilities are not calibrated; held-out labels (from {FEW_LABELS} on) do that"
        output.hint(f"{text}: {how_to_calibrate(args, folder)}")


def name_of(method: str, calibration: Calibration | None) -> str:
    """Such as `Laplace (pairwise, calibrated with 100 labels)`."""
    if method not in CALIBRATED:
        return f"Laplace ({method})"
    if calibration is None:
        return f"Laplace ({method}, uncalibrated)"
    folds = "" if calibration.folds is None else f" of {calibration.folds} folds"
    return f"Laplace ({method}, calibrated with {calibration.n_labels} labels{folds})"


def in_lines(name: str) -> str:
    """A name over a narrow column or picture."""
    return name.replace(", ", ",\n")
