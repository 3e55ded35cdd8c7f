"""Public ``outer_product`` and ``grouped_outer_product``: checks, allocation, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import accumulate_dtype, check_device, check_mask, check_same_length, check_tensor, describe
from ..device import triton_refuses
from ..dispatch import Implementation, check_impl, choose, register
from ..registration import custom_op

_FOLDER = "bayesian_lora_kernels.ops.outer_product"


def _refuses(out: Tensor, *others: Any) -> str | None:
    return triton_refuses(out)


def _refuses_any(outs: Sequence[Tensor], *others: Any) -> str | None:
    return triton_refuses(*outs)


def _on_gpu(out: Tensor, *others: Any) -> bool:
    return out.is_cuda


def _all_on_gpu(outs: Sequence[Tensor], *others: Any) -> bool:
    return all(out.is_cuda for out in outs)


_ALONE = {
    "reference": Implementation(f"{_FOLDER}.reference", "outer_product"),
    "triton": Implementation(f"{_FOLDER}.kernel", "outer_product", _refuses, _on_gpu),
}
_MIRROR = {
    "reference": Implementation(f"{_FOLDER}.reference", "mirror_lower"),
    "triton": Implementation(f"{_FOLDER}.kernel", "mirror_lower", _refuses, _on_gpu),
}
_GROUPED = {
    "reference": Implementation(f"{_FOLDER}.reference", "grouped_outer_product"),
    "triton": Implementation(f"{_FOLDER}.kernel_grouped", "grouped_outer_product", _refuses_any, _all_on_gpu),
}
for _operation, _offered in (
    ("outer_product", _ALONE),
    ("mirror_lower", _MIRROR),
    ("grouped_outer_product", _GROUPED),
):
    for _name, _implementation in _offered.items():
        register(_operation, _name, _implementation)


def outer_product(
    x: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
    lower: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Sum of outer products of rows: ``out + scale * x^T diag(mask) x``, a sum over the counted rows, divided
    by nothing.

    Args:
        x: ``[M, d]``, float16, bfloat16, float32 or float64, any strides, M may be 0.
        mask: ``[M]`` bool, True = the row counts; None: all count. Other rows may hold NaN or infinity.
        scale: a factor on the sum; the accumulated ``out`` is not scaled.
        out: ``[d, d]`` in the dtype of the result, updated in place and returned; None: starts from zero.
        lower: with ``out``: promise only its diagonal and what is below; what is above is undefined until
            ``mirror_lower``. For a stream of batches this halves the traffic of a GPU.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ``[d, d]``, float64 for float64 ``x``, else float32 (sums are in that dtype). What is added is
        bit-exactly symmetric, and so the result if ``out`` was. No gradient is recorded.

    Raises:
        TypeError: not a tensor, not a float dtype, ``mask`` not bool, ``out`` of another dtype than the
            result.
        ValueError: a wrong shape or device, ``out`` whose elements share memory, ``lower`` without ``out``, an
            unknown ``impl``.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.

    Source: the Kronecker factors of Martens and Grosse 2015, equation 23.
    """
    check_impl("outer_product", impl)
    _validate("outer_product", x, mask, out)
    if lower and out is None:
        raise ValueError("outer_product: lower: expected an out to accumulate into, got None")
    with torch.no_grad():
        if out is None:
            return _outer_product(x, mask, float(scale), impl)
        _outer_product_accumulate(out, x, mask, float(scale), impl, lower)
        return out


def mirror_lower(out: Tensor, *, impl: str = "auto") -> Tensor:
    """Copy what is below the diagonal of ``out: [d, d]`` to above it, in place: the end of a stream of
    ``outer_product(..., out=out, lower=True)``.

    Args:
        out: ``[d, d]``, float32 or float64, any strides but 0.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ``out``, bit-exactly symmetric.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: not square, elements that share memory, an unknown ``impl``.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.
    """
    check_impl("mirror_lower", impl)
    _validate_out("mirror_lower: out", out)
    with torch.no_grad():
        _mirror_lower(out, impl)
    return out


def grouped_outer_product(
    xs: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None] | None = None,
    scales: Sequence[float] | None = None,
    outs: Sequence[Tensor] | None = None,
    lower: bool = False,
    impl: str = "auto",
) -> list[Tensor]:
    """``outer_product`` of many inputs of any widths at once, in few launches where there is a kernel for it.

    Args:
        xs: tensors ``[M_i, d_i]``, all on one device; each sum is over the counted rows, divided by nothing.
        masks: one ``[M_i]`` bool tensor or None per input; None: all rows count.
        scales: one factor per input; None: 1.
        outs: one ``[d_i, d_i]`` tensor per input, updated in place and returned; None: all start from zero.
        lower: with ``outs``: as ``outer_product``, for every input.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        A list of ``[d_i, d_i]``, each as ``outer_product`` returns it (float64 for float64 input, else
        float32).

    Raises:
        TypeError, ValueError, RuntimeError: as ``outer_product``, with the entry's number; lists of different
            lengths.

    Source: as ``outer_product``.
    """
    where = "grouped_outer_product"
    check_impl(where, impl)
    if not isinstance(xs, (list, tuple)):
        raise TypeError(f"{where}: expected xs to be a list of tensors, got {type(xs).__name__}")
    count = len(xs)
    masks = [None] * count if masks is None else masks
    scales = [1.0] * count if scales is None else scales
    check_same_length(f"{where}: masks", count, masks)
    check_same_length(f"{where}: scales", count, scales)
    if outs is not None:
        check_same_length(f"{where}: outs", count, outs)
    elif lower:
        raise ValueError(f"{where}: lower: expected outs to accumulate into, got None")
    if count == 0:
        return []
    _validate_all(xs, masks, outs)
    with torch.no_grad():
        if outs is None:
            return _grouped_outer_product(list(xs), list(masks), [float(scale) for scale in scales], impl)
        numbers = [float(scale) for scale in scales]
        _grouped_outer_product_accumulate(list(outs), list(xs), list(masks), numbers, impl, lower)
        return list(outs)


