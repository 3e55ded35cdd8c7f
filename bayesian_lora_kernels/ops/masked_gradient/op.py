"""Public ``grouped_masked_gradient``: checks, allocation, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import are_tensors, check_gradient, check_same_length, describe
from ..device import triton_refuses
from ..dispatch import Implementation, check_impl, choose, register
from ..registration import custom_op
from ..verify.verifier import Evidence

ROUNDINGS = 8  # times the machine's precision is no gradient
_NAME = "grouped_masked_gradient"
_FOLDER = "bayesian_lora_kernels.ops.masked_gradient"


def _refuses(out: Tensor, gs: Sequence[Tensor], inputs: Sequence[Tensor], *others: Any) -> str | None:
    if any(g.dtype != a.dtype for g, a in zip(gs, inputs, strict=True)):
        return "it takes gradients and inputs of one dtype"
    return triton_refuses(*gs)


def _on_gpu(out: Tensor, *others: Any) -> bool:
    return out.is_cuda


register(_NAME, "reference", Implementation(f"{_FOLDER}.reference", _NAME))
_EVIDENCE = Evidence(f"{_FOLDER}.problems:SUITE", f"{_FOLDER}.kernel:variants")
register(_NAME, "triton", Implementation(f"{_FOLDER}.kernel", _NAME, _refuses, _on_gpu, _EVIDENCE))


def grouped_masked_gradient(
    gs: Sequence[Tensor], inputs: Sequence[Tensor], masks: Sequence[Tensor], *, impl: str = "auto"
) -> Tensor:
    """Whether tokens that a mask leaves out count after all, for many modules at once.

    They do if an element of their gradient is larger than the rounding of the module's largest, and their input is not
    zero: the gradient of the weight then has a term that the mask would take away.

    Args:
        gs: at least one ``[N, T, d_out]``, gradients of a module's output, not empty, float16, bfloat16, float32 or
            float64, any strides, all on one device.
        inputs: one ``[N, T, d_in]`` per module, its input, likewise.
        masks: one ``[N, T]`` bool tensor per module, True = the token counts.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ``[len(gs)]`` bool. False where a gradient is not finite: nothing is known then.

    Raises:
        TypeError, ValueError: no module, lists of different lengths, an unknown ``impl``; with the entry's number, what
            is no tensor or has a wrong dtype, shape or device.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.
    """
    check_impl(_NAME, impl)
    if not isinstance(gs, (list, tuple)) or not gs:
        raise ValueError(f"{_NAME}: expected gs to be a list of at least one tensor, got {describe(gs)}")
    check_same_length(f"{_NAME}: inputs", len(gs), inputs)
    check_same_length(f"{_NAME}: masks", len(gs), masks)
    if not are_tensors([*gs, *inputs, *masks]):
        _validate(gs, inputs, masks)  # of all else about them the operator looks, once
    with torch.no_grad():
        return _grouped_masked_gradient(list(gs), list(inputs), list(masks), impl)


def _validate(gs: Sequence[Tensor], inputs: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    for i, (g, a, mask) in enumerate(zip(gs, inputs, masks, strict=True)):
        entry = f"{_NAME}: entry {i}"
        check_gradient(entry, g, a, mask, gs[0])
        if mask is None or g.numel() == 0:
            raise ValueError(f"{entry}: expected a mask and a gradient that is not empty, got {describe(g)}")


def _validate_and_allocate(gs: Sequence[Tensor], inputs: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    _validate(gs, inputs, masks)
    return masks[0].new_empty(len(gs))


@custom_op(
    f"bayesian_lora_kernels::{_NAME}",
    mutates_args=(),
    schema="(Tensor[] gs, Tensor[] inputs, Tensor[] masks, str impl) -> Tensor",
)
def _grouped_masked_gradient(gs: list[Tensor], inputs: list[Tensor], masks: list[Tensor], impl: str) -> Tensor:
    out = _validate_and_allocate(gs, inputs, masks)
    choose(_NAME, impl, out, gs, inputs, masks)(out, gs, inputs, masks)
    return out


@_grouped_masked_gradient.register_fake
def _(gs: list[Tensor], inputs: list[Tensor], masks: list[Tensor], impl: str) -> Tensor:
    return _validate_and_allocate(gs, inputs, masks)
