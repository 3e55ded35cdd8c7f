"""Public ``incremental_svd`` and ``grouped_incremental_svd``: checks, random choice, allocation, dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import accumulate_dtype, check_device, check_mask, check_same_length, check_tensor, describe
from ..dispatch import check_impl, choose
from ..registration import custom_op
from .implementations import register_all
from .sparse_signs import choose_all_rows, draw_numbers

register_all()


def incremental_svd(
    basis: Tensor | None,
    x: Tensor,
    *,
    columns: int | None = None,
    mask: Tensor | None = None,
    fresh: int = 10,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> Tensor:
    """Update a low-rank estimate of a sum of outer products by one batch, which is read once.

    ``B B^T`` estimates ``sum x x^T`` over all counted rows of all batches (a sum, divided by nothing). To end
    with k columns, stream with ``columns = 2 k + 10`` and keep the first k of the last result. Batches with
    at most ``columns`` rows go a direct route, which uses no random numbers and loses only what the truncation
    must; a first batch with more rows than that is touched twice, since its loss would stay in the estimate.

    Args:
        basis: ``B: [d, l]``, what the last call returned, or None for the first batch.
        x: ``[M, d]``, the rows of the batch, float16, bfloat16, float32 or float64, any strides, M may be 0.
        columns: how many columns the result has; default: as many as ``basis``. At least 1.
        mask: ``[M]`` bool, True = the row counts; None: all count. Other rows may hold NaN or infinity.
        fresh: how many test columns come from the batch instead of the basis: signed sums of 16 of its rows.
            Half of the columns, where there are fewer columns than that.
        generator: where the choice of rows and signs comes from, on any device; None: PyTorch's global
            generator.
        impl: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"`` (the reference, with its Nystroem
            eigendecompositions in the native extension).

    Returns:
        ``[d, columns]``, orthogonal columns by descending norm, zero columns where the rank is smaller;
        float64 for float64 ``x``, else float32. No gradient is recorded.

    Raises:
        TypeError: not a tensor, not a float dtype, ``mask`` not bool, ``basis`` of another dtype than the
            result.
        ValueError: a wrong shape or device, ``columns`` missing or below 1, ``fresh`` negative, an unknown
            ``impl``, and on the CPU NaN or infinity in a counted row or in ``basis``. On a GPU nothing waits to see
            that: the result is NaN then, or PyTorch's eigensolver raises.
        RuntimeError: an explicit ``impl`` cannot run; the message says why.

    Source: Nystroem approximation of Tropp et al. 2017, algorithm 3, and Frangella, Tropp and Udell 2021; in
    place of the incremental SVD of Yang et al. 2024 (Laplace-LoRA), appendix E.
    """
    where = "incremental_svd"
    check_impl(where, impl)
    columns = _check(where, basis, x, columns, mask, fresh)
    return _update([basis], [x], [columns], [mask], fresh, generator, impl)[0]


def grouped_incremental_svd(
    bases: Sequence[Tensor | None],
    xs: Sequence[Tensor],
    *,
    columns: int | Sequence[int] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    fresh: int = 10,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> list[Tensor]:
    """``incremental_svd`` of many streams of any widths at once, in few launches where there is a kernel for it.

    Args:
        bases: one ``[d_i, l_i]`` tensor or None per stream.
        xs: one ``[M_i, d_i]`` tensor per stream, all on one device.
        columns: one number for all, or one per stream; default: as many as each basis has.
        masks: one ``[M_i]`` bool tensor or None per stream; None: all rows count.
        fresh: as ``incremental_svd``, for every stream.
        generator: as ``incremental_svd``. Drawn from once: streams with equally many rows and the same mask choose the
            same rows and signs, each for itself as good as any.
        impl: as ``incremental_svd``.

    Returns:
        A list of ``[d_i, columns_i]``, each as ``incremental_svd`` returns it.

    Raises:
        TypeError, ValueError, RuntimeError: as ``incremental_svd``, with the entry's number; lists of
            different lengths.

    Source: as ``incremental_svd``.
    """
    where = "grouped_incremental_svd"
    check_impl(where, impl)
    if not isinstance(xs, (list, tuple)):
        raise TypeError(f"{where}: expected xs to be a list of tensors, got {describe(xs)}")
    count = len(xs)
    masks = [None] * count if masks is None else masks
    each = [columns] * count if columns is None or isinstance(columns, int) else columns
    for name, value in (("bases", bases), ("masks", masks), ("columns", each)):
        check_same_length(f"{where}: {name}", count, value)
    if count == 0:
        return []
    widths = []
    for i in range(count):
        entry = f"{where}: entry {i}"
        widths.append(_check(entry, bases[i], xs[i], each[i], masks[i], fresh))
        check_device(f"{entry}: x", xs[i], xs[0].device)
    return _update(bases, xs, widths, masks, fresh, generator, impl)


def _check(where: str, basis: Tensor | None, x: Tensor, columns: int | None, mask: Tensor | None, fresh: int) -> int:
    """How many columns the result of these arguments has."""
    if fresh < 0:
        raise ValueError(f"{where}: expected fresh of at least 0, got {fresh}")
    check_tensor(f"{where}: x", x, ("M", "d"))
    check_mask(f"{where}: mask", mask, x, (x.shape[0],))
    if basis is not None:
        check_tensor(f"{where}: basis", basis, (x.shape[1], "l"), (accumulate_dtype(x),))
        check_device(f"{where}: basis", basis, x.device)
    if columns is None:
        if basis is None:
            raise ValueError(f"{where}: expected columns (an int) with the first batch, got None and basis=None")
        columns = basis.shape[1]
    if columns < 1:
        raise ValueError(f"{where}: expected columns of at least 1, got {columns}")
    return columns


def _update(
    bases: Sequence[Tensor | None],
    xs: Sequence[Tensor],
    columns: Sequence[int],
    masks: Sequence[Tensor | None],
    fresh: int,
    generator: torch.Generator | None,
    impl: str,
) -> list[Tensor]:
    with torch.no_grad():
        numbers = draw_numbers(max(columns), xs[0].device, generator)
        filled = [
            x.new_empty((x.shape[1], 0), dtype=accumulate_dtype(x)) if basis is None else basis
            for basis, x in zip(bases, xs, strict=True)
        ]
        result: list[Tensor] = _grouped_incremental_svd(
            filled, list(xs), list(masks), numbers, list(columns), fresh, impl
        )
        return result


def _allocate(xs: Sequence[Tensor], columns: Sequence[int]) -> list[Tensor]:
    return [x.new_empty((x.shape[1], wanted), dtype=accumulate_dtype(x)) for x, wanted in zip(xs, columns, strict=True)]


@custom_op(
    "bayesian_lora_kernels::grouped_incremental_svd",
    mutates_args=(),
    schema=(
        "(Tensor[] bases, Tensor[] xs, Tensor?[] masks, Tensor numbers, SymInt[] columns, SymInt fresh, str impl) "
        "-> Tensor[]"
    ),
)
def _grouped_incremental_svd(
    bases: list[Tensor],
    xs: list[Tensor],
    masks: list[Tensor | None],
    numbers: Tensor,
    columns: list[int],
    fresh: int,
    impl: str,
) -> list[Tensor]:
    outs = _allocate(xs, columns)
    rows, signs = choose_all_rows(numbers, columns, [x.shape[0] for x in xs], masks)
    arguments = (outs, bases, xs, masks, rows, signs, fresh)
    choose("grouped_incremental_svd", impl, *arguments)(*arguments)
    return outs


@_grouped_incremental_svd.register_fake
def _(
    bases: list[Tensor],
    xs: list[Tensor],
    masks: list[Tensor | None],
    numbers: Tensor,
    columns: list[int],
    fresh: int,
    impl: str,
) -> list[Tensor]:
    return _allocate(xs, columns)
