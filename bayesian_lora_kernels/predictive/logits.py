"""The posterior over chosen logits: one backward pass per logit, for all examples of a batch at once.

`f ~ N(f_MAP, J Sigma J^T)`, with J the Jacobian at the MAP weights. Source: Yang et al. 2024 (Laplace-LoRA), section 4.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.capture import Capture, accumulate_dtype
from bayesian_lora_kernels.model.forward import Forward
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.measuring import measuring
from bayesian_lora_kernels.model.memory import examples_within, frugal_examples
from bayesian_lora_kernels.model.pieces import captures
from bayesian_lora_kernels.posterior.exact import ExactPosterior
from bayesian_lora_kernels.posterior.layerwise import LayerwisePosterior
from bayesian_lora_kernels.predictive.jacobians import contraction, logit_gradients, narrow_layers

MAX_LOGITS = 4096

Outputs = None | int | Tensor | Sequence[int]


class LogitPredictor:
    """Means and covariances of logits for batches of one fitted model.

    Args:
        model: stays as it is.
        layers: that carry the posterior.
        forward: from a batch to logits.
        posterior: of the layers' weights.
        memory_budget: bytes for captured inputs and gradients; a batch that needs more runs in pieces.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        forward: Forward,
        posterior: LayerwisePosterior | ExactPosterior,
        memory_budget: int | None,
    ):
        self.model, self.layers, self.forward = model, layers, forward
        self.posterior, self.memory_budget = posterior, memory_budget

    def predict(
        self, batch: Batch, outputs: Outputs, priors: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Means `[N, C]`, one covariance `[N, C, C]` per set of prior precisions, and the indices of the logits.

        The Jacobian is formed once, whatever the number of priors.

        Raises:
            ValueError: for logits with a token dimension, indices out of range, too many logits at once, or values
                that are not finite.
        """
        size = batch.size
        if size == 0:
            raise ValueError("predict: expected at least one example, the batch has none")
        if isinstance(outputs, (list, tuple)):
            outputs = torch.as_tensor(outputs)
        if isinstance(outputs, Tensor) and outputs.ndim == 2 and len(outputs) != size:
            raise ValueError(f"outputs: expected one row for each of {size} examples, got {list(outputs.shape)}")
        exact = isinstance(self.posterior, ExactPosterior)
        count = outputs if isinstance(outputs, int) else None
        count = outputs.shape[-1] if isinstance(outputs, Tensor) and outputs.ndim else count
        step = examples_within(self.memory_budget, batch, self.layers, outputs=count or 8, weight_gradients=exact)
        if not exact:  # which goes over all of its rows for every piece
            step = min(step, frugal_examples(batch, self.layers))
        parts = []
        with measuring(self.model):
            for rows, recorded in captures(self.layers, self.forward, batch, step):
                chosen = outputs[rows] if isinstance(outputs, Tensor) and outputs.ndim == 2 else outputs
                parts.append(self._piece(recorded, chosen, priors))
        means = torch.cat([mean for mean, _, _ in parts])
        covariances = [torch.cat([part[1][i] for part in parts]) for i in range(len(priors))]
        indices = parts[0][2]
        if indices is not None and indices.ndim == 2:
            indices = torch.cat([part[2] for part in parts if part[2] is not None])
        return means, covariances, indices

    def _piece(
        self, recorded: Capture, outputs: Outputs, priors: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        logits = recorded.logits
        if logits.ndim != 2:
            raise ValueError(
                f"predict: expected forward to return logits [N, C], got {list(logits.shape)}; with a token dimension, "
                "return the logits of one position per example"
            )
        if not torch.isfinite(logits).all():
            raise ValueError("predict: the logits are not finite (NaN or infinity)")
        indices, per_example = choose_logits(logits.detach(), outputs)
        if isinstance(self.posterior, ExactPosterior):
            jacobians = logit_gradients(recorded, per_example, recorded.inputs)
            count = per_example.shape[1]
            jacobians |= {
                name: zero[:, None].expand(-1, count, -1, -1) for name, zero in recorded.without_gradient().items()
            }
            covariances = [self.posterior.covariance(jacobians, prior) for prior in priors]
        else:
            covariances = self._layerwise(recorded, per_example, self.posterior, priors)
        dtype = accumulate_dtype(logits)
        mean = logits.detach().gather(1, per_example).to(dtype)
        return mean, [covariance.to(logits.device, dtype) for covariance in covariances], indices

    def _layerwise(
        self,
        recorded: Capture,
        indices: Tensor,
        posterior: LayerwisePosterior,
        priors: Sequence[Mapping[str, Tensor]],
    ) -> list[Tensor]:
        """Sum over layers of the covariance contractions, one grouped operation per device and prior.

        A layer with fewer inputs than tokens hands over its weight gradient: its wide output gradients never pile up.
        """
        narrow = narrow_layers(recorded)
        gradients = logit_gradients(recorded, indices, narrow)
        units: dict[Hashable, Tensor] = {}
        parts = {
            name: contraction(recorded.inputs[name], gradient, name in narrow, units)
            for name, gradient in gradients.items()
        }
        devices: dict[torch.device, list[str]] = {}
        for name, (a, _, _) in parts.items():
            devices.setdefault(a.device, []).append(name)
        covariances = []
        for prior in priors:
            layers = posterior.with_prior(prior)
            sums = [
                ops.grouped_jacobian_covariance(
                    [parts[name][0] for name in names],
                    [parts[name][1] for name in names],
                    [layers[name] for name in names],
                    masks=[parts[name][2] for name in names],
                )
                for names in devices.values()
            ]
            covariances.append(torch.stack([one.to(sums[0].device) for one in sums]).sum(dim=0))
        return covariances


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
        indices = torch.as_tensor(outputs, device=logits.device)
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
