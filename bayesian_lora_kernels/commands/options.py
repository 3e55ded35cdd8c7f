"""Options that several commands have."""

from __future__ import annotations

import math
import re
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace, _SubParsersAction
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from bayesian_lora_kernels.commands.errors import InputError
from bayesian_lora_kernels.config import LaplaceConfig, choices

if TYPE_CHECKING:
    import torch

Subparsers: TypeAlias = "_SubParsersAction[Any]"

DATA, HELD_OUT = "DATA.jsonl", "HELDOUT.jsonl"
CURVATURES = ("kfac", "ekfac", "exact")
METHODS = ("pairwise", "scalar", "probit", "bridge", "mc")  # of probabilities, but for the model's own
CALIBRATED = ("pairwise", "scalar")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
VOCABULARY: Final = "vocabulary"
# Those that --choices and the evidence do not say already.
SAID = {"class_token_ids", "likelihood", "noise_variance", "prior_precision"}
SETTINGS = {one.name for one in fields(LaplaceConfig)} - SAID


def add_job_options(parser: ArgumentParser, *, labelled: bool, data: str = DATA, texts: bool = False) -> None:
    """What `load_job` reads; `data` is what the file of examples is called."""
    content = (
        'JSON lines {"prompt": ..., "label": ...}; a label is one of the choices (of a classifier, its name), or its '
        "index"
        if labelled
        else 'JSON lines {"prompt": ...}; labels may be there'
    )
    lines = (
        f'{content}; "messages", a chat, may stand in place of "prompt"; for a reward model, pairs {{"prompt": ..., '
        '"chosen": ..., "rejected": ...}, texts or lists of messages, of which the prompt may be absent'
    )
    if texts:
        lines += (
            '; of a causal language model without --choices, {"text": ...} or "messages", of which every token counts'
        )
    add_adapter(parser)
    parser.add_argument("data", type=path, metavar=data, help=lines)
    parser.add_argument(
        "--choices",
        nargs="+",
        metavar="CHOICE",
        help="what a causal language model chooses between, written as it follows the prompt (' A' if a space comes "
        "first); each stands for the token that it begins with; a classifier or reward model knows by itself",
    )
    add_model(parser)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="tokens in a prompt, of which a longer one keeps the last, and a classifier's text what its tokenizer "
        "keeps; default: what the model is made for",
    )


def add_adapter(parser: ArgumentParser) -> None:
    """Of the commands that cannot do without."""
    parser.add_argument("adapter", type=path, metavar="ADAPTER", help="PEFT adapter folder")


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


def add_memory(parser: ArgumentParser) -> None:
    """Of an estimate."""
    group = parser.add_argument_group(
        "memory", "with --adapter, a folder with an adapter_config.json, and a base model with a config.json"
    )
    group.add_argument("--batch-size", type=positive, metavar="N", help="texts in a batch")
    group.add_argument("--length", type=positive, metavar="T", help="tokens of a text")
    group.add_argument("--curvature", choices=CURVATURES, default=LaplaceConfig.curvature, help="default: %(default)s")
    group.add_argument(
        "--budget", type=_bytes, metavar="BYTES", help="memory_budget, such as 8GB; default: half of what is left free"
    )
    group.add_argument(
        "--outputs",
        type=_outputs,
        default=2,
        metavar="C",
        help="how many choices or labels are predicted, or `vocabulary`; default: 2",
    )
    group.add_argument("--examples", type=positive, metavar="N", help="of the fit, for the rows of exact")


