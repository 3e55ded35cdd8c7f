"""The covariance of logits across inputs, `J_a Sigma J_b^T`, in pieces that fit the memory budget.

With B a square root of Sigma, an example is the rows `X = J B [C, P]`, and the covariance of two is `X_a X_b^T`: of one
batch with itself it is positive semi-definite as it is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.deferred import Deferred
from bayesian_lora_kernels.model.forward import Forward
from bayesian_lora_kernels.model.jacobians import Jacobians
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.measuring import measuring
from bayesian_lora_kernels.model.memory import default_budget
from bayesian_lora_kernels.model.pieces import captures
from bayesian_lora_kernels.ops.checks import accumulate_dtype
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.predictive.distribution import LogitPosterior
from bayesian_lora_kernels.predictive.logits import checked_logits, examples_at_once
from bayesian_lora_kernels.predictive.probabilities import contrasts
from bayesian_lora_kernels.surroundings import in_own_surroundings

if TYPE_CHECKING:
    from bayesian_lora_kernels.laplace import LaplaceLoRA

# Of the budget, what the float32 Jacobians of the examples that are held take. Beside them there are at most as many
# that come by, and of both the rows, which may be in float64, with a copy while they are made.
SHARE = 8
SLICE = 2**22  # numbers that are widened to float64 at a time


class _Piece(NamedTuple):
    """Some examples: which, their logits `[n, C]`, and their rows of every layer, `[n, R, d_out, d_in]`."""

    examples: slice
    mean: Tensor
    rows: dict[str, Tensor]


class JointPredictor:
    """Covariances of logits of different inputs, for one posterior.

    Args:
        model: stays as it is.
        layers: that carry the posterior.
        forward: from a batch to logits.
        posterior: over their weights.
        memory_budget: bytes for Jacobians and rows; None: half of what is free.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        forward: Forward,
        posterior: Posterior,
        memory_budget: int | None,
    ):
        self.model, self.layers, self.forward = model, layers, forward
        self.posterior = posterior
        self.memory_budget = memory_budget or default_budget(layers[0].device)

    def gaussian(
        self, batch: Batch, outputs: Sequence[int] | Tensor | None = None, differences: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Of all examples of a batch together: means `[N, C]` and covariance `[N C, N C]`, symmetric, float64.

        The model runs on every example, and again on all examples behind those that fit the budget at once.

        Raises:
            ValueError: as `covariance`.
        """
        _check_some(batch)
        means: list[Tensor] = []
        result, start = torch.empty(0), 0
        while start < batch.size:
            with measuring(self.model):
                pieces = self._pieces(batch.rows(start, batch.size), outputs, differences)
                held = self._held(pieces)
                for piece in itertools.chain(held, pieces):
                    if start == 0:
                        means.append(piece.mean)
                        c = piece.mean.shape[1]
                        if not len(result):
                            result = piece.mean.new_empty(batch.size, c, batch.size, c, dtype=torch.float64)
                    columns = _moved(piece.examples, start)
                    for other in held:
                        rows = _moved(other.examples, start)
                        if other is piece:
                            block = _product(piece, piece)
                            result[rows, :, rows] = (block + block.permute(2, 3, 0, 1)) / 2
                        elif rows.start < columns.start:
                            block = _product(other, piece)
                            result[rows, :, columns], result[columns, :, rows] = block, block.permute(2, 3, 0, 1)
            start += held[-1].examples.stop
        return torch.cat(means), self._finished(result, differences)

    def covariance(
        self, batch_a: Batch, batch_b: Batch, outputs: Sequence[int] | Tensor | None = None, differences: bool = False
    ) -> Tensor:
        """`J_a Sigma J_b^T [N_a C, N_b C]`, float64, an example's logits next to each other.

        The model runs on `batch_b` once, and on `batch_a` once for every part of `batch_b` that fits the budget.

        Raises:
            ValueError: for an empty batch, logits with a token dimension or that are not finite, `outputs` that differ
                from example to example, and differences of a single logit.
        """
        _check_some(batch_a, batch_b)
        result, start = torch.empty(0), 0
        while start < batch_b.size:
            with measuring(self.model):
                held = self._held(self._pieces(batch_b.rows(start, batch_b.size), outputs, differences))
                for piece in self._pieces(batch_a, outputs, differences):
                    c = piece.mean.shape[1]
                    if not len(result):
                        result = piece.mean.new_empty(batch_a.size, c, batch_b.size, c, dtype=torch.float64)
                    for other in held:
                        result[piece.examples, :, _moved(other.examples, start)] = _product(piece, other)
            start += held[-1].examples.stop
        return self._finished(result, differences)

    def _pieces(self, batch: Batch, outputs: Sequence[int] | Tensor | None, differences: bool) -> Iterator[_Piece]:
        """The examples of a batch, some at a time; call within `measuring`."""
        if isinstance(outputs, int) or (isinstance(outputs, Tensor) and outputs.ndim != 1):
            raise ValueError(
                "outputs: expected None or indices [C], the same logits of every example; for the most probable of "
                "some, take predict(batch, outputs=k).indices"
            )
        whole, budget = self.posterior.curvature.whole_jacobians, self.memory_budget // SHARE
        step = examples_at_once(self.forward, self.layers, batch, outputs, budget, whole=whole, weight_gradients=True)
        checks = Deferred()
        for examples, recorded in captures(self.layers, self.forward, batch, step):
            logits = recorded.logits
            _, indices, columns = checked_logits(logits, outputs, differences, checks, "joint")
            jacobians = Jacobians(recorded, indices, True, columns, checks)
            n, c = jacobians.shape
            vectors = {layer.name: jacobians.matrix(layer.name).flatten(end_dim=1) for layer in self.layers}
            del jacobians
            rows = {name: x.unflatten(0, (n, c)) for name, x in self.posterior.root(vectors, transpose=True).items()}
            del vectors
            mean = logits.detach().gather(1, indices).to(accumulate_dtype(logits))
            checks.end()
            yield _Piece(examples, mean - mean.mean(dim=1, keepdim=True) if differences else mean, rows)

    def _held(self, pieces: Iterator[_Piece]) -> list[_Piece]:
        """The first of them: as many as the budget allows, at least one."""
        held = [next(pieces)]
        per_example = 4 * held[0].mean.shape[1] * sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        room = self.memory_budget // SHARE // per_example - len(held[0].mean)
        while room > 0 and (piece := next(pieces, None)) is not None:
            held.append(piece)
            room -= len(piece.mean)
        return held

    def _finished(self, result: Tensor, differences: bool) -> Tensor:
        """Checked, and as a matrix; of contrasts, for the logits less their mean."""
        if differences:
            columns = contrasts(result.shape[1], result)
            back = columns / columns.square().sum(dim=0)
            kept = result[:, : columns.shape[1], :, : columns.shape[1]]
            result = torch.einsum("ic,acbd,jd->aibj", back, kept, back)
        if not torch.isfinite(result).all():
            a, _, b, _ = (~torch.isfinite(result)).nonzero()[0].tolist()
            raise ValueError(
                f"joint: the covariance of example {a} with example {b} is not finite (NaN or infinity), because the "
                "model's logits or their gradients are not"
            )
        return result.flatten(2).flatten(end_dim=1)


def _check_some(*batches: Batch) -> None:
    if any(batch.size == 0 for batch in batches):
        raise ValueError("joint: expected at least one example, the batch has none")


def _moved(examples: slice, by: int) -> slice:
    return slice(examples.start + by, examples.stop + by)


def _product(a: _Piece, b: _Piece) -> Tensor:
    """`X_a X_b^T [n_a, C, n_b, C]` in float64, of C logits, or of C - 1 contrasts and zeros behind them."""
    (n_a, c), n_b = a.mean.shape, len(b.mean)
    total = a.mean.new_zeros(n_a, c, n_b, c, dtype=torch.float64)
    for name, rows in a.rows.items():
        x, y = rows.flatten(2), b.rows[name].flatten(2)
        r = x.shape[1]
        step = max(1, SLICE // max(n_a * r, n_b * r))
        for start in range(0, x.shape[2], step):
            part_x, part_y = (z[..., start : start + step].flatten(end_dim=1).double() for z in (x, y))
            total[:, :r, :, :r] += (part_x @ part_y.mT).to(total.device).reshape(n_a, r, n_b, r)
    return total


@in_own_surroundings
def joint_samples(laplace: LaplaceLoRA, batch: object, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Samples of the logits of all examples of a batch at once, with what their inputs share: `[n, N, C]`.

    From a Cholesky decomposition of `laplace.joint(batch)` in float64; `predict(batch).sample(n)` draws each example by
    itself. The level is the posterior's own, which calibration does not touch.

    Args:
        laplace: after `fit`.
        batch: as for `predict`.
        n: number of samples.
        generator: on the device of the logits; None: torch's global one.

    Raises:
        RuntimeError, ValueError, TypeError: as `laplace.joint`.
    """
    mean, covariance = laplace._joint_predictor().gaussian(laplace._inputs(batch))
    flat = LogitPosterior(mean.double().reshape(1, -1), covariance[None])
    return flat.sample(n, generator).reshape(n, *mean.shape).to(mean.dtype)
