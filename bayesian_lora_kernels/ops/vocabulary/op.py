"""Public ``vocabulary_logsumexp``, ``vocabulary_probs`` and ``vocabulary_statistics``: checks, allocation, dispatch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import accumulate_dtype, check_device, check_tensor, describe
from ..device import triton_refuses
from ..dispatch import Implementation, check_impl, choose, register
from ..registration import custom_op
from ..verify.verifier import Evidence

_FOLDER = "bayesian_lora_kernels.ops.vocabulary"


class VocabularyStatistics(NamedTuple):
    """Uncertainty of one next token per example, in nats: ``entropy [N]``, ``mutual_information [N]`` and
    ``target_log_prob [N]`` (None without targets).
    """

    entropy: Tensor
    mutual_information: Tensor
    target_log_prob: Tensor | None


def _refuses(out: Tensor, weight: Tensor, hidden: Tensor, *others: Any) -> str | None:
    return triton_refuses(weight, hidden)


def _statistics_refuses(entropy: Tensor, information: Tensor, log_prob: Tensor, *others: Any) -> str | None:
    return triton_refuses(*others[:2])


def _on_gpu(out: Tensor, *others: Any) -> bool:
    return out.is_cuda


for _name, _why, _suite in (
    ("vocabulary_logsumexp", _refuses, "LOGSUMEXP"),
    ("vocabulary_probs", _refuses, "PROBS"),
    ("vocabulary_statistics", _statistics_refuses, "STATISTICS"),
):
    _evidence = Evidence(f"{_FOLDER}.problems:{_suite}", f"{_FOLDER}.kernel_variants:{_name}_variants")
    register(_name, "reference", Implementation(f"{_FOLDER}.reference", _name))
    register(_name, "triton", Implementation(f"{_FOLDER}.kernel_launch", _name, _why, _on_gpu, _evidence))


def vocabulary_logsumexp(
    weight: Tensor,
    hidden: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mirrored: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Log-sum-exps of the logits of every sample, ``log sum_v exp(z_nsv)``: what joins the parts of a vocabulary.

    A head that is cut over its rows gives one such tensor per part. ``torch.logaddexp`` (or ``torch.logsumexp`` of
    them stacked) is that of the whole vocabulary; handed to ``vocabulary_probs`` and ``vocabulary_statistics`` as
    ``logsumexp`` together with one part, it makes their results those of that part.

    Args:
        weight: ``[V, d]``, the output layer or a part of its rows, float16, bfloat16, float32 or float64, any strides.
        hidden: ``[N, S, d]``, S samples of the hidden state of each example, likewise; another dtype is allowed. Or
            deviations from a hidden state whose logits are the bias.
        bias: ``[V]``, or ``[N, V]`` where every example has its own, added to the logits before the soft cap. A token
            of bias minus infinity is excluded, with a soft cap too.
        softcap: logits become ``softcap * tanh(z / softcap)``; None: they stay.
        mirrored: every sample serves with both signs, ``bias + weight x`` and ``bias - weight x``, of one product:
            there are ``k S`` samples, with k = 2, and k = 1 without.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ``[N, k S]``, the mirror images last, always float64, since one float32 unit of a log-sum-exp of 1e4 is 1e-3 of
        every probability; minus infinity where no token is left. The logits are in float64 if ``weight`` or ``hidden``
        is, else float32; they never take more than a bounded share of memory. No gradient is recorded.

    Raises:
        TypeError: not a tensor, not a float dtype, a softcap that is no number.
        ValueError: a wrong shape or device, no sample, a softcap that is not positive and finite, an unknown ``impl``.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.

    Source: the online form, Milakov and Gimelshein 2018, algorithm 3.
    """
    check_impl("vocabulary_logsumexp", impl)
    _validate("vocabulary_logsumexp", weight, hidden, bias, softcap, mirrored)
    with torch.no_grad():
        return _vocabulary_logsumexp(weight, hidden, bias, softcap, mirrored, impl)


