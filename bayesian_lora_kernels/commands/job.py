"""What fit, calibrate, evaluate and predict share: checked input, tokens, the model; the cheap checks come first."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.adapter import (
    TASKS,
    AdapterFolder,
    choose_device,
    context_length,
    open_adapter,
    pad_token,
)
from bayesian_lora_kernels.commands.classifier import set_pad_token
from bayesian_lora_kernels.commands.dataset import Example, batches, read_examples
from bayesian_lora_kernels.commands.errors import InputError, as_input_errors
from bayesian_lora_kernels.commands.options import HELD_OUT
from bayesian_lora_kernels.commands.task import Task, task_of
from bayesian_lora_kernels.commands.tokens import choice_tokens, token_text, tokenise_prompts, tokenise_texts
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.model.forward import IGNORED_LABEL
from bayesian_lora_kernels.posterior.storage import JSON_NAME
from bayesian_lora_kernels.predictive.distribution import LogitPosterior

FEW_LABELS = 10  # with fewer, the labels say little


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


@dataclass(frozen=True)
class Job:
    """A model and the examples to run it on.

    Attributes:
        base: folder or hub name of the base model.
        task: what the model decides.
        examples: of the data file, in its order.
        inputs: the model, and the examples' tokens.
        batch_size: examples in a batch.
    """

    base: str
    task: Task
    examples: list[Example]
    inputs: Inputs
    batch_size: int

    @property
    def labels(self) -> list[int]:
        """Of the examples, all of which have one."""
        return [example.label for example in self.examples if example.label is not None]

    def batches(self) -> list[dict[str, Tensor]]:
        """Labelled batches, in the order of the file; the labels of a text are its own tokens."""
        if not self.task.texts:
            return batches(self.inputs.ids, self.batch_size, self.inputs.pad_id, self.labels)
        made = batches(self.inputs.ids, self.batch_size, self.inputs.pad_id)
        for batch in made:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        return made

    def laplace(self, config: LaplaceConfig) -> LaplaceLoRA:
        """Before the fit."""
        return LaplaceLoRA(self.inputs.model, self.task.forward, self.inputs.token_ids, config=config)

    def predict(self, laplace: LaplaceLoRA, differences: bool = True, progress: bool = True) -> LogitPosterior:
        """The Gaussian over the choices' logits less their mean, of all examples in the order of the file, on the CPU.

        Examples of similar length run together, the longest first: less padding, and memory runs out at once or never.

        Args:
            laplace: the posterior.
            differences: False: the logits themselves.
            progress: whether to show a progress bar, where there is a terminal.
        """
        ids = self.inputs.ids
        order = sorted(range(len(ids)), key=lambda i: -sum(map(len, ids[i])))
        means, covariances = [], []
        shown = progress and sys.stderr.isatty()
        with tqdm(total=len(order), desc="predict", unit="example", disable=not shown) as bar:
            for batch in batches([ids[i] for i in order], self.batch_size, self.inputs.pad_id):
                with as_input_errors():
                    part = laplace.predict(batch, differences=differences)
                means.append(part.mean.cpu())
                covariances.append(part.covariance.cpu())
                bar.update(len(part.mean))
        back = torch.tensor(order).argsort()
        return replace(part, mean=torch.cat(means)[back], covariance=torch.cat(covariances)[back])

    def judged(self, laplace: LaplaceLoRA) -> tuple[LogitPosterior, Tensor]:
        """The same prediction, and labels `[N]` to judge it by.

        The file has the chosen one of a pair first; every second pair is turned round here. Neither the likelihood nor
        a metric sees which side is first, but for two things: of equal scores the first counts as the answer, so that
        all ties would be right and now half of them are; and labels of one class alone, from which calibrate learns
        nothing about a classifier, are refused.
        """
        logits, labels = self.predict(laplace), torch.tensor(self.labels)
        if not self.task.pairs:
            return logits, labels
        labels[1::2] = 1
        mean, covariance = logits.mean.clone(), logits.covariance.clone()
        mean[1::2], covariance[1::2] = mean[1::2].flip(1), covariance[1::2].flip(1, 2)
        return replace(logits, mean=mean, covariance=covariance), labels


def open_task(args: Namespace, posterior: Path | None, texts: bool = False) -> tuple[AdapterFolder, Task]:
    """The adapter and what it decides; see `load_job`."""
    folder = open_adapter(args.adapter, args.base, tuple(TASKS))
    task = task_of(folder, args.choices, without="texts" if texts else None)
    if posterior is not None and not (posterior / JSON_NAME).is_file():
        raise InputError(f"{posterior}: no posterior ({JSON_NAME}) in it; run blk fit first")
    return folder, task


def load_job(
    args: Namespace, *, labelled: bool, posterior: Path | None = None, classes: int = 1, texts: bool = False
) -> Job:
    """Check the arguments that all commands have, read the data, load the model.

    Args:
        args: as `add_job_options` defines them.
        labelled: whether every example needs a label.
        posterior: folder of a fitted posterior, whose choices must be these.
        classes: of how many choices there must be labels.
        texts: whether a causal language model without choices is asked for every token of texts.

    Raises:
        InputError: for whatever the user has to put right.
    """
    folder, task = open_task(args, posterior, texts)
    examples = read_examples(args.data, task.names, labelled, task.pairs, task.texts)
    if labelled and not task.texts:
        check_classes(args.data, task, examples, classes)
    inputs = load_inputs(folder, task, examples, args.device, args.dtype, args.max_length, posterior)
    return Job(folder.base, task, examples, inputs, args.batch_size)


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
        short = next((e.line for e, (one, *_) in zip(examples, ids, strict=True) if task.texts and len(one) < 2), None)
        if short is not None:
            raise InputError(
                f"line {short}: the text is a single token, before which there is nothing to predict it from"
            )
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


def load_posterior(model: Any, task: Task, folder: Path) -> LaplaceLoRA:
    """The posterior that `blk fit` wrote for this adapter.

    Raises:
        InputError: if it is damaged, or of other weights.
    """
    with as_input_errors():
        return LaplaceLoRA.from_pretrained(model, folder, task.forward)


def how_to_calibrate(args: Namespace, folder: Path) -> str:
    """The command that sets the level of the probabilities of the posterior in this folder, as a shell takes it."""
    return _next_command("calibrate", HELD_OUT, args, folder)


def how_to_score(args: Namespace, folder: Path) -> str:
    """The command that rates the tokens of a text with the posterior in this folder, as a shell takes it."""
    return _next_command("score", "TEXT-FILE", args, folder)


def _next_command(name: str, file: str, args: Namespace, folder: Path) -> str:
    words = ["blk", name, str(args.adapter), file]
    if args.choices is not None:
        words += ["--choices", *args.choices]
    if folder != args.adapter:
        words += ["--posterior", str(folder)]
    if args.base is not None:
        words += ["--base", args.base]
    return shlex.join(words)


def check_classes(data: Path, task: Task, examples: Sequence[Example], classes: int) -> None:
    """Whether a file has labels of enough choices, or enough pairs.

    Raises:
        InputError: if it has not.
    """
    seen = {example.label for example in examples if example.label is not None}
    if task.pairs:
        if len(examples) < classes:
            raise InputError(f"{data}: expected at least {classes} pairs, got {len(examples)}")
    elif len(seen) < classes:
        raise InputError(
            f"{data}: expected labels of at least {classes} of the choices, all {len(examples)} are "
            f"{' or '.join(repr(task.names[label]) for label in sorted(seen))}"
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
        if fitted is not None or own != task.pairs or likelihood != "classification":
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
