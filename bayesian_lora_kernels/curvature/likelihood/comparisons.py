"""Answers that are compared with each other, of which a reward model gives each one score: pairs, and ranked lists.

Logits are rewards `[N, K]`. Only their differences mean anything: no data say what all answers share.

Sources: Bradley, Terry 1952, "Rank analysis of incomplete block designs"; Luce 1959, "Individual choice behavior";
Plackett 1975, "The analysis of permutations".
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.curvature.likelihood.base import Likelihood, column, wide
from bayesian_lora_kernels.model.deferred import AT_ONCE, AtOnce

MARGIN = "margin"
LONGEST = 128  # list, whose Hessian `ops.small_eigh` decomposes


class BradleyTerry(Likelihood):
    """Of two answers the first is better with probability `sigmoid(r_1 - r_2 - margin)`.

    A batch without labels says that the first always is. Labels `[N]`, floats, are the probability that it is: 0.5 for
    a tie, which counts as half a win and half a loss. A column `margin [N]` is by how much the first was to win.
    The squared score of a tie is not that of half a win and half a loss: `certain` labels are 0 or 1.
    """

    answers: ClassVar[Literal["pairs", "lists"] | None] = "pairs"

    def check_logits(self, logits: Tensor) -> None:
        """See `Likelihood.check_logits`."""
        if logits.ndim != 2 or logits.shape[1] != 2:
            raise ValueError(
                f"likelihood: bradley-terry expects the rewards of two answers, [N, 2], got {list(logits.shape)}; "
                "ranked lists are likelihood='plackett-luce'"
            )

    def implied_labels(self, logits: Tensor) -> Tensor | None:
        """See `Likelihood.implied_labels`."""
        return torch.ones(len(logits), dtype=torch.float64, device=logits.device)

    def check_labels(self, logits: Tensor, labels: Tensor, checks: AtOnce = AT_ONCE) -> Tensor:
        """See `Likelihood.check_labels`."""
        if labels.shape != logits.shape[:1] or not labels.is_floating_point():
            raise ValueError(
                f"labels: expected floats of shape {[len(logits)]}, the probability that the first answer of a pair is "
                f"the better one (1, or 0.5 for a tie), got {labels.dtype} of shape {list(labels.shape)}; leave them "
                "out where the chosen answer comes first"
            )
        wrong = ~((labels >= 0) & (labels <= 1))
        checks.add(
            wrong.any().reshape(1),
            lambda _: ValueError(f"labels: expected probabilities from 0 to 1, got {float(labels[wrong][0]):g}"),
        )
        if self.certain:
            between = (labels != 0) & (labels != 1)
            checks.add(
                between.any().reshape(1),
                lambda _: ValueError(
                    f"labels: expected 0 or 1 with fisher='empirical', got {float(labels[between][0]):g}; take another "
                    "Fisher, or both orders of a pair, with weights"
                ),
            )
        return labels.double()

    def shifted(self, logits: Tensor, labels: Tensor | None, inputs: Any, checks: AtOnce | None = None) -> Tensor:
        """The rewards, that of the first answer less the margin."""
        margin = column(inputs, MARGIN, len(logits))
        if margin is None:
            return logits
        if checks is not None:
            wrong = ~torch.isfinite(margin)
            if labels is not None:
                wrong |= (margin != 0) & (labels != 1)
            checks.add(
                wrong.any().reshape(1),
                lambda _: ValueError(
                    "margin: expected finite numbers, and 0 where the label is not 1: a margin is by how much the "
                    "first answer is better"
                ),
            )
        return torch.stack([logits[:, 0] - margin.to(logits), logits[:, 1]], dim=1)

    def log_likelihood(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """See `Likelihood.log_likelihood`."""
        difference = _difference(logits.detach().double())
        return labels * logsigmoid(difference) + (1 - labels) * logsigmoid(-difference)

    def exact_rank(self, n_logits: int) -> int:
        """See `Likelihood.exact_rank`."""
        return 1

    def exact_columns(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """`sqrt(p (1 - p))` times 1 and -1."""
        difference = _difference(logits)
        return _contrast((0.5 * (logsigmoid(difference) + logsigmoid(-difference))).exp())[..., None]

    def sampled(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """See `Likelihood.sampled`."""
        p = _difference(logits).sigmoid()
        drawn = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device) < p
        return self.score(logits, drawn.to(p))

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Likelihood.score`."""
        return _contrast(labels.to(logits) - _difference(logits).sigmoid())


