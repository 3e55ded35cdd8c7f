"""`grouped_square_sum`: the traces of all factors of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops

from .case import Case, Provider, Work, generator, package, padding, poisoned, randn, zeroed


@dataclass(frozen=True)
class SquareSum(Case):
    """Sums of squares of `count` inputs of each width."""

    rows: int = 2048
    widths: tuple[int, ...] = (4096, 8)
    count: int = 96
    masked: bool = False

    operation = "grouped_square_sum"

    @property
    def shape(self) -> str:
        return f"{self.count} each of {self.rows}x{'/'.join(map(str, self.widths))}{' masked' * self.masked}"

    def dry(self) -> SquareSum:
        return replace(self, rows=24, widths=tuple(min(width, 70) for width in self.widths), count=2)

    def moderate(self) -> SquareSum:
        return replace(self, count=8)

    def work(self) -> Work:
        numbers = self.count * self.rows * sum(self.widths)
        return Work(numbers * self.dtype.itemsize, 2 * numbers)

    def inputs(self, device: torch.device, seed: int) -> tuple[list[Tensor], Tensor | None]:
        state, mask = generator(device, seed), padding((self.rows,), device, self.masked)
        shapes = [(self.rows, width) for width in self.widths for _ in range(self.count)]
        return [poisoned(randn(shape, self.dtype, device, state), mask) for shape in shapes], mask

    def truth(self, inputs: Any) -> Tensor:
        xs, mask = inputs
        return torch.stack([zeroed(x, mask).double().square().sum() for x in xs])

    def providers(self, device: torch.device) -> list[Provider]:
        def call(inputs: Any, impl: str) -> Tensor:
            xs, mask = inputs
            return ops.grouped_square_sum(xs, masks=[mask] * len(xs), impl=impl)

        def norms(inputs: Any) -> Tensor:
            xs, mask = inputs
            found = [torch.linalg.vector_norm(zeroed(x, mask), dtype=torch.float32) for x in xs]
            return torch.stack(found).double().square()

        ours = package(self.operation, call, device, "triton", "reference")
        return [ours[0], Provider("vector_norm loop", norms), ours[1]]
