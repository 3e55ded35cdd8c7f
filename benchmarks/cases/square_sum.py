"""`grouped_square_sum`: the traces of all factors of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops

from .case import Case, Provider, Work, generator, package, randn


@dataclass(frozen=True)
class SquareSum(Case):
    """Sums of squares of `count` inputs of each width."""

    rows: int = 2048
    widths: tuple[int, ...] = (4096, 8)
    count: int = 96

    operation = "grouped_square_sum"

    @property
    def shape(self) -> str:
        return f"{self.count} each of {self.rows}x{'/'.join(map(str, self.widths))}"

    def dry(self) -> SquareSum:
        return replace(self, rows=24, widths=tuple(min(width, 70) for width in self.widths), count=2)

    def moderate(self) -> SquareSum:
        return replace(self, count=8)

    def work(self) -> Work:
        numbers = self.count * self.rows * sum(self.widths)
        return Work(numbers * self.dtype.itemsize, 2 * numbers)

    def inputs(self, device: torch.device, seed: int) -> list[Tensor]:
        state = generator(device, seed)
        shapes = [(self.rows, width) for width in self.widths for _ in range(self.count)]
        return [randn(shape, self.dtype, device, state) for shape in shapes]

    def truth(self, inputs: Any) -> Tensor:
        return torch.stack([x.double().square().sum() for x in inputs])

    def providers(self, device: torch.device) -> list[Provider]:
        def call(xs: Any, impl: str) -> Tensor:
            return ops.grouped_square_sum(xs, impl=impl)

        def norms(xs: Any) -> Tensor:
            return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in xs]).double().square()

        ours = package(self.operation, call, device, "triton", "reference")
        return [ours[0], Provider("vector_norm loop", norms), ours[1]]
