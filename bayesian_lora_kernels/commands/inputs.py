"""The user's model, and examples as it takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.adapter import AdapterFolder, choose_device, context_length, pad_token
from bayesian_lora_kernels.commands.classifier import set_pad_token
from bayesian_lora_kernels.commands.dataset import Example
from bayesian_lora_kernels.commands.errors import InputError
from bayesian_lora_kernels.commands.task import Task
from bayesian_lora_kernels.commands.tokens import choice_tokens, token_text, tokenise_prompts, tokenise_texts
from bayesian_lora_kernels.posterior.storage import JSON_NAME


@dataclass(frozen=True)
class Inputs:
    """A model, and texts as it takes them.

    Attributes:
        model: base and adapter.
        ids: token ids, of each example one input, or the two of a pair.
        truncated: how many examples lost some of them.
        token_ids: of the choices; None: there are none.
        tokens: the same as the vocabulary writes them.
        pad_id: what fills up a batch.
    """

    model: Any
    ids: list[tuple[list[int], ...]]
    truncated: int
    token_ids: list[int] | None
    tokens: list[str] | None
    pad_id: int


def load_inputs(
    folder: AdapterFolder,
    task: Task,
    examples: Sequence[Example],
    device: str | None,
    dtype: str,
    max_length: int | None = None,
    posterior: Path | None = None,
) -> Inputs:
    """Load tokenizer and model, and make tokens of the examples: `load_model` and its `inputs`, with a warning."""
    loaded = load_model(folder, task, device, dtype, max_length, posterior)
    inputs = loaded.inputs(examples)
    loaded.warn_of_truncation(inputs.truncated, len(inputs.ids))
    return inputs


def load_model(
    folder: AdapterFolder,
    task: Task,
    device: str | None,
    dtype: str,
    max_length: int | None = None,
    posterior: Path | None = None,
) -> Loaded:
    """Load tokenizer and model.

    Args:
        folder: of the adapter.
        task: what it is for.
        device: its name; None: a GPU if there is one.
        dtype: of the base model.
        max_length: tokens of an input; None: what the model is made for.
        posterior: folder of a fitted posterior, which must be of the same task.

    Raises:
        InputError: for whatever the user has to put right.
    """
    place = choose_device(device)
    tokenizer = folder.tokenizer()
    token_ids = choice_tokens(tokenizer, task.names) if task.kind == "choices" and task.names else None
    if posterior is not None:
        _check_same_task(posterior, task, tokenizer, token_ids)
    model: Any = folder.model(place, dtype, task.config)
    limit = max_length or context_length(tokenizer, getattr(model, "config", None))
    return Loaded(model, tokenizer, task, token_ids, limit)


@dataclass(frozen=True)
class Loaded:
    """A model, and what makes tokens for it.

    Attributes:
        model: base and adapter.
        tokenizer: of the adapter.
        task: what the model decides.
        token_ids: of the choices; None: there are none.
        limit: tokens of an input; None: any number.
    """

    model: Any
    tokenizer: Any
    task: Task
    token_ids: list[int] | None
    limit: int | None

    def inputs(self, examples: Sequence[Example]) -> Inputs:
        """The tokens of some examples.

        Raises:
            InputError: for an example that has none, or some that the model does not know.
        """
        task, tokenizer = self.task, self.tokenizer
        tokenise = tokenise_prompts if task.kind == "choices" else tokenise_texts
        ids, truncated = tokenise(tokenizer, examples, self.limit)
        check_vocabulary(self.model, [one for example in ids for one in example])
        short = next((e.where for e, (one, *_) in zip(examples, ids, strict=True) if task.texts and len(one) < 2), None)
        if short is not None:
            raise InputError(f"{short}: the text is a single token, before which there is nothing to predict it from")
        if task.config is None:
            pad_id = pad_token(tokenizer, getattr(self.model, "config", None))
        else:
            pad_id = set_pad_token(self.model, tokenizer, ids)
        tokens = None if self.token_ids is None else [token_text(tokenizer, token) for token in self.token_ids]
        return Inputs(self.model, ids, truncated, self.token_ids, tokens, pad_id)

    def warn_of_truncation(self, truncated: int, total: int) -> None:
        """On stderr, if examples were too long."""
        if truncated:
            begins = self.task.kind == "choices" or self.tokenizer.truncation_side == "left"
            output.warn(
                f"{truncated} of {total} {self.task.inputs} are longer than {self.limit} tokens and lost their "
                f"{'beginning' if begins else 'end'} (--max-length)"
            )


def _check_same_task(folder: Path, task: Task, tokenizer: Any, token_ids: Sequence[int] | None) -> None:
    """Before the model is loaded, which can take minutes. Whether the file is sound is for from_pretrained to say."""
    try:
        content = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
        fitted, own = content["class_token_ids"], content["custom_forward"]
        likelihood = content["settings"]["likelihood"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if token_ids is None:
        if fitted is not None or own or likelihood != task.likelihood:
            raise InputError(f"{folder}: its posterior was not fitted to {task.kind} by blk fit; run it again")
        return
    if fitted is None:
        raise InputError(f"{folder}: its posterior was not fitted with choices; run blk fit with --choices")
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
