"""Public ``grouped_weight_gradient``: checks, allocation, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import accumulate_dtype, are_tensors, check_gradient, check_same_length, describe
from ..device import triton_refuses
from ..dispatch import Implementation, check_impl, choose, register
from ..registration import custom_op
from ..verify.verifier import Evidence

_NAME = "grouped_weight_gradient"
_FOLDER = "bayesian_lora_kernels.ops.weight_gradient"


def _refuses(outs: Sequence[Tensor], gs: Sequence[Tensor], inputs: Sequence[Tensor], *others: Any) -> str | None:
    if any(g.dtype != a.dtype for g, a in zip(gs, inputs, strict=True)):
        return "it takes gradients and inputs of one dtype"
    return triton_refuses(*outs)


def _on_gpu(outs: Sequence[Tensor], *others: Any) -> bool:
    return all(out.is_cuda for out in outs)


register(_NAME, "reference", Implementation(f"{_FOLDER}.reference", _NAME))
_EVIDENCE = Evidence(f"{_FOLDER}.problems:SUITE", f"{_FOLDER}.kernel:variants")
register(_NAME, "triton", Implementation(f"{_FOLDER}.kernel", _NAME, _refuses, _on_gpu, _EVIDENCE))


def grouped_weight_gradient(
    gs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None] | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """Gradients of the weights of many modules, of every example by itself: ``sum_t g_t a_t^T``.

    Args:
        gs: at least one ``[N, T, d_out]``, gradients of a module's output, float16, bfloat16, float32 or float64, any
            strides, all on one device. Modules need have no size in common.
        inputs: one ``[N, T, d_in]`` per module, its input, likewise.
        masks: one ``[N, T]`` bool tensor or None per module, True = the token counts; None: all count. Other tokens may
            hold NaN or infinity.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        A list of ``[N, d_out, d_in]``, sums over tokens divided by nothing; float64 if ``g`` or ``a`` is, else float32,
        which the sums are in. No gradient is recorded.

    Raises:
        TypeError, ValueError: no module, lists of different lengths, an unknown ``impl``; with the entry's number, what
            is no tensor or has a wrong dtype, shape or device.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.
    """
    check_impl(_NAME, impl)
    if not isinstance(gs, (list, tuple)) or not gs:
        raise ValueError(f"{_NAME}: expected gs to be a list of at least one tensor, got {describe(gs)}")
    masks = [None] * len(gs) if masks is None else masks
    check_same_length(f"{_NAME}: inputs", len(gs), inputs)
    check_same_length(f"{_NAME}: masks", len(gs), masks)
    if not (are_tensors([*gs, *inputs]) and are_tensors(masks, type(None))):
        _validate(gs, inputs, masks)  # of all else about them the operator looks, once
    with torch.no_grad():
        return _grouped_weight_gradient(list(gs), list(inputs), list(masks), impl)


def _validate(gs: Sequence[Tensor], inputs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    for i, (g, a, mask) in enumerate(zip(gs, inputs, masks, strict=True)):
        entry = f"{_NAME}: entry {i}"
        check_gradient(entry, g, a, mask, gs[0])


def _validate_and_allocate(
    gs: Sequence[Tensor], inputs: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> list[Tensor]:
    _validate(gs, inputs, masks)
    return [
        g.new_empty((g.shape[0], g.shape[2], a.shape[2]), dtype=accumulate_dtype(g, a))
        for g, a in zip(gs, inputs, strict=True)
    ]


@custom_op(
    f"bayesian_lora_kernels::{_NAME}",
    mutates_args=(),
    schema="(Tensor[] gs, Tensor[] inputs, Tensor?[] masks, str impl) -> Tensor[]",
)
def _grouped_weight_gradient(
    gs: list[Tensor], inputs: list[Tensor], masks: list[Tensor | None], impl: str
) -> list[Tensor]:
    outs = _validate_and_allocate(gs, inputs, masks)
    choose(_NAME, impl, outs, gs, inputs, masks)(outs, gs, inputs, masks)
    return outs


@_grouped_weight_gradient.register_fake
def _(gs: list[Tensor], inputs: list[Tensor], masks: list[Tensor | None], impl: str) -> list[Tensor]:
    return _validate_and_allocate(gs, inputs, masks)
