"""What is read: editorials to fine-tune on, and beginnings of texts of five kinds to score."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from bayesian_lora_kernels.demo.ratings import Row, read_rows

from ..vocabulary_model import docstrings

IN = "editorials"
OUT = ("movies", "amazon", "tweets", "docstrings")
SHORTEST, LONGEST = 15, 60  # words of a passage


class Texts(NamedTuple):
    """`train`: passages of editorials; `held_out`: texts of every kind, those of other editorials under `IN`."""

    train: list[str]
    held_out: dict[str, list[str]]


def read_texts(data: Path, train: int, held_out: int, seed: int) -> Texts:
    """Passages of editorials, none of which is in both sets, and texts of other kinds.

    Args:
        data: of `vaderSentiment-3.3.2.tar.gz`.
        train: passages to fine-tune on.
        held_out: of each kind, at most; more than are needed, because short ones are left out later.
        seed: of the choice.
    """
    rng = random.Random(seed)
    rows = read_rows(data)
    documents = by_document(rows[IN])
    rng.shuffle(documents)
    first: list[str] = []
    while documents and len(first) < train:
        first += passages(documents.pop())
    others = {
        IN: [text for document in documents for text in passages(document)[:1]],
        **{kind: [row.text for row in rows[kind]] for kind in ("movies", "tweets")},
        "amazon": [text for document in by_document(rows["amazon"]) for text in passages(document)[:1]],
        "docstrings": [" ".join(text.split("\n\n")[0].split()) for _, text in docstrings()],
    }
    long = {kind: [t for t in dict.fromkeys(others[kind]) if len(t.split()) >= SHORTEST] for kind in (IN, *OUT)}
    return Texts(first[:train], {kind: rng.sample(found, min(held_out, len(found))) for kind, found in long.items()})


def by_document(rows: Sequence[Row]) -> list[list[str]]:
    """Sentences of each document, in their order."""
    return [[row.text for row in group] for _, group in groupby(rows, lambda row: row.number.split("_")[0])]


def passages(sentences: Sequence[str]) -> list[str]:
    """Sentences that follow each other, joined as long as the passage stays within `LONGEST` words; no short ones."""
    joined: list[str] = []
    words = LONGEST + 1
    for sentence in sentences:
        words += len(sentence.split())
        if words > LONGEST:
            joined.append(sentence)
            words = len(sentence.split())
        else:
            joined[-1] += f" {sentence}"
    return [text for text in joined if SHORTEST <= len(text.split()) <= LONGEST]
