"""The fine-tuned models: digits, sequences, the demo's sentences; each at two or three moments of one training."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import peft
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bayesian_lora_kernels.demo.problem import in_order
from bayesian_lora_kernels.demo.sentences import read_standard_library
from bayesian_lora_kernels.demo.settings import CLASSES, FOREIGN, DemoSettings, quick_settings
from bayesian_lora_kernels.demo.task import Task
from bayesian_lora_kernels.demo.training import add_lora, class_logits, fine_tune, make_base_model, train_base_model

Batches = list[dict[str, Tensor]]
SETS = ("train", "held_out", "test", "shift")
HELD_OUT = 100
BATCH = 50


@dataclass(frozen=True)
class Model:
    """A fine-tuned model, the same one before fine-tuning, and its data.

    Attributes:
        forward: from model and batch to logits `[N, C]`.
        batches: `{set: batches}` without labels.
        labels: `{set: [N]}`.
    """

    cell: str
    seed: int
    model: nn.Module
    initial: nn.Module
    forward: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    batches: dict[str, Batches]
    labels: dict[str, Tensor]
    class_token_ids: list[int] | None = None

    def logits(self, name: str) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.forward(self.model, batch) for batch in self.batches[name]]).double()


@dataclass(frozen=True)
class Family:
    """Models of one kind; `make(seed)` yields one for each of the moments."""

    name: str
    moments: tuple[str, ...]
    make: Callable[[int], Iterator[Model]]


class Perceptron(nn.Module):
    def __init__(self, classes: int, width: int = 96):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, classes)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc2(torch.relu(self.fc1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


@lru_cache
def _digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


@lru_cache
def _pretrained(seed: int, classes: tuple[int, ...]) -> dict[str, Tensor]:
    """The two hidden layers: from naming those classes, or, without any, from restoring masked pixels of all images."""
    x, y = _digits()
    torch.manual_seed(1000 + seed)
    trunk = Perceptron(64 if not classes else len(classes))
    if classes:
        keep = torch.isin(y, torch.tensor(classes))
        x, target = x[keep], torch.tensor([classes.index(int(label)) for label in y[keep]])
    optimizer = torch.optim.Adam(trunk.parameters(), lr=2e-3)
    for _ in range(600):
        rows = torch.randint(len(x), (128,))
        inputs = x[rows] * (torch.rand(128, 64) > 0.3)
        loss = F.cross_entropy(trunk(inputs), target[rows]) if classes else 10 * F.mse_loss(trunk(inputs), x[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {key: value for key, value in trunk.state_dict().items() if "head" not in key}


def noisy(labels: Tensor, classes: int, share: float) -> Tensor:
    """That share of labels replaced by another class."""
    other = (labels + torch.randint(1, classes, labels.shape)) % classes
    return torch.where(torch.rand(labels.shape) < share, other, labels)


def digits(
    name: str,
    groups: tuple[tuple[int, ...], ...],
    n: int,
    noise: float,
    steps: tuple[int, int],
    pretrained: tuple[int, ...] = (),
) -> Family:
    """`groups`: the digits of each class."""

    def make(seed: int) -> Iterator[Model]:
        x, y = _digits()
        trunk = _pretrained(seed, pretrained)
        torch.manual_seed(seed)
        keep = torch.isin(y, torch.tensor(list(itertools.chain.from_iterable(groups))))
        class_of = {digit: index for index, group in enumerate(groups) for digit in group}
        x, targets = x[keep], torch.tensor([class_of[int(label)] for label in y[keep]])
        order = torch.randperm(len(x))
        x, targets = x[order], noisy(targets[order], len(groups), noise)
        parts = {"train": slice(0, n), "held_out": slice(n, n + HELD_OUT), "test": slice(n + HELD_OUT, None)}
        inputs = {key: x[part] for key, part in parts.items()}
        labels = {key: targets[part] for key, part in parts.items()}
        moved = inputs["test"].reshape(-1, 8, 8).roll(1, dims=2).flatten(1)
        inputs["shift"] = moved + 0.2 * torch.randn_like(moved)
        labels["shift"] = labels["test"]
        base = Perceptron(len(groups))
        base.load_state_dict(trunk, strict=False)
        head = max(2, min(len(groups), 6))
        config = peft.LoraConfig(
            r=2,
            lora_alpha=4,
            rank_pattern={"head": head},
            alpha_pattern={"head": 2 * head},
            target_modules=["fc1", "fc2", "head"],
        )
        model = peft.get_peft_model(base, config)
        initial = copy.deepcopy(model)
        batches = {key: [{"x": part} for part in value.split(BATCH)] for key, value in inputs.items()}

        def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return model(batch["x"])

        for moment, tuned in _train(model, forward, {"x": inputs["train"]}, labels["train"], steps, lr=5e-3):
            yield Model(f"{name} {moment}", seed, tuned, initial, forward, batches, labels)

    return Family(name, ("short", "long"), make)


def sequences(name: str, classes: int, n: int, noise: float, steps: tuple[int, int]) -> Family:
    """Which of the words occurs most often? Shift: longer texts, with words that were never seen among them."""

    def texts(count: int, length: int, strange: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(2, 2 + classes, (4 * count + 400, length))
        counts = torch.stack([(tokens == 2 + k).sum(1) for k in range(classes)], 1)
        best = counts.topk(2, dim=1)
        clear = best.values[:, 0] > best.values[:, 1]
        tokens, targets = tokens[clear][:count], best.indices[clear, 0][:count]
        if strange:
            others = torch.randint(2 + 2 * classes, 16, (len(tokens), strange))
            tokens = torch.cat([tokens, others], 1)
            tokens = tokens.gather(1, torch.rand(tokens.shape).argsort(1))
        return tokens, noisy(targets, classes, noise)

    def make(seed: int) -> Iterator[Model]:
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        base = LlamaForCausalLM(LlamaConfig(vocab_size=16, initializer_range=0.1, **sizes))
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        initial = copy.deepcopy(model)
        data = {
            "train": texts(n, 11, 0),
            "held_out": texts(HELD_OUT, 11, 0),
            "test": texts(600, 11, 0),
            "shift": texts(400, 15, 3),
        }
        answers = list(range(2 + classes, 2 + 2 * classes))
        labels = {key: targets for key, (_, targets) in data.items()}

        def inputs(tokens: Tensor) -> dict[str, Tensor]:
            return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

        def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits[:, -1, answers]

        batches = {key: [inputs(part) for part in tokens.split(BATCH)] for key, (tokens, _) in data.items()}
        for moment, tuned in _train(model, forward, inputs(data["train"][0]), labels["train"], steps, lr=1e-2):
            yield Model(f"{name} {moment}", seed, tuned, initial, forward, batches, labels, answers)

    return Family(name, ("short", "long"), make)


def _train(
    model: nn.Module,
    forward: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    inputs: dict[str, Tensor],
    labels: Tensor,
    steps: tuple[int, int],
    lr: float,
) -> Iterator[tuple[str, nn.Module]]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    order: list[Tensor] = []
    for step in range(1, max(steps) + 1):
        if not order:
            order = list(torch.randperm(len(labels)).split(32))
        rows = order.pop()
        loss = F.cross_entropy(forward(model, {key: value[rows] for key, value in inputs.items()}), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step in steps:
            yield ("short", "long")[steps.index(step)], copy.deepcopy(model).eval()


def demo(quick: bool, epochs: tuple[int, ...]) -> Family:
    """The package's demo: sentences of four packages of the standard library."""
    settings = quick_settings() if quick else DemoSettings()
    prepared: list[tuple[Task, nn.Module]] = []

    def prepare() -> tuple[Task, nn.Module]:
        if not prepared:
            only = None if settings.modules is None else (*CLASSES, *FOREIGN, *settings.modules)
            task = Task(read_standard_library(only), settings)
            base = make_base_model(settings.base, len(task.tokenizer), task.tokenizer.pad_token_id, seed=0)
            train_base_model(base, task.base_examples, settings.base, seed=0)
            prepared.append((task, base))
        return prepared[0]

    def make(seed: int) -> Iterator[Model]:
        task, base = prepare()
        ids = task.class_token_ids
        splits = task.splits(seed)
        model = add_lora(copy.deepcopy(base), settings.tuning, seed).eval()
        initial = copy.deepcopy(model)
        batches, labels = {}, {}
        for key in SETS:
            parts = in_order(getattr(splits, key), BATCH)
            labels[key] = torch.cat([batch["labels"] for batch in parts])
            batches[key] = [{k: v for k, v in batch.items() if k != "labels"} for batch in parts]

        def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return class_logits(model, batch, ids)

        taken: dict[int, nn.Module] = {}
        count = itertools.count(1)

        def keep(losses: dict[str, float]) -> None:
            if (epoch := next(count)) in epochs:
                taken[epoch] = copy.deepcopy(model).eval()

        fine_tune(model, ids, splits.train, replace(settings.tuning, epochs=max(epochs)), seed, watch=keep)
        for epoch in epochs:
            name = f"sentences, C 4, N {len(labels['train'])}, {epoch} epochs"
            yield Model(name, seed, taken[epoch], initial, forward, batches, labels, ids)

    return Family("sentences", tuple(str(epoch) for epoch in epochs), make)


