"""Public ``vocabulary_variance``: checks, allocation, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulate_dtype, check_device, check_tensor
from ..device import triton_refuses
from ..dispatch import Implementation, check_impl, choose, register
from ..registration import custom_op
from ..verify.verifier import Evidence

_FOLDER = "bayesian_lora_kernels.ops.vocabulary"


def _refuses(out: Tensor, weight: Tensor, factor: Tensor) -> str | None:
    return triton_refuses(weight, factor)


def _on_gpu(out: Tensor, *others: Tensor) -> bool:
    return out.is_cuda


_NAME = "vocabulary_variance"
register(_NAME, "reference", Implementation(f"{_FOLDER}.reference", _NAME))
_EVIDENCE = Evidence(f"{_FOLDER}.problems:VARIANCE", f"{_FOLDER}.kernel_variants:{_NAME}_variants")
register(_NAME, "triton", Implementation(f"{_FOLDER}.kernel_launch", _NAME, _refuses, _on_gpu, _EVIDENCE))


def vocabulary_variance(weight: Tensor, factor: Tensor, *, impl: str = "auto") -> Tensor:
    """Variances of all logits from a factor of the hidden state's covariance: the diagonal of ``W R R^T W^T``.

    Args:
        weight: ``[V, d]``, the output layer W, float16, bfloat16, float32 or float64, any strides.
        factor: ``[N, d, m]``, R of each example (the covariance is ``R R^T``), likewise; another dtype is allowed.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ``[N, V]``, float64 if ``weight`` or ``factor`` is, else float32 (sums are in that dtype): sums of squares,
        never negative. A part of the rows of W gives the same part of the result. Scratch is bounded by a few MiB,
        whatever V is. No gradient is recorded.

    Raises:
        TypeError: not a tensor, not a float dtype.
        ValueError: a wrong shape or device, an unknown ``impl``.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.

    Source: Immer et al. 2021 (covariance ``J Sigma J^T`` of the linearised network's logits, here with ``J = W J_h``).
    """
    check_impl("vocabulary_variance", impl)
    _validate(weight, factor)
    with torch.no_grad():
        return _vocabulary_variance(weight, factor, impl)


def _validate(weight: Tensor, factor: Tensor) -> None:
    check_tensor("vocabulary_variance: weight", weight, ("V", "d"))
    check_tensor("vocabulary_variance: factor", factor, ("N", weight.shape[1], "m"))
    check_device("vocabulary_variance: factor", factor, weight.device)


def _validate_and_allocate(weight: Tensor, factor: Tensor) -> Tensor:
    _validate(weight, factor)
    return factor.new_empty((factor.shape[0], weight.shape[0]), dtype=accumulate_dtype(weight, factor))


@custom_op(
    "bayesian_lora_kernels::vocabulary_variance",
    mutates_args=(),
    schema="(Tensor weight, Tensor factor, str impl) -> Tensor",
)
def _vocabulary_variance(weight: Tensor, factor: Tensor, impl: str) -> Tensor:
    out = _validate_and_allocate(weight, factor)
    choose("vocabulary_variance", impl, out, weight, factor)(out, weight, factor)
    return out


@_vocabulary_variance.register_fake
def _(weight: Tensor, factor: Tensor, impl: str) -> Tensor:
    return _validate_and_allocate(weight, factor)
