"""The prior over the weights: a value."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.config import PriorPrecision
from bayesian_lora_kernels.surroundings import in_own_surroundings


class Prior:
    """Independent Gaussians around zero, all of one precision, or of one precision for each module.

    A value: it is never changed, and two are equal if their numbers are. Precisions that require a gradient carry it
    along; others are copied. A mapping of equal numbers without gradients, or of a single one, is one precision for all
    modules.

    Attributes:
        shared: the one precision, 0-d float64; None if there is one for each module.

    Args:
        precision: one finite positive number, or `{module name: number}`.

    Raises:
        TypeError: if it is not a number at all.
        ValueError: if a number is not finite and positive, or there is none.
    """

    @in_own_surroundings
    def __init__(self, precision: PriorPrecision | Prior):
        self.shared: Tensor | None = None
        self._by_module: dict[str, Tensor] | None = None
        self._given_for: tuple[str, ...] | None = tuple(precision) if isinstance(precision, Mapping) else None
        if isinstance(precision, Prior):
            vars(self).update(vars(precision))
            return
        given: dict[str, Any] = dict(precision) if isinstance(precision, Mapping) else {"": precision}
        if not given:
            raise ValueError("prior_precision: expected one number for each module, got an empty mapping")
        values = [as_number(value) for value in given.values()]
        self._numbers = torch.stack([value.detach().to(values[0].device) for value in values])
        _check_positive(self._numbers)
        kept = [v if v.requires_grad else own for v, own in zip(values, self._numbers.unbind(), strict=True)]
        equal = bool((self._numbers == self._numbers[0]).all()) and not any(value.requires_grad for value in values)
        if equal or len(given) == 1:
            self.shared = kept[0]
        else:
            self._by_module = dict(zip(given, kept, strict=True))

    @property
    def precision(self) -> Tensor | dict[str, Tensor]:
        """0-d float64, or `{module name: 0-d float64}`."""
        if self.shared is not None:
            return self.shared
        assert self._by_module is not None
        return dict(self._by_module)

    @property
    def modules(self) -> tuple[str, ...] | None:
        """See the class."""
        return None if self._by_module is None else tuple(self._by_module)

    @property
    def requires_grad(self) -> bool:
        """Whether a precision carries a gradient."""
        values = [self.shared] if self._by_module is None else self._by_module.values()
        return any(value is not None and value.requires_grad for value in values)

    def __getitem__(self, module: str) -> Tensor:
        """The precision of a module, 0-d float64."""
        if self.shared is not None:
            return self.shared
        assert self._by_module is not None
        return self._by_module[module]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prior):
            return NotImplemented
        numbers = [prior._numbers[: None if prior.modules else 1].cpu() for prior in (self, other)]
        return self.modules == other.modules and torch.equal(*numbers)

    __hash__ = None  # type: ignore[assignment]  # a tensor that carries a gradient may change

    def __repr__(self) -> str:
        values = self._numbers.tolist()
        return f"Prior({values[0] if self.modules is None else dict(zip(self.modules, values, strict=True))})"

    def detached(self) -> Prior:
        """The same numbers, without gradients, and independent of the tensors that they came from."""
        if self.shared is not None:
            return Prior(self.shared.detach())
        assert self._by_module is not None
        return Prior({name: value.detach() for name, value in self._by_module.items()})

    def over(self, modules: Collection[str]) -> Prior:
        """The same for modules in this order.

        Raises:
            ValueError: if one is missing, or unknown.
        """
        if self._given_for is not None and (difference := sorted(set(self._given_for) ^ set(modules))):
            raise ValueError(
                f"prior_precision: expected one number for each of {len(modules)} modules; missing or unknown: "
                f"{', '.join(difference[:3])}"
            )
        if self._by_module is None:
            return self
        return Prior({name: self._by_module[name] for name in modules})


def as_number(value: float | Tensor, device: torch.device | None = None) -> Tensor:
    """A number as a 0-d float64 tensor on `device`; gradients pass through.

    Raises:
        TypeError: if it is not a number at all.
        ValueError: if it is several.
    """
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise TypeError(f"prior_precision: expected one positive number, got {kind} {value!r}") from error
    if tensor.numel() != 1:
        raise ValueError(f"prior_precision: expected one positive number, got a tensor of shape {list(tensor.shape)}")
    return tensor.reshape(())


def as_precision(value: float | Tensor, device: torch.device | None = None) -> Tensor:
    """A prior precision as a 0-d float64 tensor on `device`; gradients pass through.

    Raises:
        TypeError, ValueError: if it is not one finite positive number.
    """
    tensor = as_number(value, device)
    _check_positive(tensor.reshape(1))
    return tensor


def _check_positive(numbers: Tensor) -> None:
    good = torch.isfinite(numbers) & (numbers > 0)
    if not good.all():
        raise ValueError(f"prior_precision: expected a finite positive number, got {numbers[~good][0].item()}")
