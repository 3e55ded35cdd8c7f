"""Public ``jacobian_covariance``, its grouped form and ``jacobian_gram``: checks, allocation, dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import accumulate_dtype, are_tensors, check_device, check_mask, check_same_length, check_tensor, describe
from ..dispatch import Implementation, check_impl, choose, register
from ..registration import custom_op
from ..verify.verifier import Evidence
from .routes import kernel_refuses, kernel_suits

_FOLDER = "bayesian_lora_kernels.ops.jacobian_covariance"
_TRITON = f"{_FOLDER}.kernel_launch"
for _name, _suite in (
    ("jacobian_covariance", "ALONE"),
    ("grouped_jacobian_covariance", "GROUPED"),
    ("jacobian_gram", "GRAM"),
):
    _evidence = Evidence(f"{_FOLDER}.problems:{_suite}", f"{_TRITON}:variants")
    register(_name, "reference", Implementation(f"{_FOLDER}.reference", _name))
    register(_name, "triton", Implementation(_TRITON, _name, kernel_refuses, kernel_suits, _evidence))


class KroneckerPrecision(Protocol):
    """What ``jacobian_covariance`` asks of a posterior; ``KroneckerPosterior`` has it.

    ``basis_s: [d_out, k_s]`` and ``basis_a: [d_in, k_a]`` have orthonormal columns. ``precision_blocks`` (a
    property or a method) gives the eigenvalues of the posterior precision on four blocks: ``[k_s, k_a]`` kept
    on both sides, ``[k_s]`` kept in S and in the complement of A, ``[k_a]`` in the complement of S and kept
    in A, ``[]`` in both complements. Those of an absent complement (k = d) are not used.
    """

    @property
    def basis_s(self) -> Tensor: ...  # noqa: D102
    @property
    def basis_a(self) -> Tensor: ...  # noqa: D102
    @property
    def precision_blocks(self) -> Any: ...  # noqa: D102


def jacobian_gram(a: Tensor, g: Tensor, *, mask: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Inner products of the Jacobians of C outputs of every example: ``<J_c, J_c'>``,
    ``J_c = sum_t g_ct a_t^T``.

    Args:
        a: ``[N, T, d_in]``, inputs of the module, float16, bfloat16, float32 or float64, any strides.
        g: ``[N, C, T, d_out]``, gradients of the C outputs with respect to the module's output, likewise.
        mask: ``[N, T]`` bool, True = the token counts; None: all count. Other tokens may hold NaN or
            infinity.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ``[N, C, C]``, bit-exactly symmetric, float64 if ``a`` or ``g`` is, else float32. A sum over tokens,
        divided by nothing. The Jacobians never take more than a bounded share of memory. No gradient is
        recorded.

    Raises:
        TypeError: not a tensor, not a float dtype, ``mask`` not bool.
        ValueError: a wrong shape or device, an unknown ``impl``.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.

    Source: Yang et al. 2024 (Laplace-LoRA), section 2.2, with unit covariance.
    """
    check_impl("jacobian_gram", impl)
    if not (are_tensors((a, g)) and are_tensors((mask,), type(None))):
        _validate("jacobian_gram", a, g, mask)
    with torch.no_grad():
        return _jacobian_gram(a, g, mask, impl)


