"""What a fit is of: the settings, the layers and the weights that fits must have in common to be one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.model.forward import Forward
from bayesian_lora_kernels.model.layers import LinearLayer
from bayesian_lora_kernels.posterior.weights import MeasuredWeights
from bayesian_lora_kernels.processes import Processes


def identity(
    model: nn.Module, layers: Sequence[LinearLayer], forward: Forward, config: LaplaceConfig
) -> dict[str, Any]:
    """As JSON can hold it; `adapter` and `base_model` are digests, None where the weights are not at hand."""
    weights = MeasuredWeights.of(model, {name: p for layer in layers for name, p in layer.parameters().items()})
    base, ids = None, forward.class_token_ids
    if weights.base is not None:
        values, described = weights.base
        known = values.cpu().numpy().tobytes() + json.dumps(described, sort_keys=True).encode()
        base = hashlib.sha256(known).hexdigest()
    devices = list(dict.fromkeys(str(layer.device) for layer in layers))
    return {
        "settings": config.as_json(),
        "class_token_ids": None if ids is None else ids.tolist(),
        "custom_forward": forward.function is not None,
        "layers": {
            layer.name: {
                "shape": list(layer.shape),
                "covers": [leaf for leaf in ("weight", "bias") if getattr(layer, leaf)],
                "device": devices.index(str(layer.device)),
            }
            for layer in layers
        },
        "devices": devices,
        "adapter": weights.digest,
        "base_model": base,
    }


def of_any_device(own: dict[str, Any]) -> dict[str, Any]:
    """An identity by the kinds of its devices: another process has other ones of that kind."""
    return {**own, "devices": [name.partition(":")[0] for name in own["devices"]]}


def check_alike(processes: Processes, own: dict[str, Any]) -> None:
    """Whether all processes measure the same model in the same way.

    Raises:
        ValueError: if they do not, on all of them; what differs is named.
    """
    rest = of_any_device(own)
    processes.check_alike(
        {
            **rest.pop("settings"),
            "layers": [*rest["layers"]],
            **rest.pop("layers"),
            "SHA-256 of the posterior's weights": rest.pop("adapter"),
            "SHA-256 of the base model's": rest.pop("base_model"),
            **rest,
        }
    )
