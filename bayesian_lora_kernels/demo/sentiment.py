"""The question "is this sentence negative or positive?": movie reviews to learn from, and three other kinds of text."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayesian_lora_kernels.demo.ratings import LABELS

TEXT = "Is a sentence negative or positive?"
ASKED = "Is this sentence negative or positive? Answer with one word."
LEARNED = "movies"
TITLES = {
    "test": "test: movie reviews",
    "amazon": "shift: Amazon reviews",
    "editorials": "shift: newspaper editorials",
    "tweets": "shift: tweets",
}

Labelled = list[tuple[str, int]]


@dataclass(frozen=True)
class Sizes:
    """Of the sets; `shift` of each of the three. Half of each has either label."""

    train: int = 160
    held_out: int = 80
    test: int = 100
    shift: int = 50


QUICK = Sizes(train=16, held_out=12, test=12, shift=8)


def draw(ratings: Mapping[str, Sequence[tuple[str, int]]], sizes: Sizes, seed: int) -> dict[str, Labelled]:
    """`train`, `held_out` and `test` of one kind, and a set of each other kind, as `{set: [(sentence, label)]}`.

    Args:
        ratings: `{kind: [(sentence, label)]}`, as `read_ratings` gives them.
        sizes: of the sets.
        seed: which sentences.
    """
    rng = random.Random(seed)
    pools = {kind: rng.sample(list(sentences), len(sentences)) for kind, sentences in ratings.items()}
    sets = {name: _take(pools[LEARNED], getattr(sizes, name)) for name in ("train", "held_out", "test")}
    return sets | {kind: _take(pool, sizes.shift) for kind, pool in pools.items() if kind != LEARNED}


def _take(pool: Labelled, count: int) -> Labelled:
    """As many of either label, taken out of the pool from its beginning."""
    taken = [one for label in (0, 1) for one in [pair for pair in pool if pair[1] == label][: count // 2]]
    pool[:] = [one for one in pool if one not in set(taken)]
    return taken


def prompt(sentence: str, chat: bool) -> str | list[dict[str, Any]]:
    """What the model reads, for one with a chat template or without; one of the choices comes next."""
    if chat:
        return [{"role": "user", "content": f"{ASKED}\n\n{sentence}"}]
    return f"{ASKED}\n\nSentence: {sentence}\nAnswer:"


def choices(chat: bool) -> list[str]:
    """How the answers begin after the prompt."""
    return [label if chat else f" {label}" for label in LABELS]
