"""What a task is, and what all of them share: splits, training, models that are kept."""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import write_tensors

REQUIREMENTS = "benchmarks/calibration/requirements.txt"


class MissingPackage(ImportError):
    """A package that a task takes its data or its encoder from is not installed."""


@dataclass(frozen=True)
class Example:
    """One labelled example.

    Attributes:
        content: a text, token ids or numbers; hashable.
        label: 0..C-1.
        source: the document that it comes from: examples of one are never in two splits.
    """

    content: Any
    label: int
    source: str


@dataclass(frozen=True)
class Splits:
    """In random order; the first n of `held_out` are the n labels that a calibration gets.

    Those of `foreign` belong to no class, and their label says nothing; some tasks have none.
    """

    train: list[Example]
    held_out: list[Example]
    test: list[Example]
    shift: list[Example]
    foreign: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Training:
    """AdamW with a linearly falling rate, for so many epochs, without early stopping."""

    epochs: int
    learning_rate: float
    batch_size: int = 32
    weight_decay: float = 0.01


class Task(ABC):
    """A data set, a model for it, and how that is fine-tuned.

    Attributes:
        name: of the task.
        n_classes: C.
        class_token_ids: of a causal LM, as for `LaplaceLoRA`; None: the model's outputs are the classes.
        forward: as for `LaplaceLoRA`.
        training: of the fine-tuning.
        autocast: whether that runs in bfloat16 where PyTorch's autocast says so. Nothing else does.
        batch_size: of fits and predictions.
        last_layer: which modules a posterior over the last layer covers, as `LaplaceLoRA` takes them.
    """

    name: str
    n_classes: int
    training: Training
    class_token_ids: Sequence[int] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    autocast: bool = False
    batch_size: int = 32
    last_layer: str

    def __init__(self, cache: Path):
        self.cache = cache

    @abstractmethod
    def make(self, seed: int) -> Splits:
        """The splits; no text and no document is in two of them."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch: the model's inputs by name, and `labels`."""

    @abstractmethod
    def build(self, seed: int) -> nn.Module:
        """The pretrained model with a new adapter."""

    def identity(self) -> Any:
        """What a fine-tuned model depends on besides examples, seed and `training`; JSON can write it."""
        return None

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """`[N, C]`."""
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        if self.class_token_ids is None:
            return logits
        last = batch["attention_mask"].sum(dim=-1) - 1  # padded on the right
        return logits[torch.arange(len(last)), last][:, list(self.class_token_ids)]

    def fine_tune(self, examples: Sequence[Example], seed: int, dropout: float = 0.0) -> nn.Module:
        """A model in eval mode, trained on the examples only; one that was trained before is read from the cache.

        Args:
            examples: of the training set.
            seed: of the adapter, the order and dropout.
            dropout: of the adapter's inputs.
        """
        model = self.build(seed)
        set_lora_dropout(model, dropout)
        trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}

        def make() -> dict[str, Tensor]:
            train(self, model, examples, seed)
            return dict(trainable)

        tensors = kept(self.tuned(examples, seed, dropout), make)
        with torch.no_grad():
            for name, value in trainable.items():
                value.copy_(tensors[name])
        return model.eval()

    def tuned(self, examples: Sequence[Example], seed: int, dropout: float = 0.0) -> Path:
        """Where a fine-tuned model is kept."""
        described = [self.identity(), asdict(self.training), seed, [(e.content, e.label) for e in examples]]
        described += [{"dropout": dropout}] * (dropout > 0) + [{"autocast": True}] * self.autocast
        return self.cache / self.name / f"tuned-{digest(described)}.safetensors"

    def batches(self, examples: Sequence[Example], size: int | None = None) -> list[dict[str, Tensor]]:
        """A loader: in the order of the examples."""
        size = size or self.batch_size
        return [self.collate(examples[start : start + size]) for start in range(0, len(examples), size)]


def set_lora_dropout(model: nn.Module, rate: float) -> None:
    """Of the inputs of every LoRA layer, from now on."""
    if rate == 0:
        return
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(rate)


def logits_of(task: Task, model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """`[N, C]` float64, in the mode that the model is in."""
    with torch.no_grad():
        return torch.cat([task.logits(model, batch) for batch in task.batches(examples)]).double()


def train(task: Task, model: nn.Module, examples: Sequence[Example], seed: int) -> None:
    """Cross-entropy of the classes."""
    settings = task.training
    rng = random.Random(seed)
    torch.manual_seed(seed)  # of dropout
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(examples) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(settings.epochs):
        for batch in task.batches(rng.sample(list(examples), len(examples)), settings.batch_size):
            with torch.autocast("cpu", torch.bfloat16, enabled=task.autocast):
                logits = task.logits(model, batch)
            loss = F.cross_entropy(logits.float(), batch["labels"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from a file; if there is none, they are made and written, whole or not at all."""
    from safetensors.torch import load_file

    if not path.exists():
        start, cpu_start = time.perf_counter(), time.process_time()
        tensors = make()
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        write_tensors(path, tensors, {name: f"{value:.1f}" for name, value in seconds.items()})
    return load_file(path)


def cpu_seconds(path: Path) -> float:
    """What making such a file took, of all cores together.

    Raises:
        ValueError: for a file that does not say so.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "cpu_seconds" not in metadata:
        raise ValueError(f"{path}: expected its cpu_seconds, an older version wrote it; use another folder for --cache")
    return float(metadata["cpu_seconds"])


def digest(value: Any) -> str:
    """Of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def imported(module: str, package: str) -> ModuleType:
    """A module of a package that is not among this project's dependencies.

    Raises:
        MissingPackage: if it is not installed; says which command installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"{package} is not installed; run: pip install --no-deps -r {REQUIREMENTS} "
            "(with --target=FOLDER, and FOLDER in PYTHONPATH, to keep it out of the environment)"
        ) from error


def shares(sources: Iterable[str], parts: Sequence[float], rng: random.Random) -> list[set[str]]:
    """The documents in random order, cut into parts."""
    order = sorted(set(sources))
    rng.shuffle(order)
    ends = [round(len(order) * sum(parts[: i + 1]) / sum(parts)) for i in range(len(parts))]
    return [set(order[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def drawn(examples: Sequence[Example], count: int, rng: random.Random, per_source: int | None = None) -> list[Example]:
    """Up to `count` of them at random, at most so many of one document."""
    taken: dict[str, int] = {}
    result: list[Example] = []
    for example in rng.sample(list(examples), len(examples)):
        taken[example.source] = taken.get(example.source, 0) + 1
        if len(result) < count and (per_source is None or taken[example.source] <= per_source):
            result.append(example)
    return result
