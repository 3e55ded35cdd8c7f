"""A small Llama trained on the spot: which of four packages of Python's standard library is a sentence from?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from bayesian_lora_kernels.demo.problem import Batch, Example, make_batch
from bayesian_lora_kernels.demo.sentences import read_standard_library
from bayesian_lora_kernels.demo.settings import CLASSES, FOREIGN, DemoSettings
from bayesian_lora_kernels.demo.task import Task
from bayesian_lora_kernels.demo.training import add_lora, fine_tune, make_base_model, train_base_model

MOST_THREADS = 4  # the model is small: more of them wait for each other


class TinyProblem:
    """Reads the text and trains the base model, which serves every fine-tuning.

    Args:
        settings: sizes.
        seed: of the base model.
        progress: whether to show progress bars.

    Raises:
        RuntimeError: if this Python lacks the text that is needed.
    """

    classes: Sequence[str] = CLASSES
    question = f"Which module is a sentence from: {', '.join(CLASSES)}?"

    def __init__(self, settings: DemoSettings, seed: int, progress: bool):
        self.settings = settings
        self.predict_batch_size = settings.predict_batch_size
        self.titles = {"test": "test: docstrings", "shift": "shift: comments of the same modules"}
        start = perf_counter()
        only = None if settings.modules is None else (*CLASSES, *FOREIGN, *settings.modules)
        modules = read_standard_library(
            only, lambda files: tqdm(files, desc="reading the standard library", unit="file", disable=not progress)
        )
        self._task = Task(modules, settings)
        self.class_token_ids = self._task.class_token_ids
        self.splits = self._task.splits
        data = perf_counter() - start
        self._base = self._train(seed, progress)
        self.seconds = {"data": data, "base model": perf_counter() - start - data}

    def _train(self, seed: int, progress: bool) -> nn.Module:
        settings, tokenizer = self.settings.base, self._task.tokenizer
        base = make_base_model(settings, len(tokenizer), tokenizer.pad_token_id, seed)
        with tqdm(total=settings.steps, desc="training the base model", unit="step", disable=not progress) as bar:

            def show(numbers: dict[str, float]) -> None:
                bar.set_postfix({name: f"{value:.2f}" for name, value in numbers.items()}, refresh=False)
                bar.update()

            train_base_model(base, self._task.base_examples, settings, seed, show)
        return base

    def fine_tune(self, examples: Sequence[Example], seed: int, progress: bool) -> nn.Module:
        """As `Problem` says."""
        model = add_lora(copy.deepcopy(self._base), self.settings.tuning, seed)
        steps = self.settings.tuning.epochs * -(-len(examples) // self.settings.tuning.batch_size)
        title = f"fine-tuning on {len(examples)} sentences"
        with tqdm(total=steps, desc=title, unit="step", leave=False, disable=not progress) as bar:
            fine_tune(model, self.class_token_ids, examples, self.settings.tuning, seed, tick=bar.update)
        return model

    def batch(self, examples: Sequence[Example]) -> Batch:
        """As `Problem` says."""
        return make_batch(examples)

    def as_json(self) -> dict[str, Any]:
        """As `Problem` says."""
        return asdict(self.settings)


@contextmanager
def few_threads() -> Iterator[None]:
    """At most `MOST_THREADS` of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, MOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
