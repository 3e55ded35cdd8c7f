"""`outer_product` of one wide input, and `grouped_outer_product` of many."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops.outer_product import reference

from .case import (
    HALF,
    Case,
    Provider,
    Work,
    absent_peer,
    compiled,
    generator,
    package,
    padding,
    poisoned,
    randn,
    zeroed,
)


def addmm(out: Tensor, x: Tensor) -> Tensor:
    """`out += x^T x`, summed in float32: PyTorch's own way, which has mixed dtypes on CUDA only."""
    if x.dtype == out.dtype:
        return out.addmm_(x.T, x)
    if not x.is_cuda:
        return out.addmm_(x.float().T, x.float())
    return torch.addmm(out, x.T, x, out_dtype=torch.float32, out=out)


def baddbmm(out: Tensor, x: Tensor) -> Tensor:
    """`addmm` of a batch."""
    if x.dtype == out.dtype:
        return out.baddbmm_(x.mT, x)
    if not x.is_cuda:
        return out.baddbmm_(x.float().mT, x.float())
    return torch.baddbmm(out, x.mT, x, out_dtype=torch.float32, out=out)


def symmetric(shape: tuple[int, ...], device: torch.device, state: torch.Generator | None) -> Tensor:
    out = randn(shape, torch.float32, device, state)
    return out + out.mT


@dataclass(frozen=True)
class OuterProduct(Case):
    """`out += x^T x`, the factor of one layer while the data passes by."""

    rows: int = 8192
    width: int = 4096
    masked: bool = False

    operation = "outer_product"
    mutates = True

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}{' masked' * self.masked}"

    def dry(self) -> OuterProduct:
        return replace(self, rows=40, width=72)

    def moderate(self) -> OuterProduct:
        return replace(self, rows=self.rows // 8, width=self.width // 4)

    def work(self) -> Work:
        x, out = self.rows * self.width * self.dtype.itemsize, 4 * self.width**2
        return Work(x + 2 * out, self.rows * self.width * (self.width + 1))

    @property
    def gemm(self) -> int:
        return 2 * self.rows * self.width**2

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
        state, mask = generator(device, seed), padding((self.rows,), device, self.masked)
        out = symmetric((self.width, self.width), device, state)
        return poisoned(randn((self.rows, self.width), self.dtype, device, state), mask), out, mask

    def truth(self, inputs: Any) -> Tensor:
        x, out, mask = inputs
        x = zeroed(x, mask).double()
        return torch.addmm(out.double(), x.T, x)

    def providers(self, device: torch.device) -> list[Provider]:
        traced = compiled(lambda x, out, mask: reference.outer_product(out, x, mask, 1.0, True), device)

        def call_traced(inputs: Any) -> Tensor:
            traced(*inputs)
            return inputs[1]

        def call(inputs: Any, impl: str, lower: bool = False) -> Tensor:
            x, out, mask = inputs
            return ops.outer_product(x, out=out, mask=mask, lower=lower, impl=impl)

        def quack(inputs: Any) -> Tensor:
            from quack.gemm_interface import gemm_symmetric

            x, out, mask = inputs
            rows = zeroed(x, mask)
            return gemm_symmetric(rows.T, rows, C=out, out_dtype=out.dtype)

        lower = package(self.operation, lambda i, impl: call(i, impl, True), device, "triton")[0]
        no_quack = absent_peer("quack", device) if self.dtype in HALF else "quack multiplies 16 bits"
        return [
            *package(self.operation, call, device, "triton"),
            replace(lower, name="triton lower", comparable=lambda out: out.tril() + out.tril(-1).T),
            Provider("addmm", lambda i: addmm(i[1], zeroed(i[0], i[2]))),
            Provider("quack", quack, no_quack, compiles=True),
            *package(self.operation, call, device, "reference"),
            *([Provider("compiled reference", call_traced, compiles=True)] if self.extras else []),
        ]


@dataclass(frozen=True)
class GroupedOuterProduct(Case):
    """`outs[i] += x_i^T x_i`, `count` of each width."""

    rows: int = 8192
    widths: tuple[int, ...] = (8,)
    count: int = 256
    masked: bool = False

    operation = "grouped_outer_product"
    mutates = True

    @property
    def shape(self) -> str:
        widths = "/".join(map(str, self.widths))
        return f"{self.count}{' each' if len(self.widths) > 1 else ''} of {self.rows}x{widths}{' masked' * self.masked}"

    def dry(self) -> GroupedOuterProduct:
        return replace(self, rows=24, widths=tuple(min(width, 40) for width in self.widths), count=3)

    def moderate(self) -> GroupedOuterProduct:
        return replace(self, rows=1024, widths=tuple(min(width, 512) for width in self.widths), count=self.count // 8)

    def work(self) -> Work:
        x = sum(self.count * self.rows * width * self.dtype.itemsize for width in self.widths)
        out = sum(self.count * 4 * width**2 for width in self.widths)
        return Work(x + 2 * out, sum(self.count * self.rows * width * (width + 1) for width in self.widths))

    @property
    def gemm(self) -> int:
        return sum(2 * self.count * self.rows * width**2 for width in self.widths)

    def inputs(self, device: torch.device, seed: int) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Stacks per width, so that a batched product can be measured too; one mask for all."""
        state, mask = generator(device, seed), padding((self.rows,), device, self.masked)
        xs = [poisoned(randn((self.count, self.rows, width), self.dtype, device, state), mask) for width in self.widths]
        return xs, [symmetric((self.count, width, width), device, state) for width in self.widths], mask

    def truth(self, inputs: Any) -> list[Tensor]:
        xs, outs, mask = inputs
        return [
            torch.stack([torch.addmm(one, row.T, row) for one, row in zip(out.double(), x.double(), strict=True)])
            for x, out in zip((zeroed(x, mask) for x in xs), outs, strict=True)
        ]

    def providers(self, device: torch.device) -> list[Provider]:
        def grouped(inputs: Any, impl: str) -> list[Tensor]:
            xs, outs, mask = inputs
            flat = [one for out in outs for one in out]
            masks = [mask] * len(flat)
            ops.grouped_outer_product([one for x in xs for one in x], outs=flat, masks=masks, impl=impl)
            return outs

        def one_by_one(inputs: Any) -> list[Tensor]:
            xs, outs, mask = inputs
            for x, out in zip(xs, outs, strict=True):
                for row, one in zip(zeroed(x, mask), out, strict=True):
                    addmm(one, row)
            return outs

        def batched(inputs: Any) -> list[Tensor]:
            xs, outs, mask = inputs
            return [baddbmm(out, zeroed(x, mask)) for x, out in zip(xs, outs, strict=True)]

        return [
            *package(self.operation, grouped, device, "triton"),
            Provider("addmm loop", one_by_one),
            Provider("baddbmm", batched),
            *package(self.operation, grouped, device, "reference"),
        ]
