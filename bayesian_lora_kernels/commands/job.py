"""What fit, calibrate, evaluate and predict share: checked input, tokens, the model; the cheap checks come first."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.adapter import choose_device, context_length, open_adapter, pad_token
from bayesian_lora_kernels.commands.dataset import Example, batches, read_examples
from bayesian_lora_kernels.commands.errors import InputError, as_input_errors
from bayesian_lora_kernels.commands.options import add_adapter, add_model, positive
from bayesian_lora_kernels.commands.tokens import choice_tokens, token_text, tokenise_prompts
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.posterior.storage import JSON_NAME
from bayesian_lora_kernels.predictive.distribution import LogitPosterior

DATA, HELD_OUT = "DATA.jsonl", "HELDOUT.jsonl"
FEW_LABELS = 10  # with fewer, the labels say little


def add_job_options(parser: ArgumentParser, *, labelled: bool, data: str = DATA) -> None:
    """What `load_job` reads; `data` is what the file of examples is called."""
    lines = (
        'JSON lines {"prompt": ..., "label": ...}; a label is one of the choices, or its index'
        if labelled
        else 'JSON lines {"prompt": ...}; labels may be there'
    )
    add_adapter(parser)
    parser.add_argument("data", type=Path, metavar=data, help=lines)
    parser.add_argument(
        "--choices",
        nargs="+",
        required=True,
        metavar="CHOICE",
        help="what the model chooses between, written as it follows the prompt (' A' if a space comes first); each "
        "stands for the token that it begins with",
    )
    add_model(parser)
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="tokens in a prompt, of which a longer one keeps the last; default: what the model is made for",
    )


@dataclass(frozen=True)
class Job:
    """A model and the examples to run it on.

    Attributes:
        base: folder or hub name of the base model.
        model: base and adapter.
        examples: of the data file, in its order.
        prompts: their token ids.
        truncated: how many prompts lost their beginning.
        tokens: `{choice: its first token, as the vocabulary writes it}`.
        token_ids: their ids.
        batch_size: examples in a batch.
        pad_id: what fills up a batch.
    """

    base: str
    model: Any
    examples: list[Example]
    prompts: list[list[int]]
    truncated: int
    tokens: dict[str, str]
    token_ids: list[int]
    batch_size: int
    pad_id: int

    @property
    def labels(self) -> list[int]:
        """Of the examples, all of which have one."""
        return [example.label for example in self.examples if example.label is not None]

    def batches(self) -> list[dict[str, Tensor]]:
        """Labelled batches, in the order of the file."""
        return batches(self.prompts, self.batch_size, self.pad_id, self.labels)

    def predict(self, laplace: LaplaceLoRA) -> LogitPosterior:
        """The Gaussian over the choices' logits less their mean, of all examples in the order of the file, on the CPU.

        Examples of similar length run together, the longest first: less padding, and memory runs out at once or never.
        """
        order = sorted(range(len(self.prompts)), key=lambda i: -len(self.prompts[i]))
        means, covariances = [], []
        with tqdm(total=len(order), desc="predict", unit="example", disable=not sys.stderr.isatty()) as bar:
            for batch in batches([self.prompts[i] for i in order], self.batch_size, self.pad_id):
                with as_input_errors():
                    part = laplace.predict(batch, differences=True)
                means.append(part.mean.cpu())
                covariances.append(part.covariance.cpu())
                bar.update(len(part.mean))
        back = torch.tensor(order).argsort()
        return replace(part, mean=torch.cat(means)[back], covariance=torch.cat(covariances)[back])


def load_job(args: Namespace, *, labelled: bool, posterior: Path | None = None, classes: int = 1) -> Job:
    """Check the arguments that all commands have, read the data, load the model.

    Args:
        args: as `add_job_options` defines them.
        labelled: whether every example needs a label.
        posterior: folder of a fitted posterior, whose choices must be these.
        classes: of how many choices there must be labels.

    Raises:
        InputError: for whatever the user has to put right.
    """
    choices: list[str] = args.choices
    if len(choices) < 2:
        raise InputError(f"--choices: expected at least two, got {len(choices)}")
    repeated = next((choice for i, choice in enumerate(choices) if choice in choices[:i]), None)
    if repeated is not None:
        raise InputError(f"--choices: {repeated!r} is there twice")
    folder = open_adapter(args.adapter, args.base)
    if posterior is not None and not (posterior / JSON_NAME).is_file():
        raise InputError(f"{posterior}: no posterior ({JSON_NAME}) in it; run blk fit first")
    examples = read_examples(args.data, choices, labelled)
    seen = {example.label for example in examples if example.label is not None}
    if labelled and len(seen) < classes:
        raise InputError(
            f"{args.data}: expected labels of at least {classes} of the choices, all {len(examples)} are "
            f"{' or '.join(repr(choices[label]) for label in sorted(seen))}"
        )
    device = choose_device(args.device)
    tokenizer = folder.tokenizer()
    token_ids = choice_tokens(tokenizer, choices)
    if posterior is not None:
        _check_same_choices(posterior, tokenizer, token_ids)
    model: Any = folder.model(device, args.dtype)
    config = getattr(model, "config", None)
    limit = args.max_length or context_length(tokenizer, config)
    prompts, truncated = tokenise_prompts(tokenizer, examples, limit)
    check_vocabulary(model, prompts)
    if truncated:
        output.warn(
            f"{truncated} of {len(prompts)} prompts are longer than {limit} tokens and lost their beginning "
            "(--max-length)"
        )
    return Job(
        base=folder.base,
        model=model,
        examples=examples,
        prompts=prompts,
        truncated=truncated,
        tokens={choice: token_text(tokenizer, token) for choice, token in zip(choices, token_ids, strict=True)},
        token_ids=token_ids,
        batch_size=args.batch_size,
        pad_id=pad_token(tokenizer, config),
    )


def load_posterior(job: Job, folder: Path) -> LaplaceLoRA:
    """The posterior that `blk fit` wrote for this adapter.

    Raises:
        InputError: if it is damaged, or of other weights.
    """
    with as_input_errors():
        return LaplaceLoRA.from_pretrained(job.model, folder)


def how_to_calibrate(args: Namespace, folder: Path) -> str:
    """The command that sets the level of the probabilities of the posterior in this folder, as a shell takes it."""
    words = ["blk", "calibrate", str(args.adapter), HELD_OUT, "--choices", *args.choices]
    if folder != args.adapter:
        words += ["--posterior", str(folder)]
    if args.base is not None:
        words += ["--base", args.base]
    return shlex.join(words)


def _check_same_choices(folder: Path, tokenizer: Any, token_ids: Sequence[int]) -> None:
    """Before the model is loaded, which can take minutes. Whether the file is sound is for from_pretrained to say."""
    try:
        fitted = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))["class_token_ids"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if fitted is None:
        raise InputError(f"{folder}: its posterior was not fitted with choices; run blk fit")
    if fitted != list(token_ids):
        raise InputError(
            f"--choices: they begin with the tokens {_tokens(tokenizer, token_ids)}, but the posterior in {folder} was "
            f"fitted for {_tokens(tokenizer, fitted)}, in this order"
        )


def check_vocabulary(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """On a GPU an embedding that is too small stops the process with an assertion that says nothing.

    Raises:
        InputError: if a token lies outside the model's embedding.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(max(ids) for ids in prompts)
    if largest >= rows:
        raise InputError(
            f"tokenizer: it makes token {largest} of the prompts, and the base model has {rows} tokens; expected the "
            "tokenizer that the adapter was trained with"
        )


def _tokens(tokenizer: Any, ids: Sequence[int]) -> str:
    return " ".join(repr(token_text(tokenizer, token)) for token in ids)
