"""Majority: which of three groups have most of a sequence's symbols? With or without wrong labels. Shift: longer ones.

The base model knows this game for many ways to put the symbols into groups, each with a token of its own that begins
the sequence. Fine-tuning shows it examples of a new way. Wrong labels are in all splits, as they would be.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .causal import Llama, collated
from .task import Example, Splits, Task, Training, digest, kept

SYMBOLS, GROUPS, RULES = 24, 3, 32
FIRST_SYMBOL = 1
FIRST_RULE = FIRST_SYMBOL + SYMBOLS
ASK = FIRST_RULE + RULES + 1
FIRST_ANSWER = ASK + 1
TRAIN, HELD_OUT, TEST, SHIFT = 300, 100, 400, 400
LENGTHS, LONG, BASE_LENGTHS = (9, 15), (20, 30), (5, 20)


class Majority(Task):
    """A sequence is a document."""

    n_classes = GROUPS
    class_token_ids = tuple(range(FIRST_ANSWER, FIRST_ANSWER + GROUPS))
    training = Training(epochs=25, learning_rate=3e-3)
    llama = Llama(vocabulary=FIRST_ANSWER + GROUPS, steps=2500)
    collate = staticmethod(collated)  # type: ignore[assignment]

    def __init__(self, cache: Path, noise: float):
        super().__init__(cache)
        self.noise = noise
        self.name = "majority-noisy" if noise else "majority"

    def make(self, seed: int) -> Splits:
        rng = random.Random(seed)
        seen: set[tuple[int, ...]] = set()
        grouping = groups_of(RULES)

        def some(count: int, lengths: tuple[int, int]) -> list[Example]:
            result: list[Example] = []
            while len(result) < count:
                symbols, label = draw(grouping, lengths, rng)
                if symbols not in seen:
                    seen.add(symbols)
                    if rng.random() < self.noise:
                        label = (label + rng.randrange(1, GROUPS)) % GROUPS
                    result.append(Example(token_ids(RULES, symbols), label, " ".join(map(str, symbols))))
            return result

        return Splits(some(TRAIN, LENGTHS), some(HELD_OUT, LENGTHS), some(TEST, LENGTHS), some(SHIFT, LONG))

    def identity(self) -> Any:
        return [repr(self.llama), SYMBOLS, GROUPS, RULES, BASE_LENGTHS]

    @cached_property
    def base(self) -> dict[str, Tensor]:
        path = self.cache / "majority" / f"base-{digest(self.identity())}.safetensors"
        return kept(path, lambda: self.llama.pretrained(_base_texts(), answer_weight=4.0))

    def build(self, seed: int) -> nn.Module:
        return self.llama.adapted(self.base, seed, ["q_proj", "v_proj", "o_proj", "down_proj"], rank=8)


def groups_of(rule: int) -> list[int]:
    """The group of each symbol, as many in each."""
    groups = [symbol % GROUPS for symbol in range(SYMBOLS)]
    random.Random(f"rule {rule}").shuffle(groups)
    return groups


def draw(grouping: Sequence[int], lengths: tuple[int, int], rng: random.Random) -> tuple[tuple[int, ...], int]:
    """Random symbols of which one group has most, and that group."""
    while True:
        symbols = tuple(rng.randrange(SYMBOLS) for _ in range(rng.randint(*lengths)))
        (first, most), *rest = Counter(grouping[symbol] for symbol in symbols).most_common()
        if not rest or rest[0][1] < most:
            return symbols, first


def token_ids(rule: int, symbols: Sequence[int]) -> tuple[int, ...]:
    return (FIRST_RULE + rule, *(FIRST_SYMBOL + symbol for symbol in symbols), ASK)


def _base_texts() -> Iterator[Sequence[int]]:
    rng = random.Random(0)
    groupings = [groups_of(rule) for rule in range(RULES)]
    while True:
        rule = rng.randrange(RULES)
        symbols, label = draw(groupings[rule], BASE_LENGTHS, rng)
        yield (*token_ids(rule, symbols), FIRST_ANSWER + label)
