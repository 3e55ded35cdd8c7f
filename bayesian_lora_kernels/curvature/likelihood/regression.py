"""Numbers around the model's outputs."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from bayesian_lora_kernels.curvature.likelihood.base import Likelihood, masked
from bayesian_lora_kernels.model.deferred import AT_ONCE, AtOnce


class Regression(Likelihood):
    """Independent Gaussians around the logits; labels are `[N, C]` (or `[N]` for one logit).

    All outputs share one noise variance, which is 1 here: another is the posterior's affair (`posterior/noise.py`).
    """

    noisy: ClassVar[bool] = True

    def check_labels(self, logits: Tensor, labels: Tensor, checks: AtOnce = AT_ONCE) -> Tensor:
        """See `Likelihood.check_labels`."""
        if labels.shape == logits.shape[:-1] and logits.shape[-1] == 1:
            labels = labels.unsqueeze(-1)
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels: expected targets of shape {list(logits.shape)} like the logits, got {list(labels.shape)}"
            )
        finite = torch.isfinite(labels).all().reshape(1)
        checks.add(~finite, lambda _: ValueError("labels: expected finite targets, got NaN or infinity"))
        return labels

    def log_likelihood(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """See `Likelihood.log_likelihood`."""
        density = -0.5 * (labels - logits.detach()).double().square() - 0.5 * math.log(2 * math.pi)
        return masked(density, mask).reshape(len(logits), -1).sum(dim=1)

    def exact_rank(self, n_logits: int) -> int:
        """See `Likelihood.exact_rank`."""
        return n_logits

    def exact_columns(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """Columns of the identity."""
        c = logits.shape[-1]
        return torch.eye(c, dtype=logits.dtype, device=logits.device).expand(*logits.shape, c)

    def sampled(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """See `Likelihood.sampled`."""
        return torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Likelihood.score`."""
        return labels.to(logits.dtype) - logits
