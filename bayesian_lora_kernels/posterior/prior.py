"""The prior over the weights: a value."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bayesian_lora_kernels.config import PriorPrecision
from bayesian_lora_kernels.surroundings import in_own_surroundings

NAME = "prior_precision"


class Prior:
    """Independent Gaussians around zero, all of one precision, or of one precision for each module.

    A value: it is never changed, and two are equal if their numbers are. Derivatives go through it, forwards and
    backwards; the tensors that it was made from may change afterwards.

    Attributes:
        shared: the precision that all modules have, 0-d float64; None if each has its own. It is shared if one number
            was given, one tensor for all modules, or equal numbers of which no derivative is wanted.
        modules: the modules that it was given for, None: any.

    Args:
        precision: one finite positive number, or `{module name: number}`.

    Raises:
        TypeError: if it is not a number at all.
        ValueError: if a number is not finite and positive, or there is none.
    """

    @in_own_surroundings
    def __init__(self, precision: PriorPrecision | Prior):
        self.shared: Tensor | None = None
        self.modules: tuple[str, ...] | None = None
        self._by_module: dict[str, Tensor] = {}
        if isinstance(precision, Prior):
            vars(self).update(vars(precision))
            return
        if not isinstance(precision, Mapping):
            self.shared = as_precision(precision).clone()  # type: ignore[arg-type]  # a Tensor is no Prior
            return
        if not precision:
            raise ValueError("prior_precision: expected one number for each module, got an empty mapping")
        self.modules = tuple(precision)
        given = list(precision.values())
        values = [as_number(value) for value in given]
        numbers = torch.stack([value.detach().to(values[0].device) for value in values])
        _check_positive(numbers)
        same = all(value is given[0] for value in given)
        if same or (bool((numbers == numbers[0]).all()) and not any(map(has_derivative, values))):
            self.shared = values[0].clone()
        else:
            self._by_module = {name: value.clone() for name, value in zip(self.modules, values, strict=True)}

    @property
    def precision(self) -> Tensor | dict[str, Tensor]:
        """0-d float64, or `{module name: 0-d float64}`."""
        return dict(self._by_module) if self.shared is None else self.shared

    @property
    def requires_grad(self) -> bool:
        """Whether a precision carries a gradient."""
        return any(value.requires_grad for value in self._values())

    def __getitem__(self, module: str) -> Tensor:
        """The precision of a module, 0-d float64."""
        return self._by_module[module] if self.shared is None else self.shared

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prior):
            return NotImplemented
        if self._by_module.keys() != other._by_module.keys():
            return False
        return torch.equal(*(torch.stack([v.detach().cpu() for v in prior._values()]) for prior in (self, other)))

    __hash__ = None  # type: ignore[assignment]  # a tensor that carries a gradient has no hash of its number

    def __repr__(self) -> str:
        numbers = {name: float(value) for name, value in self._by_module.items()}
        return f"Prior({numbers if self.shared is None else float(self.shared)})"

    def detached(self) -> Prior:
        """The same numbers, without derivatives."""
        if self.shared is not None:
            return Prior(self.shared.detach())
        return Prior({name: value.detach() for name, value in self._by_module.items()})

    def times(self, factor: Tensor) -> Prior:
        """Every precision times a positive number, 0-d float64."""
        if self.shared is not None:
            return Prior(self.shared * factor.to(self.shared.device))
        return Prior({name: value * factor.to(value.device) for name, value in self._by_module.items()})

    def over(self, modules: Collection[str]) -> Prior:
        """The same for modules in this order.

        Raises:
            ValueError: if one is missing, or unknown.
        """
        if self.modules is not None and (difference := sorted(set(self.modules) ^ set(modules))):
            raise ValueError(
                f"prior_precision: expected one number for each of {len(modules)} modules; missing or unknown: "
                f"{', '.join(difference[:3])}"
            )
        if self.shared is not None or self.modules == tuple(modules):
            return self
        return Prior({name: self._by_module[name] for name in modules})

    def _values(self) -> list[Tensor]:
        return list(self._by_module.values()) if self.shared is None else [self.shared]


def as_number(value: float | Tensor, device: torch.device | None = None, name: str = NAME) -> Tensor:
    """A number as a 0-d float64 tensor on `device`; gradients pass through.

    Raises:
        TypeError: if it is not a number at all.
        ValueError: if it is several.
    """
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise TypeError(f"{name}: expected one positive number, got {kind} {value!r}") from error
    if tensor.numel() != 1:
        raise ValueError(f"{name}: expected one positive number, got a tensor of shape {list(tensor.shape)}")
    return tensor.reshape(())


def as_precision(value: float | Tensor, device: torch.device | None = None, name: str = NAME) -> Tensor:
    """A prior precision, or a noise variance, as a 0-d float64 tensor on `device`; gradients pass through.

    Raises:
        TypeError, ValueError: if it is not one finite positive number.
    """
    tensor = as_number(value, device, name)
    _check_positive(tensor.reshape(1), name)
    return tensor


def has_derivative(value: Tensor) -> bool:
    """Whether it is a variable of some derivative, backward or forward; those of `torch.func` are one of these."""
    return value.requires_grad or forward_ad.unpack_dual(value).tangent is not None


def _check_positive(numbers: Tensor, name: str = NAME) -> None:
    good = torch.isfinite(numbers) & (numbers > 0)
    if not good.all():
        raise ValueError(f"{name}: expected a finite positive number, got {numbers[~good][0].item()}")
