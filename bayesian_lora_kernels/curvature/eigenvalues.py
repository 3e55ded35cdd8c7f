"""EKFAC: what the eigenvalue products of K-FAC stand for, measured in a second pass over the data.

Source: George et al. 2018, "Fast approximate natural gradient descent in a Kronecker factored eigenbasis".
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesian_lora_kernels.posterior.kronecker import Blocks, Eigenbasis, KroneckerFactors


class EigenvalueSum:
    """Second moments of one layer's per-example gradients along the Kronecker eigenbasis, on the four blocks.

    On a complement the average over its directions is kept. Where a factor was truncated and its tail is switched off,
    its complement has no curvature.
    """

    def __init__(self, s: Eigenbasis, a: Eigenbasis, factors: KroneckerFactors, tail: bool):
        self.basis_s, self.basis_a = s.vectors, a.vectors
        self.n_s = self.basis_s.shape[0] - self.basis_s.shape[1]
        self.n_a = self.basis_a.shape[0] - self.basis_a.shape[1]
        self.measure_s = self.n_s > 0 and (tail or factors.s.shape[0] == factors.s.shape[1])
        self.measure_a = self.n_a > 0 and (tail or factors.a.shape[0] == factors.a.shape[1])
        k_s, k_a = self.basis_s.shape[1], self.basis_a.shape[1]
        new = self.basis_a.new_zeros
        self.sums = Blocks(
            kept=new((k_s, k_a), dtype=torch.float64),
            rest_a=new((k_s,), dtype=torch.float64),
            rest_s=new((k_a,), dtype=torch.float64),
            rest=new((), dtype=torch.float64),
        )

    def add(self, gradients: Tensor) -> None:
        """Add per-example weight gradients `[N, d_out, d_in]` of one Fisher column."""
        q_s, q_a = self.basis_s.to(gradients.dtype), self.basis_a.to(gradients.dtype)
        u = q_s.mT @ gradients
        p = u @ q_a
        self.sums.kept.add_(p.square().sum(dim=0))
        if self.measure_a:
            u_rest = u - p @ q_a.mT
            self.sums.rest_a.add_(u_rest.square().sum(dim=(0, 2)))
        if self.measure_s:
            v_rest = gradients @ q_a - q_s @ p
            self.sums.rest_s.add_(v_rest.square().sum(dim=(0, 1)))
            if self.measure_a:
                self.sums.rest.add_((gradients - q_s @ u - v_rest @ q_a.mT).square().sum())

    def eigenvalues(self) -> Blocks:
        """The corrected curvature eigenvalues, float64."""
        return Blocks(
            kept=self.sums.kept,
            rest_a=self.sums.rest_a / max(self.n_a, 1),
            rest_s=self.sums.rest_s / max(self.n_s, 1),
            rest=self.sums.rest / max(self.n_s * self.n_a, 1),
        )
