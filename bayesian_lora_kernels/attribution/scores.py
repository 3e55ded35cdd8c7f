"""Influence of training examples on the losses of others, by the inverse of the posterior's precision.

With more weight on example i the MAP weights move by `-Sigma grad l_i` for each unit of it, to first order, and the
loss of a query q by `-grad l_q^T Sigma grad l_i`. Sigma is the inverse of the Gauss-Newton matrix plus the prior's
precision, both on the scale of sums over the data.

Sources: Hampel 1974, "The influence curve and its role in robust estimation"; Koh, Liang 2017, "Understanding black-box
predictions via influence functions"; Grosse et al. 2023, "Studying large language model generalization with influence
functions" (EKFAC).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesian_lora_kernels.attribution.order import InOrder
from bayesian_lora_kernels.config import PriorPrecision
from bayesian_lora_kernels.curvature.factor_sums import Rows, checked_square_sums, not_finite
from bayesian_lora_kernels.curvature.passes import Passes
from bayesian_lora_kernels.model.capture import Capture
from bayesian_lora_kernels.model.forward import model_device
from bayesian_lora_kernels.model.measuring import measuring
from bayesian_lora_kernels.model.memory import default_budget
from bayesian_lora_kernels.model.sharding import not_sharded
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.posterior.prior import Prior
from bayesian_lora_kernels.surroundings import in_own_surroundings

if TYPE_CHECKING:
    from bayesian_lora_kernels.laplace import LaplaceLoRA

# Of the budget, what each of these takes: gradients of the examples that come by, and the queries' that are kept.
SHARE = 4


@in_own_surroundings
def influence(
    laplace: LaplaceLoRA,
    train_loader: Iterable[Any],
    queries: Iterable[Any],
    *,
    damping: PriorPrecision | None = None,
    progress: bool = True,
) -> Tensor:
    """How the loss of each query changes when a training example counts more.

    `-grad l_q^T (F + damping)^-1 grad l_i`, with F the curvature that `laplace` has and l the negative log-likelihood
    of an example's labels, summed over its positions: to first order, what query q's loss changes by for each unit of
    weight that example i gets beside its own. Removing it changes the loss by minus that. Negative: the example helps.

    Args:
        laplace: after `fit` on the training data, in any kind of curvature.
        train_loader: labelled batches of N examples, in the order of the result's columns.
        queries: labelled batches of Q examples, in the order of its rows.
        damping: what is added to the curvature: one precision, or one for each module; None: the prior's.
        progress: whether to show a progress bar.

    Returns:
        `[Q, N]` float64. The model runs once over the queries, and once over the training data for as many of them as
        fit a quarter of `memory_budget` (Q P numbers; of single precision, 4 bytes each).

    Raises:
        RuntimeError: before `fit`.
        ValueError: for batches without labels, a loader that shuffles, is of a share of the data or gives other batches
            the next time, gradients that are not finite, a model that is sharded, a curvature whose rows are spread
            over processes, and queries that do not fit the memory at once if `train_loader` is an iterator, which
            cannot start again.
        TypeError: for a single batch instead of a loader, or a curvature without `root`.
    """
    posterior, budget = damped(laplace, damping), budget_of(laplace)
    train, queries = InOrder(train_loader, "train_loader"), InOrder(queries, "queries")
    rows: list[Tensor] = []
    with measuring(laplace.model):
        for count, solved in enumerate(_blocks(laplace, queries, posterior, budget // SHARE)):
            if count and isinstance(train_loader, Iterator):
                raise ValueError(
                    "train_loader: the queries do not fit the memory at once, so that it is gone over more than once: "
                    "expected a DataLoader or a list, got an iterator; or raise memory_budget"
                )
            parts = gradients(laplace, posterior, train, progress)
            rows.append(torch.cat([-products(solved, part) for part in parts], dim=1))
    return torch.cat(rows)


class _Losses(Passes):
    """The loss of each example itself, whatever its weight in the data."""

    def _example_weights(self, recorded: Capture) -> Tensor | None:
        return None


def damped(laplace: LaplaceLoRA, damping: PriorPrecision | None) -> Posterior:
    """The posterior of a fit, under another prior if one is given.

    Raises:
        RuntimeError, ValueError: as `influence`.
    """
    curvature = laplace._fitted("influence").curvature
    not_sharded(laplace.model, "influence")
    if curvature.processes.size > 1:
        raise ValueError(
            f"influence: the curvature's rows are spread over {curvature.processes.size} processes, and influence runs "
            "on one; fit on one process, or with curvature='kfac' or 'ekfac'"
        )
    if damping is None:
        return laplace._gaussian()
    prior = Prior(damping).over([layer.name for layer in laplace.layers])
    return Posterior(curvature, prior.detached(), laplace.noise_variance.detach())


def budget_of(laplace: LaplaceLoRA) -> int:
    """Bytes."""
    return laplace.config.memory_budget or default_budget(model_device(laplace.model))


def gradients(
    laplace: LaplaceLoRA,
    posterior: Posterior,
    loader: InOrder,
    progress: bool,
    share: int = SHARE,
) -> Iterator[dict[str, Tensor]]:
    """Gradients `{layer: [n, d_out, d_in]}` of the log-likelihood of each example, some examples at a time.

    Call within `measuring`.

    Args:
        laplace: whose model it is.
        posterior: whose noise variance counts.
        loader: labelled batches.
        progress: whether to show a progress bar.
        share: of the memory budget, the part that captures and gradients may take: one over this.

    Raises:
        ValueError: for a batch without labels, and gradients that are not finite; the batch is named.
    """
    config = replace(laplace.config, fisher="empirical", memory_budget=max(1, budget_of(laplace) // share))
    passes = _Losses(laplace.model, laplace.layers, laplace._forward, loader, config, progress)
    name = loader.name
    names, noise = [layer.name for layer in laplace.layers], float(posterior.noise_variance)
    for index, recorded in passes.captures(name, weight_gradients=True):
        if recorded.result.labels is None:
            raise ValueError(f"{name}: batch {index} has no labels, and influence is of their losses")
        for part, found in passes.backward(recorded, weight_gradients=names):
            found |= part.without_gradient()
            rows: dict[Hashable, Rows] = {layer: (found[layer].flatten(start_dim=1), None) for layer in names}
            error = functools.partial(not_finite, what="gradient", where=f" in batch {index} of {name}")
            checked_square_sums(rows, passes.checks, error)
            yield {layer: found[layer] if noise == 1 else found[layer] / noise for layer in names}


def products(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Inner products `[n_a, n_b]` of vectors of weights `{layer: [n, d_out, d_in]}`, added up in float64."""
    found = [(x.flatten(1) @ b[name].flatten(1).to(x.dtype).mT).double() for name, x in a.items()]
    return torch.stack([one.to(found[0].device) for one in found]).sum(dim=0)


def _blocks(laplace: LaplaceLoRA, queries: InOrder, posterior: Posterior, room: int) -> Iterator[dict[str, Tensor]]:
    """The queries' gradients times Sigma, as many at a time as fit `room` bytes; at least one piece of a batch."""
    held: list[dict[str, Tensor]] = []
    free = room
    # Solving takes the gradients in float64, twice.
    for piece in gradients(laplace, posterior, queries, False, share=4 * SHARE):
        size = sum(gradient.nbytes for gradient in piece.values())
        if held and size > free:
            yield _joined(held)
            held, free = [], room
        solved = posterior.solve({name: gradient.double() for name, gradient in piece.items()})
        held.append({name: solved[name].to(gradient) for name, gradient in piece.items()})
        free -= size
    yield _joined(held)


def _joined(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