def add_settings(parser: ArgumentParser) -> None:
    """Those of `LaplaceConfig`, which says what they are."""
    for one in fields(LaplaceConfig):
        if one.name not in SETTINGS:
            continue
        about = one.metadata["help"].replace("`", "").replace("%", "%%").replace("None", "none")
        given: dict[str, Any] = {"type": _number, "metavar": "N"}
        if allowed := CURVATURES if one.name == "curvature" else choices(one.name):
            given = {"choices": allowed}
        elif isinstance(one.default, bool):
            given = {"action": BooleanOptionalAction}
        elif one.name == "seed":
            given = {"type": seed}
        elif one.name == "modules":
            about, given = "modules to fit; none: every trainable linear one", {"type": _pattern, "metavar": "REGEX"}
        elif one.name == "row_dtype":
            given = {"type": _dtype, "metavar": "DTYPE"}
        parser.add_argument(
            f"--{one.name.replace('_', '-')}",
            default=one.default,
            help=f"{about}; default: {str(one.default).lower()}",
            **given,
        )


def config_of(args: Namespace) -> LaplaceConfig:
    """What a parser with `add_settings` found.

    Raises:
        InputError: for a number out of its range.
    """
    try:
        return LaplaceConfig(**{k: v for k, v in vars(args).items() if k in SETTINGS})
    except (TypeError, ValueError) as error:
        name, _, what = str(error).partition(":")
        raise InputError(f"--{name.replace('_', '-')}:{what}") from None


def add_probabilities(parser: ArgumentParser) -> None:
    """From the posterior to probabilities of the choices."""
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="pairwise",
        help="from Gaussian logits to probabilities; blk calibrate sets the level of those of "
        f"{' and '.join(CALIBRATED)}; default: pairwise",
    )
    parser.add_argument(
        "--uncalibrated", action="store_true", help="leave out what blk calibrate found; default: use it if it is there"
    )
    parser.add_argument("--samples", type=positive, default=1024, metavar="N", help="for mc; default: 1024")
    parser.add_argument("--seed", type=seed, default=0, help="for mc; default: 0")
    add_posterior(parser)


def add_posterior(parser: ArgumentParser) -> None:
    """Of a command that reads what `blk fit` wrote."""
    parser.add_argument(
        "--posterior", type=path, metavar="FOLDER", help="what blk fit got as --out; default: the adapter's folder"
    )


def add_diagrams(parser: ArgumentParser) -> None:
    """Of the commands that judge probabilities."""
    parser.add_argument("--plot", type=path, metavar="FILE", help="also draw a reliability diagram, PNG, PDF or SVG")
    parser.add_argument(
        "--plot-risk",
        type=path,
        metavar="FILE",
        help="also draw a risk-coverage diagram: how many answers are wrong if only the surest are given",
    )


def add_json(parser: ArgumentParser, text: str = "also write the results to this file") -> None:
    """Of every command; `output.check_outputs` looks at it."""
    parser.add_argument("--json", type=path, metavar="FILE", help=text)


def _outputs(text: str) -> int | str:
    return text if text == VOCABULARY else positive(text)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)B?", text)
    if found is None or not (size := round(float(found[1]) * UNITS[found[2]])):
        raise ArgumentTypeError(f"expected bytes, such as 8GB or 500MB, got {text!r}")
    return size


def path(text: str) -> Path:
    """Of a file or a folder; a variable of the shell that is not set is none."""
    if not text:
        raise ArgumentTypeError("expected a path, got an empty one")
    return Path(text)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def precision(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def seed(text: str) -> int:
    """What a generator takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise ArgumentTypeError(f"expected a whole number below 2^63, got {text!r}")
    return int(text)


def _number(text: str) -> int | None:
    if text in ("none", "full"):
        return None
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a whole number or none, got {text!r}") from None


def _dtype(text: str) -> torch.dtype | None:
    if text not in (*DTYPES[1:], "none"):
        raise ArgumentTypeError(f"expected one of {', '.join(DTYPES[1:])}, none, got {text!r}")
    if text == "none":
        return None
    import torch

    dtype: torch.dtype = getattr(torch, text)
    return dtype


def _pattern(text: str) -> str | None:
    if text == "none":
        return None
    try:
        re.compile(text)
    except re.error as error:
        raise ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from error
    return text
