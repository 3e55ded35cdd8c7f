"""`grouped_jacobian_covariance`: the covariance of C outputs over all LoRA A of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops.jacobian_covariance import reference

from .case import Case, Provider, Work, compiled, generator, package, padding, poisoned, randn, zeroed


@dataclass
class Posterior:
    basis_s: Tensor
    basis_a: Tensor
    precision_blocks: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Posterior:
        blocks = tuple(block.to(dtype) for block in self.precision_blocks)
        return Posterior(self.basis_s.to(dtype), self.basis_a.to(dtype), blocks)


def subtractive_covariance(a: Tensor, g: Tensor, posterior: Posterior) -> Tensor:
    """The usual form, which subtracts the kept part from the whole (docs/method.md), from explicit Jacobians."""
    kept, rest_a, rest_s, rest = (1 / block for block in posterior.precision_blocks)
    q_s, q_a = posterior.basis_s, posterior.basis_a
    if q_a.shape[0] == q_a.shape[1]:
        rest_a, rest = torch.zeros_like(rest_a), torch.zeros_like(rest)
    if q_s.shape[0] == q_s.shape[1]:
        rest_s, rest = torch.zeros_like(rest_s), torch.zeros_like(rest)
    j = torch.einsum("ncto,nti->ncoi", g, a)
    u, v = torch.einsum("os,ncoi->ncsi", q_s, j), j @ q_a
    p = torch.einsum("os,ncok->ncsk", q_s, v)
    total = rest * torch.einsum("ncoi,neoi->nce", j, j)
    total += torch.einsum("ncsi,s,nesi->nce", u, rest_a - rest, u)
    total += torch.einsum("ncok,k,neok->nce", v, rest_s - rest, v)
    return total + torch.einsum("ncsk,sk,nesk->nce", p, kept - rest_s - rest_a[:, None] + rest, p)


Inputs = tuple[list[Tensor], list[Tensor], list[Posterior], Tensor | None]


@dataclass(frozen=True)
class JacobianCovariance(Case):
    """LoRA A of rank `rank` on a wide input, a full small side and `kept` directions on the wide one; or LoRA B, whose
    wide side is the output, from its weight gradients: as many pseudo-tokens as the rank.
    """

    modules: int = 224
    examples: int = 8
    tokens: int = 256
    width: int = 4096
    rank: int = 8
    kept: int = 10
    outputs: int = 4
    masked: bool = False
    wide_output: bool = False

    operation = "grouped_jacobian_covariance"

    @property
    def shape(self) -> str:
        sizes = f"N={self.examples} T={self.tokens} d={self.width} r={self.rank} C={self.outputs}"
        return f"{self.modules} of {sizes}{' wide output' * self.wide_output}{' masked' * self.masked}"

    @property
    def sides(self) -> tuple[int, int]:
        """Widths of input and output."""
        return (self.rank, self.width) if self.wide_output else (self.width, self.rank)

    def dry(self) -> JacobianCovariance:
        small = replace(self, modules=2, examples=2, tokens=5, width=70, rank=3, kept=4)
        return replace(small, outputs=3 if self.outputs <= 4 else 17)

    def moderate(self) -> JacobianCovariance:
        return replace(self, modules=2, examples=4, tokens=128, width=2048)

    def work(self) -> Work:
        n, t, d, r, k, c = self.examples, self.tokens, self.width, self.rank, self.kept, self.outputs
        d_in, d_out = self.sides
        moved = (n * t * d_in + n * c * t * d_out) * self.dtype.itemsize + 4 * d * k
        # the Jacobians, their projections on the kept directions, the lower triangle of their inner products
        operations = n * (2 * c * t * d * r + 2 * c * r * d * k + c * (c + 1) * r * d)
        return Work(self.modules * moved + 4 * n * c**2, self.modules * operations)

    def inputs(self, device: torch.device, seed: int) -> Inputs:
        state = generator(device, seed)
        a, g, posteriors = [], [], []
        mask = padding((self.examples, self.tokens), device, self.masked)
        of_outputs = None if mask is None else mask[:, None]
        d_in, d_out = self.sides
        wide = torch.linalg.qr(randn((self.width, self.kept), torch.float32, device, state)).Q
        narrow = torch.linalg.qr(randn((self.rank, self.rank), torch.float32, device, state)).Q
        basis_s, basis_a = (wide, narrow) if self.wide_output else (narrow, wide)
        k_s, k_a = basis_s.shape[1], basis_a.shape[1]
        for _ in range(self.modules):
            a.append(poisoned(randn((self.examples, self.tokens, d_in), self.dtype, device, state), mask))
            shape = (self.examples, self.outputs, self.tokens, d_out)
            g.append(poisoned(randn(shape, self.dtype, device, state), of_outputs))
            shapes = ((k_s, k_a), (k_s,), (k_a,), ())
            blocks = tuple(1 + torch.rand(shape, device=device, generator=state) for shape in shapes)
            posteriors.append(Posterior(basis_s.clone(), basis_a.clone(), blocks))
        return a, g, posteriors, mask

    def truth(self, inputs: Any) -> Tensor:
        return one_by_one(inputs, torch.float64, subtractive_covariance)

    def providers(self, device: torch.device) -> list[Provider]:
        traced = compiled(reference.jacobian_covariance, device)

        def of_reference(a: Tensor, g: Tensor, posterior: Posterior) -> Tensor:  # of what is not masked
            out = torch.empty(a.shape[0], g.shape[1], g.shape[1], dtype=torch.float32, device=a.device)
            traced(out, a, g, posterior.basis_s, posterior.basis_a, *posterior.precision_blocks, None)
            return out

        def call(i: Any, impl: str) -> Tensor:
            a, g, posteriors, mask = i
            return ops.grouped_jacobian_covariance(a, g, posteriors, masks=[mask] * len(a), impl=impl)

        traced_loop = Provider("compiled reference", lambda i: one_by_one(i, None, of_reference), compiles=True)
        plain = [Provider("einsum fp32", lambda i: one_by_one(i, torch.float32, subtractive_covariance))]
        if self.dtype == torch.bfloat16:
            # Jacobians and projections are rounded to bfloat16: another accuracy, and the report shows it. (In float16
            # their inner products overflow.)
            half = Provider("einsum bf16", lambda i: one_by_one(i, self.dtype, subtractive_covariance), tolerance=5e-2)
            plain.append(half)
        return [
            *package(self.operation, call, device, "triton"),
            *plain,
            *package(self.operation, call, device, "reference"),
            *([traced_loop] if self.extras else []),
        ]


def one_by_one(
    inputs: Inputs, dtype: torch.dtype | None, function: Callable[[Tensor, Tensor, Posterior], Tensor]
) -> Any:
    """Sum over the modules, each taken to `dtype` first."""
    total: Any = 0
    *lists, mask = inputs
    for a, g, posterior in zip(*lists, strict=True):
        if mask is not None:
            a, g = zeroed(a, mask), zeroed(g, mask[:, None])
        one = (a, g, posterior) if dtype is None else (a.to(dtype), g.to(dtype), posterior.to(dtype))
        total = total + function(*one).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return total
