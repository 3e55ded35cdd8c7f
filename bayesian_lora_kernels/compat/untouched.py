"""Batches of any kind for a user's own forward call, which the engine hands on without looking inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bayesian_lora_kernels.model.forward import Forward

_KEY = "untouched"


class _Box:
    def __init__(self, value: Any):
        self.value = value


def boxed(batch: Any) -> dict[str, Any]:
    """A batch of strings, triples or anything else as a mapping that the engine accepts."""
    return {_KEY: _Box(batch)}


class BoxedForward(Forward):
    """`forward_call(model, batch)` on boxed batches.

    Args:
        model: the model.
        forward_call: the user's, from its own batches to logits.
        masked: whether padding is left out: the attention mask is then read off the call of the model, because the
            batch may be anything.
    """

    def __init__(self, model: nn.Module, forward_call: Callable[[nn.Module, Any], Any], masked: bool):
        super().__init__(model, self._call)
        self._forward_call = forward_call
        self._masked = masked

    def _call(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        def note_mask(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 2:
                batch["attention_mask"] = mask

        handle = model.register_forward_pre_hook(note_mask, with_kwargs=True) if self._masked else None
        try:
            return self._forward_call(model, batch[_KEY].value)
        finally:
            if handle is not None:
                handle.remove()
