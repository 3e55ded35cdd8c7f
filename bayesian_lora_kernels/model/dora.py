"""DoRA's norms, `||W + s B A||` of every row: constants to autograd, and so to every derivative that is taken here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bayesian_lora_kernels.model.measuring import undone

NORM, PRODUCT = "get_weight_norm", "get_lora_weight"  # methods of PEFT's DoRA layers; the second is newer
LINEAR = "DoraLinearLayer"


def dora_layers(model: nn.Module) -> list[nn.Module]:
    """PEFT's DoRA layers, which hold the magnitudes."""
    return [module for module in model.modules() if callable(getattr(module, NORM, None))]


@contextmanager
def constant_norms(model: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """Inside, norms are those of the weights as they are now, whatever weights the model is then run with.

    Args:
        model: with DoRA layers; any other is left alone.
        run: runs the model as it is.
    """
    layers = dora_layers(model)
    if not layers:
        yield
        return
    own = [(vars(layer), {key: vars(layer)[key] for key in (NORM, PRODUCT) if key in vars(layer)}) for layer in layers]

    def restore() -> None:
        for attributes, before in own:
            for key in (NORM, PRODUCT):
                attributes.pop(key, None)
            attributes.update(before)

    with undone(restore):
        found: dict[nn.Module, Tensor] = {}
        for layer in layers:
            setattr(layer, NORM, _noting(layer, found))
        run()
        restore()
        for layer, norm in found.items():
            setattr(layer, NORM, _always(norm))
            if type(layer).__name__ == LINEAR and hasattr(layer, PRODUCT):
                setattr(layer, PRODUCT, _always(norm.new_empty(0)))  # of B and A, which nothing but the norm needs
        yield


def _noting(layer: nn.Module, found: dict[nn.Module, Tensor]) -> Callable[..., Tensor]:
    compute: Callable[..., Tensor] = getattr(layer, NORM)

    def norm(*args: Any, **kwargs: Any) -> Tensor:
        found[layer] = value = compute(*args, **kwargs).detach()
        return value

    return norm


def _always(value: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: value