def jacobian_covariance(
    a: Tensor, g: Tensor, posterior: KroneckerPrecision, *, mask: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Covariance of C linearised outputs of every example under one module's posterior: ``J_c Sigma J_c'^T``.

    Args:
        a: ``[N, T, d_in]``, inputs of the module, float16, bfloat16, float32 or float64, any strides.
        g: ``[N, C, T, d_out]``, gradients of the C outputs with respect to the module's output, likewise.
        posterior: see ``KroneckerPrecision``; its scale is that of the data set's summed curvature plus the
            prior precision, and the result has the scale of a covariance. Taken to the dtype of the result.
        mask: ``[N, T]`` bool, True = the token counts; None: all count. Other tokens may hold NaN or
            infinity.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ``[N, C, C]``, bit-exactly symmetric and positive semi-definite up to rounding (a sum of Gram
        matrices), float64 if ``a`` or ``g`` is, else float32. No gradient is recorded.

    Raises:
        TypeError: not a tensor, not a float dtype, ``mask`` not bool.
        ValueError: a wrong shape or device, an unknown ``impl``.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.

    Source: Yang et al. 2024 (Laplace-LoRA), equation 12 and appendix E, for low-rank factors with a tail on
    either side.
    """
    where = "jacobian_covariance"
    check_impl(where, impl)
    parts = _bases_and_precisions(where, posterior)
    if not (are_tensors((a, g, *parts)) and are_tensors((mask,), type(None))):
        _validate(where, a, g, mask, *parts)
    with torch.no_grad():
        return _jacobian_covariance(a, g, *parts, mask, impl)


def grouped_jacobian_covariance(
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    posteriors: Sequence[KroneckerPrecision],
    *,
    masks: Sequence[Tensor | None] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sum over modules of ``jacobian_covariance``: the covariance under a posterior of independent modules.

    Args:
        a: one ``[N, T_i, d_in_i]`` per module, at least one, all on one device.
        g: one ``[N, C, T_i, d_out_i]`` per module, with the same N and C.
        posteriors: one per module, see ``KroneckerPrecision``.
        masks: one ``[N, T_i]`` bool tensor or None per module; None: all tokens count.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``. The kernel takes all modules of the same
            shapes, dtypes and strides in one go.

    Returns:
        ``[N, C, C]``, bit-exactly symmetric, float64 if any ``a`` or ``g`` is, else float32. No gradient is recorded.

    Raises:
        TypeError, ValueError, RuntimeError: as ``jacobian_covariance``, with the entry's number; lists of different
            lengths, or no module at all.

    Source: as ``jacobian_covariance``.
    """
    where = "grouped_jacobian_covariance"
    check_impl(where, impl)
    if not isinstance(a, (list, tuple)) or not a:
        raise ValueError(f"{where}: expected a to be a list of at least one tensor, got {describe(a)}")
    masks = [None] * len(a) if masks is None else masks
    for name, entries in (("g", g), ("posteriors", posteriors), ("masks", masks)):
        check_same_length(f"{where}: {name}", len(a), entries)
    parts = [_bases_and_precisions(f"{where}: entry {i}", one) for i, one in enumerate(posteriors)]
    lists = [list(column) for column in zip(*parts, strict=True)]
    if not (all(map(are_tensors, (a, g, *lists))) and are_tensors(masks, type(None))):
        _validate_all(a, g, masks, *lists)
    with torch.no_grad():
        return _grouped_jacobian_covariance(list(a), list(g), *lists, list(masks), impl)


def _bases_and_precisions(where: str, posterior: KroneckerPrecision) -> tuple[Tensor, ...]:
    """The two bases, and the posterior precision on the four blocks."""
    for name in ("basis_s", "basis_a", "precision_blocks"):
        if not hasattr(posterior, name):
            raise TypeError(f"{where}: posterior: expected an object with {name}, got {describe(posterior)}")
    blocks = posterior.precision_blocks
    blocks = tuple(blocks() if callable(blocks) else blocks)
    if len(blocks) != 4:
        raise ValueError(f"{where}: posterior.precision_blocks: expected 4 tensors, got {len(blocks)}")
    return posterior.basis_s, posterior.basis_a, *blocks


def _validate(where: str, a: Tensor, g: Tensor, mask: Tensor | None, *posterior: Tensor) -> None:
    check_tensor(f"{where}: a", a, ("N", "T", "d_in"))
    examples, tokens, _ = a.shape
    check_tensor(f"{where}: g", g, (examples, "C", tokens, "d_out"))
    check_device(f"{where}: g", g, a.device)
    check_mask(f"{where}: mask", mask, a, (examples, tokens))
    if posterior:
        _validate_posterior(f"{where}: posterior", a, g, *posterior)


def _validate_posterior(where: str, a: Tensor, g: Tensor, basis_s: Tensor, basis_a: Tensor, *blocks: Tensor) -> None:
    check_tensor(f"{where}.basis_s", basis_s, (g.shape[3], "k_s"))
    check_tensor(f"{where}.basis_a", basis_a, (a.shape[2], "k_a"))
    for name, basis in (("basis_s", basis_s), ("basis_a", basis_a)):
        check_device(f"{where}.{name}", basis, a.device)
        if basis.shape[1] > basis.shape[0]:
            raise ValueError(f"{where}.{name}: expected at most as many columns as rows, got {describe(basis)}")
    k_s, k_a = basis_s.shape[1], basis_a.shape[1]
    shapes: tuple[tuple[int, ...], ...] = ((k_s, k_a), (k_s,), (k_a,), ())
    for name, block, shape in zip(("kept", "rest_a", "rest_s", "rest"), blocks, shapes, strict=True):
        check_tensor(f"{where}.precision_blocks, {name}", block, shape)
        check_device(f"{where}.precision_blocks, {name}", block, a.device)


def _validate_all(
    a: Sequence[Tensor], g: Sequence[Tensor], masks: Sequence[Tensor | None], *posteriors: Sequence[Tensor]
) -> None:
    known: list[tuple[object, ...]] = []  # few: most modules are alike
    for i, entry in enumerate(zip(a, g, masks, *posteriors, strict=True)):
        like = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in entry)
        if like in known:
            continue
        where = f"grouped_jacobian_covariance: entry {i}"
        _validate(where, *entry)
        check_tensor(f"{where}: g", g[i], (*g[0].shape[:2], *g[i].shape[2:]))
        check_device(f"{where}: a", a[i], a[0].device)
        known.append(like)


