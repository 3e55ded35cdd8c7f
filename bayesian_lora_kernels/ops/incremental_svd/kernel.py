"""One-touch randomised incremental SVD in Triton, any number of streams at once, without waiting for the device.

As ``reference.py``, but for three things. Test columns are made orthonormal by Gram-Schmidt on their Gram matrix in
float64 instead of Householder QR, which has no batched form on a GPU; a dependent column becomes zero. Z is split
into two bfloat16 halves where X is bfloat16. And NaN or infinity in a counted row is not looked for: the result is
then NaN.

Launches, for all streams of a dtype and padded width together: norms, fresh columns, stack, Gram, Gram-Schmidt, Omega;
R, the touch (Z, Y), C, K; ``nystrom_eigh`` (one launch where the native extension has it), B. First batches go through
the touch twice, as in the reference. Batches with at most as many rows as columns are a few products in PyTorch each.
Which streams go together, and how the kernels are compiled for them, is what ``plan.py`` says.

Bytes and operations per stream, X of M rows and d columns of b bytes, L = l padded to a power of two: X twice, ``2 M
d b`` (once where the second reading finds it in the L2 cache, see ``touch.py``) plus ``160 d b`` for the fresh
columns; about ``44 d L`` bytes for B, the stack, Omega and Y and ``20 M L`` for Z; ``2 M d L`` operations for Z and
twice that for Y's two halves; ``8 d L^2`` in float64. 224 streams of 2048 x 4096 in bf16, l = 30: X is 3.76 GB, 1.25
ms at 3 TB/s, and read twice; the rest 1.6 GB, 0.5 ms; products 0.36 TFLOP, 0.5 ms on tensor cores; float64 7.5 GFLOP,
0.2 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import native
from ..device import architecture, on_device, widened
from ..kernel_types import TYPES
from ..layouts import addresses, device_table
from ..masking import zero_masked
from ..tuning import choose_configuration
from . import columns as around
from . import nystrom, reference
from .plan import Configuration, Group, plan, variants
from .touch import back_project_kernel, project_kernel, touch_kernel

__all__ = ["grouped_incremental_svd", "variants"]

# Parts of the rows in the kernels around the touch; their sums are added in order.
_PARTS = 8
# Rows per step of the kernels around the touch, by padded width, and warps: all that fits the registers.
_STEP = {16: 32, 32: 64, 64: 32, 128: 16}
_WARPS = {16: 4, 32: 4, 64: 8, 128: 8}
_COLUMNS = 64  # of a product of l x l matrices, per program: as many as 99 KB of shared memory hold
_SMALL_WARPS = {16: 4, 32: 4, 64: 8, 128: 16}
# Squared distance of a unit column from those before it, below which it is the rounding of float32.
_DROPPED = 1e-14
_EPS = torch.finfo(torch.float32).eps


def grouped_incremental_svd(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    rows: Sequence[Tensor],
    signs: Sequence[Tensor],
    fresh: int,
) -> None:
    """As ``reference.grouped_incremental_svd``, in Triton; outs, rows and signs have no gaps."""
    found = plan(outs, bases, xs, [mask is not None for mask in masks], fresh)
    with on_device(xs[0]):
        wide = widened(masks)
        columns = [addresses(each) for each in (xs, wide, bases, outs, rows, signs)]
        for i in found.direct:
            _direct(outs[i], bases[i], xs[i], masks[i])
        for group in found.groups:
            table = device_table(columns, group.fixed, group.order, xs[0].device)
            _Update(group, table).run()


def _direct(out: Tensor, basis: Tensor, x: Tensor, mask: Tensor | None) -> None:
    counted = zero_masked(x, mask).to(out.dtype)
    result = reference.direct(basis, counted, min(out.shape), _eigh)
    out[:, : result.shape[1]] = result
    out[:, result.shape[1] :] = 0.0


def _is_native(matrices: Tensor) -> bool:
    """Whether the native extension takes them: it never waits for the device, as ``torch.linalg.eigh`` does."""
    return native.why_unavailable() is None and native.refuses(matrices) is None


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors of ``[n, n]``."""
    if not _is_native(matrix):
        return torch.linalg.eigh(matrix)
    values, vectors = matrix.new_empty(1, len(matrix)), matrix.new_empty(1, *matrix.shape)
    native.small_eigh(values, vectors, matrix[None], check_errors=False)
    return values[0].flip(-1), vectors[0].flip(-1)


def _nystrom_eigh(core: Tensor, gram: Tensor) -> Tensor:
    one = nystrom if _is_native(core) else reference
    return one.nystrom_eigh(core, gram, _EPS)


