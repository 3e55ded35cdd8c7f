"""The prior precision that predicts held-out labels best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayesian_lora_kernels.curvature.likelihood import Likelihood
from bayesian_lora_kernels.curvature.likelihood.comparisons import MARGIN
from bayesian_lora_kernels.model.forward import model_device
from bayesian_lora_kernels.model.reading import check_loader
from bayesian_lora_kernels.model.sharding import in_step
from bayesian_lora_kernels.posterior.curvature import Curvature
from bayesian_lora_kernels.posterior.evidence import minimise_on_grid
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.posterior.prior import Prior
from bayesian_lora_kernels.predictive.logits import LogitPredictor
from bayesian_lora_kernels.predictive.probabilities import pairwise_log_probs
from bayesian_lora_kernels.processes import ALONE, Processes

# Each round is one pass over the held-out data and leaves two of its 16 intervals.
ROUNDS = 3
GRID = 17


def minimise_nll(
    predictor: LogitPredictor,
    likelihood: Likelihood,
    loader: Iterable[Any],
    curvature: Curvature,
    noise_variance: float | Tensor = 1.0,
    processes: Processes = ALONE,
) -> Prior:
    """The prior of one precision with the smallest negative log-likelihood of the predictive.

    Classes and pairs of answers: the pairwise predictive. Regression: the Gaussian with the logits' variance and the
    noise. Each batch is captured once for all precisions of a round. Of several processes, each has a share of the
    data.

    Raises:
        TypeError: if the loader is a single batch.
        ValueError: if the loader is empty, an iterator that cannot start again, or has no labels; for ranked lists.
    """
    if likelihood.answers == "lists":
        raise ValueError(
            "method: expected 'marglik' for plackett-luce; the probability of a ranking has no closed form"
        )
    if isinstance(loader, Iterator):
        raise ValueError("val_loader: expected an iterable that can start again (a DataLoader or a list)")

    def nll(log_precisions: Tensor) -> Tensor:
        totals = torch.zeros(len(log_precisions), dtype=torch.float64)
        posteriors = _Posteriors(curvature, log_precisions.exp(), noise_variance)
        found = labelled_predictions(predictor, likelihood, loader, posteriors, processes=processes)
        for mean, covariances, labels, weights in found:
            each = torch.stack([_nll(likelihood, mean, c, labels, noise_variance) for c in covariances])
            totals += (each if weights is None else each * weights.to(each)).sum(dim=1).cpu()
        processes.add([totals])
        return totals

    return Prior(math.exp(minimise_on_grid(nll, "the model", ROUNDS, GRID)))


def labelled_predictions(
    predictor: LogitPredictor,
    likelihood: Likelihood,
    loader: Iterable[Any],
    posteriors: Sequence[Posterior],
    progress: bool = False,
    processes: Processes = ALONE,
) -> Iterator[tuple[Tensor, list[Tensor], Tensor, Tensor | None]]:
    """Means, covariances under every posterior, labels, and weights if there are any, batch by batch.

    Of classes and answers, only of their differences.

    Raises:
        TypeError: if the loader is a single batch.
        ValueError: if the loader is empty, on all processes, a batch has no labels, or labels that cannot be, or a
            margin, which is no part of what is predicted.
    """
    check_loader(loader, "val_loader")
    seen, hidden = False, not progress or processes.rank > 0
    batches = tqdm(loader, desc="held-out data", unit="batch", disable=hidden)
    with posteriors[0].in_step():
        for index, given in enumerate(in_step(predictor.model, batches)):
            batch = predictor.forward.read(given, model_device(predictor.model))
            if isinstance(batch.inputs, Mapping) and likelihood.answers and batch.inputs.get(MARGIN) is not None:
                raise ValueError(f"{MARGIN}: expected none in held-out pairs, batch {index} has one; leave it out")
            mean, covariances, _ = predictor.predict(batch, None, posteriors, not likelihood.noisy)
            likelihood.check_logits(mean)
            labels = likelihood.implied_labels(mean) if batch.labels is None else batch.labels
            if labels is None:
                raise ValueError(f"val_loader: expected labels, batch {index} has none")
            yield mean, covariances, likelihood.check_labels(mean, labels.to(mean.device)), batch.weights
            seen = True
    if not any(processes.values(seen)):
        raise ValueError("val_loader: expected at least one batch, got none")


class _Posteriors(Sequence[Posterior]):
    """One for each precision, made when it is looked at: what one of them computes does not stay."""

    def __init__(self, curvature: Curvature, precisions: Tensor, noise_variance: float | Tensor):
        self.curvature, self.precisions, self.noise_variance = curvature, precisions, noise_variance

    def __getitem__(self, index: Any) -> Any:
        return Posterior(self.curvature, Prior(self.precisions[index]), self.noise_variance)

    def __len__(self) -> int:
        return len(self.precisions)


def _nll(
    likelihood: Likelihood, mean: Tensor, covariance: Tensor, labels: Tensor, noise_variance: float | Tensor
) -> Tensor:
    """Of each example, `[N]` float64."""
    if not likelihood.noisy:
        return -likelihood.log_likelihood(pairwise_log_probs(mean, covariance), labels, None)
    variance = covariance.diagonal(dim1=-2, dim2=-1) + float(noise_variance)
    density = -0.5 * ((labels - mean).square() / variance + variance.log() + math.log(2 * math.pi))
    return -density.sum(dim=1, dtype=torch.float64)