def _allocate(a: Tensor, g: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], g.shape[1], g.shape[1]), dtype=accumulate_dtype(a, g))


def _validate_and_allocate(where: str, a: Tensor, g: Tensor, mask: Tensor | None, *posterior: Tensor) -> Tensor:
    _validate(where, a, g, mask, *posterior)
    return _allocate(a, g)


def _validate_all_and_allocate(
    a: Sequence[Tensor], g: Sequence[Tensor], masks: Sequence[Tensor | None], *posteriors: Sequence[Tensor]
) -> Tensor:
    _validate_all(a, g, masks, *posteriors)
    return _allocate(a[0], g[0]).to(accumulate_dtype(*a, *g))


@custom_op(
    "bayesian_lora_kernels::jacobian_gram",
    mutates_args=(),
    schema="(Tensor a, Tensor g, Tensor? mask, str impl) -> Tensor",
)
def _jacobian_gram(a: Tensor, g: Tensor, mask: Tensor | None, impl: str) -> Tensor:
    out = _validate_and_allocate("jacobian_gram", a, g, mask)
    choose("jacobian_gram", impl, out, a, g, mask)(out, a, g, mask)
    return out


@_jacobian_gram.register_fake
def _(a: Tensor, g: Tensor, mask: Tensor | None, impl: str) -> Tensor:
    return _validate_and_allocate("jacobian_gram", a, g, mask)


@custom_op(
    "bayesian_lora_kernels::jacobian_covariance",
    mutates_args=(),
    schema=(
        "(Tensor a, Tensor g, Tensor basis_s, Tensor basis_a, Tensor kept, Tensor rest_a, Tensor rest_s, Tensor rest, "
        "Tensor? mask, str impl) -> Tensor"
    ),
)
def _jacobian_covariance(
    a: Tensor,
    g: Tensor,
    basis_s: Tensor,
    basis_a: Tensor,
    kept: Tensor,
    rest_a: Tensor,
    rest_s: Tensor,
    rest: Tensor,
    mask: Tensor | None,
    impl: str,
) -> Tensor:
    posterior = (basis_s, basis_a, kept, rest_a, rest_s, rest)
    out = _validate_and_allocate("jacobian_covariance", a, g, mask, *posterior)
    arguments = (out, a, g, *posterior, mask)
    choose("jacobian_covariance", impl, *arguments)(*arguments)
    return out


@_jacobian_covariance.register_fake
def _(
    a: Tensor,
    g: Tensor,
    basis_s: Tensor,
    basis_a: Tensor,
    kept: Tensor,
    rest_a: Tensor,
    rest_s: Tensor,
    rest: Tensor,
    mask: Tensor | None,
    impl: str,
) -> Tensor:
    posterior = (basis_s, basis_a, kept, rest_a, rest_s, rest)
    return _validate_and_allocate("jacobian_covariance", a, g, mask, *posterior)


@custom_op(
    "bayesian_lora_kernels::grouped_jacobian_covariance",
    mutates_args=(),
    schema=(
        "(Tensor[] a, Tensor[] g, Tensor[] basis_s, Tensor[] basis_a, Tensor[] kept, Tensor[] rest_a, "
        "Tensor[] rest_s, Tensor[] rest, Tensor?[] masks, str impl) -> Tensor"
    ),
)
def _grouped_jacobian_covariance(
    a: list[Tensor],
    g: list[Tensor],
    basis_s: list[Tensor],
    basis_a: list[Tensor],
    kept: list[Tensor],
    rest_a: list[Tensor],
    rest_s: list[Tensor],
    rest: list[Tensor],
    masks: list[Tensor | None],
    impl: str,
) -> Tensor:
    posteriors = (basis_s, basis_a, kept, rest_a, rest_s, rest)
    out = _validate_all_and_allocate(a, g, masks, *posteriors)
    arguments = (out, a, g, *posteriors, masks)
    choose("grouped_jacobian_covariance", impl, *arguments)(*arguments)
    return out


@_grouped_jacobian_covariance.register_fake
def _(
    a: list[Tensor],
    g: list[Tensor],
    basis_s: list[Tensor],
    basis_a: list[Tensor],
    kept: list[Tensor],
    rest_a: list[Tensor],
    rest_s: list[Tensor],
    rest: list[Tensor],
    masks: list[Tensor | None],
    impl: str,
) -> Tensor:
    posteriors = (basis_s, basis_a, kept, rest_a, rest_s, rest)
    return _validate_all_and_allocate(a, g, masks, *posteriors)
