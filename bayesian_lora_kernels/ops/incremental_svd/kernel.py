"""One-touch randomised incremental SVD in Triton, any number of streams at once, without waiting for the device.

As ``reference.py``, but for three things. Test columns are made orthonormal by Gram-Schmidt on their Gram matrix in
float64 instead of Householder QR, which has no batched form on a GPU; a dependent column becomes zero. Z is split
into two bfloat16 halves where X is bfloat16. And NaN or infinity in a counted row is not looked for: the result is
then NaN.

Launches, for all streams of a dtype and padded width together: norms, fresh columns, stack, Gram, Gram-Schmidt, Omega;
R, the touch (Z, Y), C, K; ``nystrom_eigh`` (one launch where the native extension has it), B. First batches go through
the touch twice, as in the reference. Batches with at most as many rows as columns are a few products in PyTorch each.

Bytes and operations per stream, X of M rows and d columns of b bytes, L = l padded to a power of two: X twice, ``2 M
d b`` (once where the second reading finds it in the L2 cache, see ``touch.py``) plus ``160 d b`` for the fresh
columns; about ``44 d L`` bytes for B, the stack, Omega and Y and ``20 M L`` for Z; ``2 M d L`` operations for Z and
twice that for Y's two halves; ``8 d L^2`` in float64. 224 streams of 2048 x 4096 in bf16, l = 30: X is 3.76 GB, 1.25
ms at 3 TB/s; the rest 1.6 GB, 0.5 ms; products 0.36 TFLOP, 0.5 ms on tensor cores; float64 7.5 GFLOP, 0.2 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import native
from ..device import architecture, in_vectors, int64_table, multiprocessors, on_device
from ..kernel_types import TYPES
from ..masking import zero_masked
from ..tuning import choose_configuration
from . import columns as around
from . import nystrom, reference
from .touch import back_project_kernel, project_kernel, touch_kernel

WIDEST = 128  # columns of B before and after
# Parts of the rows in the kernels around the touch; their sums are added in order.
_PARTS = 8
# Rows per step of the kernels around the touch, by padded width, and warps: all that fits the registers.
_STEP = {16: 64, 32: 64, 64: 32, 128: 16}
_WARPS = {16: 4, 32: 4, 64: 8, 128: 8}
_APPLY_STEP = {16: 64, 32: 64, 64: 32, 128: 32}
_SMALL_WARPS = {16: 4, 32: 4, 64: 8, 128: 16}
# Squared distance of a unit column from those before it, below which it is the rounding of float32.
_DROPPED = 1e-14


@dataclass(frozen=True)
class Configuration:
    """Rows of X per projection, columns of X per step of it and per product, rows per step of that; fused: one
    launch. ``max_registers``: without it the assembler spills to fit one program more.
    """

    block_m: int
    block_k: int
    block_d: int
    step_m: int
    num_warps: int
    num_stages: int
    fused: bool = False
    max_registers: int | None = None


def configurations(
    name: str, dtype: torch.dtype, block: int, programs: int, contiguous: bool = True
) -> tuple[Configuration, ...]:
    """Candidates for an architecture, dtype, padded width, how many blocks of 64 rows there are, and layout; the
    known-good first.

    Blocks of 64 rows and 128 columns read Omega and Z an eighth and a quarter as often as X. Where they would leave
    multiprocessors idle, blocks of 16 and 32 take their place. ``sm_90`` and ``sm_100`` have room for deeper pipelines.
    Elements loaded one by one take an address each: smaller steps, or registers spill.
    """
    stages = 3 if name == "sm_80" else 4
    if programs < 132:
        return (Configuration(16, 64, 32, 32, 4, 3),)
    if block == 128 or not contiguous:
        return (Configuration(64, 32, 64, 32 if contiguous else 16, 8, 3),)
    if dtype == torch.float32:
        return (Configuration(64, 32, 64, 32, 4, 3),)
    if dtype == torch.float16:  # multiplied in float32 with Z, which float16 might not hold
        return (Configuration(64, 64, 64, 32, 4, 3, max_registers=128 if block <= 32 else 255),)
    return (
        Configuration(64, 128, 128, 64, 8 if block == 64 else 4, stages),
        Configuration(128, 64, 128, 64, 8, stages),
        Configuration(64, 64 if block == 64 else 128, 64, 64, 8 if block == 64 else 4, stages, fused=True),
    )


@dataclass(frozen=True)
class _Class:
    dtype: torch.dtype
    block: int
    contiguous: bool
    has_mask: bool


@dataclass
class _Stream:
    out: Tensor
    basis: Tensor
    x: Tensor
    mask: Tensor | None
    rows: Tensor
    signs: Tensor
    fresh: int

    def kind(self) -> _Class:
        widest = max(16, self.out.shape[1], self.basis.shape[1])
        return _Class(self.x.dtype, triton.next_power_of_2(widest), in_vectors(self.x), self.mask is not None)

    def fields(self, first_m: int, first_d: int) -> tuple[int, ...]:
        columns = min(self.out.shape)
        fresh = self.fresh if self.fresh <= columns else columns // 2
        pointers = (self.x, self.mask, self.basis, self.out, self.rows, self.signs)
        return (
            *(0 if tensor is None else tensor.data_ptr() for tensor in pointers),
            *self.x.shape,
            *self.x.stride(),
            0 if self.mask is None else self.mask.stride(0),
            self.basis.shape[1],
            *self.basis.stride(),
            *self.out.stride(),
            columns,
            columns - fresh,
            first_m,
            first_d,
            self.out.shape[1],
        )


def grouped_incremental_svd(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    xs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    rows: Sequence[Tensor],
    signs: Sequence[Tensor],
    fresh: int,
) -> None:
    """As ``reference.grouped_incremental_svd``, in Triton."""
    classes: dict[_Class, list[_Stream]] = {}
    with on_device(xs[0]):
        for out, basis, x, mask, row, sign in zip(outs, bases, xs, masks, rows, signs, strict=True):
            if out.numel() == 0:
                continue
            if reference.is_direct(x.shape[0], out.shape[1]):
                _direct(out, basis, x, mask)
                continue
            stream = _Stream(out, basis, x, mask, row.contiguous(), sign.contiguous(), fresh)
            classes.setdefault(stream.kind(), []).append(stream)
        for kind, streams in classes.items():
            _Update(kind, streams).run()


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


def _nystrom_eigh(core: Tensor, gram: Tensor, rounding: float) -> Tensor:
    if not _is_native(core):
        return reference.nystrom_eigh(core, gram, rounding)
    return nystrom.nystrom_eigh(core, gram, rounding)


class _Update:
    """One update of the streams of one class: their table, their scratch, and the launches in order."""

    def __init__(self, kind: _Class, streams: list[_Stream]) -> None:
        # First batches come first: they go through the touch twice.
        self.kind, self.streams = kind, sorted(streams, key=lambda stream: stream.basis.shape[1] > 0)
        self.device = streams[0].x.device
        first_m = first_d = 0
        rows = []
        for stream in self.streams:
            rows.append(stream.fields(first_m, first_d))
            first_m, first_d = first_m + stream.x.shape[0], first_d + stream.x.shape[1]
        self.table = int64_table(rows, self.device)
        count, block = len(streams), kind.block
        self.halves = kind.dtype == torch.bfloat16
        self.stack = self._empty(first_d, block)
        self.omega = self._empty(first_d, block, dtype=kind.dtype)
        self.y = self._empty(first_d, block)
        self.z = self._empty(first_m, block)
        self.high = self._empty(first_m, block, dtype=torch.bfloat16) if self.halves else self.z
        self.low = torch.empty_like(self.high) if self.halves else self.z
        self.r = self._empty(count, block, block)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(self) -> None:
        everyone = len(self.streams)
        self._stack_test_columns()
        beginners = sum(stream.basis.shape[1] == 0 for stream in self.streams)
        if beginners:
            self._orthonormalise(self.stack, beginners)
            self.r[:beginners] = 0.0
            self._touch(beginners)
            first_d = sum(stream.x.shape[1] for stream in self.streams[:beginners])
            self.stack[:first_d] = self.y[:first_d]
        self._orthonormalise(self.stack, everyone)
        r = self._gram(self.table, p=None, q=self.y)  # Y is scratch until the touch: Omega in float32
        self.r.copy_(r)
        self._touch(everyone)
        core = self._gram(self.table, p=self.z, over_m=True) + r.mT @ r
        gram = self._gram(self.table, p=self.y)
        self._apply(self.y, self._combination(core, gram), everyone, None)

    def _options(self, warps: int | None = None) -> dict[str, int | bool]:
        return {"num_warps": warps or _WARPS[self.kind.block], "num_stages": 2, "enable_fp_fusion": False}

    def _stack_test_columns(self) -> None:
        count, block = len(self.streams), self.kind.block
        parts = self._empty(count, _PARTS, block, dtype=torch.float64)
        fresh = self._empty(self.stack.numel())
        present = self._empty(count, block, dtype=torch.int32)
        around.norms_kernel[(count, _PARTS)](self.table, parts, BN=_STEP[block], BL=block, **self._options())
        around.fresh_kernel[(count, block)](
            *(self.table, parts, fresh, present),
            DTYPE=TYPES[self.kind.dtype],
            PARTS=_PARTS,
            BN=1024,
            BL=block,
            **self._options(),
        )
        around.stack_kernel[(count, _PARTS)](
            *(self.table, parts, fresh, present, self.stack), PARTS=_PARTS, BN=_STEP[block], BL=block, **self._options()
        )

    def _gram(self, table: Tensor, p: Tensor | None, q: Tensor | None = None, over_m: bool = False) -> Tensor:
        """``P^T Q`` per module, float64; ``P`` is the basis if None, and ``Q = P`` if None."""
        count, block = table.shape[0], self.kind.block
        parts = self._empty(count, _PARTS, block, block, dtype=torch.float64)
        around.gram_kernel[(count, _PARTS)](
            table,
            self.y if p is None else p,
            self.y if q is None else q,
            parts,
            OVER_M=over_m,
            P_IS_BASIS=p is None,
            SAME=q is None,
            BN=min(32, _STEP[block]),
            BL=block,
            **self._options(),
        )
        return parts.sum(1)

    def _orthonormalise(self, stack: Tensor, count: int) -> None:
        gram = self._gram(self.table[:count], p=stack)
        w = torch.empty_like(gram)
        around.orthonormalise_kernel[(count,)](
            self.table, gram, w, DROPPED=_DROPPED, BL=self.kind.block, **self._options(_SMALL_WARPS[self.kind.block])
        )
        self._apply(stack, w, count, self.omega)

    def _apply(self, p: Tensor, w: Tensor, count: int, to: Tensor | None) -> None:
        around.apply_kernel[(count, _PARTS)](
            self.table,
            p,
            w,
            p if to is None else to,
            self.y,
            TO_OUT=to is None,
            BN=_APPLY_STEP[self.kind.block],
            BL=self.kind.block,
            **self._options(),
        )

    def _combination(self, core: Tensor, gram: Tensor) -> Tensor:
        """``[modules, BL, BL]`` with ``B = Y W``, zero where a column would hold nothing but rounding."""
        eps = torch.finfo(torch.float32).eps
        columns = max(min(stream.out.shape) for stream in self.streams)
        core, gram = core[:, :columns, :columns], gram[:, :columns, :columns]
        combination = _nystrom_eigh(core, gram, eps)
        norms = (combination * (gram @ combination)).sum(-2).clamp(min=0.0).sqrt()
        terms = gram.diagonal(dim1=-2, dim2=-1).sqrt()[:, None, :] @ combination.abs()
        kept = norms[:, None, :] > eps * terms
        whole = core.new_zeros(core.shape[0], self.kind.block, self.kind.block)
        whole[:, :columns, :columns] = torch.where(kept, combination, 0.0)
        return whole

    def _touch(self, count: int) -> None:
        heights = [stream.x.shape[0] for stream in self.streams[:count]]
        widths = [stream.x.shape[1] for stream in self.streams[:count]]
        name = architecture(self.device)
        programs = sum(triton.cdiv(height, 64) for height in heights)
        programs = programs * 132 // multiprocessors(self.device)
        candidates = configurations(name, self.kind.dtype, self.kind.block, programs, self.kind.contiguous)
        key = ("incremental_svd", name, self.kind, count, max(heights), max(widths))
        chosen = choose_configuration(key, candidates, lambda one: self._launch(one, count, max(heights), max(widths)))
        self._launch(chosen, count, max(heights), max(widths))

    def _launch(self, one: Configuration, count: int, height: int, width: int) -> None:
        common = {
            "DTYPE": TYPES[self.kind.dtype],
            "CONTIGUOUS": self.kind.contiguous,
            "HAS_MASK": self.kind.has_mask,
            "HALVES": self.halves,
            "BL": self.kind.block,
            "num_warps": one.num_warps,
            "num_stages": one.num_stages,
            "maxnreg": one.max_registers,
            "enable_fp_fusion": True,
        }
        precision = "tf32x3" if self.kind.dtype == torch.float32 else "ieee"
        projections, products = triton.cdiv(height, one.block_m), triton.cdiv(width, one.block_d)
        scratch = (self.z, self.high, self.low)
        if one.fused:
            # Programs in flight span about LAG modules: then nobody waits, and X is still in the cache.
            lag = min(4, max(1, triton.cdiv(2 * multiprocessors(self.device), projections + products)))
            counters = torch.zeros(1 + count, dtype=torch.int32, device=self.device)
            touch_kernel[((count + lag) * (projections + products),)](
                *(self.table, self.omega, *scratch, self.r, self.y, counters, count, projections, products),
                **common,
                PRECISION=precision,
                BM=one.block_m,
                BK=one.block_k,
                BD=one.block_d,
                LAG=lag,
            )
            return
        project_kernel[(projections, count)](
            *(self.table, self.omega, *scratch), **common, PRECISION=precision, BM=one.block_m, BK=one.block_k
        )
        back_project_kernel[(products, count)](
            *(self.table, *scratch, self.r, self.y), **common, BM=one.step_m, BD=one.block_d
        )
