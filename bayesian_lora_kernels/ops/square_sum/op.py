"""Public ``grouped_square_sum``: checks, allocation, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import are_tensors, check_device, check_mask, check_same_length, check_tensor, describe
from ..device import triton_refuses
from ..dispatch import Implementation, check_impl, choose, register
from ..layouts import per_layout
from ..registration import custom_op
from ..verify.verifier import Evidence

_FOLDER = "bayesian_lora_kernels.ops.square_sum"


def _refuses_any(out: Tensor, xs: Sequence[Tensor], *others: Any) -> str | None:
    return triton_refuses(*xs)


def _on_gpu(out: Tensor, *others: Any) -> bool:
    return out.is_cuda


_NAME, _EVIDENCE = "grouped_square_sum", Evidence(f"{_FOLDER}.problems:SUITE", f"{_FOLDER}.kernel:variants")
register(_NAME, "reference", Implementation(f"{_FOLDER}.reference", _NAME))
register(_NAME, "triton", Implementation(f"{_FOLDER}.kernel", _NAME, _refuses_any, _on_gpu, _EVIDENCE))


def grouped_square_sum(
    xs: Sequence[Tensor], *, masks: Sequence[Tensor | None] | None = None, impl: str = "auto"
) -> Tensor:
    """Sums of squares of the counted rows of many inputs at once: what the traces of their outer products grow by.

    Args:
        xs: at least one ``[M_i, d_i]``, float16, bfloat16, float32 or float64, any strides, all on one device.
        masks: one ``[M_i]`` bool tensor or None per input, True = the row counts; None: all count. Other rows may
            hold NaN or infinity.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ``[len(xs)]`` float64, sums divided by nothing; squares of float32 and narrower inputs are formed in float32. An
        entry is not finite if a counted element is not, or if the squares overflow. No gradient is recorded.

    Raises:
        TypeError, ValueError: no input, lists of different lengths, an unknown ``impl``; with the entry's number, what
            is no tensor or has a wrong dtype, shape or device.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.
    """
    where = "grouped_square_sum"
    check_impl(where, impl)
    if not isinstance(xs, (list, tuple)) or not xs:
        raise ValueError(f"{where}: expected xs to be a list of at least one tensor, got {describe(xs)}")
    masks = [None] * len(xs) if masks is None else masks
    check_same_length(f"{where}: masks", len(xs), masks)
    if not (are_tensors(xs) and are_tensors(masks, type(None))):
        _validate(xs, masks)  # it says which is none; what else may be wrong, the operation finds
    with torch.no_grad():
        return _grouped_square_sum(list(xs), list(masks), impl)


def _validate(xs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    for i, (x, mask) in enumerate(zip(xs, masks, strict=True)):
        entry = f"grouped_square_sum: entry {i}"
        check_tensor(f"{entry}: x", x, ("M", "d"))
        check_mask(f"{entry}: mask", mask, x, (x.shape[0],))
        check_device(f"{entry}: x", x, xs[0].device)


_check = per_layout(_validate)


def _allocate(xs: Sequence[Tensor]) -> Tensor:
    return xs[0].new_empty(len(xs), dtype=torch.float64)


@custom_op(
    "bayesian_lora_kernels::grouped_square_sum",
    mutates_args=(),
    schema="(Tensor[] xs, Tensor?[] masks, str impl) -> Tensor",
)
def _grouped_square_sum(xs: list[Tensor], masks: list[Tensor | None], impl: str) -> Tensor:
    _check(xs, masks)
    out = _allocate(xs)
    choose("grouped_square_sum", impl, out, xs, masks)(out, xs, masks)
    return out


@_grouped_square_sum.register_fake
def _(xs: list[Tensor], masks: list[Tensor | None], impl: str) -> Tensor:
    _validate(xs, masks)
    return _allocate(xs)
