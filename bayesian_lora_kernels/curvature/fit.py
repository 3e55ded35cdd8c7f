"""Passes over the data: from a loader to the curvature of every layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayesian_lora_kernels.curvature.eigenvalues import EigenvalueSum
from bayesian_lora_kernels.curvature.factors import FactorSettings, KroneckerSums, check_finite, square_sums
from bayesian_lora_kernels.curvature.likelihood import Likelihood
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.capture import Capture
from bayesian_lora_kernels.model.forward import Forward, model_device
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.measuring import measuring
from bayesian_lora_kernels.model.memory import default_budget, examples_within
from bayesian_lora_kernels.model.pieces import captures
from bayesian_lora_kernels.model.reading import check_loader
from bayesian_lora_kernels.posterior.exact import ExactPosterior
from bayesian_lora_kernels.posterior.kronecker import (
    Eigenbasis,
    KroneckerFactors,
    KroneckerPosterior,
    eigenbasis,
    kronecker_eigenvalues,
)
from bayesian_lora_kernels.posterior.layerwise import LayerwisePosterior
from bayesian_lora_kernels.posterior.rows import RowStore


@dataclass(frozen=True)
class FitSettings:
    """How the curvature is measured; the meanings are LaplaceLoRA's."""

    curvature: str = "kfac"
    fisher: str = "auto"
    fisher_samples: int = 1
    seed: int = 0
    memory_budget: int | None = None
    row_dtype: torch.dtype | None = None
    factors: FactorSettings = field(default_factory=FactorSettings)


@dataclass(frozen=True)
class Fit:
    """What a fit found; nothing in it depends on the prior precision.

    `input_rows` says how many rows (tokens, or examples) the A of each layer is the mean of.
    """

    posterior: LayerwisePosterior | ExactPosterior
    factors: dict[str, KroneckerFactors] | None
    n_examples: int
    log_likelihood: float | None
    input_rows: Mapping[str, int] = field(default_factory=dict)


@dataclass
class _Totals:
    n_examples: int = 0
    positions: Tensor | int = 0  # that carry a loss
    log_likelihood: Tensor | None = None
    labelled: bool = True


