"""Log-probability of labels, and the output cotangents whose backward passes make up the Fisher.

With cotangents `l_1, ..., l_m` for one example, the Fisher of its logits is `sum_i l_i l_i^T`, in expectation for `mc`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bayesian_lora_kernels.model.deferred import AT_ONCE, AtOnce

MAX_EXACT_COLUMNS = 16


class Likelihood(ABC):
    """What a logit means. Logits are `[N, C]`, or `[N, T, C]` with a mask `[N, T]` of positions that carry a loss.

    Attributes:
        answers: whether a model of one score is asked about `pairs` or `lists` of answers, `[N, K]`; None: it is not.
        noisy: whether there is a noise variance; what the methods say is of variance 1.
        certain: whether labels that are probabilities are refused, as the empirical Fisher demands.
    """

    answers: ClassVar[Literal["pairs", "lists"] | None] = None
    noisy: ClassVar[bool] = False
    certain: bool = False

    def check_logits(self, logits: Tensor) -> None:  # noqa: B027 (most shapes mean something)
        """Raises ValueError if logits of this shape mean nothing."""

    @abstractmethod
    def check_labels(self, logits: Tensor, labels: Tensor, checks: AtOnce = AT_ONCE) -> Tensor:
        """Labels in the form that the other methods take.

        Raises:
            ValueError: for a wrong shape or dtype; when `checks` look, for a wrong range.
        """

    def implied_labels(self, logits: Tensor) -> Tensor | None:
        """Labels of a batch that has none, where the order of its answers says it; else None."""
        return None

    def shifted(self, logits: Tensor, labels: Tensor | None, inputs: Any, checks: AtOnce | None = None) -> Tensor:
        """The logits that the labels are of, from those of the model and the columns of a batch.

        Raises:
            ValueError: for a column of another shape; when `checks` look, if there are any, for what it cannot be.
        """
        return logits

    @abstractmethod
    def log_likelihood(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probability of the labels of each example, `[N]` float64."""

    @abstractmethod
    def exact_columns(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """`[..., C, m]` with `L L^T` the Fisher of the logits, which the labels of most likelihoods do not change."""

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

        The number of positions changes from batch to batch, and one fit should not mix the two. So does the length of
        ranked lists, which are always exact.
        """
        if fisher != "auto":
            return fisher
        return "exact" if logits.ndim == 2 and self.exact_rank(logits.shape[-1]) <= MAX_EXACT_COLUMNS else "mc"

    def cotangents(
        self,
        logits: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        weights: Tensor | None = None,
        *,
        fisher: str,
        samples: int,
        generator: torch.Generator,
    ) -> Iterator[tuple[Tensor, bool]]:
        """The cotangents of one batch, each of the shape of the logits, and whether it is the last.

        Each is times the root of its example's weight. `exact` with a token dimension takes each position by itself:
        one backward pass that held several positions would add their cross terms.
        """
        logits = masked(wide(logits.detach()), mask)  # what is masked may be anything, even NaN
        roots = None if weights is None else weights.to(logits).sqrt().reshape(-1, *[1] * (logits.ndim - 1))
        for cotangent, last in self._unweighted(logits, mask, labels, fisher, samples, generator):
            yield cotangent if roots is None else roots * cotangent, last

    def _unweighted(
        self,
        logits: Tensor,
        mask: Tensor | None,
        labels: Tensor | None,
        fisher: str,
        samples: int,
        generator: torch.Generator,
    ) -> Iterator[tuple[Tensor, bool]]:
        fisher = self.choose_fisher(fisher, logits)
        if fisher == "exact":
            columns = self.exact_columns(logits, labels)
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
                yield masked(self.sampled(logits, generator), mask) / math.sqrt(samples), i == samples - 1
        else:
            if labels is None:
                raise ValueError("labels: the empirical Fisher needs them, the batch has none")
            yield masked(self.score(logits, labels), mask), True


def column(inputs: Any, name: str, size: int) -> Tensor | None:
    """Numbers `[N]` that a batch has beside its inputs; None if it has none of this name.

    Raises:
        ValueError: for another shape.
    """
    found = inputs.get(name) if isinstance(inputs, Mapping) else None
    if found is None:
        return None
    if not isinstance(found, Tensor) or found.shape != (size,):
        shape = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f"{name}: expected one number for each of {size} examples, got {shape}")
    return found


def wide(x: Tensor) -> Tensor:
    """In float32, or float64."""
    return x if x.dtype == torch.float64 else x.float()


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """`[N, T, C]`, zero where a mask `[N, T]` is False."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
