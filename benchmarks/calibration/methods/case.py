"""One task under one seed: its data, its fine-tuned models, what the plain one says, and what things cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...peak_memory import measurable, peak_bytes
from ..scores import labels_of
from ..tasks import Splits, Task
from ..tasks.task import cpu_seconds, digest, logits_of

SETS = ("test", "shift", "foreign")
MIB = 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Of some work: seconds of all cores together, and MiB beyond what was resident before (NaN: not known here)."""

    seconds: float
    mib: float


@dataclass(frozen=True)
class Outcome:
    """What one method makes of one case.

    Attributes:
        probs: `{set: [N, C]}`.
        mutual_information: `{set: [N]}`, in nats, of the label and the weights; empty where there are no samples.
        seconds: beyond the fine-tuning of the plain model, by what for: `fine-tuning`, `fit`, `labels` (held-out ones,
            or those of folds), `predict` (all sets).
        mib: peak memory beyond the loaded model, fine-tuning not counted.
        facts: what was tuned.
    """

    probs: Mapping[str, Tensor]
    mutual_information: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    mib: float = math.nan
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Everything is made when it is first asked for."""

    task: Task
    seed: int

    @cached_property
    def splits(self) -> Splits:
        return self.task.make(self.seed)

    @cached_property
    def data(self) -> str:
        """Tells other data from these."""
        return digest({name: [(e.content, e.label) for e in part] for name, part in vars(self.splits).items()})

    @property
    def settings(self) -> dict[str, Any]:
        """What every method's numbers depend on."""
        sizes = {name: len(part) for name, part in vars(self.splits).items()}
        training = asdict(self.task.training) | {"autocast": self.task.autocast}
        return {"sizes": sizes, "data": self.data, "training": training, "model": self.task.identity()}

    def labels(self, name: str) -> Tensor:
        return labels_of(getattr(self.splits, name))

    def fine_tuned(self, seed: int | None = None, dropout: float = 0.0) -> tuple[nn.Module, float]:
        """A model trained on all of the training set, and the seconds that this took."""
        seed = self.seed if seed is None else seed
        model = self.task.fine_tune(self.splits.train, seed, dropout)
        return model, cpu_seconds(self.task.tuned(self.splits.train, seed, dropout))

    @cached_property
    def model(self) -> nn.Module:
        """The plain one."""
        return self.fine_tuned()[0]

    @cached_property
    def logits(self) -> tuple[dict[str, Tensor], Cost]:
        """`{set: [N, C]}` of the plain model."""
        model = self.model
        return measured(lambda: {name: logits_of(self.task, model, getattr(self.splits, name)) for name in SETS})

    @cached_property
    def held_out_logits(self) -> tuple[Tensor, Cost]:
        """`[N, C]` of the plain model."""
        model = self.model
        return measured(lambda: logits_of(self.task, model, self.splits.held_out))


def measured(work: Callable[[], T]) -> tuple[T, Cost]:
    """What it returns, and its cost."""
    result: list[T] = []
    seconds = 0.0

    def run() -> None:
        nonlocal seconds
        start = time.process_time()
        result.append(work())
        seconds = time.process_time() - start

    if measurable():
        mib = max(0, peak_bytes(run)) / MIB
    else:
        run()
        mib = math.nan
    return result[0], Cost(seconds, mib)


def mutual_information(samples: Tensor) -> Tensor:
    """`[N]`, nats, of probabilities `[S, N, C]`: the entropy of their mean less their mean entropy.

    Source: Houlsby, Huszár, Ghahramani, Lengyel 2011, "Bayesian active learning for classification and preference
    learning".
    """
    total = torch.special.entr(samples.mean(dim=0)).sum(dim=-1)
    return (total - torch.special.entr(samples).sum(dim=-1).mean(dim=0)).clamp_min(0)