class CurvatureFit:
    """One fit: the model, its layers and the data stay the same over its passes.

    Args:
        model: stays as it is.
        layers: to measure.
        forward: from a batch to logits.
        likelihood: of the labels.
        loader: any iterable of batches; EKFAC goes over it twice.
        settings: see FitSettings.
        progress: whether to show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        forward: Forward,
        likelihood: Likelihood,
        loader: Iterable[Any],
        settings: FitSettings,
        progress: bool,
    ):
        self.model, self.layers, self.forward = model, layers, forward
        self.likelihood, self.loader, self.settings, self.progress = likelihood, loader, settings, progress
        self._generators: dict[torch.device, torch.Generator] = {}

    def run(self) -> Fit:
        """Measure.

        Raises:
            TypeError: for a loader that is a single batch.
            ValueError: for an empty loader, bad labels, logits, inputs or gradients that are not finite, a layer that
                is never called; the batch and the module are named.
        """
        check_loader(self.loader)
        if self.settings.curvature == "ekfac" and isinstance(self.loader, Iterator):
            raise ValueError(
                "loader: EKFAC goes over the data twice, expected an iterable that can start again (a DataLoader or a "
                "list), got an iterator"
            )
        with measuring(self.model):
            if self.settings.curvature == "exact":
                return self._exact()
            return self._kronecker()

    def _kronecker(self) -> Fit:
        sums, totals = KroneckerSums(self.settings.factors, self.settings.seed), _Totals()
        for index, recorded in self._captures("curvature", totals):
            self._check_clear(index)
            check_finite("input", sums.add_inputs(recorded.inputs), f" in batch {index}")
            for gradients in self._backward(recorded):
                check_finite("output gradient", sums.add_gradients(gradients, recorded.inputs), f" in batch {index}")
        factors = sums.factors()
        self._check_called(factors)
        bases = {name: self._bases(factors[name]) for name in factors}
        if self.settings.curvature == "ekfac":
            values = self._eigenvalues(factors, bases)
        else:
            values = {name: kronecker_eigenvalues(s, a) for name, (s, a) in bases.items()}
        one = torch.ones((), dtype=torch.float64)
        posterior = LayerwisePosterior(
            {
                layer.name: KroneckerPosterior(
                    bases[layer.name][0].vectors,
                    bases[layer.name][1].vectors,
                    values[layer.name],
                    one.to(layer.device),
                )
                for layer in self.layers
            }
        )
        return Fit(posterior, factors, totals.n_examples, _likelihood_of(totals), sums.input_rows)

    def _bases(self, factors: KroneckerFactors) -> tuple[Eigenbasis, Eigenbasis]:
        return eigenbasis(factors.s, factors.tail_s), eigenbasis(factors.a, factors.tail_a)

    def _eigenvalues(
        self, factors: Mapping[str, KroneckerFactors], bases: Mapping[str, tuple[Eigenbasis, Eigenbasis]]
    ) -> dict[str, Any]:
        sums = {name: EigenvalueSum(s, a, factors[name], self.settings.factors.tail) for name, (s, a) in bases.items()}
        for _, recorded in self._captures("eigenvalues", _Totals(), weight_gradients=True):
            for gradients in self._backward(recorded, weight_gradients=list(sums)):
                for name, gradient in gradients.items():
                    sums[name].add(gradient)
        return {name: total.eigenvalues() for name, total in sums.items()}

    def _exact(self) -> Fit:
        totals = _Totals()
        budget = self.settings.memory_budget or default_budget(model_device(self.model))
        store = RowStore(budget, self.settings.row_dtype)
        names = [layer.name for layer in self.layers]
        called: set[str] = set()
        for index, recorded in self._captures("rows", totals, weight_gradients=True):
            called |= recorded.inputs.keys()
            for gradients in self._backward(recorded, weight_gradients=names):
                gradients |= recorded.without_gradient()
                rows = {name: gradients[name].flatten(start_dim=1) for name in names}
                squares = square_sums({name: (row, None) for name, row in rows.items()})
                check_finite(
                    "gradient", [name for name in names if not math.isfinite(squares[name])], f" in batch {index}"
                )
                store.append(rows)
        self._check_called(called)
        shapes = {layer.name: layer.shape for layer in self.layers}
        posterior = ExactPosterior(store, shapes, model_device(self.model))
        return Fit(posterior, None, totals.n_examples, _likelihood_of(totals))

    def _captures(self, what: str, totals: _Totals, weight_gradients: bool = False) -> Iterator[tuple[int, Capture]]:
        """Every batch, in pieces that fit the memory budget, with its labels checked and counted."""
        device = model_device(self.model)
        for index, given in enumerate(tqdm(self.loader, desc=what, unit="batch", disable=not self.progress)):
            try:
                batch = Batch.of(given, device)
                if batch.size == 0:
                    continue
                step = examples_within(
                    self.settings.memory_budget, batch, self.layers, weight_gradients=weight_gradients
                )
                for _, recorded in captures(self.layers, self.forward, batch, step, all_labels=True):
                    self._count(recorded, totals)
                    yield index, recorded
            except (ValueError, TypeError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"batch {index}: {error}") from error
        if totals.n_examples == 0:
            raise ValueError("loader: expected at least one batch with at least one example, got none")
        if int(totals.positions) == 0:
            raise ValueError(
                "mask: expected at least one position that carries a loss, got none in all of the data (a mask of all "
                "False, or labels that are all -100)"
            )

    def _count(self, recorded: Capture, totals: _Totals) -> None:
        logits, mask, labels, _ = recorded.result
        if not torch.isfinite(logits if mask is None else logits[mask]).all():
            raise ValueError("the logits are not finite (NaN or infinity)")
        self.likelihood.check_logits(logits)
        totals.n_examples += len(logits)
        totals.positions = totals.positions + (len(logits) if mask is None else mask.sum())
        if labels is None:
            totals.labelled = False
            return
        labels = self.likelihood.check_labels(logits, labels)
        recorded.result = recorded.result._replace(labels=labels)
        added = self.likelihood.log_likelihood(logits, labels, mask)
        totals.log_likelihood = added if totals.log_likelihood is None else totals.log_likelihood + added

    def _backward(self, recorded: Capture, weight_gradients: Collection[str] = ()) -> Iterator[dict[str, Tensor]]:
        logits, mask, labels, _ = recorded.result
        if logits.device not in self._generators:
            self._generators[logits.device] = torch.Generator(logits.device).manual_seed(self.settings.seed)
        for cotangent, last in self.likelihood.cotangents(
            logits,
            mask,
            labels,
            fisher=self.settings.fisher,
            samples=self.settings.fisher_samples,
            generator=self._generators[logits.device],
        ):
            yield recorded.backward(cotangent, weight_gradients=weight_gradients, retain_graph=not last)

    def _check_clear(self, index: int) -> None:
        """A Kronecker factor of the inputs must not count padding; the exact curvature need not know."""
        for name, reason in self.forward.findings.unclear.items():
            raise ValueError(
                f"batch {index}: {name}: {reason}, so that its factor A would count padding; pass batches without "
                "padding (one example each, or of equal length), or curvature='exact'"
            )

    def _check_called(self, called: Collection[str]) -> None:
        missing = [layer.name for layer in self.layers if layer.name not in called]
        if missing:
            raise ValueError(
                f"{', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}: never called by forward, so the "
                "data say nothing about it (an adapter that is merged, disabled or not active?); leave it out with "
                "modules=..."
            )


def _likelihood_of(totals: _Totals) -> float | None:
    if not totals.labelled or totals.log_likelihood is None:
        return None
    return float(totals.log_likelihood)
