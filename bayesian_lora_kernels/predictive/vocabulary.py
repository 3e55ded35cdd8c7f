"""The posterior over the logits of a whole vocabulary, without a `[V, V]` or `[N, S, V]` tensor.

Everything lives in the hidden state before the output head, of which posterior samples are exact; the covariance of any
chosen tokens is exact too, by one backward pass each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.head import OutputHead
from bayesian_lora_kernels.ops.vocabulary import VocabularyStatistics
from bayesian_lora_kernels.predictive.distribution import LogitPosterior
from bayesian_lora_kernels.predictive.hidden_samples import Deviations, HiddenSampler
from bayesian_lora_kernels.predictive.logits import LogitPredictor
from bayesian_lora_kernels.predictive.sampled_logits import SampledLogits
from bayesian_lora_kernels.surroundings import in_own_surroundings

SAMPLES = 64


class VocabularyPosterior:
    """`z ~ N(mean, J Sigma J^T)` over all V logits of the next token, for every example of a batch.

    Means, variances, covariances and samples are of the logits **before** a soft cap, if the model has one (Gemma 2):
    there they are Gaussian. Probabilities and statistics apply the cap to every sample.

    Samples are drawn when they are first needed, at the cost of one Jacobian-vector product each, and kept: `probs`,
    `statistics` and `variance` look at the same ones, unless they are given a generator. Exact covariances run the
    model again. So the model must not change as long as this object is used.

    Attributes:
        hidden: `[N, d]`, what the output head sees at the last valid token at the MAP weights.
        softcap: the model's cap, or None.

    Args:
        sampler: of hidden states.
        predictor: of chosen logits, likewise before a cap.
        batch: on the model's device, without labels.
        hidden: see above.
        head: what it computes; see `read_head`.
    """

    def __init__(
        self,
        sampler: HiddenSampler,
        predictor: LogitPredictor,
        batch: Batch,
        hidden: Tensor,
        head: OutputHead,
    ):
        self._sampler, self._predictor, self._batch = sampler, predictor, batch
        self._head = head
        self._kept: Deviations | None = None
        self._mean: Tensor | None = None
        self.hidden = hidden
        self.softcap = head.softcap

    @property
    def mean(self) -> Tensor:
        """`[N, V]`, the logits at the MAP weights, before a cap; float32 (float64 for a float64 model)."""
        if self._mean is None:
            with torch.no_grad():
                self._mean = self._head.logits(self.hidden.to(self._head.weight.device))
        return self._mean

    @property
    def method(self) -> str:
        """How the samples' derivatives are taken, with the error of an inexact one; see `JacobianVectorProduct`."""
        return self._sampler.jvp.describe()

    @in_own_surroundings
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`[n, N, V]` fresh joint samples of the logits, before a cap.

        One sample of the weights serves all examples, so that their logits are jointly right too.

        Raises:
            ValueError: if n is not positive.
        """
        _check_count("n", n)
        drawn = self._sampler.draw(self._batch, n, False, generator)
        return SampledLogits(self._head, self.hidden, drawn, n, mirrored=False, mean=self.mean).logits()

    @in_own_surroundings
    def probs(self, n_samples: int = SAMPLES, generator: torch.Generator | None = None) -> Tensor:
        """`[N, V]`, the mean of the softmax over posterior samples.

        Args:
            n_samples: half of them are drawn, the others are their mirror images, for which no derivative is needed.
            generator: draw new samples with it instead of using those that are kept.

        Raises:
            ValueError: if n_samples is not positive.
        """
        return self._samples(n_samples, generator, mirrored=True).probs()

    @in_own_surroundings
    def statistics(
        self, targets: Tensor | None = None, n_samples: int = SAMPLES, generator: torch.Generator | None = None
    ) -> VocabularyStatistics:
        """Entropy, mutual information and log-probability of the targets, each `[N]`, in nats.

        Args:
            targets: `[N]` token ids, or None.
            n_samples: as for `probs`. Mirror images do little for the mutual information, a second-order quantity: its
                relative error falls as the root of the number of samples that are drawn.
            generator: as for `probs`.

        Raises:
            ValueError: if n_samples is not positive, or targets are not `[N]` token ids.
        """
        if targets is not None:
            targets = self._check_indices(targets, "targets", (1,)).to(self._head.weight.device)
            if targets.shape != self.hidden.shape[:1]:
                raise ValueError(f"targets: expected [{len(self.hidden)}], got {list(targets.shape)}")
        return self._samples(n_samples, generator, mirrored=True).statistics(targets)

    @in_own_surroundings
    def variance(
        self, n_samples: int = SAMPLES, generator: torch.Generator | None = None, exact: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Variances of the logits before a cap, and their standard errors, both `[N, V]`.

        The estimate is the mean square of independent Gaussian deviations, whose law is known: the standard error is
        such that `estimate - 1.96 errors` to `estimate + 1.96 errors` holds the variance with 95 % probability,
        whatever n_samples. For many samples that is `estimate * sqrt(2 / n_samples)`, for few it is more.

        Args:
            n_samples: each costs a Jacobian-vector product.
            generator: as for `probs`.
            exact: for this many of the most probable tokens of each example the variance is computed exactly, by one
                backward pass each; their standard error is 0.

        Raises:
            ValueError: if n_samples is not positive, or `exact` out of range.
        """
        estimate = self._samples(n_samples, generator, mirrored=False).mean_square()
        error = estimate * relative_error(n_samples)
        if exact:
            top = self._top_indices(exact)
            known = self.covariance(top).diagonal(dim1=1, dim2=2).clamp_min(0)
            estimate.scatter_(1, top, known.to(estimate))
            error.scatter_(1, top, 0)
        return estimate, error

    @in_own_surroundings
    def covariance(self, indices: Tensor) -> Tensor:
        """`[N, K, K]`, the exact covariance of chosen logits, before a cap; one backward pass for each of the K.

        Args:
            indices: `[K]`, or `[N, K]` for each example.

        Raises:
            ValueError: for indices out of range, of another shape, or more than 4096.
        """
        indices = self._check_indices(torch.as_tensor(indices), "indices", (1, 2))
        return self._predictor.predict(self._batch, indices, [self._sampler.posterior])[1][0]

    @in_own_surroundings
    def top(self, k: int) -> LogitPosterior:
        """The k most probable tokens of each example with their exact joint covariance, as `predict(batch, k)`.

        With a soft cap the Gaussian is of the capped logits, to first order.

        Raises:
            ValueError: if k is not from 1 to V.
        """
        indices = self._top_indices(k)
        covariance = self.covariance(indices)
        mean = self.mean.gather(1, indices)
        if self.softcap is not None:
            slope = 1 - (mean / self.softcap).tanh().square()
            covariance = slope[:, :, None] * covariance * slope[:, None, :]
            mean = self._head.capped(mean)
        return LogitPosterior(mean, covariance, indices)

    def _top_indices(self, k: int) -> Tensor:
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.mean.shape[1]:
            raise ValueError(f"expected 1 to {self.mean.shape[1]} most probable tokens, got {k!r}")
        return self.mean.topk(k, dim=1).indices

    def _samples(self, n_samples: int, generator: torch.Generator | None, mirrored: bool) -> SampledLogits:
        _check_count("n_samples", n_samples)
        needed = -(-n_samples // 2) if mirrored else n_samples
        if generator is not None:
            drawn = self._sampler.draw(self._batch, needed, False, generator)
        else:
            have = [] if self._kept is None else [self._kept]
            missing = needed - sum(map(len, have))
            if missing > 0:
                have.append(self._sampler.draw(self._batch, missing, False, None))
                self._kept = Deviations.join(have)
            assert self._kept is not None
            drawn = self._kept.first(needed)
        mean = self.mean if mirrored else None  # variances do not need it
        return SampledLogits(self._head, self.hidden, drawn, n_samples, mirrored, mean)

    def _check_indices(self, indices: Tensor, name: str, dimensions: tuple[int, ...]) -> Tensor:
        vocabulary = self._head.vocabulary
        if indices.is_floating_point() or indices.dtype == torch.bool or indices.ndim not in dimensions:
            raise ValueError(f"{name}: expected token ids, got {indices.dtype} of shape {list(indices.shape)}")
        if not indices.numel() or indices.min() < 0 or indices.max() >= vocabulary:
            raise ValueError(f"{name}: expected token ids from 0 to {vocabulary - 1}, got {indices.tolist()}")
        return indices.long()


def vocabulary_posterior(sampler: HiddenSampler, batch: Any) -> VocabularyPosterior:
    """The posterior over the vocabulary for one batch.

    Raises:
        ValueError: for a head that cannot be served; see `read_head`.
    """
    prepared = sampler.prepare(batch)
    hidden, _ = sampler.mean(prepared, every=False)
    head = sampler.head(prepared)
    forward, whole = sampler.forward.whole_vocabulary(head), sampler.posterior.curvature.whole_jacobians
    predictor = LogitPredictor(sampler.model, sampler.layers, forward, whole, sampler.memory_budget)
    return VocabularyPosterior(sampler, predictor, prepared, hidden, head)


def relative_error(n: int) -> float:
    """Standard error of a mean square of n unit Gaussians, as a share of it, for 95 % intervals that hold.

    With `x` chi-squared over its n degrees of freedom, `x (1 - 1.96 c) <= 1 <= x (1 + 1.96 c)` has probability 0.95.
    """

    def below(x: float) -> float:
        return float(torch.special.gammainc(torch.tensor(n / 2.0).double(), torch.tensor(x * n / 2.0).double()))

    low, high = 0.0, 1e6
    for _ in range(100):
        c = (low + high) / 2
        reach = 1.96 * c
        covered = (below(1 / (1 - reach)) if reach < 1 else 1.0) - below(1 / (1 + reach))
        low, high = (c, high) if covered < 0.95 else (low, c)
    return high


def _check_count(name: str, n: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{name}: expected a positive int, got {n!r}")
