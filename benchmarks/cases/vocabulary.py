"""The operations over a whole vocabulary; left out, with the reason, where this version lacks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops

from .case import Case, Provider, Work, absent_peer, generator, package, randn


@dataclass(frozen=True)
class Vocabulary(Case):
    """`weight [V, d]` against one matrix per example: `m` columns of a factor, or `m` hidden states."""

    vocabulary: int = 128256
    width: int = 4096
    examples: int = 16
    m: int = 64

    @property
    def shape(self) -> str:
        return f"V={self.vocabulary} d={self.width} N={self.examples} m={self.m}"

    def dry(self) -> Vocabulary:
        return replace(self, vocabulary=150, width=24, examples=2, m=5)

    def moderate(self) -> Vocabulary:
        return replace(self, vocabulary=32000, width=512, examples=2, m=16)

    @property
    def product(self) -> int:
        """Operations of one pass over the vocabulary."""
        return 2 * self.vocabulary * self.width * self.examples * self.m

    @property
    def gemm(self) -> int:
        return self.product

    @property
    def read(self) -> int:
        return (self.vocabulary + self.examples * self.m) * self.width * self.dtype.itemsize

    def call(self, *arguments: Any, **options: Any) -> Any:
        """The package's operation; looked up when called, so that a version without it can list its cases."""
        return getattr(ops, self.operation)(*arguments, **options)

    def weight(self, device: torch.device, state: torch.Generator | None) -> Tensor:
        return randn((self.vocabulary, self.width), self.dtype, device, state) * self.width**-0.5

    def both(self, function: Callable[[Tensor, Tensor], Tensor], inputs: Any) -> Tensor:
        """One example after the other in float64: `[N, V, m]` at once would not fit."""
        weight = inputs[0].double()
        return torch.stack([function(weight, one.double()) for one in inputs[1]])


@dataclass(frozen=True)
class VocabularyVariance(Vocabulary):
    operation = "vocabulary_variance"

    def work(self) -> Work:
        return Work(self.read + 4 * self.examples * self.vocabulary, self.product)

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        state = generator(device, seed)
        return self.weight(device, state), randn((self.examples, self.width, self.m), self.dtype, device, state)

    def truth(self, inputs: Any) -> Tensor:
        return self.both(lambda weight, factor: (weight @ factor).square().sum(-1), inputs)

    def providers(self, device: torch.device) -> list[Provider]:
        def gemm(inputs: Any) -> Tensor:
            return inputs[0] @ inputs[1].transpose(0, 1).reshape(self.width, -1)

        def materialised(inputs: Any) -> Tensor:
            product = gemm(inputs).view(self.vocabulary, self.examples, self.m)
            return product.float().square().sum(-1).T

        return [
            *package(self.operation, lambda i, impl: self.call(*i, impl=impl), device, "triton"),
            Provider("gemm alone", gemm, gated=False),
            # The product is rounded to the dtype of the inputs before it is squared.
            Provider("torch", materialised, tolerance=1e-2),
            *package(self.operation, lambda i, impl: self.call(*i, impl=impl), device, "reference"),
        ]


@dataclass(frozen=True)
class VocabularyProbs(Vocabulary):
    operation = "vocabulary_probs"

    def work(self) -> Work:
        """Logits twice: for their sum, then for the probabilities. They are nowhere stored."""
        return Work(self.read + 4 * self.examples * self.vocabulary, 2 * self.product)

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        state = generator(device, seed)
        return self.weight(device, state), 3 * randn((self.examples, self.m, self.width), self.dtype, device, state)

    def truth(self, inputs: Any) -> Tensor:
        return self.both(lambda weight, hidden: (hidden @ weight.T).softmax(-1).mean(0), inputs)

    def providers(self, device: torch.device) -> list[Provider]:
        def materialised(inputs: Any) -> Tensor:
            weight, hidden = inputs
            return (hidden @ weight.T).float().softmax(-1).mean(1)

        return [
            *package(self.operation, lambda i, impl: self.call(*i, impl=impl), device, "triton"),
            # Logits are rounded to the dtype of the inputs.
            Provider("torch", materialised, tolerance=2e-2),
            *package(self.operation, lambda i, impl: self.call(*i, impl=impl), device, "reference"),
        ]


@dataclass(frozen=True)
class VocabularyStatistics(VocabularyProbs):
    operation = "vocabulary_statistics"

    def work(self) -> Work:
        return Work(self.read + 12 * self.examples, 2 * self.product)

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        state = generator(device, seed + 1)
        targets = torch.randint(self.vocabulary, (self.examples,), device=device, generator=state)
        return *super().inputs(device, seed), targets

    def truth(self, inputs: Any) -> tuple[Tensor, ...]:
        """Entropy of the mean, what of it is mutual information, log of the mean probability of the target."""
        weight = inputs[0].double()
        return torch.stack(
            [
                torch.stack(statistics(one.double() @ weight.T, target))
                for one, target in zip(inputs[1], inputs[2], strict=True)
            ]
        ).unbind(1)

    def providers(self, device: torch.device) -> list[Provider]:
        def call(inputs: Any, impl: str) -> Any:
            return self.call(inputs[0], inputs[1], targets=inputs[2], impl=impl)

        def materialised(inputs: Any) -> tuple[Tensor, ...]:
            weight, hidden, targets = inputs
            logits = (hidden @ weight.T).float()
            return torch.stack(
                [torch.stack(statistics(one, target)) for one, target in zip(logits, targets, strict=True)]
            ).unbind(1)

        def rows(inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
            weight, hidden, targets = inputs
            return weight, hidden.flatten(0, 1), targets.repeat_interleave(hidden.shape[1])

        def cut(inputs: Any) -> Tensor:
            from cut_cross_entropy import linear_cross_entropy

            weight, hidden, targets = rows(inputs)
            return linear_cross_entropy(hidden, weight, targets, reduction="none")

        def liger(inputs: Any) -> Tensor:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            return LigerFusedLinearCrossEntropyLoss(reduction="none")(*rows(inputs))

        # These give the log-probability of each sample's target, one of the three statistics.
        losses = (("cut_cross_entropy", cut), ("liger_kernel", liger))
        return [
            *package(self.operation, call, device, "triton"),
            Provider("torch", materialised, tolerance=5e-2),
            *(Provider(f"{name}: target", loss, absent_peer(name, device), gated=False) for name, loss in losses),
            *package(self.operation, call, device, "reference"),
        ]


def statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `[S, V]` logits of one example."""
    logs = logits.log_softmax(-1)
    mean = logs.logsumexp(0) - torch.tensor(float(len(logs)), dtype=logs.dtype).log()
    entropy = -(mean.exp() * mean).sum()
    expected = -(logs.exp() * logs).sum(-1).mean()
    return entropy, entropy - expected, mean[target]
