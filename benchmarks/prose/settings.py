"""Sizes of the run, and how long each part of it may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What decides the numbers.

    Attributes:
        train: passages to fine-tune on and to fit the posterior to.
        epochs, batch, rate: of the fine-tuning.
        held_out: texts of each kind to score.
        length: tokens of each that are read, so that all have as much before them.
        samples: of the weights, half of them mirrored.
        seed: of everything.
    """

    train: int = 320
    epochs: int = 2
    batch: int = 8
    rate: float = 1e-3
    held_out: int = 30
    length: int = 24
    samples: int = 32
    seed: int = 0


QUICK = Settings(train=8, epochs=1, held_out=2, samples=2)
