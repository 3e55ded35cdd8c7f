"""What a model decides: the next token of a text, a choice that follows a prompt, a label, or the better of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bayesian_lora_kernels.commands.adapter import CAUSAL_LM, AdapterFolder
from bayesian_lora_kernels.commands.classifier import classifier_config
from bayesian_lora_kernels.commands.dataset import SIDES
from bayesian_lora_kernels.commands.errors import InputError
from bayesian_lora_kernels.config import LikelihoodName


@dataclass(frozen=True)
class Task:
    """What is asked of an adapter.

    Attributes:
        kind: `choices` or every token of `texts` by a causal language model, `labels` of a classifier, `pairs` for a
            model of one score.
        names: of the classes; none for texts.
        config: of the base model of a classifier; None for a causal language model.
    """

    kind: Literal["choices", "texts", "labels", "pairs"]
    names: list[str]
    config: Any = None

    @property
    def pairs(self) -> bool:
        """Whether an example is a pair."""
        return self.kind == "pairs"

    @property
    def texts(self) -> bool:
        """Whether every token of a text is predicted."""
        return self.kind == "texts"

    @property
    def examples(self) -> str:
        """What they are called."""
        return self.kind if self.pairs or self.texts else "examples"

    @property
    def inputs(self) -> str:
        """What is put into the model."""
        return self.kind if self.pairs or self.texts else "prompts"

    @property
    def likelihood(self) -> LikelihoodName:
        """What the logits mean: of a pair, two scores that are compared."""
        return "bradley-terry" if self.pairs else "classification"


def task_of(
    folder: AdapterFolder, choices: Sequence[str] | None, *, without: Literal["choices", "texts"] | None = None
) -> Task:
    """What an adapter is for.

    Args:
        folder: of the adapter.
        choices: what `--choices` says; None: nothing.
        without: what a causal language model does if there are none; None: it needs them.

    Raises:
        InputError: if the choices are not what the adapter needs.
    """
    if folder.task == CAUSAL_LM:
        if choices is None:
            if without is not None:
                return Task(without, [])
            raise InputError("--choices: expected what the model chooses between, as a causal language model needs it")
        if len(choices) < 2:
            raise InputError(f"--choices: expected at least two, got {len(choices)}")
        repeated = next((choice for i, choice in enumerate(choices) if choice in choices[:i]), None)
        if repeated is not None:
            raise InputError(f"--choices: {repeated!r} is there twice")
        return Task("choices", list(choices))
    config = classifier_config(folder)
    names = list(config.id2label.values())
    task = Task("pairs", list(SIDES), config) if len(names) == 1 else Task("labels", names, config)
    if choices is not None and list(choices) != task.names:
        what = "a reward model, which chooses between" if task.pairs else "a classifier with the labels"
        raise InputError(
            f"--choices: leave them out; {folder.folder} is {what} {_listed(task.names)}, got {_listed(choices)}"
        )
    return task


def _listed(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return " ".join(map(repr, names[:limit])) + more
