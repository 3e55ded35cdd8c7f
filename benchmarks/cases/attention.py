"""`attention_jvp`: attention of one layer with many tangents, as forward mode asks for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bayesian_lora_kernels import ops

from .case import HALF, Case, Provider, Work, generator, package, randn


@dataclass(frozen=True)
class Attention(Case):
    """Causal, one text, grouped heads."""

    tokens: int = 2048
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    tangents: int = 16

    operation = "attention_jvp"

    @property
    def shape(self) -> str:
        return f"T={self.tokens} H={self.heads}/{self.kv_heads} d={self.width} S={self.tangents}"

    @property
    def tolerance(self) -> float:
        """Weights and results in half precision are rounded to it."""
        return 1e-2 if self.dtype in HALF else 2e-5

    def dry(self) -> Attention:
        return replace(self, tokens=20, heads=2, kv_heads=1, width=16, tangents=2)

    def moderate(self) -> Attention:
        return replace(self, tokens=256, heads=4, kv_heads=2, width=64, tangents=4)

    def work(self) -> Work:
        """Each of q, k, v, out and their tangents once; two products for the value, four for each tangent."""
        numbers = 2 * (self.heads + self.kv_heads) * self.tokens * self.width * (1 + self.tangents)
        pairs = self.heads * self.tokens * (self.tokens + 1) // 2
        return Work(numbers * self.dtype.itemsize, 2 * pairs * self.width * (2 + 4 * self.tangents))

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        state = generator(device, seed)
        lead = ((1,), (self.tangents, 1))
        return tuple(
            randn((*before, self.tokens, heads, self.width), self.dtype, device, state).transpose(-3, -2)
            for before in lead
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )

    def truth(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """One tangent and head after the other, by the derivative of a softmax."""
        q, k, v, dq, dk, dv = (one.double() for one in inputs)
        groups = self.heads // self.kv_heads
        later = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=q.device).triu(1)
        out, dout = torch.empty_like(q), torch.empty_like(dq)
        for h in range(self.heads):
            kh, vh, scale = k[0, h // groups], v[0, h // groups], self.width**-0.5
            p = (scale * q[0, h] @ kh.T).masked_fill(later, -torch.inf).softmax(-1)
            out[0, h] = p @ vh
            for s in range(self.tangents):
                da = scale * (dq[s, 0, h] @ kh.T + q[0, h] @ dk[s, 0, h // groups].T)
                dp = p * (da - (p * da).sum(-1, keepdim=True))
                dout[s, 0, h] = dp @ vh + p @ dv[s, 0, h // groups]
        return out, dout

    def providers(self, device: torch.device) -> list[Provider]:
        def call(inputs: Any, impl: str) -> tuple[Tensor, Tensor]:
            return ops.attention_jvp(*inputs, causal=True, impl=impl)

        def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def math_kernel(inputs: Any) -> tuple[Tensor, Tensor]:
            primals, changes = tuple(inputs[:3]), tuple(inputs[3:])
            with sdpa_kernel(SDPBackend.MATH):
                both = torch.func.vmap(lambda *d: torch.func.jvp(attended, primals, d), out_dims=(None, 0))
                found: tuple[Tensor, Tensor] = both(*changes)
            return found

        return [
            *package(self.operation, call, device, "triton"),
            Provider("torch", math_kernel, tolerance=3e-2),
            *package(self.operation, call, device, "reference"),
        ]
