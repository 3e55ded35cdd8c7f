"""From a batch's columns to a model's arguments: what is passed on, what is left out, what is refused."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from bayesian_lora_kernels.model.host import on_host

NOT_SERVED = {
    "adapter_names": "one posterior is that of one adapter's weights, but each example would use an adapter of its "
    "own; predict the examples of each adapter by themselves, after model.set_adapter(...)",
    "past_key_values": "the cached keys and values depend on the adapter's weights too, but their derivatives are not "
    "in the cache; pass the whole text in input_ids",
}


def pass_on(inputs: Mapping[str, Any], accepted: Collection[str]) -> dict[str, Any]:
    """Of a batch's columns those that go to the model: tensors, and whatever else its signature names.

    Raises:
        ValueError: for columns that would make the posterior that of something else.
        TypeError: for a column of a kind that is neither passed on nor known to be safe to leave out.
    """
    for key, reason in NOT_SERVED.items():
        if inputs.get(key) is not None:
            raise ValueError(f"{key}: {reason}")
    if inputs.get("return_dict") is False:
        raise ValueError("return_dict: expected an output with .logits, return_dict=False returns a tuple")
    kwargs = {}
    for key, value in inputs.items():
        if value is None:
            continue
        if isinstance(value, Tensor) or key in accepted:
            kwargs[key] = value
        elif not _is_text(value):
            raise TypeError(
                f"{key}: expected a tensor, or an argument that the model's forward names, got {type(value).__name__}; "
                "leave it out of the batch, or pass forward=callable(model, batch) -> logits"
            )
    return kwargs


def _is_text(value: Any) -> bool:
    """Strings and numbers, in lists and mappings or not: columns that come along for people."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_text, value))
    if isinstance(value, Mapping):
        return all(map(_is_text, value.values()))
    return isinstance(value, (str, bytes, int, float, bool)) or value is None


def is_left_padded(mask: Tensor) -> bool:
    """Whether some example of a mask `[N, T]` starts with padding."""
    return not bool(on_host(mask)[:, 0].bool().all())


def decoder_inputs(base: nn.Module, labels: Tensor) -> Tensor:
    """The decoder's inputs `[N, T]` that an encoder-decoder of transformers makes of its labels.

    Raises:
        ValueError: if the model has no known way to make them.
    """
    config: Any = base.config
    prepare: Any = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    shift: Any = getattr(sys.modules.get(type(base).__module__), "shift_tokens_right", None)
    labels = labels.clone()
    if prepare is not None:
        return prepare(labels=labels)
    if shift is not None:
        names = list(inspect.signature(shift).parameters)
        more = {name: getattr(config, name) for name in names[1:]}
        return shift(labels, **more)
    raise ValueError(
        f"decoder_input_ids: {type(base).__name__} has no known way to make the decoder's inputs from labels; pass "
        "decoder_input_ids"
    )
