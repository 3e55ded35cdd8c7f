"""What fit, calibrate, evaluate and predict share: checked input, tokens, the model; the cheap checks come first."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.adapter import (
    TASKS,
    AdapterFolder,
    open_adapter,
)
from bayesian_lora_kernels.commands.dataset import Example, batches, read_examples
from bayesian_lora_kernels.commands.errors import InputError, absence, as_input_errors
from bayesian_lora_kernels.commands.inputs import Inputs, load_inputs
from bayesian_lora_kernels.commands.options import HELD_OUT
from bayesian_lora_kernels.commands.task import Task, task_of
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.laplace import LaplaceLoRA
from bayesian_lora_kernels.model.forward import IGNORED_LABEL
from bayesian_lora_kernels.posterior.storage import JSON_NAME
from bayesian_lora_kernels.predictive.distribution import LogitPosterior

FEW_LABELS = 10  # with fewer, the labels say little


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
            labels = None if self.task.pairs else self.labels  # the chosen one comes first
            return batches(self.inputs.ids, self.batch_size, self.inputs.pad_id, labels)
        made = batches(self.inputs.ids, self.batch_size, self.inputs.pad_id)
        for batch in made:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        return made

    def laplace(self, config: LaplaceConfig) -> LaplaceLoRA:
        """Before the fit."""
        config = replace(config, likelihood=self.task.likelihood)
        return LaplaceLoRA(self.inputs.model, None, self.inputs.token_ids, config=config)

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
        with output.bar(total=len(order), desc="predict", unit="example", shown=progress) as bar:
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
    if posterior is not None:
        check_fitted(posterior)
    return folder, task


def check_fitted(folder: Path) -> None:
    """Before long work: is there a posterior in this folder?

    Raises:
        InputError: if not.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: {absence(folder)}; expected a folder that blk fit wrote into")
    if not (folder / JSON_NAME).is_file():
        raise InputError(f"{folder}: no posterior ({JSON_NAME}) in it; run blk fit first")


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


def load_parts(
    args: Namespace,
    folder: AdapterFolder,
    task: Task,
    parts: Sequence[Sequence[Example]],
    posterior: Path | None = None,
) -> list[Job]:
    """Load the model once for several files of examples."""
    every = [one for part in parts for one in part]
    inputs = load_inputs(folder, task, every, args.device, args.dtype, args.max_length, posterior)
    jobs, start = [], 0
    for part in parts:
        ids = inputs.ids[start : start + len(part)]
        jobs.append(Job(folder.base, task, list(part), replace(inputs, ids=ids), args.batch_size))
        start += len(part)
    return jobs


def load_posterior(model: Any, folder: Path) -> LaplaceLoRA:
    """The posterior that `blk fit` wrote for this adapter.

    Raises:
        InputError: if it is damaged, or of other weights.
    """
    with as_input_errors():
        return LaplaceLoRA.from_pretrained(model, folder)


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
