"""Jacobians of chosen logits with respect to every layer's matrix, kept as what they are made of."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from bayesian_lora_kernels.model.capture import Capture, LayerInput
from bayesian_lora_kernels.model.deferred import AT_ONCE, AtOnce
from bayesian_lora_kernels.ops.checks import accumulate_dtype
from bayesian_lora_kernels.ops.masking import zero_masked


def unit_cotangents(logits: Tensor, indices: Tensor | Sequence[int]) -> Iterator[Tensor]:
    """For each of C logits of every example, chosen by `indices` `[N, C]` or `[C]`, the cotangent that it is alone in.

    Logits `[N, ...]` count as `[N, K]`; the cotangents are of their shape.
    """
    for index in torch.as_tensor(indices, device=logits.device).expand(len(logits), -1).unbind(dim=1):
        yield _cotangent(logits, index[:, None], logits.new_ones(1))


def _cotangent(logits: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Of the shape of the logits `[N, ...]`: `values` `[C]` added at the `indices` `[N, C]` of every example."""
    n = len(logits)
    cotangent = logits.new_zeros(n, logits[0].numel())
    return cotangent.scatter_add_(1, indices, values.to(logits).expand(n, -1)).reshape(logits.shape)


def _new_columns(gradient: Tensor, count: int) -> Tensor:
    """`[N, count, ...]` for `count` gradients `[N, ...]`; on a GPU each has a place in one piece, to be copied fast."""
    n, rest = len(gradient), gradient.shape[1:]
    if gradient.device.type == "cpu":
        return gradient.new_empty(n, count, *rest)
    return gradient.new_empty(count, n, *rest).transpose(0, 1)


class Jacobians:
    """`J [N, C, d_out, d_in]` of every layer, from one backward pass for each of the C logits, or contrasts of logits.

    A layer keeps its input and the gradients of the logits with respect to its output, or the Jacobian itself where
    that is smaller (fewer inputs than tokens), or wanted. Layers that were not called have the Jacobian zero.

    Attributes:
        shape: `(N, C)`.
        inputs: of the layers that were called.

    Args:
        recorded: one forward pass with logits `[N, ...]`, which count as `[N, K]`; its graph is used up here.
        indices: `[N, L]`, which of the K logits of each example.
        whole: whether every Jacobian itself is kept.
        contrasts: `[L, C]`, the sums of these logits whose Jacobians are wanted; None: each by itself, C = L.
        checks: see `Capture.backward`.
    """

    def __init__(
        self,
        recorded: Capture,
        indices: Tensor,
        whole: bool = False,
        contrasts: Tensor | None = None,
        checks: AtOnce = AT_ONCE,
    ):
        self.checks = checks
        self.shape = len(indices), (indices if contrasts is None else contrasts).shape[1]
        self.inputs: dict[str, LayerInput] = dict(recorded.inputs)
        self._formed = {name for name, (a, _, _) in self.inputs.items() if whole or a.shape[2] < a.shape[1]}
        if contrasts is None:
            cotangents = unit_cotangents(recorded.logits, indices)
        else:
            cotangents = (_cotangent(recorded.logits, indices, column) for column in contrasts.unbind(dim=1))
        self._gradients = self._run(recorded, cotangents)
        self._not_called = recorded.without_gradient() if whole else {}
        self._units: dict[Hashable, Tensor] = {}  # which layers share

    def _run(self, recorded: Capture, cotangents: Iterator[Tensor]) -> dict[str, Tensor]:
        """One backward pass for each cotangent, summed over the batch: examples do not interact."""
        count = self.shape[1]
        collected: dict[str, Tensor] = {}
        for c, cotangent in enumerate(cotangents):
            gradients = recorded.backward(
                cotangent, weight_gradients=self._formed, retain_graph=c + 1 < count, checks=self.checks
            )
            if not collected:
                collected = {name: _new_columns(gradient, count) for name, gradient in gradients.items()}
            torch._foreach_copy_([collected[name][:, c] for name in gradients], list(gradients.values()))
        return collected

    def matrix(self, layer: str) -> Tensor:
        """`[N, C, d_out, d_in]` of a layer, float32 (float64 for a float64 model)."""
        if layer in self._not_called:
            return self._not_called[layer][:, None].expand(-1, self.shape[1], -1, -1)
        gradients = self._gradients[layer]
        if layer in self._formed:
            return gradients
        a, mask, _ = self.inputs[layer]
        dtype = accumulate_dtype(a, gradients)
        a, gradients = zero_masked(a, mask), zero_masked(gradients.transpose(1, 2), mask).transpose(1, 2)
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
