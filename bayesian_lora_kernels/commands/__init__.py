"""The commands that work on a PEFT adapter folder and a file: `blk fit`, `evaluate`, `predict` and `score`."""

from __future__ import annotations

import os
import re
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from bayesian_lora_kernels.commands.errors import InputError
from bayesian_lora_kernels.posterior.curvature import CURVATURES
from bayesian_lora_kernels.predictive.distribution import PROBABILITY_METHODS

if TYPE_CHECKING:
    from argparse import _SubParsersAction

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
METHODS = tuple(method for method in PROBABILITY_METHODS if method != "map")


def add_commands(subparsers: _SubParsersAction[ArgumentParser]) -> None:
    """Register the commands; each sets `run`, a function of the parsed arguments to an exit code."""
    fit = subparsers.add_parser(
        "fit",
        help="fit a Laplace posterior to an adapter",
        description="Fit a Laplace posterior to a PEFT adapter, choose its prior precision by the evidence, and write "
        "it into the adapter's folder.",
    )
    _shared(fit, 'JSON lines {"prompt": ..., "label": ...}; a label is one of the choices, or its index')
    fit.add_argument("--curvature", choices=tuple(CURVATURES), default="kfac", help="default: kfac")
    fit.add_argument(
        "--rank", type=_rank, default=32, metavar="N", help="columns kept of a wide factor, or 'full'; default: 32"
    )
    fit.add_argument("--per-module", action="store_true", help="one prior precision for each module")
    fit.add_argument(
        "--modules", type=_pattern, metavar="REGEX", help="modules to fit; default: every trainable linear one"
    )
    fit.add_argument("--seed", type=_seed, default=0, help="of everything random; default: 0")
    fit.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: the adapter's folder")
    _json(fit, "also write the results to this file, as JSON")
    fit.set_defaults(run=_runner("fit", "fitting"))

    evaluate = subparsers.add_parser(
        "evaluate",
        help="accuracy and calibration, with the posterior and without",
        description="Accuracy and calibration on labelled examples, of the adapter alone (MAP) and with the posterior "
        "that blk fit wrote (Laplace).",
    )
    _shared(evaluate, 'JSON lines {"prompt": ..., "label": ...}; a label is one of the choices, or its index')
    _predictive(evaluate)
    evaluate.add_argument("--plot", type=Path, metavar="FILE", help="also draw a reliability diagram, PNG, PDF or SVG")
    _json(evaluate, "also write the results to this file, as JSON")
    evaluate.set_defaults(run=_runner("evaluate", "evaluation"))

    predict = subparsers.add_parser(
        "predict",
        help="probabilities of the choices, line by line",
        description="For every line the probabilities of the choices, of the adapter alone (MAP) and with the "
        "posterior that blk fit wrote (Laplace), and the standard deviation of each choice's logit.",
    )
    _shared(predict, 'JSON lines {"prompt": ...}; labels may be there')
    _predictive(predict)
    _json(predict, "also write the results to this file, as JSON lines: one object for each example")
    predict.set_defaults(run=_runner("predict", "prediction"))

    score = subparsers.add_parser(
        "score",
        help="how sure the model is of each token of a text",
        description="For every token of a text its log-probability given those before it, of the adapter alone (MAP) "
        "and with the posterior that blk fit wrote (Laplace), the entropy of what could stand there, and the part of "
        "it that more data would remove: the mutual information between token and weights, in nats.",
    )
    _adapter(score)
    score.add_argument("text", type=Path, metavar="TEXT-FILE", help="UTF-8 text")
    _model(score)
    score.add_argument(
        "--window",
        type=_positive,
        default=512,
        metavar="N",
        help="tokens that the model reads at once; of a longer text, windows overlap by half; default: 512",
    )
    score.add_argument(
        "--samples",
        type=_positive,
        default=64,
        metavar="N",
        help="posterior samples, half of them mirrored; default: 64",
    )
    score.add_argument("--seed", type=_seed, default=0, help="of the samples; default: 0")
    _posterior(score)
    score.add_argument(
        "--html", type=Path, metavar="FILE", help="also write the text with each token coloured by mutual information"
    )
    score.add_argument("--plot", type=Path, metavar="FILE", help="the same as a picture, PNG, PDF or SVG")
    _json(score, "also write the results to this file, as JSON")
    score.set_defaults(run=_runner("score", "scoring"))


def _shared(parser: ArgumentParser, data: str) -> None:
    _adapter(parser)
    parser.add_argument("data", type=Path, metavar="DATA.jsonl", help=data)
    parser.add_argument(
        "--choices",
        nargs="+",
        required=True,
        metavar="CHOICE",
        help="what the model chooses between, written as it follows the prompt (' A' if a space comes first); each "
        "stands for the token that it begins with",
    )
    _model(parser)
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="tokens in a prompt, of which a longer one keeps the last; default: what the model is made for",
    )


def _adapter(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="PEFT adapter folder")


def _model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="base model, a folder or a name on the hub; default: what the adapter says, if that is on this machine",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the base model; default: as it was saved")


def _predictive(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--method", choices=METHODS, default="probit", help="from Gaussian logits to probabilities; default: probit"
    )
    parser.add_argument("--samples", type=_positive, default=1024, metavar="N", help="for mc; default: 1024")
    parser.add_argument("--seed", type=_seed, default=0, help="for mc; default: 0")
    _posterior(parser)


def _posterior(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--posterior", type=Path, metavar="FOLDER", help="what blk fit got as --out; default: the adapter's folder"
    )


def _json(parser: ArgumentParser, text: str) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise ArgumentTypeError(f"expected a whole number below 2^63, got {text!r}")
    return int(text)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from error
    return text


def _rank(text: str) -> int | None:
    return None if text == "full" else _positive(text)


def _runner(name: str, module: str) -> Callable[[Namespace], int]:
    """Imports the command when it is called, and says in one line what the user has to put right."""

    def run(args: Namespace) -> int:
        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

        with warnings.catch_warnings():
            warnings.showwarning = show  # without a place in the source, which says nothing to who runs a command
            for category in (DeprecationWarning, FutureWarning):  # those are for the authors of what we call
                warnings.simplefilter("ignore", category)
            try:
                import_module(f"{__name__}.{module}").run(args)
                sys.stdout.flush()
            except InputError as error:
                print(f"blk {name}: {error}", file=sys.stderr)
                return 2
            except BrokenPipeError:  # whoever reads has seen enough, such as `| head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0

    return run
