"""`small_eigh`: many small symmetric matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops

from .case import Case, Provider, Work, absent_peer, generator, package, randn

SWEEPS = 8  # of Jacobi's method; it takes 6 to 10


@dataclass(frozen=True)
class SmallEigh(Case):
    """Gram matrices of random rows with a spectrum over four decades."""

    count: int = 224
    n: int = 32

    operation = "small_eigh"

    @property
    def shape(self) -> str:
        return f"{self.count} of {self.n}x{self.n}"

    @property
    def tolerance(self) -> float:
        return 1e-11 if self.dtype == torch.float64 else 1e-4

    def dry(self) -> SmallEigh:
        return replace(self, count=3)

    def moderate(self) -> SmallEigh:
        return replace(self, count=32)

    def work(self) -> Work:
        read_and_written = self.count * (2 * self.n**2 + self.n) * self.dtype.itemsize
        return Work(read_and_written, self.count * SWEEPS * 4 * self.n**3)

    def inputs(self, device: torch.device, seed: int) -> Tensor:
        rows = randn((self.count, self.n, 2 * self.n), torch.float64, device, generator(device, seed))
        rows *= torch.logspace(0, -2, self.n, device=device, dtype=torch.float64)[:, None]
        return (rows @ rows.mT).to(self.dtype)

    def truth(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """The matrices, and their eigenvalues by LAPACK on the CPU."""
        a = inputs.double()
        return a, torch.linalg.eigvalsh(a.cpu()).flip(-1).to(a.device)

    def error(self, truth: Any, result: Any) -> float:
        """Of eigenvalues and residual relative to the largest eigenvalue, and of orthogonality; the largest."""
        a, values = truth
        e, v = result[0].double(), result[1].double()
        largest = values.abs().amax(dim=1)[:, None, None]
        identity = torch.eye(self.n, dtype=a.dtype, device=a.device)
        errors = [(e - values)[:, None] / largest, (a @ v - v * e[:, None]) / largest, v.mT @ v - identity]
        worst = max(float(error.abs().max()) for error in errors)
        return worst if worst == worst else float("inf")

    def providers(self, device: torch.device) -> list[Provider]:
        def eigh(a: Any) -> tuple[Tensor, Tensor]:
            return torch.linalg.eigh(a)

        def of_cupy(a: Any) -> tuple[Tensor, Tensor]:
            import cupy

            values, vectors = cupy.linalg.eigh(cupy.from_dlpack(a))
            return torch.from_dlpack(values), torch.from_dlpack(vectors)

        def descending(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return result[0].flip(-1), result[1].flip(-1)

        return [
            *package(self.operation, lambda a, impl: ops.small_eigh(a, impl=impl), device, "native"),
            Provider("torch.linalg.eigh", eigh, comparable=descending),
            Provider("cupy.linalg.eigh", of_cupy, absent_peer("cupy", device), comparable=descending),
            *package(self.operation, lambda a, impl: ops.small_eigh(a, impl=impl), device, "reference"),
        ]
