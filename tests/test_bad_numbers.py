"""NaN and infinity are found where they arise, whatever the logits look like, and the earlier fit stays."""

from __future__ import annotations

import pytest
import torch
from snapshot import untouched
from torch import nn

import bayesian_lora_kernels as blk


class Trap(nn.Module):
    """NaN in the input or in the gradient of a layer, of which the logits show nothing."""

    def __init__(self, where: str):
        super().__init__()
        self.where, self.fine, self.bad = where, nn.Linear(4, 20), nn.Linear(20, 3)

    def forward(self, x):
        hidden = self.fine(x)
        if self.where == "input":
            return torch.nan_to_num(self.bad(torch.where(hidden > 0, hidden, x.sum() * hidden)))
        y = self.bad(hidden)
        return y + (y - y.detach() + (x.sum() == 0)).abs().sqrt().masked_fill(x.sum() == 0, 0)  # infinite slope at 0


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
@pytest.mark.parametrize("where", ["input", "output gradient"])
def test_numbers_that_are_not_finite_are_located(where, curvature, rank):
    model = Trap(where).double()
    x = torch.randn(400, 4, dtype=torch.float64)  # so many rows that a low-rank factor is updated at once
    bad = x * float("inf") if where == "input" else x
    if where == "output gradient":
        x = x * 0
    labels = torch.zeros(400, dtype=torch.long)
    laplace = blk.LaplaceLoRA(model, curvature=curvature, rank=rank, rank_threshold=4)
    laplace.fit([(x, labels)], progress=False)
    before = float(laplace.log_marginal_likelihood())
    what = where if curvature != "exact" else "gradient"
    with untouched(model), pytest.raises(ValueError, match=rf"(bad|fine): its {what} is not finite .* in batch 1"):
        laplace.fit([(x, labels), (bad, labels)], progress=False)
    assert float(laplace.log_marginal_likelihood()) == before  # of the earlier fit
    assert laplace.n_examples == 400


@pytest.mark.parametrize("curvature", ["kfac", "exact"])
def test_a_gradient_that_is_infinite_at_the_first_position_only(curvature):
    """Each position has backward passes of its own, and every one of them counts."""
    model = nn.Linear(4, 3).double()

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return torch.where(g == 0, g, float("inf"))

    def forward(m, batch):
        y = m(batch[0])
        return torch.cat([Steep.apply(y[:, :1]), y[:, 1:]], dim=1)

    x, labels = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(2, 3).long()
    laplace = blk.LaplaceLoRA(model, forward=forward, curvature=curvature, fisher="exact")
    with untouched(model), pytest.raises(ValueError, match=r"gradient is not finite .* in batch 0"):
        laplace.fit([(x, labels)], progress=False)


@pytest.mark.parametrize("curvature", ["kfac", "exact"])
def test_a_prediction_whose_gradients_are_not_finite(curvature):
    model = nn.Linear(4, 3).double()
    slope = [1.0]

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * torch.tensor([[1.0], [slope[0]]], dtype=g.dtype)

    x, labels = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(2).long()
    laplace = blk.LaplaceLoRA(
        model, forward=lambda m, batch: Steep.apply(m(batch[0])), curvature=curvature, check="off"
    )
    laplace.fit([(x, labels)], progress=False)
    assert torch.isfinite(laplace.predict((x, None)).covariance).all()
    slope[0] = float("nan")
    with untouched(model), pytest.raises(ValueError, match=r"covariance of example 1 of 2 is not finite"):
        laplace.predict((x, None))
    with untouched(model), pytest.raises(ValueError, match="not finite"):
        laplace.verify((x, labels))