def _validate(where: str, x: Tensor, mask: Tensor | None, out: Tensor | None) -> None:
    check_tensor(f"{where}: x", x, ("M", "d"))
    check_mask(f"{where}: mask", mask, x, (x.shape[0],))
    if out is None:
        return
    width = x.shape[1]
    check_tensor(f"{where}: out", out, (width, width), (accumulate_dtype(x),))
    check_device(f"{where}: out", out, x.device)
    _check_own_memory(f"{where}: out", out)


def _validate_out(where: str, out: Tensor) -> None:
    check_tensor(where, out, ("d", "d"), (torch.float32, torch.float64))
    if out.shape[0] != out.shape[1]:
        raise ValueError(f"{where}: expected shape [d, d], got {describe(out)}")
    _check_own_memory(where, out)


def _check_own_memory(where: str, out: Tensor) -> None:
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"{where}: expected a tensor whose elements have their own memory, got a stride of 0")


def _validate_all(xs: Sequence[Tensor], masks: Sequence[Tensor | None], outs: Sequence[Tensor] | None) -> None:
    for i, (x, mask) in enumerate(zip(xs, masks, strict=True)):
        entry = f"grouped_outer_product: entry {i}"
        _validate(entry, x, mask, None if outs is None else outs[i])
        check_device(f"{entry}: x", x, xs[0].device)


def _validate_and_allocate(x: Tensor, mask: Tensor | None) -> Tensor:
    _validate("outer_product", x, mask, None)
    return x.new_empty((x.shape[1], x.shape[1]), dtype=accumulate_dtype(x))


def _validate_and_allocate_all(xs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
    _validate_all(xs, masks, None)
    return [x.new_empty((x.shape[1], x.shape[1]), dtype=accumulate_dtype(x)) for x in xs]


@custom_op(
    "bayesian_lora_kernels::outer_product",
    mutates_args=(),
    schema="(Tensor x, Tensor? mask, float scale, str impl) -> Tensor",
)
def _outer_product(x: Tensor, mask: Tensor | None, scale: float, impl: str) -> Tensor:
    out = _validate_and_allocate(x, mask)
    choose("outer_product", impl, out, x, mask, scale, False)(out, x, mask, scale, False)
    return out


@_outer_product.register_fake
def _(x: Tensor, mask: Tensor | None, scale: float, impl: str) -> Tensor:
    return _validate_and_allocate(x, mask)


@custom_op(
    "bayesian_lora_kernels::outer_product_accumulate",
    mutates_args=("out",),
    schema="(Tensor(a!) out, Tensor x, Tensor? mask, float scale, str impl, bool lower=False) -> ()",
)
def _outer_product_accumulate(
    out: Tensor, x: Tensor, mask: Tensor | None, scale: float, impl: str, lower: bool = False
) -> None:
    _validate("outer_product", x, mask, out)
    arguments = (out, x, mask, scale, True, lower)
    choose("outer_product", impl, *arguments)(*arguments)


@_outer_product_accumulate.register_fake
def _(out: Tensor, x: Tensor, mask: Tensor | None, scale: float, impl: str, lower: bool = False) -> None:
    _validate("outer_product", x, mask, out)


@custom_op("bayesian_lora_kernels::mirror_lower", mutates_args=("out",), schema="(Tensor(a!) out, str impl) -> ()")
def _mirror_lower(out: Tensor, impl: str) -> None:
    _validate_out("mirror_lower: out", out)
    choose("mirror_lower", impl, out)(out)


@_mirror_lower.register_fake
def _(out: Tensor, impl: str) -> None:
    _validate_out("mirror_lower: out", out)


@custom_op(
    "bayesian_lora_kernels::grouped_outer_product",
    mutates_args=(),
    schema="(Tensor[] xs, Tensor?[] masks, float[] scales, str impl) -> Tensor[]",
)
def _grouped_outer_product(
    xs: list[Tensor], masks: list[Tensor | None], scales: list[float], impl: str
) -> list[Tensor]:
    outs = _validate_and_allocate_all(xs, masks)
    choose("grouped_outer_product", impl, outs, xs, masks, scales, False)(outs, xs, masks, scales, False)
    return outs


@_grouped_outer_product.register_fake
def _(xs: list[Tensor], masks: list[Tensor | None], scales: list[float], impl: str) -> list[Tensor]:
    return _validate_and_allocate_all(xs, masks)


@custom_op(
    "bayesian_lora_kernels::grouped_outer_product_accumulate",
    mutates_args=("outs",),
    schema="(Tensor(a!)[] outs, Tensor[] xs, Tensor?[] masks, float[] scales, str impl, bool lower=False) -> ()",
)
def _grouped_outer_product_accumulate(
    outs: list[Tensor],
    xs: list[Tensor],
    masks: list[Tensor | None],
    scales: list[float],
    impl: str,
    lower: bool = False,
) -> None:
    _validate_all(xs, masks, outs)
    arguments = (outs, xs, masks, scales, True, lower)
    choose("grouped_outer_product", impl, *arguments)(*arguments)


@_grouped_outer_product_accumulate.register_fake
def _(
    outs: list[Tensor],
    xs: list[Tensor],
    masks: list[Tensor | None],
    scales: list[float],
    impl: str,
    lower: bool = False,
) -> None:
    _validate_all(xs, masks, outs)
