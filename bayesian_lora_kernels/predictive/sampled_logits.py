"""Samples of all V logits as matrix products that the vocabulary operations stream: no `[N, S, V]` is ever made.

Without LoRA on the head a sample deviates by `W delta_s` from the logits at the MAP weights, `W h + b`. With it, to
first order, by

`W delta_s + B (A delta_s + dA_s h) + dB_s A h`,

A with PEFT's scaling in it. All of it is one product of `[W | B | dB_1 | ... | dB_m]` with a vector per sample that has
`A h` in its own slot, so that the same operations serve; m is kept so small that the slots are no wider than W.

The logits at the MAP weights are computed once, from the hidden states in full precision. Deviations are multiplied in
the dtype in which the model's derivative gives them, which is the head's: so its matrix product is that of a forward
pass, once for a deviation and its mirror image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.model.head import OutputHead
from bayesian_lora_kernels.ops.vocabulary import VocabularyStatistics
from bayesian_lora_kernels.predictive.hidden_samples import Deviations


class _Product(NamedTuple):
    """Some of the samples: what they add to the logits is `deviation weight^T`, `[N, s, V]`; if `mirrored` they serve
    with both signs. `share` is how many of all samples that makes.
    """

    weight: Tensor
    deviation: Tensor
    mirrored: bool
    share: float


class SampledLogits:
    """n samples of the logits of N examples.

    Args:
        head: what it computes; see `read_head`.
        hidden: `[N, d]`, at the MAP weights.
        deviations: at least as many as needed.
        n_samples: how many samples; with `mirrored`, every deviation serves twice, with both signs.
        mirrored: whether it does. Odd orders of the deviation then cancel out of every mean.
        mean: `[N, V]`, the logits at the MAP weights before a cap; None: they are computed when they are needed.
    """

    def __init__(
        self,
        head: OutputHead,
        hidden: Tensor,
        deviations: Deviations,
        n_samples: int,
        mirrored: bool,
        mean: Tensor | None = None,
    ):
        self.head, self.mirrored, self.n_samples = head, mirrored, n_samples
        device = head.weight.device
        drawn = -(-n_samples // 2) if mirrored else n_samples
        self.hidden = hidden.to(device)
        self.delta = deviations.hidden[:drawn].to(device).transpose(0, 1)  # [N, S, d]
        self._moved = {name: d[:drawn].to(device, hidden.dtype) for name, d in deviations.head.items()}
        if mean is not None:
            self.mean = mean

    @cached_property
    def mean(self) -> Tensor:
        """`[N, V]`, the logits at the MAP weights, before a cap."""
        with torch.no_grad():
            return self.head.logits(self.hidden)

    @torch.no_grad()
    def probs(self) -> Tensor:
        """`[N, V]`, the mean of the softmax."""
        total: Tensor | None = None
        for product in self._products():
            part = self._probs(product)
            if product.share == 1:
                return part
            total = part.mul_(product.share) if total is None else total.add_(part, alpha=product.share)
        assert total is not None
        return total

    @torch.no_grad()
    def statistics(self, targets: Tensor | None) -> VocabularyStatistics:
        """Entropy, mutual information and log-probability of the targets `[N]`."""
        total: Tensor | None = None
        conditional = torch.zeros(len(self.hidden), dtype=torch.float64, device=self.hidden.device)
        log_probs = []
        for product in self._products():
            weight, deviation, mirrored, share = product
            part = ops.vocabulary_statistics(
                weight, deviation, bias=self.mean, softcap=self.head.softcap, mirrored=mirrored, targets=targets
            )
            if share == 1:
                return part
            conditional += share * (part.entropy.double() - part.mutual_information)
            if part.target_log_prob is not None:
                log_probs.append(part.target_log_prob + math.log(share))
            probs = self._probs(product).mul_(share)
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
        for product in self._products():
            part = ops.vocabulary_variance(product.weight, product.deviation.mT)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.div_(self.n_samples)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """`[S, N, V]`, the samples themselves, before a cap."""
        dtype = self.mean.dtype
        parts = [p.deviation.transpose(0, 1).to(dtype) @ p.weight.to(dtype).mT for p in self._products()]
        return torch.cat(parts).add_(self.mean)

    def _probs(self, product: _Product) -> Tensor:
        weight, deviation, mirrored, _ = product
        return ops.vocabulary_probs(weight, deviation, bias=self.mean, softcap=self.head.softcap, mirrored=mirrored)

    def _products(self) -> Iterator[_Product]:
        adapters, delta = self.head.adapters, self.delta
        n, drawn, d = delta.shape
        if not adapters:
            yield self._product(self.head.weight, delta, 0)
            return
        h, dtype = self.hidden, self.hidden.dtype
        a = torch.cat([adapter.scaling * adapter.a.to(dtype) for adapter in adapters])  # [R, d]
        inner = delta.to(dtype) @ a.mT  # [N, S, R]
        moved_a = [self._moved.get(adapter.a_name) for adapter in adapters]
        if any(m is not None for m in moved_a):
            parts = [
                h.new_zeros(drawn, n, len(adapter.a)) if m is None else adapter.scaling * (h @ m.mT)
                for adapter, m in zip(adapters, moved_a, strict=True)
            ]
            inner = inner + torch.cat(parts, dim=2).transpose(0, 1)
        moved_b = [self._moved.get(adapter.b_name) for adapter in adapters]
        left = torch.cat([self.head.weight.to(delta), *(adapter.b.to(delta) for adapter in adapters)], dim=1)
        deviation = torch.cat([delta, inner.to(delta)], dim=2)
        if all(m is None for m in moved_b):
            yield self._product(_aligned(left), _aligned(deviation), 0)
            return
        step = max(1, d // len(a))
        for start in range(0, drawn, step):
            stop = min(start + step, drawn)
            slots = []
            for s in range(start, stop):
                for adapter, m in zip(adapters, moved_b, strict=True):
                    slots.append(torch.zeros_like(adapter.b, dtype=delta.dtype) if m is None else m[s].to(delta))
            own = torch.eye(stop - start, dtype=dtype, device=h.device)
            placed = torch.einsum("st,nr->nstr", own, h @ a.mT).flatten(2)  # [N, s, s R]
            wide = torch.cat([deviation[:, start:stop], placed.to(delta)], dim=2)
            yield self._product(_aligned(torch.cat([left, *slots], dim=1)), _aligned(wide), start)

    def _product(self, weight: Tensor, deviation: Tensor, first: int) -> _Product:
        """Of the deviations from number `first`; an odd number of samples leaves the last one without its mirror image,
        and then images are deviations of their own.
        """
        count = deviation.shape[1]
        images = min(max(self.n_samples // 2 - first, 0), count) if self.mirrored else 0
        if self.head.scale != 1:
            deviation = deviation * self.head.scale
        if 0 < images < count:
            deviation = torch.cat([deviation, -deviation[:, :images]], dim=1)
        return _Product(weight, deviation, images == count, (count + images) / self.n_samples)


def _aligned(rows: Tensor) -> Tensor:
    """With zeros up to a width that the kernels load 16 bytes at a time, for any dtype."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 16))
