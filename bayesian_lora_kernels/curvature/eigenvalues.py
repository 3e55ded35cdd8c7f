"""EKFAC: what the eigenvalue products of K-FAC stand for, measured in a second pass over the data.

Source: George et al. 2018, "Fast approximate natural gradient descent in a Kronecker factored eigenbasis".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.posterior.kronecker import Blocks, Eigenbasis, KroneckerFactors
from bayesian_lora_kernels.processes import Processes

# Elements of the bases that are used together: on a CPU as many as outweigh the calls, elsewhere few launches.
TOGETHER = {"cpu": 2**14, "cuda": 2**24}


class EigenvalueSums:
    """Second moments of per-example gradients along the layers' Kronecker eigenbases, on the four blocks.

    Args:
        bases: `{layer: those of S and A}`.
        factors: of the same layers.
        tail: whether the complement of a truncated factor has curvature.
    """

    def __init__(
        self, bases: Mapping[str, tuple[Eigenbasis, Eigenbasis]], factors: Mapping[str, KroneckerFactors], tail: bool
    ):
        alike: dict[tuple[Any, ...], list[str]] = {}
        for name, (s, a) in bases.items():
            truncated = tuple(not tail and f.shape[0] > f.shape[1] for f in (factors[name].s, factors[name].a))
            kind = s.vectors.shape, a.vectors.shape, truncated, a.vectors.dtype, a.vectors.device
            alike.setdefault(kind, []).append(name)
        self._groups: list[_Group] = []
        for (shape_s, shape_a, truncated, _, device), names in alike.items():
            limit = TOGETHER.get(device.type, TOGETHER["cuda"])
            step = max(1, limit // max(1, shape_s.numel() + shape_a.numel()))
            for start in range(0, len(names), step):
                part = names[start : start + step]
                basis_s, basis_a = (_stacked([bases[name][side].vectors for name in part]) for side in (0, 1))
                self._groups.append(_Group(part, basis_s, basis_a, *truncated))

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add per-example weight gradients `[N, d_out, d_in]` of one Fisher column; of some layers, or all."""
        for group in self._groups:
            group.add(gradients)

    def reduce(self, processes: Processes) -> None:
        """The sums of all processes, on each of them, bit for bit the same."""
        blocks = [block for group in self._groups for block in group.sums]
        processes.add(blocks)
        same = iter(processes.agree(blocks))
        for group in self._groups:
            group.sums = Blocks(*islice(same, len(group.sums)))

    def state(self) -> list[Any]:
        """See `Stateful`."""
        return [tuple(group.sums) for group in self._groups]

    def restore(self, state: Sequence[Any]) -> None:
        """See `Stateful`."""
        for group, sums in zip(self._groups, state, strict=True):
            group.sums = Blocks(*sums)

    def eigenvalues(self) -> dict[str, Blocks]:
        """The corrected curvature eigenvalues, float64."""
        return {name: blocks for group in self._groups for name, blocks in group.eigenvalues().items()}


class _Group:
    """L layers of one shape: bases `[L, d_out, k_s]` and `[L, d_in, k_a]`, sums with L in front.

    On a complement the average over its directions is kept. Where a factor was truncated and its tail is switched off,
    its complement has no curvature.
    """

    def __init__(self, names: Sequence[str], basis_s: Tensor, basis_a: Tensor, truncated_s: bool, truncated_a: bool):
        self.names, self.basis_s, self.basis_a = names, basis_s, basis_a
        self.n_s, self.n_a = (basis.shape[1] - basis.shape[2] for basis in (basis_s, basis_a))
        self.measure_s, self.measure_a = self.n_s > 0 and not truncated_s, self.n_a > 0 and not truncated_a
        k_s, k_a = basis_s.shape[2], basis_a.shape[2]
        sizes: tuple[tuple[int, ...], ...] = ((k_s, k_a), (k_s,), (k_a,), ())
        new = basis_a.new_zeros
        self.sums = Blocks(*(new((len(names), *size), dtype=torch.float64) for size in sizes))

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        like = next((gradients[name] for name in self.names if name in gradients), None)
        if like is None:
            return
        g = _stacked([gradients[name] if name in gradients else torch.zeros_like(like) for name in self.names])
        q_s, q_a = self.basis_s[:, None].to(g.dtype), self.basis_a[:, None].to(g.dtype)
        u = q_s.mT @ g  # [L, N, k_s, d_in]
        p = u @ q_a  # [L, N, k_s, k_a]
        self.sums.kept.add_(p.square().sum(dim=1))
        if self.measure_a:
            u_rest = u - p @ q_a.mT
            self.sums.rest_a.add_(u_rest.square().sum(dim=(1, 3)))
        if self.measure_s:
            v_rest = g @ q_a - q_s @ p
            self.sums.rest_s.add_(v_rest.square().sum(dim=(1, 2)))
            if self.measure_a:
                self.sums.rest.add_((g - q_s @ u - v_rest @ q_a.mT).square().sum(dim=(1, 2, 3)))

    def eigenvalues(self) -> dict[str, Blocks]:
        sizes = (1, max(self.n_a, 1), max(self.n_s, 1), max(self.n_s * self.n_a, 1))
        means = [(block / size).unbind() for block, size in zip(self.sums, sizes, strict=True)]
        return dict(zip(self.names, map(Blocks, *means), strict=True))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
