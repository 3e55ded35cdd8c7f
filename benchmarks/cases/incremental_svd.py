"""`grouped_incremental_svd`: one batch of every stream of a model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops

from .case import Case, Provider, Work, generator, package, randn

FRESH = 10
TESTED = 2  # streams whose dense matrix is formed for the gate
PEER = 1  # streams that the peer is timed on


@dataclass(frozen=True)
class IncrementalSvd(Case):
    """Streams with a spectrum 1/i; the state `B` is what earlier batches of the same rows would have left."""

    modules: int = 224
    tokens: int = 2048
    width: int = 4096
    columns: int = 30

    operation = "grouped_incremental_svd"

    @property
    def shape(self) -> str:
        return f"{self.modules} of {self.tokens}x{self.width} l={self.columns}"

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

    def inputs(self, device: torch.device, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        state = generator(device, seed)
        deviation = torch.arange(1, self.width + 1, device=device, dtype=torch.float32).rsqrt()
        v = randn((self.width, 1), torch.float32, device, state)
        v /= v.norm()  # the axes of the spectrum, reflected at the plane orthogonal to v
        basis = torch.eye(self.width, self.columns, device=device) * deviation[: self.columns] * self.tokens**0.5
        basis = basis - 2 * v @ (v.T @ basis)
        xs = []
        for _ in range(self.modules):
            x = randn((self.tokens, self.width), torch.float32, device, state) * deviation
            xs.append((x - 2 * (x @ v) @ v.T).to(self.dtype))
        return [basis.clone() for _ in xs], xs

    def truth(self, inputs: Any) -> list[tuple[Tensor, Tensor]]:
        """Per tested stream the dense sum and the best possible error."""
        found = []
        for basis, x in list(zip(*inputs, strict=True))[:TESTED]:
            dense = basis.double() @ basis.double().T + x.double().T @ x.double()
            values = torch.linalg.eigvalsh(dense)
            found.append((dense, values[: -self.kept].norm()))
        return found

    def error(self, truth: Any, result: Any) -> float:
        excess = 0.0
        for (dense, best), basis in zip(truth, result, strict=False):
            leading = basis[:, : self.kept].double()
            ratio = float((dense - leading @ leading.T).norm() / best)
            excess = max(excess, ratio - 1 if ratio == ratio else float("inf"))
        return excess

    def providers(self, device: torch.device) -> list[Provider]:
        def grouped(inputs: Any, impl: str) -> list[Tensor]:
            return ops.grouped_incremental_svd(*inputs, generator=generator(device, 0), fresh=FRESH, impl=impl)

        def peer(inputs: Any) -> list[Tensor]:
            from bayesian_lora.kfac import incremental_svd

            pairs = list(zip(*inputs, strict=True))[:PEER]
            return [incremental_svd(basis.double(), x, n_kfac=self.columns) for basis, x in pairs]

        missing = None if importlib.util.find_spec("bayesian_lora") else "bayesian_lora is not installed"
        ours = package(self.operation, grouped, device, "triton", "native", "reference")
        return [*ours, Provider("bayesian_lora", peer, missing, share=PEER / self.modules)] if self.extras else ours
