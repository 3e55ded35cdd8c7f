"""Jacobians of chosen logits with respect to every layer's matrix, kept as what they are made of."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from bayesian_lora_kernels.model.capture import Capture, LayerInput
from bayesian_lora_kernels.ops.checks import accumulate_dtype


def unit_cotangents(logits: Tensor, indices: Tensor | Sequence[int]) -> Iterator[Tensor]:
    """For each of C logits of every example, chosen by `indices` `[N, C]` or `[C]`, the cotangent that it is alone in.

    Logits `[N, ...]` count as `[N, K]`; the cotangents are of their shape.
    """
    n = len(logits)
    for index in torch.as_tensor(indices, device=logits.device).expand(n, -1).unbind(dim=1):
        cotangent = logits.new_zeros(n, logits[0].numel()).scatter_(1, index[:, None], 1)
        yield cotangent.reshape(logits.shape)


class Jacobians:
    """`J [N, C, d_out, d_in]` of every layer, from one backward pass for each of the C logits.

    A layer keeps its input and the gradients of the logits with respect to its output, or the Jacobian itself where
    that is smaller (fewer inputs than tokens), or wanted. Layers that were not called have the Jacobian zero.

    Attributes:
        indices: `[N, C]`, the logits.
        inputs: of the layers that were called.

    Args:
        recorded: one forward pass with logits `[N, ...]`, which count as `[N, K]`; its graph is used up here.
        indices: `[N, C]`, which of the K logits of each example.
        whole: whether every Jacobian itself is kept.
    """

    def __init__(self, recorded: Capture, indices: Tensor, whole: bool = False):
        self.indices = indices
        self.inputs: dict[str, LayerInput] = dict(recorded.inputs)
        self._formed = {name for name, (a, _, _) in self.inputs.items() if whole or a.shape[2] < a.shape[1]}
        self._gradients = self._run(recorded)
        self._not_called = recorded.without_gradient() if whole else {}
        self._units: dict[Hashable, Tensor] = {}  # which layers share

    def _run(self, recorded: Capture) -> dict[str, Tensor]:
        """One backward pass for each chosen logit, summed over the batch: examples do not interact."""
        n, count = self.indices.shape
        collected: dict[str, Tensor] = {}
        for c, cotangent in enumerate(unit_cotangents(recorded.logits, self.indices)):
            gradients = recorded.backward(cotangent, weight_gradients=self._formed, retain_graph=c + 1 < count)
            for name, gradient in gradients.items():
                if name not in collected:
                    collected[name] = gradient.new_empty(n, count, *gradient.shape[1:])
                collected[name][:, c] = gradient
        return collected

    def matrix(self, layer: str) -> Tensor:
        """`[N, C, d_out, d_in]` of a layer, float32 (float64 for a float64 model)."""
        if layer in self._not_called:
            return self._not_called[layer][:, None].expand(-1, self.indices.shape[1], -1, -1)
        gradients = self._gradients[layer]
        if layer in self._formed:
            return gradients
        a, mask, _ = self.inputs[layer]
        dtype = accumulate_dtype(a, gradients)
        a = a if mask is None else a.masked_fill(~mask[:, :, None], 0)
        return gradients.to(dtype).mT @ a.to(dtype)[:, None]

    def contraction(self, layer: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `ops.jacobian_covariance` takes of a layer that was called: `a`, `g` and `mask`.

        To it, a layer with its Jacobian is one whose tokens are the unit vectors.
        """
        gradients = self._gradients[layer]
        if layer not in self._formed:
            return self.inputs[layer].a, gradients, self.inputs[layer].mask
        n, width = len(gradients), gradients.shape[-1]
        key = n, width, gradients.dtype, gradients.device
        if key not in self._units:
            self._units[key] = torch.eye(width, dtype=gradients.dtype, device=gradients.device).expand(n, -1, -1)
        return self._units[key], gradients.mT, None
