"""What the demo asks, and of which model: sets of prompts with answers, and how to fine-tune on them."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

NO_ANSWER = -100

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """A prompt, its answer (an index into the classes, or a token, or `NO_ANSWER`), and what document it is from."""

    tokens: tuple[int, ...]
    answer: int
    document: Hashable = None


@dataclass(frozen=True)
class Splits:
    """What fine-tuning and measuring see; the sets share no example.

    Attributes:
        train: what fine-tuning and the curvature see.
        held_out: labels for temperature scaling, and for what is compared with it.
        test: more of the same kind.
        shifts: `{name: examples}` of other kinds.
        foreign: of no class at all; may be empty.
    """

    train: list[Example]
    held_out: list[Example]
    test: list[Example]
    shifts: dict[str, list[Example]]
    foreign: list[Example] = field(default_factory=list)

    @property
    def measured(self) -> dict[str, list[Example]]:
        """The sets with answers to measure on, `test` first."""
        return {"test": self.test, **self.shifts}


class Problem(Protocol):
    """A question with a few answers, each one token, and a model to be fine-tuned on it."""

    @property
    def question(self) -> str:
        """In words."""

    @property
    def classes(self) -> Sequence[str]:
        """The answers."""

    @property
    def class_token_ids(self) -> Sequence[int]:
        """`[C]`, the tokens of the answers."""

    @property
    def titles(self) -> Mapping[str, str]:
        """Of the measured sets."""

    @property
    def predict_batch_size(self) -> int:
        """Examples of a batch of fits and predictions."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """What making the problem took."""

    def splits(self, seed: int) -> Splits:
        """Draw the sets."""

    def fine_tune(self, examples: Sequence[Example], seed: int, progress: bool) -> nn.Module:
        """A model with a fresh adapter that knows these examples and no others."""

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Of these examples in this order."""

    def as_json(self) -> dict[str, Any]:
        """The settings."""


def make_batch(examples: Sequence[Example], pad: int = 0, left: bool = True) -> Batch:
    """`input_ids` and `attention_mask` `[N, T]`, and `labels` `[N]`.

    Args:
        examples: of any lengths.
        pad: the token that fills up.
        left: whether padding comes first.
    """
    longest = max(len(example.tokens) for example in examples)
    ids = torch.full((len(examples), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        n = len(example.tokens)
        where = slice(longest - n, longest) if left else slice(n)
        ids[row, where] = torch.tensor(example.tokens)
        mask[row, where] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.tensor([example.answer for example in examples]),
    }


def in_order(examples: Sequence[Example], batch_size: int) -> list[Batch]:
    """Batches in the order of the examples."""
    return [make_batch(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]


def shuffled(examples: Sequence[Example], batch_size: int, rng: random.Random) -> Iterator[list[Example]]:
    """One epoch in random order; batches hold examples of similar length, so that there is little padding."""
    order = rng.sample(range(len(examples)), len(examples))
    groups = []
    window = 32 * batch_size
    for start in range(0, len(order), window):
        similar = sorted(order[start : start + window], key=lambda i: len(examples[i].tokens))
        groups += [similar[i : i + batch_size] for i in range(0, len(similar), batch_size)]
    rng.shuffle(groups)
    for group in groups:
        yield [examples[i] for i in group]
