"""Public ``outer_product`` and ``grouped_outer_product``: checks, allocation, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import accumulate_dtype, are_tensors, check_device, check_mask, check_same_length, check_tensor, describe
from ..device import triton_refuses
from ..dispatch import Implementation, check_impl, choose, register
from ..layouts import per_layout
from ..overlaps import check_apart, overlaps_itself, spans
from ..registration import custom_op
from ..verify.verifier import Evidence

_FOLDER = "bayesian_lora_kernels.ops.outer_product"


def _refuses(outs: Sequence[Tensor], *others: Any) -> str | None:
    return triton_refuses(*outs)


def _on_gpu(outs: Sequence[Tensor], *others: Any) -> bool:
    return all(out.is_cuda for out in outs)


def _is_on_gpu(out: Tensor) -> bool:
    return out.is_cuda


_LAUNCH = f"{_FOLDER}.kernel_launch"
_GROUPED = Evidence(f"{_FOLDER}.problems:GROUPED", f"{_LAUNCH}:variants")
_MIRROR = Evidence(f"{_FOLDER}.problems:MIRROR", f"{_LAUNCH}:mirror_variants")
for _operation in ("outer_product", "grouped_outer_product"):
    register(_operation, "reference", Implementation(f"{_FOLDER}.reference", "grouped_outer_product"))
    register(_operation, "triton", Implementation(_LAUNCH, "grouped_outer_product", _refuses, _on_gpu, _GROUPED))
register("mirror_lower", "reference", Implementation(f"{_FOLDER}.reference", "mirror_lower"))
register("mirror_lower", "triton", Implementation(_LAUNCH, "mirror_lower", triton_refuses, _is_on_gpu, _MIRROR))


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
        ValueError: a wrong shape or device, ``out`` whose elements share memory or which shares memory with ``x``,
            ``lower`` without ``out``, an unknown ``impl``.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.

    Source: the Kronecker factors of Martens and Grosse 2015, equation 23.
    """
    check_impl("outer_product", impl)
    if lower and out is None:
        raise ValueError("outer_product: lower: expected an out to accumulate into, got None")
    return _sums([x], [mask], [scale], None if out is None else [out], lower, impl)[0]


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
    if not isinstance(out, Tensor):
        _validate_out(out)
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
            lengths; ``outs`` that share memory.

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
    return _sums(xs, masks, scales, outs, lower, impl)


def _sums(
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    scales: Sequence[float],
    outs: Sequence[Tensor] | None,
    lower: bool,
    impl: str,
) -> list[Tensor]:
    if not (are_tensors(xs) and are_tensors(masks, type(None)) and are_tensors(outs or ())):
        _validate(xs, masks, outs)  # it says which is none; what else may be wrong, the operation finds
    numbers = [float(scale) for scale in scales]
    with torch.no_grad():
        if outs is None:
            return _grouped_outer_product(list(xs), list(masks), numbers, impl)
        _grouped_outer_product_accumulate(list(outs), list(xs), list(masks), numbers, impl, lower)
        return list(outs)


def _validate(xs: Sequence[Tensor], masks: Sequence[Tensor | None], outs: Sequence[Tensor] | None) -> None:
    for i, (x, mask) in enumerate(zip(xs, masks, strict=True)):
        entry = _entry(xs, i)
        check_tensor(f"{entry}: x", x, ("M", "d"))
        check_device(f"{entry}: x", x, xs[0].device)
        check_mask(f"{entry}: mask", mask, x, (x.shape[0],))
        if outs is not None:
            width = x.shape[1]
            check_tensor(f"{entry}: out", outs[i], (width, width), (accumulate_dtype(x),))
            check_device(f"{entry}: out", outs[i], x.device)


def _name(xs: Sequence[Tensor]) -> str:
    return "outer_product" if len(xs) == 1 else "grouped_outer_product"


def _entry(xs: Sequence[Tensor], i: int) -> str:
    return _name(xs) if len(xs) == 1 else f"{_name(xs)}: entry {i}"


def _allocate(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty((x.shape[1], x.shape[1]), dtype=accumulate_dtype(x)) for x in xs]


@per_layout
def _check(xs: Sequence[Tensor], masks: Sequence[Tensor | None], outs: Sequence[Tensor] | None) -> Tensor:
    """Validate, with the outputs' memory; the bytes that outputs and inputs span."""
    _validate(xs, masks, outs)
    for i, out in enumerate(outs or ()):
        _check_own_memory(f"{_entry(xs, i)}: out", out)
    return spans([*(outs or ()), *xs])


def _check_own_memory(where: str, out: Tensor) -> None:
    if overlaps_itself(out):
        raise ValueError(
            f"{where}: expected a tensor whose elements have their own memory, got strides of {out.stride()}"
        )


def _validate_out(out: Tensor) -> None:
    where = "mirror_lower: out"
    check_tensor(where, out, ("d", "d"), (torch.float32, torch.float64))
    if out.shape[0] != out.shape[1]:
        raise ValueError(f"{where}: expected shape [d, d], got {describe(out)}")


@custom_op("bayesian_lora_kernels::mirror_lower", mutates_args=("out",), schema="(Tensor(a!) out, str impl) -> ()")
def _mirror_lower(out: Tensor, impl: str) -> None:
    _validate_out(out)
    _check_own_memory("mirror_lower: out", out)
    choose("mirror_lower", impl, out)(out)


@_mirror_lower.register_fake
def _(out: Tensor, impl: str) -> None:
    _validate_out(out)


@custom_op(
    "bayesian_lora_kernels::grouped_outer_product",
    mutates_args=(),
    schema="(Tensor[] xs, Tensor?[] masks, float[] scales, str impl) -> Tensor[]",
)
def _grouped_outer_product(
    xs: list[Tensor], masks: list[Tensor | None], scales: list[float], impl: str
) -> list[Tensor]:
    _check(xs, masks, None)
    outs = _allocate(xs)
    choose(_name(xs), impl, outs, xs, masks, scales, False)(outs, xs, masks, scales, False)
    return outs


@_grouped_outer_product.register_fake
def _(xs: list[Tensor], masks: list[Tensor | None], scales: list[float], impl: str) -> list[Tensor]:
    _validate(xs, masks, None)
    return _allocate(xs)


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
    check_apart(_name(xs), outs, xs, _check(xs, masks, outs))
    arguments = (outs, xs, masks, scales, True, lower)
    choose(_name(xs), impl, *arguments)(*arguments)


@_grouped_outer_product_accumulate.register_fake
def _(
    outs: list[Tensor],
    xs: list[Tensor],
    masks: list[Tensor | None],
    scales: list[float],
    impl: str,
    lower: bool = False,
) -> None:
    _validate(xs, masks, outs)
