"""What the JSON file of a saved posterior must hold; everything that reads it relies on this."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.posterior.curvature import CURVATURES

Check = Callable[[Any], bool]


def is_int(least: int) -> Check:
    """An int, no bool, of at least this, that fits into 64 bits."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_number(value: Any) -> bool:
    return is_int(-(2**63))(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def is_object(value: Any) -> bool:
    """What JSON calls so."""
    return isinstance(value, dict)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(is_int(0)(n) for n in value)


def _is_matrix_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_int(1)(n) for n in value)


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]+\.safetensors", value) is not None


def _is_covers(value: Any) -> bool:
    return value in (["weight"], ["bias"], ["weight", "bias"])


def optional(check: Check) -> Check:
    """None, or what the check accepts."""
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(check(item) for item in value)


_TOP: dict[str, tuple[Check, str]] = {
    "settings": (is_object, "an object"),
    "class_token_ids": (optional(_list_of(is_int(0))), "null or a list of token ids"),
    "custom_forward": (_is_bool, "true or false"),
    "prior_precision": (is_object, "an object of one number for each layer"),
    "n_examples": (is_int(0), "a number of examples"),
    "log_likelihood": (optional(_is_number), "null or a finite number"),
    "adapter_sha256": (_is_digest, "a SHA-256 in hexadecimal"),
    "layers": (lambda value: is_object(value) and len(value) > 0, "an object of one entry for each layer"),
    "tensors": (is_object, "an object"),
}
_TENSORS: dict[str, tuple[Check, str]] = {
    "file": (_is_file_name, "the name of a safetensors file in the same folder"),
    "sha256": (_is_digest, "a SHA-256 in hexadecimal"),
}
_BASE: dict[str, tuple[Check, str]] = {
    "tensors": (is_object, "an object of one entry for each frozen tensor"),
    "skipped": (is_int(0), "a number of tensors"),
}
_BASE_TENSOR: dict[str, tuple[Check, str]] = {
    "shape": (_is_shape, "a list of sizes"),
    "dtype": (_is_text, "text"),
    "values": (is_int(0), "a number of values"),
}
_SHAPE: tuple[Check, str] = (_is_matrix_shape, "[d_out, d_in]")
_NOISE: dict[str, tuple[Check, str]] = {
    "variance": (lambda value: _is_number(value) and value > 0, "a finite positive number"),
    "targets": (lambda value: _is_number(value) and value >= 0, "a number of targets"),
}
_NORM: tuple[Check, str] = (lambda value: _is_number(value) and value >= 0, "a finite number, not negative")
_COVERS: tuple[Check, str] = (_is_covers, '["weight"], ["bias"] or both')


def check_description(content: Mapping[str, Any], version: int) -> None:
    """Every key there, and of its type.

    Raises:
        ValueError: naming the first key that is missing, is not what it should be, or does not belong there.
    """
    check_keys("", content, _TOP)
    settings = LaplaceConfig.from_json(content["settings"])
    curvature = settings.curvature
    if curvature not in CURVATURES:
        raise ValueError(
            f"settings.curvature: expected one of {', '.join(CURVATURES)}, got {curvature!r}; import the module that "
            "registers it first (bayesian_lora_kernels.compat.laplace_lora has 'kfac-published')"
        )
    check_keys("tensors.", content["tensors"], _TENSORS)
    layers = content["layers"]
    per_layer: dict[str, tuple[Check, str]] = {"shape": _SHAPE}
    if version > 1:
        per_layer["covers"] = _COVERS
    for name, layer in layers.items():
        check_keys("layers.", layers, {name: (is_object, "an object")})
        check_keys(f"layers.{name}.", layer, per_layer | ({"square_norm": _NORM} if "square_norm" in layer else {}))
    positive: tuple[Check, str] = (lambda value: _is_number(value) and value > 0, "a finite positive number")
    check_keys("prior_precision.", content["prior_precision"], dict.fromkeys(layers, positive))
    if version > 1:
        check_keys("", content, {"base_model": (is_object, "an object")})
        check_keys("base_model.", content["base_model"], _BASE)
        tensors = content["base_model"]["tensors"]
        for name, tensor in tensors.items():
            check_keys("base_model.tensors.", tensors, {name: (is_object, "an object")})
            check_keys(f"base_model.tensors.{name}.", tensor, _BASE_TENSOR)
    if version > 2:  # what it holds, Calibration.from_json checks
        check_keys("", content, {"calibration": (optional(is_object), "null or an object")})
    if version > 3:
        noisy = settings.likelihood == "regression"
        of_noise = is_object if noisy else (lambda value: value is None)
        check_keys("", content, {"noise": (of_noise, "an object" if noisy else "null, as there is none")})
        check_keys("noise.", content["noise"] or {}, _NOISE if noisy else {})


def check_keys(prefix: str, content: Mapping[str, Any], spec: Mapping[str, tuple[Check, str]]) -> None:
    """Whether every key of `spec` is there, with a value that its check accepts.

    Raises:
        ValueError: naming the first that is not, with the prefix before it, and what was expected.
    """
    for key, (check, expected) in spec.items():
        if key not in content:
            raise ValueError(f"{prefix}{key}: missing, expected {expected}")
        if not check(content[key]):
            raise ValueError(f"{prefix}{key}: expected {expected}, got {content[key]!r:.80}")
