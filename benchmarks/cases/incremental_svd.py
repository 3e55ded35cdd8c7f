"""`grouped_incremental_svd`: one batch of every stream of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops

from .case import Case, Provider, Work, absent_peer, generator, package, padding, poisoned, randn, zeroed

FRESH = 10
ROUNDS = 12  # of subspace iteration for the best possible error
PEER = 1  # streams that the peer is timed on


@dataclass(frozen=True)
class IncrementalSvd(Case):
    """Streams with a spectrum 1/i; the state `B` is what earlier batches of the same rows would have left."""

    modules: int = 224
    tokens: int = 2048
    width: int = 4096
    columns: int = 30
    masked: bool = False

    operation = "grouped_incremental_svd"

    @property
    def shape(self) -> str:
        return f"{self.modules} of {self.tokens}x{self.width} l={self.columns}{' masked' * self.masked}"

    @property
    def kept(self) -> int:
        """Columns of the final estimate: columns = 2 kept + FRESH."""
        return max(1, (self.columns - FRESH) // 2)

    @property
    def tolerance(self) -> float:
        """Excess of the error over the best possible one at `kept` columns; measured streams stay within 1.01."""
        return 0.05

    def dry(self) -> IncrementalSvd:
        return replace(self, modules=2, tokens=48, width=64, columns=14)

    def moderate(self) -> IncrementalSvd:
        return replace(self, modules=2, tokens=1024, width=1024)

    def work(self) -> Work:
        d, l, m = self.width, self.columns, self.tokens
        one = m * d * self.dtype.itemsize + 2 * 4 * d * l  # X read once, B read and written
        operations = 4 * m * d * l + 4 * d * l**2  # Z = X Omega and X^T Z; B R and Y W
        return Work(self.modules * one, self.modules * operations)

    def inputs(self, device: torch.device, seed: int) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        state, mask = generator(device, seed), padding((self.tokens,), device, self.masked)
        deviation = torch.arange(1, self.width + 1, device=device, dtype=torch.float32).rsqrt()
        v = randn((self.width, 1), torch.float32, device, state)
        v /= v.norm()  # the axes of the spectrum, reflected at the plane orthogonal to v
        basis = torch.eye(self.width, self.columns, device=device) * deviation[: self.columns] * self.tokens**0.5
        basis = basis - 2 * v @ (v.T @ basis)
        xs = []
        for _ in range(self.modules):
            x = randn((self.tokens, self.width), torch.float32, device, state) * deviation
            xs.append(poisoned((x - 2 * (x @ v) @ v.T).to(self.dtype), mask))
        return [basis.clone() for _ in xs], xs, mask

    def truth(self, inputs: Any) -> list[tuple[Tensor, Tensor, Tensor | None, float, float]]:
        """Per stream its inputs, the squared norm of the exact sum A, and the least squared error of its rank."""
        bases, xs, mask = inputs
        found = []
        for basis, x in zip(bases, xs, strict=True):
            root = root_of(basis, x, mask)
            squared = float((root @ root.T).square().sum())
            found.append((basis, x, mask, squared, squared - float(leading(root, self.kept))))
        return found

    def error(self, truth: Any, result: Any) -> float:
        """The largest over all streams, or over those of the peer; `|A - L L^T|^2` is taken apart, A being `[d, d]`."""
        excess = 0.0
        streams = truth[:PEER] if len(result) == PEER else truth
        for (basis, x, mask, squared, best), made in zip(streams, result, strict=True):
            kept = made[:, : self.kept].double()
            found = squared - 2 * (root_of(basis, x, mask) @ kept).square().sum() + (kept.T @ kept).square().sum()
            ratio = (float(found) / best) ** 0.5 if float(found) > 0 else float("inf")
            excess = max(excess, ratio - 1 if ratio == ratio else float("inf"))
        return excess

    def providers(self, device: torch.device) -> list[Provider]:
        def grouped(inputs: Any, impl: str) -> list[Tensor]:
            bases, xs, mask = inputs
            state, masks = generator(device, 0), [mask] * len(xs)
            return ops.grouped_incremental_svd(bases, xs, masks=masks, generator=state, fresh=FRESH, impl=impl)

        def peer(inputs: Any) -> list[Tensor]:
            from bayesian_lora.kfac import incremental_svd

            pairs = list(zip(*inputs[:2], strict=True))[:PEER]
            return [incremental_svd(basis.double(), x, n_kfac=self.columns) for basis, x in pairs]

        missing = absent_peer("bayesian_lora")
        ours = package(self.operation, grouped, device, "triton", "native", "reference")
        return [*ours, Provider("bayesian_lora", peer, missing, share=PEER / self.modules)] if self.extras else ours


def root_of(basis: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """R of the exact sum `A = R^T R = B B^T + X^T X`, `[l + T, d]` in float64."""
    return torch.cat([basis.T.double(), zeroed(x, mask).double()])


def leading(root: Tensor, count: int) -> Tensor:
    """Sum of the squares of the largest eigenvalues of `R^T R`, by subspace iteration."""
    start = torch.arange(root.shape[1] * min(3 * count + 20, *root.shape), device=root.device, dtype=root.dtype)
    block = torch.sin(start * start).view(root.shape[1], -1)  # in general position, without a generator
    for _ in range(ROUNDS):
        block = torch.linalg.qr(root.T @ (root @ block)).Q
    values = torch.linalg.eigvalsh((root @ block).T @ (root @ block))
    return values[-count:].square().sum()