def vocabulary_probs(
    weight: Tensor,
    hidden: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mirrored: bool = False,
    logsumexp: Tensor | None = None,
    scratch_bytes: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Mean over samples of the softmax over the vocabulary: predictive probabilities of the next token.

    Args:
        weight: ``[V, d]``, the output layer, or with ``logsumexp`` a part of its rows.
        hidden: ``[N, S, d]``, S samples of the hidden state of each example.
        bias: ``[V]``, ``[N, V]`` or None, as for ``vocabulary_logsumexp``; so are the dtypes and strides of all three.
        softcap: as for ``vocabulary_logsumexp``.
        mirrored: likewise, and so are k and the order of the samples.
        logsumexp: ``[N, k S]`` float64 or float32, of the whole vocabulary, where ``weight`` is a part of it; None:
            ``weight`` is the whole.
        scratch_bytes: how much memory may hold exponentials on their way; with more, fewer logits are computed twice.
            None: the reference takes 1.8 times the result, or half the weight where that has eight times the result's
            size, within 14 and 64 MiB; the kernels take up to 256 MiB. 0: as little as goes (about 1 MiB; the kernels
            16 MiB or one tile), and every logit is computed twice, unless all of them fit.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ``[N, V]``, float64 if ``weight`` or ``hidden`` is, else float32 (sums are in that dtype): the sum over the
        tokens is 1 (over those of all parts). NaN where every token is excluded. Never a tensor of ``N S V`` elements.
        No gradient is recorded.

    Raises:
        TypeError, ValueError, RuntimeError: as ``vocabulary_logsumexp``; ``logsumexp`` of another shape, dtype or
            device, ``scratch_bytes`` negative or no integer.

    Source: Immer et al. 2021 (posterior predictive by samples of the linearised network); docs/vocabulary.md.
    """
    where = "vocabulary_probs"
    check_impl(where, impl)
    _validate(where, weight, hidden, bias, softcap, mirrored, None, logsumexp, scratch_bytes)
    with torch.no_grad():
        return _vocabulary_probs(weight, hidden, bias, softcap, mirrored, logsumexp, scratch_bytes, impl)


def vocabulary_statistics(
    weight: Tensor,
    hidden: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    mirrored: bool = False,
    targets: Tensor | None = None,
    logsumexp: Tensor | None = None,
    scratch_bytes: int | None = None,
    impl: str = "auto",
) -> VocabularyStatistics:
    """Predictive entropy, mutual information and target log-probability over the vocabulary, without ``[N, V]``.

    Args:
        weight: ``[V, d]``, the output layer, or with ``logsumexp`` a part of its rows.
        hidden: ``[N, S, d]``, S samples of the hidden state of each example.
        bias: ``[V]``, ``[N, V]`` or None, as for ``vocabulary_logsumexp``; so are the dtypes and strides of all three.
        softcap: as for ``vocabulary_logsumexp``.
        mirrored: likewise, and so are k and the order of the samples.
        targets: ``[N]`` int64 or int32, one token per example, in ``[0, V)``. On a GPU, where looking would be a
            synchronisation, one out of range gets the log-probability NaN instead of an error.
        logsumexp: as for ``vocabulary_probs``. Entropy and mutual information are then the part's terms, to be added
            up over the parts. Targets count from the part's first token; one that lies outside gives minus infinity,
            so that the largest over the parts is the target's.
        scratch_bytes: as for ``vocabulary_probs``. None: 64 MiB, the kernels 256 MiB. Where the exponentials of one
            example, ``k S V`` numbers, do not fit, every logit is computed twice.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        A named tuple, each ``[N]``, in nats, float64 if ``weight`` or ``hidden`` is, else float32:

        - ``entropy``: of the mean probabilities;
        - ``mutual_information`` between token and weights: ``entropy`` less the mean entropy of the samples, never
          computed as that difference: it is a sum of terms none of which is negative, so that a small one is as
          accurate as the logits are; rounding is cut off at 0;
        - ``target_log_prob``: log of the mean probability of the target, right where that underflows, at most 0; None
          without ``targets``.

        No gradient is recorded.

    Raises:
        TypeError, ValueError, RuntimeError: as ``vocabulary_probs``; ``targets`` of another shape, dtype or device, or
            out of range (unless ``logsumexp`` is given).

    Source: Houlsby et al. 2011 (BALD), equation 2, in the form of a mean Kullback-Leibler divergence.
    """
    where = "vocabulary_statistics"
    check_impl(where, impl)
    _validate(where, weight, hidden, bias, softcap, mirrored, targets, logsumexp, scratch_bytes)
    with torch.no_grad():
        entropy, information, log_prob = _vocabulary_statistics(
            weight, hidden, bias, softcap, mirrored, targets, logsumexp, scratch_bytes, impl
        )
    return VocabularyStatistics(entropy, information, None if targets is None else log_prob)


def _validate(
    where: str,
    weight: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mirrored: bool,
    targets: Tensor | None = None,
    logsumexp: Tensor | None = None,
    scratch_bytes: int | None = None,
) -> None:
    check_tensor(f"{where}: weight", weight, ("V", "d"))
    check_tensor(f"{where}: hidden", hidden, ("N", "S", weight.shape[1]))
    check_device(f"{where}: hidden", hidden, weight.device)
    examples, samples = hidden.shape[:2]
    if samples == 0:
        raise ValueError(f"{where}: hidden: expected at least one sample, got {describe(hidden)}")
    if not isinstance(mirrored, bool):
        raise TypeError(f"{where}: mirrored: expected True or False, got {describe(mirrored)}")
    if bias is not None:
        of_each = isinstance(bias, Tensor) and bias.ndim == 2
        check_tensor(f"{where}: bias", bias, (examples, weight.shape[0]) if of_each else (weight.shape[0],))
        check_device(f"{where}: bias", bias, weight.device)
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
            raise TypeError(f"{where}: softcap: expected a number or None, got {describe(softcap)}")
        if not 0 < softcap < math.inf:
            raise ValueError(f"{where}: softcap: expected a positive finite number, got {softcap}")
    if targets is not None:
        check_tensor(f"{where}: targets", targets, (examples,), (torch.int64, torch.int32))
        check_device(f"{where}: targets", targets, weight.device)
    if logsumexp is not None:
        check_tensor(
            f"{where}: logsumexp", logsumexp, (examples, (1 + mirrored) * samples), (torch.float64, torch.float32)
        )
        check_device(f"{where}: logsumexp", logsumexp, weight.device)
    if scratch_bytes is not None:
        if isinstance(scratch_bytes, bool) or not isinstance(scratch_bytes, int):
            raise TypeError(f"{where}: scratch_bytes: expected an integer or None, got {describe(scratch_bytes)}")
        if scratch_bytes < 0:
            raise ValueError(f"{where}: scratch_bytes: expected at least 0, got {scratch_bytes}")


def _check_range(targets: Tensor, vocabulary: int, log_prob: Tensor) -> None:
    """Refuse targets out of range; on a GPU, where looking would be a synchronisation, they get NaN."""
    outside = (targets < 0) | (targets >= vocabulary)
    if targets.is_cuda:
        log_prob.masked_fill_(outside, math.nan)
        return
    found = targets[outside]
    if found.numel():
        raise ValueError(
            f"vocabulary_statistics: targets: expected tokens in [0, {vocabulary}), got {int(found[0])} "
            f"({found.numel()} of {targets.numel()} out of range)"
        )


def _allocate_logsumexp(hidden: Tensor, mirrored: bool) -> Tensor:
    examples, samples = hidden.shape[:2]
    return hidden.new_empty((examples, (1 + mirrored) * samples), dtype=torch.float64)


def _allocate_probs(weight: Tensor, hidden: Tensor) -> Tensor:
    return hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=accumulate_dtype(weight, hidden))


def _allocate_statistics(weight: Tensor, hidden: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype, examples = accumulate_dtype(weight, hidden), hidden.shape[0]
    counts = (examples, examples, 0 if targets is None else examples)
    entropy, information, log_prob = (hidden.new_empty(count, dtype=dtype) for count in counts)
    return entropy, information, log_prob


@custom_op(
    "bayesian_lora_kernels::vocabulary_logsumexp",
    mutates_args=(),
    schema="(Tensor weight, Tensor hidden, Tensor? bias, float? softcap, bool mirrored, str impl) -> Tensor",
)
def _vocabulary_logsumexp(
    weight: Tensor, hidden: Tensor, bias: Tensor | None, softcap: float | None, mirrored: bool, impl: str
) -> Tensor:
    _validate("vocabulary_logsumexp", weight, hidden, bias, softcap, mirrored)
    out = _allocate_logsumexp(hidden, mirrored)
    arguments = (out, weight, hidden, bias, softcap, mirrored)
    choose("vocabulary_logsumexp", impl, *arguments)(*arguments)
    return out


@_vocabulary_logsumexp.register_fake
def _(weight: Tensor, hidden: Tensor, bias: Tensor | None, softcap: float | None, mirrored: bool, impl: str) -> Tensor:
    _validate("vocabulary_logsumexp", weight, hidden, bias, softcap, mirrored)
    return _allocate_logsumexp(hidden, mirrored)


@custom_op(
    "bayesian_lora_kernels::vocabulary_probs",
    mutates_args=(),
    schema=(
        "(Tensor weight, Tensor hidden, Tensor? bias, float? softcap, bool mirrored, Tensor? logsumexp, "
        "int? scratch_bytes, str impl) -> Tensor"
    ),
)
def _vocabulary_probs(
    weight: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mirrored: bool,
    logsumexp: Tensor | None,
    scratch_bytes: int | None,
    impl: str,
) -> Tensor:
    _validate("vocabulary_probs", weight, hidden, bias, softcap, mirrored, None, logsumexp, scratch_bytes)
    out = _allocate_probs(weight, hidden)
    arguments = (out, weight, hidden, bias, softcap, mirrored, logsumexp, scratch_bytes)
    choose("vocabulary_probs", impl, *arguments)(*arguments)
    return out


@_vocabulary_probs.register_fake
def _(
    weight: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mirrored: bool,
    logsumexp: Tensor | None,
    scratch_bytes: int | None,
    impl: str,
) -> Tensor:
    _validate("vocabulary_probs", weight, hidden, bias, softcap, mirrored, None, logsumexp, scratch_bytes)
    return _allocate_probs(weight, hidden)


@custom_op(
    "bayesian_lora_kernels::vocabulary_statistics",
    mutates_args=(),
    schema=(
        "(Tensor weight, Tensor hidden, Tensor? bias, float? softcap, bool mirrored, Tensor? targets, "
        "Tensor? logsumexp, int? scratch_bytes, str impl) -> (Tensor, Tensor, Tensor)"
    ),
)
def _vocabulary_statistics(
    weight: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mirrored: bool,
    targets: Tensor | None,
    logsumexp: Tensor | None,
    scratch_bytes: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _validate("vocabulary_statistics", weight, hidden, bias, softcap, mirrored, targets, logsumexp, scratch_bytes)
    out = _allocate_statistics(weight, hidden, targets)
    arguments = (*out, weight, hidden, bias, softcap, mirrored, targets, logsumexp, scratch_bytes)
    choose("vocabulary_statistics", impl, *arguments)(*arguments)
    if targets is not None and logsumexp is None:
        _check_range(targets, weight.shape[0], out[2])
    return out


@_vocabulary_statistics.register_fake
def _(
    weight: Tensor,
    hidden: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mirrored: bool,
    targets: Tensor | None,
    logsumexp: Tensor | None,
    scratch_bytes: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _validate("vocabulary_statistics", weight, hidden, bias, softcap, mirrored, targets, logsumexp, scratch_bytes)
    return _allocate_statistics(weight, hidden, targets)
