"""Samples of all V logits as matrix products that the vocabulary operations stream: no `[N, S, V]` is ever made.

Without LoRA on the head a sample is `z_s = W (h + delta_s) + b`. With it, to first order,

`z_s = W (h + delta_s) + B (A (h + delta_s) + dA_s h) + dB_s A h`,

B with PEFT's scaling in it. All of it is one product of `[W | B | dB_1 | ... | dB_m]` with a vector per sample that has
`A h` in its own slot, so that the same operations serve; m is kept so small that the slots are no wider than W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.model.head import OutputHead
from bayesian_lora_kernels.ops.vocabulary import VocabularyStatistics
from bayesian_lora_kernels.predictive.hidden_samples import Deviations


class _Product(NamedTuple):
    """Some of the samples: `logits = hidden weight^T + bias` with `hidden [N, S, D]`, and their share of all."""

    weight: Tensor
    hidden: Tensor
    share: float


class SampledLogits:
    """n samples of the logits of N examples.

    Args:
        head: what it computes; see `read_head`.
        hidden: `[N, d]`, at the MAP weights.
        deviations: at least as many as needed.
        n_samples: how many samples; with `mirrored`, every deviation serves twice, with both signs.
        mirrored: whether it does. Odd orders of the deviation then cancel out of every mean.
    """

    def __init__(self, head: OutputHead, hidden: Tensor, deviations: Deviations, n_samples: int, mirrored: bool):
        self.head, self.mirrored, self.n_samples = head, mirrored, n_samples
        device = head.weight.device
        drawn = -(-n_samples // 2) if mirrored else n_samples
        self.hidden = hidden.to(device)
        self.delta = deviations.hidden[:drawn].to(device).transpose(0, 1)  # [N, S, d]
        self.bias = None if head.bias is None else head.bias.to(hidden.dtype) * head.scale
        self._moved = {name: d[:drawn].to(device, hidden.dtype) for name, d in deviations.head.items()}

    @torch.no_grad()
    def probs(self) -> Tensor:
        """`[N, V]`, the mean of the softmax."""
        total: Tensor | None = None
        for weight, hidden, share in self._products():
            part = ops.vocabulary_probs(weight, hidden, bias=self.bias, softcap=self.head.softcap)
            if share == 1:
                return part
            total = part.mul_(share) if total is None else total.add_(part, alpha=share)
        assert total is not None
        return total

    @torch.no_grad()
    def statistics(self, targets: Tensor | None) -> VocabularyStatistics:
        """Entropy, mutual information and log-probability of the targets `[N]`."""
        total: Tensor | None = None
        conditional = torch.zeros(len(self.hidden), dtype=torch.float64, device=self.hidden.device)
        log_probs = []
        softcap = self.head.softcap
        for weight, hidden, share in self._products():
            part = ops.vocabulary_statistics(weight, hidden, bias=self.bias, softcap=softcap, targets=targets)
            if share == 1:
                return part
            conditional += share * (part.entropy.double() - part.mutual_information)
            if part.target_log_prob is not None:
                log_probs.append(part.target_log_prob + math.log(share))
            probs = ops.vocabulary_probs(weight, hidden, bias=self.bias, softcap=softcap).mul_(share)
            total = probs if total is None else total.add_(probs)
        assert total is not None
        entropy = torch.special.entr(total).sum(dim=1, dtype=torch.float64)
        return VocabularyStatistics(
            entropy.to(total),
            (entropy - conditional).clamp_min(0).to(total),
            torch.stack(log_probs).logsumexp(dim=0) if log_probs else None,
        )

    @torch.no_grad()
    def mean_square(self) -> Tensor:
        """`[N, V]`, the mean over the samples of the squared deviation of the logit (before a cap)."""
        total: Tensor | None = None
        for weight, factor, _ in self._products(deviation_only=True):
            part = ops.vocabulary_variance(weight, (factor * self.n_samples**-0.5).mT.contiguous())
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    @torch.no_grad()
    def logits(self) -> Tensor:
        """`[S, N, V]`, the samples themselves, before a cap."""
        parts = []
        for weight, hidden, _ in self._products():
            z = hidden.transpose(0, 1) @ weight.to(hidden.dtype).mT
            parts.append(z if self.bias is None else z.add_(self.bias))
        return torch.cat(parts)

    def _products(self, deviation_only: bool = False) -> Iterator[_Product]:
        base = 0.0 if deviation_only else 1.0
        adapters = self.head.adapters
        n, drawn, d = self.delta.shape
        if not adapters:
            yield _Product(self.head.weight, self._signed(base * self.hidden, self.delta) * self.head.scale, 1.0)
            return
        h, dtype = self.hidden, self.hidden.dtype
        a = torch.cat([adapter.a for adapter in adapters]).to(dtype)  # [R, d]
        b = torch.cat([adapter.scaling * adapter.b.to(dtype) for adapter in adapters], dim=1)  # [V, R]
        rank = len(a)
        inner = self.delta @ a.mT  # [N, S, R]
        moved_a = [self._moved.get(adapter.a_name) for adapter in adapters]
        if any(m is not None for m in moved_a):
            parts = [
                torch.zeros(drawn, n, len(adapter.a), dtype=dtype, device=h.device) if m is None else h @ m.mT
                for adapter, m in zip(adapters, moved_a, strict=True)
            ]
            inner = inner + torch.cat(parts, dim=2).transpose(0, 1)
        moved_b = [self._moved.get(adapter.b_name) for adapter in adapters]
        left = torch.cat([self.head.weight.to(dtype), b], dim=1)
        ah = h @ a.mT
        deviation = torch.cat([self.delta, inner], dim=2)
        center = base * torch.cat([h, ah], dim=1)
        if all(m is None for m in moved_b):
            yield _Product(left, self._signed(center, deviation) * self.head.scale, 1.0)
            return
        step = max(1, d // rank)
        for start in range(0, drawn, step):
            stop = min(start + step, drawn)
            slots = []
            for s in range(start, stop):
                for adapter, m in zip(adapters, moved_b, strict=True):
                    slots.append(torch.zeros_like(adapter.b, dtype=dtype) if m is None else adapter.scaling * m[s])
            own = torch.eye(stop - start, dtype=dtype, device=h.device)
            placed = torch.einsum("st,nr->nstr", own, ah).flatten(2)  # [N, s, s R]
            wide = torch.cat([deviation[:, start:stop], placed], dim=2)
            middle = torch.cat([center, center.new_zeros(n, placed.shape[2])], dim=1)
            hidden = self._signed(middle, wide, first=start)
            yield _Product(torch.cat([left, *slots], dim=1), hidden * self.head.scale, hidden.shape[1] / self.n_samples)

    def _signed(self, center: Tensor, deviation: Tensor, first: int = 0) -> Tensor:
        """`[N, s, D]`: center + deviation, and with `mirrored` also center - deviation; n_samples in all."""
        plus = center[:, None] + deviation
        if not self.mirrored:
            return plus
        room = self.n_samples // 2 - first  # an odd number leaves the last deviation without its mirror image
        return torch.cat([plus, center[:, None] - deviation[:, : max(room, 0)]], dim=1)
