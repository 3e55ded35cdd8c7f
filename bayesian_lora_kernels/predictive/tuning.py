"""The prior precision that predicts held-out labels best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayesian_lora_kernels.curvature.likelihood import Classification, Likelihood
from bayesian_lora_kernels.model.batches import Batch
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
    processes: Processes = ALONE,
) -> Prior:
    """The prior of one precision with the smallest negative log-likelihood of the predictive.

    Classification: the pairwise predictive. Regression: the Gaussian with the logits' variance and the unit noise. Each
    batch is captured once for all precisions of a round. Of several processes, each has a share of the data.

    Raises:
        TypeError: if the loader is a single batch.
        ValueError: if the loader is empty, an iterator that cannot start again, or has no labels.
    """
    if isinstance(loader, Iterator):
        raise ValueError("val_loader: expected an iterable that can start again (a DataLoader or a list)")

    def nll(log_precisions: Tensor) -> Tensor:
        totals = torch.zeros(len(log_precisions), dtype=torch.float64)
        posteriors = _Posteriors(curvature, log_precisions.exp())
        found = labelled_predictions(predictor, likelihood, loader, posteriors, processes=processes)
        for mean, covariances, labels in found:
            totals += torch.stack([_nll(likelihood, mean, c, labels) for c in covariances]).cpu()
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
) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
    """Means, covariances under every posterior, and labels, batch by batch; of classes, only of their differences.

    Raises:
        TypeError: if the loader is a single batch.
        ValueError: if the loader is empty, on all processes, or a batch has no labels, or labels that cannot be.
    """
    check_loader(loader, "val_loader")
    seen, hidden = False, not progress or processes.rank > 0
    batches = tqdm(loader, desc="held-out data", unit="batch", disable=hidden)
    with posteriors[0].in_step():
        for index, given in enumerate(in_step(predictor.model, batches)):
            batch = Batch.of(given, model_device(predictor.model))
            labels = batch.labels
            if labels is None:
                raise ValueError(f"val_loader: expected labels, batch {index} has none")
            mean, covariances, _ = predictor.predict(batch, None, posteriors, isinstance(likelihood, Classification))
            yield mean, covariances, likelihood.check_labels(mean, labels.to(mean.device))
            seen = True
    if not any(processes.values(seen)):
        raise ValueError("val_loader: expected at least one batch, got none")


class _Posteriors(Sequence[Posterior]):
    """One for each precision, made when it is looked at: what one of them computes does not stay."""

    def __init__(self, curvature: Curvature, precisions: Tensor):
        self.curvature, self.precisions = curvature, precisions

    def __getitem__(self, index: Any) -> Any:
        return Posterior(self.curvature, Prior(self.precisions[index]))

    def __len__(self) -> int:
        return len(self.precisions)


def _nll(likelihood: Likelihood, mean: Tensor, covariance: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        variance = covariance.diagonal(dim1=-2, dim2=-1) + 1
        density = -0.5 * ((labels - mean).square() / variance + variance.log() + math.log(2 * math.pi))
        return -density.sum(dtype=torch.float64)
    return -likelihood.log_likelihood(pairwise_log_probs(mean, covariance), labels, None)
