"""Likelihoods: log-probability of labels, and the output cotangents whose backward passes make up the Fisher.

With cotangents `l_1, ..., l_m` for one example, the Fisher of its logits is `sum_i l_i l_i^T`, in expectation for `mc`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from bayesian_lora_kernels.model.deferred import AT_ONCE, AtOnce
from bayesian_lora_kernels.model.forward import IGNORED_LABEL

MAX_EXACT_COLUMNS = 16


class Likelihood(ABC):
    """What a logit means. Logits are `[N, C]`, or `[N, T, C]` with a mask `[N, T]` of positions that carry a loss."""

    def check_logits(self, logits: Tensor) -> None:  # noqa: B027 (most shapes mean something)
        """Raises ValueError if logits of this shape mean nothing."""

    @abstractmethod
    def check_labels(self, logits: Tensor, labels: Tensor, checks: AtOnce = AT_ONCE) -> Tensor:
        """Labels in the form that the other methods take.

        Raises:
            ValueError: for a wrong shape or dtype; when `checks` look, for a wrong range.
        """

    @abstractmethod
    def log_likelihood(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Sum of the log-probabilities of the labels, 0-d float64."""

    @abstractmethod
    def exact_columns(self, logits: Tensor) -> Tensor:
        """`[..., C, m]` with `L L^T` the Fisher of the logits."""

    @abstractmethod
    def exact_rank(self, n_logits: int) -> int:
        """How many columns `exact_columns` has."""

    @abstractmethod
    def sampled(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Score of a target drawn from the model's own predictive distribution, in the shape of the logits."""

    @abstractmethod
    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Gradient of the log-likelihood of the labels with respect to the logits."""

    def choose_fisher(self, fisher: str, logits: Tensor) -> str:
        """Resolve `auto`: exact up to 16 backward passes, then mc; mc with a token dimension, whatever its length.

        The number of positions changes from batch to batch, and one fit should not mix the two.
        """
        if fisher != "auto":
            return fisher
        return "exact" if logits.ndim == 2 and self.exact_rank(logits.shape[-1]) <= MAX_EXACT_COLUMNS else "mc"

    def cotangents(
        self,
        logits: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        *,
        fisher: str,
        samples: int,
        generator: torch.Generator,
    ) -> Iterator[tuple[Tensor, bool]]:
        """The cotangents of one batch, each of the shape of the logits, and whether it is the last.

        `exact` with a token dimension takes each position by itself: one backward pass that held several positions
        would add their cross terms.
        """
        logits = _masked(_wide(logits.detach()), mask)  # what is masked may be anything, even NaN
        fisher = self.choose_fisher(fisher, logits)
        if fisher == "exact":
            columns = self.exact_columns(logits)
            if mask is not None:
                columns = columns.masked_fill(~mask[..., None, None], 0)
            rank = columns.shape[-1]
            if logits.ndim == 2:
                for i in range(rank):
                    yield columns[..., i], i == rank - 1
                return
            positions = logits.shape[1]
            for t in range(positions):
                for i in range(rank):
                    cotangent = torch.zeros_like(logits)
                    cotangent[:, t] = columns[:, t, :, i]
                    yield cotangent, t == positions - 1 and i == rank - 1
        elif fisher == "mc":
            for i in range(samples):
                yield _masked(self.sampled(logits, generator), mask) / math.sqrt(samples), i == samples - 1
        else:
            if labels is None:
                raise ValueError("labels: the empirical Fisher needs them, the batch has none")
            yield _masked(self.score(logits, labels), mask), True


class Classification(Likelihood):
    """Softmax over the logits; labels are class indices `[N]`, or `[N, T]` with -100 for none."""

    def check_logits(self, logits: Tensor) -> None:
        """See `Likelihood.check_logits`."""
        if logits.shape[-1] < 2:
            raise ValueError(
                f"likelihood: classification expects at least 2 logits, got {logits.shape[-1]}; a single score, such "
                "as a reward model's, is likelihood='regression'"
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
        log_probs = _wide(logits.detach()).log_softmax(dim=-1)
        picked = log_probs.gather(-1, _index(labels, log_probs)).squeeze(-1)
        return picked.masked_fill(~counted, 0).sum(dtype=torch.float64)

    def exact_rank(self, n_logits: int) -> int:
        """See `Likelihood.exact_rank`."""
        return n_logits - 1

    def exact_columns(self, logits: Tensor) -> Tensor:
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


class Regression(Likelihood):
    """Independent Gaussians of unit variance around the logits; labels are `[N, C]` (or `[N]` for one logit)."""

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
        return _masked(density, mask).sum()

    def exact_rank(self, n_logits: int) -> int:
        """See `Likelihood.exact_rank`."""
        return n_logits

    def exact_columns(self, logits: Tensor) -> Tensor:
        """Columns of the identity."""
        c = logits.shape[-1]
        return torch.eye(c, dtype=logits.dtype, device=logits.device).expand(*logits.shape, c)

    def sampled(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """See `Likelihood.sampled`."""
        return torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Likelihood.score`."""
        return labels.to(logits.dtype) - logits


LIKELIHOODS: dict[str, type[Likelihood]] = {"classification": Classification, "regression": Regression}


def _index(labels: Tensor, logits: Tensor) -> Tensor:
    """Of labels that may turn out to be wrong, or none: an index out of range would break a GPU's context."""
    return labels.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
