"""Filled: the game of `majority`, in prompts that are as long as one likes.

A sequence of 14 symbols between two tokens is the content; filler that says nothing stands in front of it. A fifth of
the labels are wrong, in every split. The base model has seen filler of every length, and so has the adapter; what that
learns is a grouping in which a quarter of the symbols are elsewhere than in one that the base model knows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..calibration.tasks.causal import Llama, NextToken
from ..calibration.tasks.majority import FIRST_ANSWER, GROUPS, draw, groups_of, token_ids
from ..calibration.tasks.task import Example, Splits, Training, digest, kept

LENGTHS = (16, 32, 64, 128, 256)
SHARES = (0.6, 0.2, 0.1, 0.06, 0.04)  # of them in pretraining
CONTENT = (14, 14)  # symbols
RULES = 4  # that the base model knows
NEW, MOVED = 4, 6  # the rule that fine-tuning shows, and its symbols that rule 0 has in another group
NOISE = 0.2
FILLERS = 16
FIRST_FILLER = FIRST_ANSWER + GROUPS
TRAIN, HELD_OUT, TEST = 200, 100, 300


class Filled(NextToken):
    """A sequence is a document.

    Attributes:
        columns: of every batch, at least: more than the texts are long is padding.
    """

    name = "filled"
    n_classes = GROUPS
    class_token_ids = tuple(range(FIRST_ANSWER, FIRST_ANSWER + GROUPS))
    training = Training(epochs=20, learning_rate=5e-3)
    llama = Llama(vocabulary=FIRST_FILLER + FILLERS, width=48, layers=2, steps=1000, batch_size=32, learning_rate=4e-3)
    pad = FIRST_FILLER  # as elsewhere a token of the vocabulary: LlamaForCausalLM makes its own one zero
    columns = 0

    def make(self, seed: int) -> Splits:
        """Without filler."""
        rng = random.Random(seed)
        groups, seen = new_groups(), set()

        def some(count: int) -> list[Example]:
            result: list[Example] = []
            while len(result) < count:
                symbols, label = draw(groups, CONTENT, rng)
                if symbols not in seen:
                    seen.add(symbols)
                    if rng.random() < NOISE:
                        label = (label + rng.randrange(1, GROUPS)) % GROUPS
                    result.append(Example(token_ids(NEW, symbols), label, " ".join(map(str, symbols))))
            return result

        return Splits(some(TRAIN), some(HELD_OUT), some(TEST), [])

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = super().collate(examples)
        extra = max(0, self.columns - batch["input_ids"].shape[1])
        for name, value in (("input_ids", self.pad), ("attention_mask", 0)):
            batch[name] = nn.functional.pad(batch[name], (extra, 0), value=value)
        return batch

    def identity(self) -> Any:
        return [repr(self.llama), RULES, LENGTHS, SHARES, CONTENT, FILLERS]

    @cached_property
    def base(self) -> dict[str, Tensor]:
        path = self.cache / self.name / f"base-{digest(self.identity())}.safetensors"
        return kept(path, lambda: self.llama.pretrained(self._texts(), answer_weight=4.0))

    def build(self, seed: int) -> nn.Module:
        return self.llama.adapted(self.base, seed, ["q_proj", "v_proj", "lm_head"], rank=8)

    def _texts(self) -> Iterator[Sequence[int]]:
        rng = random.Random(0)
        groupings = [groups_of(rule) for rule in range(RULES)]
        while True:
            (length,) = rng.choices(LENGTHS, SHARES)
            for _ in range(self.llama.batch_size):
                rule = rng.randrange(RULES)
                symbols, label = draw(groupings[rule], CONTENT, rng)
                yield (*with_filler(token_ids(rule, symbols), length, rng), FIRST_ANSWER + label)


def new_groups() -> list[int]:
    """The group of each symbol, as fine-tuning has them."""
    groups, rng = groups_of(0), random.Random("new")
    for symbol in rng.sample(range(len(groups)), MOVED):
        groups[symbol] = (groups[symbol] + 1) % GROUPS
    return groups


def with_filler(content: Sequence[int], tokens: int, rng: random.Random) -> tuple[int, ...]:
    """So many tokens, the content at the end."""
    filler = (FIRST_FILLER + rng.randrange(FILLERS) for _ in range(tokens - len(content)))
    return (*filler, *content)


def of_length(examples: Sequence[Example], tokens: Sequence[int]) -> list[Example]:
    """The examples as prompts of so many tokens, in turns; the same filler whenever it is asked for."""
    result = []
    for number, example in enumerate(examples):
        length = tokens[number % len(tokens)]
        rng = random.Random(f"{example.source}, {length} tokens")
        result.append(Example(with_filler(example.content, length, rng), example.label, example.source))
    return result
