"""Problems that an implementation must solve before its results are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]
Function = Callable[..., None]

HALF = (torch.float16, torch.bfloat16)
_GUARD = 64  # elements before and after an output that nobody may write
_UNTOUCHED = -12345.0


class Draw:
    """The arguments of one problem, drawn on ``device``; the same seed gives the same numbers."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._guarded: list[tuple[Tensor, int]] = []

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, device=self.device, generator=self._generator).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(shape, device=self.device, generator=self._generator, dtype=dtype)

    def mask(self, *shape: int) -> Tensor:
        """True for about seven of ten."""
        return self.uniform(*shape) < 0.7

    def output(self, *shape: int, dtype: torch.dtype = torch.float32, start: Tensor | None = None) -> Tensor:
        """Memory to write to: NaN, or ``start`` where results are added; what lies around it is watched.

        Of numbers that are no floats: ones, and nothing is watched.
        """
        if not dtype.is_floating_point:
            return torch.ones(shape, dtype=dtype, device=self.device)
        size = torch.Size(shape).numel()
        whole = torch.full((size + 2 * _GUARD,), _UNTOUCHED, dtype=dtype, device=self.device)
        self._guarded.append((whole, size))
        out = whole[_GUARD : _GUARD + size].view(shape)
        return out.fill_(float("nan")) if start is None else out.copy_(start)

    def intact(self) -> bool:
        """Whether nobody wrote beside the outputs."""
        parts = [part for whole, size in self._guarded for part in (whole[:_GUARD], whole[_GUARD + size :])]
        return all(bool((part == _UNTOUCHED).all()) for part in parts)


def off_alignment(x: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of 16 bytes."""
    whole = x.new_empty(x.numel() + 1)
    return whole[1:].view(x.shape).copy_(x)


def strided(x: Tensor) -> Tensor:
    """The same numbers, ``[rows, columns]``, every second of a matrix."""
    rows, columns = x.shape
    whole = x.new_zeros(2 * rows, 2 * columns)
    whole[::2, ::2] = x
    return whole[::2, ::2]


def poisoned(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` with NaN where ``mask`` (over its leading dimensions) is False: what must not be read, or not matter."""
    return x.masked_fill_(~mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), float("nan"))


@dataclass(frozen=True)
class Problem:
    """Arguments of an implementation: outputs first, as it is called."""

    name: str
    arguments: Callable[[Draw], Arguments]


def _everything(arguments: Arguments) -> Arguments:
    return arguments


def _never(arguments: Arguments) -> bool:
    return False


def _nothing(variant: str) -> Iterable[Problem]:
    return ()


@dataclass(frozen=True)
class Suite:
    """What there is to know of an operation in order to verify an implementation of it.

    Args:
        problems: of the usual kinds of call, for a device.
        comparable: after a call, the tensors of its arguments that are determined, to be compared.
        limit: of the error of those, which is that of ``error``.
        sample: a smaller call with some entries of a grouped one; shares its tensors.
        outputs: how many of the arguments, from the first, are written.
        accumulates: whether a call adds to what its outputs hold.
        near: more problems that may take a variant, by its name, where there are too many kinds for a list.
    """

    problems: Callable[[torch.device], Iterable[Problem]]
    comparable: Callable[[Arguments], Sequence[Tensor]]
    limit: Callable[[Arguments], float]
    sample: Callable[[Arguments], Arguments] = _everything
    outputs: int = 1
    accumulates: Callable[[Arguments], bool] = _never
    near: Callable[[str], Iterable[Problem]] = _nothing


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Nested lists and tuples with every tensor replaced; the rest as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(function, one) for one in value)
    return value


def in_float64(arguments: Arguments) -> Arguments:
    """Copies with every floating-point tensor in float64."""
    return tuple(mapped(lambda x: x.double() if x.is_floating_point() else x.clone(), list(arguments)))


def error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest over the tensors of the error relative to the truth: by Frobenius norms, or by the largest elements.

    Not finite where a tensor that should be finite is not.
    """
    worst = 0.0
    for one, true in zip(found, truth, strict=True):
        if one.shape != true.shape:
            raise ValueError(f"expected a tensor of shape {list(true.shape)}, got {list(one.shape)}")
        if true.numel() == 0:
            continue
        difference = (one.double() - true.double()).abs()
        size = true.double().abs()
        for norm in (torch.linalg.vector_norm, torch.amax):
            of_truth = float(norm(size))
            relative = float(norm(difference)) / of_truth if of_truth else float(norm(difference))
            worst = max(worst, relative) if relative == relative else float("inf")
    return worst


def usual_limit(*inputs: Tensor) -> float:
    """For sums in float32 of products that are exact or in float32; a product in TF32 would give 3e-4."""
    return 1e-4 if any(x.dtype in HALF for x in inputs) else 2e-5


def some_entries(arguments: Arguments, counted: Sequence[Any], most: int = 4) -> Arguments:
    """A grouped call with at most ``most`` of its entries, evenly chosen; every list as long as ``counted`` is cut."""
    step = -(-len(counted) // most)
    return tuple(
        value[::step] if isinstance(value, list | tuple) and len(value) == len(counted) else value
        for value in arguments
    )
