"""A posterior's folder: what of a `LaplaceLoRA` is written into it, and what is checked when it is read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.likelihood import LIKELIHOODS
from bayesian_lora_kernels.curvature.passes import Fit
from bayesian_lora_kernels.model import fingerprint
from bayesian_lora_kernels.model.forward import ForwardFunction
from bayesian_lora_kernels.posterior import storage
from bayesian_lora_kernels.posterior.curvature import CURVATURES
from bayesian_lora_kernels.posterior.stored import Stored
from bayesian_lora_kernels.posterior.weights import MeasuredWeights, adapter_digest, covered_by, find_adapter
from bayesian_lora_kernels.predictive.calibrate import Calibration

if TYPE_CHECKING:
    from bayesian_lora_kernels.laplace import LaplaceLoRA

BASE = "base_model"  # the tensor that holds the fingerprint of the base model


def save(laplace: LaplaceLoRA, folder: str | os.PathLike[str]) -> None:
    """See `LaplaceLoRA.save_pretrained`."""
    fit, weights = laplace._fitted("save_pretrained"), laplace._weights
    assert weights is not None
    calibration = laplace.calibration
    if calibration is not None and calibration.outdated is not None:
        warnings.warn(f"{folder}: saved without its calibration: {calibration.outdated} since", stacklevel=4)
        calibration = None
    tensors, described = fit.curvature.pack()
    norms = laplace._square_norms()
    layers = {
        layer.name: {
            "shape": list(layer.shape),
            "square_norm": float(norms[layer.name]),
            "covers": [leaf for leaf in ("weight", "bias") if getattr(layer, leaf)],
            **described.get(layer.name, {}),
        }
        for layer in laplace.layers
    }
    values, base = weights.base or fingerprint.take(laplace.model, laplace._parameters().values())
    ids = laplace._forward.class_token_ids
    description = {
        "settings": laplace.config.as_json(),
        "class_token_ids": None if ids is None else ids.tolist(),
        "custom_forward": laplace._forward.function is not None,
        "prior_precision": {name: float(laplace.prior[name]) for name in layers},
        "n_examples": fit.n_examples,
        "log_likelihood": fit.log_likelihood,
        "noise": {"variance": float(laplace.noise_variance), "targets": fit.targets}
        if LIKELIHOODS[laplace.likelihood].noisy
        else None,
        "adapter_sha256": weights.digest or adapter_digest(laplace._parameters()),
        "layers": layers,
        "base_model": base,
        "calibration": None if calibration is None else calibration.as_json(),
    }
    processes = fit.curvature.processes
    with processes.together():
        if processes.rank == 0:
            storage.save(folder, {**tensors, BASE: values}, description)
        else:
            storage.hand_over({**tensors, BASE: values})


def load(
    kind: type[LaplaceLoRA], model: nn.Module, folder: str | os.PathLike[str], forward: ForwardFunction | None
) -> LaplaceLoRA:
    """See `LaplaceLoRA.from_pretrained`."""
    tensors, content = storage.load(folder)
    if content["custom_forward"] and forward is None:
        raise ValueError(f"{folder}: this posterior was fitted with its own forward; pass the same forward=...")
    config = LaplaceConfig.from_json(content["settings"])
    with _errors_name(folder):
        saved = content.get("calibration")
        calibration = None if saved is None else Calibration.from_json(saved)
        place, same_weights = find_adapter(model, content)
        config = replace(config, modules=covered_by(model, content["layers"], place))
        laplace = kind(model, forward, content["class_token_ids"], config=config)
    stored = Stored(tensors, content["layers"], place.layers, {x.name: x.device for x in laplace.layers})
    with _errors_name(folder):
        shapes = {layer.name: layer.shape for layer in laplace.layers}
        for name, found in place.layers.items():
            if stored.shape(name) != shapes[found]:
                raise ValueError(
                    f"expected {found} of shape {list(stored.shape(name))}, this model's has {list(shapes[found])}"
                )
        if not same_weights:
            raise ValueError(
                "the adapter's weights are not those the posterior was fitted to (another adapter, further "
                "training, or a dtype that does not hold them)"
            )
        curvature = CURVATURES[config.curvature].unpack(stored)
        if content["version"] > 1:
            base = content["base_model"]
            count = sum(tensor["values"] for tensor in base["tensors"].values())
            values = stored.tensor(BASE, (count,), finite=False)
            fingerprint.check(model, laplace._parameters().values(), place.adapters, values, base)
        else:
            warnings.warn(
                f"{folder}: its posterior is of format version 1, which says nothing of the base model; make sure "
                "that it is the right one, and save_pretrained again",
                stacklevel=4,
            )
    noise = content.get("noise") or {"variance": 1.0, "targets": 0.0}
    laplace._fit = Fit(curvature, content["n_examples"], content["log_likelihood"], noise["targets"])
    laplace._weights = MeasuredWeights.of(laplace.model, laplace._parameters())
    laplace.noise_variance = noise["variance"]
    laplace.prior_precision = {place.layers[name]: value for name, value in content["prior_precision"].items()}
    if calibration is not None:
        laplace._calibration = calibration, *laplace._belongs()
    return laplace


@contextmanager
def _errors_name(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Errors begin with the folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
