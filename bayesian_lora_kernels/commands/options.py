"""Options that several commands have."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, _SubParsersAction
from pathlib import Path
from typing import TypeAlias

from bayesian_lora_kernels.predictive.distribution import PROBABILITY_METHODS

Subparsers: TypeAlias = "_SubParsersAction[ArgumentParser]"

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
METHODS = tuple(method for method in PROBABILITY_METHODS if method != "map")


def add_adapter(parser: ArgumentParser) -> None:
    """Of the commands that cannot do without."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="PEFT adapter folder")


def add_model(parser: ArgumentParser) -> None:
    """What the adapter stands on, and how that is loaded."""
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="base model, a folder or a name on the hub; default: what the adapter says, if that is on this machine",
    )
    add_device(parser)


def add_device(parser: ArgumentParser) -> None:
    """Where and in what the model computes."""
    parser.add_argument("--device", help="such as cpu or cuda:1; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the base model; default: as it was saved")


def add_probabilities(parser: ArgumentParser) -> None:
    """From the posterior to probabilities of the choices."""
    parser.add_argument(
        "--method", choices=METHODS, default="probit", help="from Gaussian logits to probabilities; default: probit"
    )
    parser.add_argument("--samples", type=positive, default=1024, metavar="N", help="for mc; default: 1024")
    parser.add_argument("--seed", type=seed, default=0, help="for mc; default: 0")
    add_posterior(parser)


def add_posterior(parser: ArgumentParser) -> None:
    """Of a command that reads what `blk fit` wrote."""
    parser.add_argument(
        "--posterior", type=Path, metavar="FOLDER", help="what blk fit got as --out; default: the adapter's folder"
    )


def add_json(parser: ArgumentParser, text: str = "also write the results to this file") -> None:
    """Of every command; `output.check_outputs` looks at it."""
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """What a generator takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise ArgumentTypeError(f"expected a whole number below 2^63, got {text!r}")
    return int(text)
