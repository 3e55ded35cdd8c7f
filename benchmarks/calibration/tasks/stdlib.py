"""Standard library: the demo's task. Which of four packages is a sentence from? Shift: comments."""

from __future__ import annotations

import platform
import random
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from bayesian_lora_kernels.demo.problem import Example as DemoExample
from bayesian_lora_kernels.demo.sentences import read_standard_library
from bayesian_lora_kernels.demo.settings import CLASSES, FOREIGN, DemoSettings
from bayesian_lora_kernels.demo.task import Task as DemoTask
from bayesian_lora_kernels.demo.training import add_lora, make_base_model, train_base_model

from .causal import NextToken
from .task import Example, Splits, Training, digest, kept

BASE_SEED = 0


class StandardLibrary(NextToken):
    """Sentences, base model and adapter of the demo; a docstring is a document, and so is a comment's sentence.

    The demo cuts each class's sentences into sets by their number: the docstring that a cut goes through, one of each
    class, is in both sets. No sentence is.
    """

    name = "stdlib"
    n_classes = len(CLASSES)
    training = Training(epochs=20, learning_rate=3e-3, weight_decay=0.0)
    last_layer = r".*lm_head.*"  # LoRA on it
    settings = DemoSettings()

    @cached_property
    def demo(self) -> DemoTask:
        only = self.settings.modules
        modules = read_standard_library(None if only is None else (*CLASSES, *FOREIGN, *only))
        return DemoTask(modules, self.settings)

    @property
    def class_token_ids(self) -> list[int]:  # type: ignore[override]
        return self.demo.class_token_ids

    def make(self, seed: int) -> Splits:
        rng = random.Random(seed)

        def own(examples: Sequence[DemoExample]) -> list[Example]:
            converted = [
                Example(one.tokens, max(one.answer, 0), str(one.document or f"comment {number}"))
                for number, one in enumerate(examples)
            ]
            return rng.sample(converted, len(converted))

        splits = self.demo.splits(seed)
        parts = splits.train, splits.held_out, splits.test, splits.shifts["shift"], splits.foreign
        return Splits(*map(own, parts))

    def identity(self) -> Any:
        return {"base": asdict(self.settings), "python": platform.python_version(), "seed": BASE_SEED}

    @cached_property
    def pretrained(self) -> dict[str, Tensor]:
        """Weights of the base model."""

        def make() -> dict[str, Tensor]:
            model = self._base()
            train_base_model(model, self.demo.base_examples, self.settings.base, BASE_SEED)
            return dict(model.state_dict())

        return kept(self.cache / self.name / f"base-{digest(self.identity())}.safetensors", make)

    def build(self, seed: int) -> nn.Module:
        base = self._base()
        base.load_state_dict(self.pretrained)
        return add_lora(base, self.settings.tuning, seed)

    def _base(self) -> nn.Module:
        tokenizer = self.demo.tokenizer
        return make_base_model(self.settings.base, len(tokenizer), tokenizer.pad_token_id, BASE_SEED)
