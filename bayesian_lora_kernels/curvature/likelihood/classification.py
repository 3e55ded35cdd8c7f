"""Classes, one of which is right."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesian_lora_kernels.curvature.likelihood.base import Likelihood, wide
from bayesian_lora_kernels.model.deferred import AT_ONCE, AtOnce
from bayesian_lora_kernels.model.forward import IGNORED_LABEL


class Classification(Likelihood):
    """Softmax over the logits; labels are class indices `[N]`, or `[N, T]` with -100 for none."""

    def check_logits(self, logits: Tensor) -> None:
        """See `Likelihood.check_logits`."""
        if logits.shape[-1] < 2:
            raise ValueError(
                f"likelihood: classification expects at least 2 logits, got {logits.shape[-1]}; a single score is "
                "likelihood='regression', or 'bradley-terry' for a reward model's pairs of answers"
            )

    def check_labels(self, logits: Tensor, labels: Tensor, checks: AtOnce = AT_ONCE) -> Tensor:
        """See `Likelihood.check_labels`."""
        n_classes = logits.shape[-1]
        if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels: expected class indices of shape {list(logits.shape[:-1])}, got {labels.dtype} of shape "
                f"{list(labels.shape)}"
            )
        labels = labels.long()
        wrong = (labels < 0) | (labels >= n_classes)
        if labels.ndim == 2:  # only a position can go without a label: an example that does is not part of the data
            wrong &= labels != IGNORED_LABEL
        checks.add(
            wrong.any().reshape(1),
            lambda _: ValueError(
                f"labels: expected class indices from 0 to {n_classes - 1}, got {int(labels[wrong][0])}"
            ),
        )
        return labels

    def log_likelihood(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """See `Likelihood.log_likelihood`."""
        counted = labels != IGNORED_LABEL
        if mask is not None:
            counted = counted & mask
        log_probs = wide(logits.detach()).log_softmax(dim=-1)
        picked = log_probs.gather(-1, _index(labels, log_probs)).squeeze(-1)
        return picked.masked_fill(~counted, 0).reshape(len(logits), -1).sum(dim=1, dtype=torch.float64)

    def exact_rank(self, n_logits: int) -> int:
        """See `Likelihood.exact_rank`."""
        return n_logits - 1

    def exact_columns(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """C - 1 columns: `L = diag(sqrt p) - p sqrt(p)^T` has the null vector sqrt(p), which a reflection takes out.

        With H the Householder reflection of the first axis onto sqrt(p), the other columns of `L H` are
        `sqrt(p) * h_i`, and `L H (L H)^T = L L^T = diag(p) - p p^T`.
        """
        root = logits.softmax(dim=-1).sqrt()
        v = root.clone()
        v[..., 0] += 1
        reflection = -v[..., :, None] * v[..., None, 1:] / (1 + root[..., 0, None, None])
        rows = torch.arange(logits.shape[-1] - 1, device=logits.device)
        reflection[..., rows + 1, rows] += 1
        return root[..., :, None] * reflection

    def sampled(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """See `Likelihood.sampled`."""
        # As `torch.multinomial` draws one, which would wait for the device to see that the probabilities are some.
        probs = logits.softmax(dim=-1)
        return self.score(logits, (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1))

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Likelihood.score`."""
        one_hot = torch.zeros_like(logits).scatter_(-1, _index(labels, logits), 1)
        return (one_hot - logits.softmax(dim=-1)).masked_fill((labels == IGNORED_LABEL).unsqueeze(-1), 0)


def _index(labels: Tensor, logits: Tensor) -> Tensor:
    """Of labels that may turn out to be wrong, or none: an index out of range would break a GPU's context."""
    return labels.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
