"""All numbers of the demo on a small model."""

from __future__ import annotations

from dataclasses import dataclass, field

CLASSES = ("asyncio", "email", "unittest", "xml")

# Kept out of all training: where the foreign sentences come from.
FOREIGN = (
    "calendar", "datetime", "difflib", "ipaddress", "random", "shutil", "statistics", "tarfile", "turtle", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class BaseSettings:
    """The base model, and how it is trained.

    Attributes:
        vocabulary: entries of the tokenizer, of which `pieces` are parts of words.
        label_weight: weight of the question "which module?" beside language modelling.
        position_share: share of the positions at which language modelling asks for the next token.
        initial_std: of all weights; those that write into the residual stream get `residual_scale` times that.
    """

    vocabulary: int = 6000
    pieces: int = 1500
    width: int = 128
    layers: int = 2
    heads: int = 4
    mlp: int = 384
    steps: int = 900
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    warmup: int = 50
    weight_decay: float = 0.01
    label_weight: float = 2.0
    position_share: float = 0.2
    initial_std: float = 0.06
    residual_scale: float = 0.2


@dataclass(frozen=True)
class TuningSettings:
    """LoRA and its training.

    Attributes:
        targets: names of modules; None: PEFT's own for the kind of model.
    """

    rank: int = 4
    alpha: int = 8
    targets: tuple[str, ...] | None = ("q_proj", "v_proj", "lm_head")
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the sets are per class, except `foreign`.

    Attributes:
        train: sentences to fine-tune on.
        held_out: labelled sentences that only temperature scaling gets.
        test: sentences to measure on.
        shift: comments to measure on.
        foreign: sentences of the modules in `FOREIGN`.
        other_modules: how many modules beside the classes the base model learns to name.
        modules: of the standard library, the only ones to read beside the classes and the foreign ones; None: all.
        samples: for Monte-Carlo averaging.
        predict_batch_size: for predictions.
    """

    train: int = 150
    held_out: int = 25
    test: int = 100
    shift: int = 100
    foreign: int = 400
    other_modules: int = 88
    modules: tuple[str, ...] | None = None
    samples: int = 1024
    predict_batch_size: int = 50
    base: BaseSettings = field(default_factory=BaseSettings)
    tuning: TuningSettings = field(default_factory=TuningSettings)


def quick_settings() -> DemoSettings:
    """Everything tiny: runs in seconds, shows that every part works, and nothing else."""
    return DemoSettings(
        train=12,
        held_out=8,
        test=20,
        shift=20,
        foreign=40,
        other_modules=8,
        modules=("argparse", "http", "inspect", "json", "logging", "threading", "typing", "urllib"),
        samples=128,
        base=BaseSettings(vocabulary=900, pieces=300, width=32, heads=2, mlp=64, steps=40, warmup=5),
        tuning=TuningSettings(learning_rate=1e-2),
    )