class PlackettLuce(Likelihood):
    """The best of all answers has the probability that a softmax gives it, then the best of the others, and so on.

    A batch without labels says that the answers are ranked as they stand, the best first. Labels `[N, K]`, integers,
    are the rank of each answer, 0 for the best. `exact` is the Hessian of the ranking that was observed: the
    expectation over all K! has no closed form. `mc` draws rankings.
    """

    answers: ClassVar[Literal["pairs", "lists"] | None] = "lists"

    def check_logits(self, logits: Tensor) -> None:
        """See `Likelihood.check_logits`."""
        if logits.ndim != 2 or not 2 <= logits.shape[1] <= LONGEST:
            raise ValueError(
                f"likelihood: plackett-luce expects the rewards of 2 to {LONGEST} answers, [N, K], got "
                f"{list(logits.shape)}"
            )

    def implied_labels(self, logits: Tensor) -> Tensor | None:
        """See `Likelihood.implied_labels`."""
        return torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)

    def check_labels(self, logits: Tensor, labels: Tensor, checks: AtOnce = AT_ONCE) -> Tensor:
        """See `Likelihood.check_labels`."""
        if labels.shape != logits.shape or labels.is_floating_point():
            raise ValueError(
                f"labels: expected the rank of each answer, integers {list(logits.shape)}, 0 for the best, got "
                f"{labels.dtype} {list(labels.shape)}; leave them out where the best answer comes first"
            )
        labels, every = labels.long(), torch.arange(labels.shape[1], device=labels.device)
        wrong = (labels.sort(dim=1).values != every).any(dim=1)
        checks.add(
            wrong.any().reshape(1),
            lambda _: ValueError(
                f"labels: expected each of the ranks 0 to {len(every) - 1} once, got {labels[wrong][0].tolist()}; "
                "plackett-luce has no ties"
            ),
        )
        return labels.argsort(dim=1).argsort(dim=1)  # always ranks: an index out of range breaks a GPU's context

    def shifted(self, logits: Tensor, labels: Tensor | None, inputs: Any, checks: AtOnce | None = None) -> Tensor:
        """The rewards.

        Raises:
            ValueError: for a margin.
        """
        if column(inputs, MARGIN, len(logits)) is not None:
            raise ValueError("margin: expected likelihood='bradley-terry', got one with plackett-luce; leave it out")
        return logits

    def log_likelihood(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """See `Likelihood.log_likelihood`."""
        ranked = logits.detach().double().gather(1, labels.argsort(dim=1))
        return (ranked - _of_the_rest(ranked)).sum(dim=1)

    def exact_rank(self, n_logits: int) -> int:
        """See `Likelihood.exact_rank`."""
        return n_logits - 1

    def choose_fisher(self, fisher: str, logits: Tensor) -> str:
        """`auto` is exact for lists of any length: those of one fit may differ, and should not mix the two."""
        return "exact" if fisher == "auto" else fisher

    def exact_columns(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """K - 1 columns from the eigendecomposition of the Hessian, which knows nothing of what all rewards share."""
        labels = self.implied_labels(logits) if labels is None else labels
        assert labels is not None
        p = _stages(logits, labels)
        hessian = torch.diag_embed(p.sum(dim=1)) - p.mT @ p
        values, vectors = ops.small_eigh(hessian)
        columns = vectors[:, :, :-1] * values[:, None, :-1].clamp_min(0).sqrt()
        return columns.gather(1, labels[:, :, None].expand_as(columns))

    def sampled(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """See `Likelihood.sampled`."""
        noise = torch.empty_like(logits).exponential_(generator=generator).log()  # that of Gumbel, turned round
        return self.score(logits, (logits - noise).argsort(dim=1, descending=True).argsort(dim=1))

    def score(self, logits: Tensor, labels: Tensor) -> Tensor:
        """See `Likelihood.score`."""
        return (1 - _stages(logits, labels).sum(dim=1)).gather(1, labels)


def _difference(logits: Tensor) -> Tensor:
    return wide(logits)[:, 0] - wide(logits)[:, 1]


def _contrast(x: Tensor) -> Tensor:
    return torch.stack([x, -x], dim=1)


def _of_the_rest(ranked: Tensor) -> Tensor:
    """Of rewards `[N, K]`, the best first: the log-sum-exp of each and all after it."""
    return ranked.flip(1).logcumsumexp(dim=1).flip(1)


def _stages(logits: Tensor, labels: Tensor) -> Tensor:
    """`[N, K, K]`, the probability at stage j that the answer of rank i is the best of those that are left."""
    ranked = logits.gather(1, labels.argsort(dim=1))
    gone = torch.ones(2 * ranked.shape[1:], dtype=torch.bool, device=ranked.device).tril(-1)
    return (ranked[:, None, :] - _of_the_rest(ranked)[:, :, None]).masked_fill(gone, -torch.inf).exp()
