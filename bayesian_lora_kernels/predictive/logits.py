"""The posterior over chosen logits: one backward pass per logit, or contrast, for all examples of a batch at once.

`f ~ N(f_MAP, J Sigma J^T)`, with J the Jacobian at the MAP weights. Source: Yang et al. 2024 (Laplace-LoRA), section 4.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.answers import answers_in
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.capture import Capture
from bayesian_lora_kernels.model.deferred import Deferred
from bayesian_lora_kernels.model.forward import Forward
from bayesian_lora_kernels.model.host import to_device
from bayesian_lora_kernels.model.jacobians import Jacobians
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.measuring import measuring
from bayesian_lora_kernels.model.memory import examples_within, frugal_examples
from bayesian_lora_kernels.model.pieces import captures
from bayesian_lora_kernels.ops.checks import accumulate_dtype
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.predictive.probabilities import contrasts

MAX_LOGITS = 4096
UNKNOWN_LOGITS = 8  # of an example, where nothing tells before the model has run

Outputs = None | int | Tensor | Sequence[int]


class LogitPredictor:
    """Means and covariances of logits for batches of one fitted model.

    Args:
        model: stays as it is.
        layers: that carry the posterior.
        forward: from a batch to logits.
        whole: whether the posteriors want every Jacobian itself (`Curvature.whole_jacobians`).
        memory_budget: bytes for captured inputs and gradients; a batch that needs more runs in pieces.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        forward: Forward,
        whole: bool,
        memory_budget: int | None,
    ):
        self.model, self.layers, self.forward = model, layers, forward
        self.whole, self.memory_budget = whole, memory_budget

    def examples_at_once(self, batch: Batch, outputs: Outputs) -> int:
        """How many examples of a batch run together."""
        whole, budget = self.whole, self.memory_budget
        return examples_at_once(self.forward, self.layers, batch, outputs, budget, whole=whole, weight_gradients=whole)

    def predict(
        self, batch: Batch, outputs: Outputs, posteriors: Sequence[Posterior], differences: bool = False
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Means `[N, C]`, one covariance `[N, C, C]` for each posterior, and the indices of the logits.

        The Jacobian is formed once, whatever the number of posteriors. With `differences` all is of the logits less
        their mean, from C - 1 backward passes: what they share is never computed, and no digits are lost to it.

        Raises:
            ValueError: for logits with a token dimension, indices out of range, too many logits at once, values that
                are not finite, or differences of a single logit.
        """
        size = batch.size
        if size == 0:
            raise ValueError("predict: expected at least one example, the batch has none")
        if isinstance(outputs, (list, tuple)):
            outputs = torch.as_tensor(outputs)
        if isinstance(outputs, Tensor) and outputs.ndim == 2 and len(outputs) != size:
            raise ValueError(f"outputs: expected one row for each of {size} examples, got {list(outputs.shape)}")
        step = self.examples_at_once(batch, outputs)
        parts, checks = [], Deferred()
        with posteriors[0].in_step(), measuring(self.model):
            for rows, recorded in captures(self.layers, self.forward, batch, step):
                chosen = outputs[rows] if isinstance(outputs, Tensor) and outputs.ndim == 2 else outputs
                parts.append(self._piece(recorded, chosen, posteriors, differences, checks))
            checks.end()
        means = torch.cat([mean for mean, _, _ in parts])
        covariances = [torch.cat([part[1][i] for part in parts]) for i in range(len(posteriors))]
        indices = parts[0][2]
        if indices is not None and indices.ndim == 2:
            indices = torch.cat([part[2] for part in parts if part[2] is not None])
        return means, covariances, indices

    def _piece(
        self,
        recorded: Capture,
        outputs: Outputs,
        posteriors: Sequence[Posterior],
        differences: bool,
        checks: Deferred,
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        logits = recorded.logits
        indices, per_example, columns = checked_logits(logits, outputs, differences, checks, "predict")
        jacobians = Jacobians(recorded, per_example, self.whole, columns, checks)
        covariances = [posterior.covariance(jacobians) for posterior in posteriors]
        bad = ~torch.isfinite(covariances[0]).flatten(1).all(dim=1)
        checks.add(bad, functools.partial(_not_finite, len(bad)))
        dtype = accumulate_dtype(logits)
        mean = logits.detach().gather(1, per_example).to(dtype)
        if columns is not None:
            mean -= mean.mean(dim=1, keepdim=True)
            back = columns.to(covariances[0]) / columns.to(covariances[0]).square().sum(dim=0)
            covariances = [back @ covariance @ back.T for covariance in covariances]
        return mean, [covariance.to(logits.device, dtype) for covariance in covariances], indices


def _not_finite(size: int, example: int) -> ValueError:
    return ValueError(
        f"predict: the covariance of example {example} of {size} is not finite (NaN or infinity), because the model's "
        "gradients are not: numbers that overflow in half precision, or attention over rows that are masked altogether "
        "(another attn_implementation may do without)"
    )


def examples_at_once(
    forward: Forward,
    layers: Sequence[LinearLayer],
    batch: Batch,
    outputs: Outputs,
    budget: int | None,
    *,
    whole: bool,
    weight_gradients: bool,
) -> int:
    """How many examples of a batch run together: `examples_within` of the logits that are asked for.

    Args:
        forward: that returns the logits.
        layers: that are captured.
        batch: on the device where it will run.
        outputs: as for `predict`.
        budget: bytes; None: half of what is free.
        whole: see `LogitPredictor`: the exact curvature goes over all of its rows for every piece.
        weight_gradients: see `examples_within`.
    """
    count = outputs if isinstance(outputs, int) else None
    if isinstance(outputs, Tensor):
        count = outputs.shape[-1] if outputs.ndim else None
    elif isinstance(outputs, (list, tuple)):
        count = len(outputs)
    if forward.answers is not None:
        count = count or answers_in(batch.inputs) or 1
    count = count or forward.n_logits or UNKNOWN_LOGITS
    step = examples_within(budget, batch, layers, outputs=count, weight_gradients=weight_gradients)
    return step if whole else min(step, frugal_examples(batch, layers))


def checked_logits(
    logits: Tensor, outputs: Outputs, differences: bool, checks: Deferred, what: str
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """As `choose_logits`, and the contrasts of the chosen ones with `differences`; `what` is the caller's name.

    Raises:
        TypeError: as `choose_logits`.
        ValueError: as `choose_logits`; for a token dimension, numbers that are not finite (by `checks`), and
            differences of a single logit.
    """
    if logits.ndim != 2:
        raise ValueError(
            f"{what}: expected forward to return logits [N, C], got {list(logits.shape)}; with a token dimension, "
            "return the logits of one position per example"
        )
    bad = ~torch.isfinite(logits.detach()).all().reshape(1)
    checks.add(bad, lambda _: ValueError(f"{what}: the logits are not finite (NaN or infinity)"))
    indices, per_example = choose_logits(logits.detach(), outputs)
    count = per_example.shape[1]
    if differences and count < 2:
        raise ValueError("differences: expected at least 2 logits, got 1, of which there is no difference")
    return indices, per_example, contrasts(count, logits) if differences else None


def choose_logits(logits: Tensor, outputs: Outputs) -> tuple[Tensor | None, Tensor]:
    """What `.indices` says, and the indices per example `[N, C]`.

    Raises:
        TypeError: if `outputs` is of no known kind.
        ValueError: if it is out of range, or asks for more than 4096 logits at once.
    """
    n, available = logits.shape
    if outputs is None:
        indices = None
        per_example = torch.arange(available, device=logits.device).expand(n, -1)
    elif isinstance(outputs, bool):
        raise TypeError("outputs: expected None, an int, or a LongTensor [C] or [N, C], got a bool")
    elif isinstance(outputs, int):
        if not 1 <= outputs <= available:
            raise ValueError(f"outputs: expected 1 to {available} most probable logits, got {outputs}")
        indices = per_example = logits.topk(outputs, dim=1).indices
    elif isinstance(outputs, (Tensor, list, tuple)):
        indices = torch.as_tensor(outputs)
        if (
            indices.is_floating_point()
            or indices.dtype == torch.bool
            or indices.ndim not in (1, 2)
            or not indices.numel()
        ):
            raise ValueError(f"outputs: expected integers [C] or [{n}, C], got {indices.dtype} {list(indices.shape)}")
        indices = indices.long()
        if indices.ndim == 2 and len(indices) != n:
            raise ValueError(f"outputs: expected one row for each of {n} examples, got {list(indices.shape)}")
        if indices.min() < 0 or indices.max() >= available:
            raise ValueError(
                f"outputs: expected indices from 0 to {available - 1}, got {int(indices.min())} to {int(indices.max())}"
            )
        indices = to_device(indices, logits.device)
        per_example = indices.expand(n, -1) if indices.ndim == 1 else indices
    else:
        raise TypeError(
            f"outputs: expected None, an int, or a LongTensor [C] or [N, C], got {type(outputs).__name__}"
            + (f" {outputs!r}" if isinstance(outputs, str) else "")
        )
    if per_example.shape[1] > MAX_LOGITS:
        raise ValueError(
            f"outputs: the covariance of {per_example.shape[1]} logits per example is too much at once (at most "
            f"{MAX_LOGITS}); choose some with outputs=k or outputs=indices"
        )
    return indices, per_example