class _Update:
    """One update of the streams of one group: their scratch, and the launches in order."""

    def __init__(self, group: Group, table: Tensor) -> None:
        self.group, self.table, self.device = group, table, table.device
        self.block = group.variant.block
        first_m, first_d = sum(group.rows_of_x), sum(group.columns_of_x)
        self.halves = group.variant.dtype == torch.bfloat16
        self.stack = self._empty(first_d, self.block)
        self.omega = self._empty(first_d, self.block, dtype=group.variant.dtype)
        self.y = self._empty(first_d, self.block)
        self.z = self._empty(first_m, self.block)
        self.high = self._empty(first_m, self.block, dtype=torch.bfloat16) if self.halves else self.z
        self.low = torch.empty_like(self.high) if self.halves else self.z
        self.r = self._empty(len(table), self.block, self.block)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(self) -> None:
        self._stack_test_columns()
        if self.group.beginners:  # they have no basis, so that the touch does not read R
            self._orthonormalise(self.group.beginners)
            self._touch(self.group.beginners, self.stack)
        self._orthonormalise(len(self.table))
        r = self._gram(self.table, p=None, q=self.y)  # Y is scratch until the touch: Omega in float32
        self.r.copy_(r)
        self._touch(len(self.table), self.y)
        core = torch.baddbmm(self._gram(self.table, p=self.z, over_m=True), r.mT, r)
        self._apply(self.y, self._combination(core, self._gram(self.table, p=self.y)), len(self.table), None)

    def _options(self, warps: int | None = None) -> dict[str, int | bool]:
        return {"num_warps": warps or _WARPS[self.block], "num_stages": 2, "enable_fp_fusion": False}

    def _stack_test_columns(self) -> None:
        count, block = len(self.table), self.block
        parts = self._empty(count, _PARTS, block, dtype=torch.float64)
        fresh = self._empty(self.stack.numel())
        present = self._empty(count, block, dtype=torch.int32)
        around.norms_kernel[(count, _PARTS)](self.table, parts, BN=_STEP[block], BL=block, **self._options())
        around.fresh_kernel[(count, block)](
            *(self.table, parts, fresh, present),
            DTYPE=TYPES[self.group.variant.dtype],
            PARTS=_PARTS,
            BN=1024,
            BL=block,
            maxnreg=255,  # or ptxas spills a few bytes to fit one more block
            **self._options(),
        )
        around.stack_kernel[(count, _PARTS)](
            *(self.table, parts, fresh, present, self.stack), PARTS=_PARTS, BN=_STEP[block], BL=block, **self._options()
        )

    def _gram(self, table: Tensor, p: Tensor | None, q: Tensor | None = None, over_m: bool = False) -> Tensor:
        """``P^T Q`` per module, float64; ``P`` is the basis if None, and ``Q = P`` if None."""
        count, block, columns = len(table), self.block, min(_COLUMNS, self.block)
        parts = self._empty(count, _PARTS, block, block, dtype=torch.float64)
        around.gram_kernel[(count, _PARTS, block // columns)](
            table,
            self.y if p is None else p,
            self.y if q is None else q,
            parts,
            OVER_M=over_m,
            P_IS_BASIS=p is None,
            SAME=q is None,
            BN=min(32, _STEP[block]),
            BC=columns,
            BL=block,
            **self._options(),
        )
        return parts.sum(1)

    def _orthonormalise(self, count: int) -> None:
        """The first streams' Omega from the stack, and as float32 in Y."""
        gram = self._gram(self.table[:count], p=self.stack)
        w = torch.empty_like(gram)
        around.orthonormalise_kernel[(count,)](
            self.table, gram, w, DROPPED=_DROPPED, BL=self.block, **self._options(_SMALL_WARPS[self.block])
        )
        self._apply(self.stack, w, count, self.omega)

    def _apply(self, p: Tensor, w: Tensor, count: int, to: Tensor | None) -> None:
        columns = min(_COLUMNS, self.block)
        around.apply_kernel[(count, _PARTS, self.block // columns)](
            *(self.table, p, w, p if to is None else to, self.y),
            TO_OUT=to is None,
            BN=_STEP[self.block],
            BC=columns,
            BL=self.block,
            **self._options(),
        )

    def _combination(self, core: Tensor, gram: Tensor) -> Tensor:
        """``W: [modules, BL, BL]`` with ``B = Y W``."""
        columns, whole = self.group.columns, torch.empty_like(gram)
        combination = _nystrom_eigh(core[:, :columns, :columns], gram[:, :columns, :columns]).contiguous()
        around.significant_kernel[(len(gram), self.block // 16)](
            *(combination, gram, whole, columns), EPS=_EPS, BC=16, BL=self.block, **self._options(4)
        )
        return whole

    def _touch(self, count: int, y: Tensor) -> None:
        group = self.group
        key = ("incremental_svd", architecture(self.device), group.variant, group.rows_of_x, group.columns_of_x, count)
        chosen = choose_configuration(key, group.candidates, lambda one: self._launch(one, count, y))
        self._launch(chosen, count, y)

    def _launch(self, one: Configuration, count: int, y: Tensor) -> None:
        variant = self.group.variant
        common = {
            "DTYPE": TYPES[variant.dtype],
            "CONTIGUOUS": variant.contiguous,
            "HAS_MASK": variant.masked,
            "HALVES": self.halves,
            "BL": self.block,
            "num_warps": one.num_warps,
            "num_stages": one.num_stages,
            "maxnreg": one.max_registers,
            "enable_fp_fusion": True,
        }
        precision = "tf32x3" if variant.dtype == torch.float32 else "ieee"
        projections = triton.cdiv(max(self.group.rows_of_x[:count]), one.block_m)
        products = triton.cdiv(max(self.group.columns_of_x[:count]), one.block_d)
        scratch = (self.z, self.high, self.low)
        if one.fused:
            counters = torch.zeros(1 + count, dtype=torch.int32, device=self.device)
            lag = self.group.lag
            touch_kernel[((count + lag) * (projections + products),)](
                *(self.table, self.omega, *scratch, self.r, y, counters, count, projections, products, lag),
                **common,
                PRECISION=precision,
                BM=one.block_m,
                BK=one.block_k,
                BD=one.block_d,
            )
            return
        project_kernel[(projections, count)](
            *(self.table, self.omega, *scratch), **common, PRECISION=precision, BM=one.block_m, BK=one.block_k
        )
        back_project_kernel[(products, count)](
            *(self.table, *scratch, self.r, y), **common, BM=one.step_m, BD=one.block_d
        )