TEN = tuple((digit,) for digit in range(10))
ODD = ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9))
FOUR, SIX = ((3,), (5,), (8,), (9,)), (0, 1, 2, 4, 6, 7)


def families(quick: bool) -> list[Family]:
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
    if quick:
        return [
            digits("digits, C 4, N 60, noise 15 %", FOUR, 60, 0.15, (20, 60), pretrained=SIX),
            sequences("sequences, C 2, N 80, clean", 2, 80, 0.0, (20, 60)),
            demo(True, (2, 5)),
        ]
    return [
        digits("digits, C 10, N 100, clean", TEN, 100, 0.0, (60, 500)),
        digits("digits, C 10, N 300, clean", TEN, 300, 0.0, (60, 800)),
        digits("digits, C 10, N 300, noise 15 %", TEN, 300, 0.15, (80, 800)),
        digits("digits, C 10, N 300, noise 45 %", TEN, 300, 0.45, (80, 800)),
        digits("digits, C 10, N 800, noise 15 %", TEN, 800, 0.15, (150, 1500)),
        digits("digits, C 10, N 800, clean", TEN, 800, 0.0, (150, 1500)),
        digits("digits odd, C 2, N 1000, clean", ODD, 1000, 0.0, (150, 1500)),
        digits("digits odd, C 2, N 200, noise 15 %", ODD, 200, 0.15, (60, 600)),
        digits("digits, C 4, N 250, clean", FOUR, 250, 0.0, (60, 600), pretrained=SIX),
        digits("digits, C 4, N 250, noise 30 %", FOUR, 250, 0.3, (60, 600), pretrained=SIX),
        sequences("sequences, C 2, N 2000, noise 10 %", 2, 2000, 0.1, (150, 800)),
        sequences("sequences, C 3, N 300, noise 20 %", 3, 300, 0.2, (60, 500)),
        sequences("sequences, C 4, N 600, clean", 4, 600, 0.0, (100, 600)),
        sequences("sequences, C 4, N 600, noise 30 %", 4, 600, 0.3, (100, 600)),
        demo(False, (3, 20, 60)),
    ]
