"""Posterior samples of the hidden state before the output head, in the linearised network.

One sample of the weights, pushed through the Jacobian, is one exact sample of `h - h_MAP`, jointly for every example
and position. Source: Immer, Korzepa, Bauer 2021 (the linearised predictive), here by Jacobian-vector products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.dora import constant_norms
from bayesian_lora_kernels.model.forward import Forward, model_device
from bayesian_lora_kernels.model.head import OutputHead, read_head
from bayesian_lora_kernels.model.hidden import HiddenStates, attention_weights_are_formed, differentiable_attention
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.model.measuring import inference_mode, measuring, uninterrupted
from bayesian_lora_kernels.model.memory import default_budget
from bayesian_lora_kernels.model.reading import inputs_and_labels
from bayesian_lora_kernels.ops.checks import accumulate_dtype
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.predictive.jvp import JacobianVectorProduct

# Weights are drawn in blocks of this size whatever the memory, so that the same generator gives the same samples.
BLOCK = 8
# Rows (tokens times samples) beyond which a CPU is no faster for more at once.
CPU_ROWS = 2048


@dataclass(frozen=True)
class Deviations:
    """Samples of what differs from the MAP, to first order.

    Attributes:
        hidden: `[S, N, d]`, or `[S, N, T, d]`, of the hidden state, in the dtype in which the model computes it.
        head: `{layer: [S, d_out, d_in]}`, of the weights of an adapted head.
    """

    hidden: Tensor
    head: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.hidden)

    def first(self, n: int) -> Deviations:
        """The first n samples."""
        return Deviations(self.hidden[:n], {name: d[:n] for name, d in self.head.items()})

    @staticmethod
    def join(parts: Sequence[Deviations]) -> Deviations:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        hidden = torch.cat([part.hidden for part in parts])
        return Deviations(hidden, {name: torch.cat([part.head[name] for part in parts]) for name in parts[0].head})


class HiddenSampler:
    """Hidden states of a fitted model, and their posterior samples.

    Args:
        model: stays as it is.
        layers: that carry the posterior.
        forward: from a batch to logits; must have an output head.
        posterior: of the layers' weights.
        memory_budget: bytes; None: half of what is free. Examples and samples run in pieces within it.
        jvp: how derivatives are taken; is shared so that they are tried once.

    Raises:
        ValueError: for a model without an output head.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        forward: Forward,
        posterior: Posterior,
        memory_budget: int | None,
        jvp: JacobianVectorProduct,
    ):
        self.model, self.layers, self.forward = model, layers, forward
        self.posterior, self.memory_budget = posterior, memory_budget
        self.jvp = jvp
        self.states = HiddenStates(forward)
        self._inner = [layer for layer in layers if not forward.in_head(layer.name)]

    def prepare(self, batch: Any) -> Batch:
        """A user's batch on the model's device, without labels.

        Raises:
            TypeError: if it is no mapping.
            ValueError: if it is empty.
        """
        inputs, _ = inputs_and_labels(batch)
        if not isinstance(inputs, Mapping):
            raise TypeError(f"batch: expected a mapping (input_ids, attention_mask, ...), got {type(inputs).__name__}")
        prepared = Batch.of(inputs, model_device(self.model))
        if not prepared.rows_of_inputs:
            raise ValueError("batch: expected at least one example")
        return prepared

    def head(self, batch: Batch) -> OutputHead:
        """The output head, with what it does to the hidden state; see `read_head` for errors."""
        with measuring(self.model), torch.no_grad():
            inference_mode(self.model)
            return read_head(self.forward, [layer.name for layer in self.layers], batch)

    def mean(self, batch: Batch, every: bool) -> tuple[Tensor, Tensor | None]:
        """Hidden states at the MAP weights, `[N, d]` of the last valid token or `[N, T, d]` of every token; the mask.

        Raises:
            ValueError: if they are not finite.
        """
        with measuring(self.model), torch.no_grad():
            inference_mode(self.model)
            parts = [self._at(piece, self.states(piece), every) for _, piece in batch.pieces(self._shape(batch)[0])]
        hidden = torch.cat(parts)
        hidden = hidden.to(accumulate_dtype(hidden))
        mask = self.states.mask(batch, hidden) if every else None
        if not torch.isfinite(hidden if mask is None else hidden[mask.to(hidden.device)]).all():
            raise ValueError("the hidden states before the output head are not finite (NaN or infinity)")
        return hidden, mask

    def draw(self, batch: Batch, n: int, every: bool, generator: torch.Generator | None) -> Deviations:
        """Posterior samples, n of them, at the last valid token of each example, or at every token.

        Raises:
            RuntimeError: if the model has no derivative of any kind.
        """
        examples, samples = self._shape(batch)
        blocks = max(1, samples // BLOCK)
        parts: list[Deviations] = []
        with measuring(self.model), differentiable_attention(self.model), torch.no_grad():
            inference_mode(self.model)  # `measuring` leaves checkpointing on, which these derivatives do not need
            with constant_norms(self.model, lambda: self._run(batch, examples)):
                while (missing := n - sum(map(len, parts))) > 0:
                    drawn = [self.posterior.sample(BLOCK, generator) for _ in range(min(blocks, -(-missing // BLOCK)))]
                    weights = {name: torch.cat([part[name] for part in drawn])[:missing] for name in drawn[0]}
                    parts.append(self._push(batch, weights, examples, samples, every))
        return Deviations.join(parts)

    def _run(self, batch: Batch, examples: int) -> None:
        """The model as it is, some examples at a time."""
        for _, piece in batch.pieces(examples):
            self.states(piece)

    def _push(
        self, batch: Batch, weights: Mapping[str, Tensor], examples: int, samples: int, every: bool
    ) -> Deviations:
        """Hidden states for samples of the weights; examples and samples at a time as said."""
        parameters = {name: p for layer in self._inner for name, p in layer.parameters().items()}
        deviations = {name: d for layer in self._inner for name, d in layer.split(weights[layer.name]).items()}
        deviations = {name: d.to(parameters[name].device) for name, d in deviations.items()}
        total = len(next(iter(weights.values())))
        columns = []
        for _, piece in batch.pieces(examples):

            def function(values: Mapping[str, Tensor], piece: Batch = piece) -> Tensor:
                return self._at(piece, self.states(piece, values), every)

            if parameters:
                rows = []
                for i in range(0, total, samples):
                    some = {k: d[i : i + samples] for k, d in deviations.items()}
                    # PyTorch's derivatives of functions leave their levels behind if they are interrupted.
                    rows.append(uninterrupted(partial(self.jvp, function, parameters, some)))
                columns.append(torch.cat(rows))
            else:  # nothing but the head is adapted
                still = function({})
                columns.append(still.new_zeros(total, *still.shape))
        hidden = torch.cat(columns, dim=1)
        head = {layer.name: weights[layer.name] for layer in self.layers if self.forward.in_head(layer.name)}
        return Deviations(hidden, head)

    def _shape(self, batch: Batch) -> tuple[int, int]:
        """How many examples, and how many samples of them, run at once.

        Forward mode keeps no graph: what counts is the widest moment of one layer, for every sample.
        """
        tokens = max((t.shape[1] for t in batch.inputs.values() if isinstance(t, Tensor) and t.ndim > 1), default=1)
        width = max(
            (
                module.in_features + module.out_features
                for name, module in self.model.named_modules()
                if isinstance(module, nn.Linear) and not self.forward.in_head(name)
            ),
            default=1,
        )
        heads = getattr(getattr(self.forward.base, "config", None), "num_attention_heads", None) or 1
        item = max(p.element_size() for p in self.model.parameters())
        square = attention_weights_are_formed(self.model) or self.jvp.method == "double-backward"
        one = item * tokens * (6 * width + (3 * int(heads) * tokens if square else 0))
        device = model_device(self.model)
        budget = self.memory_budget or default_budget(device)
        rows = budget // max(one, 1)
        if device.type == "cpu":
            rows = min(rows, max(CPU_ROWS // tokens, 1))
        examples = max(1, min(batch.size, rows // BLOCK))
        # Weights of a sample are there several times while they are drawn: noise, deviations, in the model's dtype.
        weights = 4 * 4 * sum(self.posterior.curvature.n_parameters.values())
        return examples, max(1, min(rows // examples, max(budget // max(weights, 1), BLOCK)))

    def _at(self, batch: Batch, hidden: Tensor, every: bool) -> Tensor:
        return hidden if every else self.states.last(batch, hidden)
