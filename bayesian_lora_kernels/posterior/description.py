"""What the JSON file of a saved posterior must hold; everything that reads it relies on this."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.posterior.curvature import CURVATURES

Check = Callable[[Any], bool]


def _is_int(least: int) -> Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(0)(n) for n in value)


def _is_matrix_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_int(1)(n) for n in value)


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and not set(value) & set("/\\:")


def _is_covers(value: Any) -> bool:
    return value in (["weight"], ["bias"], ["weight", "bias"])


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(check(item) for item in value)


_TOP: dict[str, tuple[Check, str]] = {
    "settings": (_is_object, "an object"),
    "class_token_ids": (_optional(_list_of(_is_int(0))), "null or a list of token ids"),
    "custom_forward": (_is_bool, "true or false"),
    "prior_precision": (_is_object, "an object of one number for each layer"),
    "n_examples": (_is_int(0), "a number of examples"),
    "log_likelihood": (_optional(_is_number), "null or a finite number"),
    "adapter_sha256": (_is_digest, "a SHA-256 in hexadecimal"),
    "layers": (lambda value: _is_object(value) and len(value) > 0, "an object of one entry for each layer"),
    "tensors": (_is_object, "an object"),
}
_TENSORS: dict[str, tuple[Check, str]] = {
    "file": (_is_file_name, "the name of a safetensors file in the same folder"),
    "sha256": (_is_digest, "a SHA-256 in hexadecimal"),
}
_BASE: dict[str, tuple[Check, str]] = {
    "tensors": (_is_object, "an object of one entry for each frozen tensor"),
    "skipped": (_is_int(0), "a number of tensors"),
}
_BASE_TENSOR: dict[str, tuple[Check, str]] = {
    "shape": (_is_shape, "a list of sizes"),
    "dtype": (_is_text, "text"),
    "values": (_is_int(0), "a number of values"),
}
_SHAPE: tuple[Check, str] = (_is_matrix_shape, "[d_out, d_in]")
_COVERS: tuple[Check, str] = (_is_covers, '["weight"], ["bias"] or both')


def check_description(content: Mapping[str, Any], version: int) -> None:
    """Every key there, and of its type.

    Raises:
        ValueError: naming the first key that is missing, is not what it should be, or does not belong there.
    """
    _check("", content, _TOP)
    curvature = LaplaceConfig.from_json(content["settings"]).curvature
    if curvature not in CURVATURES:
        raise ValueError(
            f"settings.curvature: expected one of {', '.join(CURVATURES)}, got {curvature!r}; import the module that "
            "registers it first (bayesian_lora_kernels.compat.laplace_lora has 'kfac-published')"
        )
    _check("tensors.", content["tensors"], _TENSORS)
    layers = content["layers"]
    per_layer: dict[str, tuple[Check, str]] = {"shape": _SHAPE}
    if version > 1:
        per_layer["covers"] = _COVERS
    for name, layer in layers.items():
        _check("layers.", layers, {name: (_is_object, "an object")})
        _check(f"layers.{name}.", layer, per_layer)
    positive: tuple[Check, str] = (lambda value: _is_number(value) and value > 0, "a finite positive number")
    _check("prior_precision.", content["prior_precision"], dict.fromkeys(layers, positive))
    if version > 1:
        _check("", content, {"base_model": (_is_object, "an object")})
        _check("base_model.", content["base_model"], _BASE)
        tensors = content["base_model"]["tensors"]
        for name, tensor in tensors.items():
            _check("base_model.tensors.", tensors, {name: (_is_object, "an object")})
            _check(f"base_model.tensors.{name}.", tensor, _BASE_TENSOR)
    if version > 2:  # what it holds, Calibration.from_json checks
        _check("", content, {"calibration": (_optional(_is_object), "null or an object")})


def _check(prefix: str, content: Mapping[str, Any], spec: Mapping[str, tuple[Check, str]]) -> None:
    for key, (check, expected) in spec.items():
        if key not in content:
            raise ValueError(f"{prefix}{key}: missing, expected {expected}")
        if not check(content[key]):
            raise ValueError(f"{prefix}{key}: expected {expected}, got {content[key]!r:.80}")
