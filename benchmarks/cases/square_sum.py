"""`grouped_square_sum`: what the traces of a model's factors grow by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops

from .case import Case, Provider, Work, generator, package, randn


@dataclass(frozen=True)
class GroupedSquareSum(Case):
    count: int = 96
    rows: int = 2048
    width: int = 4096

    operation = "grouped_square_sum"

    @property
    def shape(self) -> str:
        return f"{self.count} of {self.rows}x{self.width}"

    def dry(self) -> GroupedSquareSum:
        return replace(self, count=3, rows=40, width=72)

    def moderate(self) -> GroupedSquareSum:
        return replace(self, count=8, rows=1024, width=1024)

    def work(self) -> Work:
        elements = self.count * self.rows * self.width
        return Work(elements * self.dtype.itemsize + 8 * self.count, 2 * elements)

    def inputs(self, device: torch.device, seed: int) -> list[Tensor]:
        state = generator(device, seed)
        return [randn((self.rows, self.width), self.dtype, device, state) for _ in range(self.count)]

    def truth(self, inputs: Any) -> Tensor:
        return torch.stack([x.double().square().sum() for x in inputs])

    def providers(self, device: torch.device) -> list[Provider]:
        def norms(xs: Any) -> Tensor:
            return torch.stack(torch._foreach_norm(xs, 2, dtype=torch.float32)).double().square()

        def call(xs: Any, impl: str) -> Tensor:
            return ops.grouped_square_sum(xs, impl=impl)

        return [
            *package(self.operation, call, device, "triton"),
            Provider("foreach_norm", norms),
            *package(self.operation, call, device, "reference"),
        ]
