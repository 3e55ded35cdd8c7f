"""Tumours: scikit-learn's breast cancer data, an accurate model. Shift: noise on the measurements.

The base model has learned to remove noise from the measurements of patients of its own, without their diagnoses.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .task import Example, Splits, Task, Training, digest, kept

BASE, TRAIN, HELD_OUT, TEST = 120, 160, 100, 189
WIDTH, STEPS, NOISE = 64, 1500, 1.0


class Body(nn.Module):
    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.first = nn.Linear(features, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, measurements: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.first(measurements))
        return self.head(torch.nn.functional.gelu(self.second(hidden)))


class Tumours(Task):
    """A patient is a document."""

    name = "tumours"
    n_classes = 2
    training = Training(epochs=100, learning_rate=3e-3)

    @cached_property
    def patients(self) -> tuple[Tensor, list[Example]]:
        """Measurements for the base model, and examples; in units of the base's standard deviations."""
        from sklearn.datasets import load_breast_cancer

        data: Any = load_breast_cancer()
        values = torch.from_numpy(data.data).float()
        order = list(range(len(values)))
        random.Random(0).shuffle(order)
        base = values[order[:BASE]]
        values = (values - base.mean(dim=0)) / base.std(dim=0)
        examples = [Example(tuple(values[i].tolist()), int(data.target[i]), f"patient {i}") for i in order[BASE:]]
        return values[order[:BASE]], examples

    def make(self, seed: int) -> Splits:
        rng = random.Random(seed)
        examples = rng.sample(self.patients[1], len(self.patients[1]))
        ends = (TRAIN, TRAIN + HELD_OUT, TRAIN + HELD_OUT + TEST)
        train, held_out, test = examples[: ends[0]], examples[ends[0] : ends[1]], examples[ends[1] : ends[2]]
        noisy = [
            Example(tuple(value + NOISE * rng.gauss(0, 1) for value in one.content), one.label, one.source)
            for one in test
        ]
        return Splits(train, held_out, test, noisy)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return {
            "measurements": torch.tensor([example.content for example in examples]),
            "labels": torch.tensor([example.label for example in examples]),
        }

    def identity(self) -> Any:
        return [BASE, WIDTH, STEPS]

    @cached_property
    def base(self) -> dict[str, Tensor]:
        path = self.cache / self.name / f"base-{digest(self.identity())}.safetensors"
        return kept(path, lambda: _denoising(self.patients[0]))

    def build(self, seed: int) -> nn.Module:
        import peft

        torch.manual_seed(seed)
        model = Body(len(self.patients[1][0].content), self.n_classes)
        model.load_state_dict(self.base, strict=False)  # all but the head
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], modules_to_save=["head"])
        return peft.get_peft_model(model, config)


def _denoising(measurements: Tensor) -> dict[str, Tensor]:
    """Weights, without those of the head, that reconstruct measurements from noisy ones."""
    torch.manual_seed(0)
    model = Body(measurements.shape[1], measurements.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        clean = measurements[torch.randint(0, len(measurements), (32,))]
        loss = (model(clean + 0.5 * torch.randn_like(clean)) - clean).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return {name: value for name, value in model.state_dict().items() if not name.startswith("head")}
