"""Batches of any kind for a user's own forward call, which the engine hands on without looking inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.forward import Forward

_KEY = "untouched"


class _Box:
    def __init__(self, value: Any):
        self.value = value


def boxed(batch: Any, **columns: Any) -> Batch:
    """A batch of strings, triples or anything else as one that the engine accepts, and the columns it shall see."""
    return Batch.unchecked({_KEY: _Box(batch), **columns})


class BoxedForward(Forward):
    """`forward_call(model, batch)` on boxed batches.

    Args:
        model: the model.
        forward_call: the user's, from its own batches to logits.
        masked: whether padding is left out, as the calls of the model say it.
    """

    def __init__(self, model: nn.Module, forward_call: Callable[[nn.Module, Any], Any], masked: bool):
        super().__init__(model, lambda model, batch: forward_call(model, batch[_KEY].value), masked=masked)
