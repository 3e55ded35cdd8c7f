"""Modules that one launch takes, and what the launches of both routes share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..device import int64_table
from ..kernel_types import TYPES
from . import kernel_rows
from .variants import Variant


@dataclass(frozen=True)
class Covariance:
    """The posteriors of a group of modules, as the kernels read them; all float32."""

    maps: Tensor  # [entries, width of the narrow side, rows]
    deviations: Tensor  # [entries, rows, K_]
    relative: Tensor  # [entries, rows]
    largest: Tensor  # [entries]

    def __getitem__(self, some: slice) -> Covariance:
        """Those of some of the modules."""
        return Covariance(self.maps[some], self.deviations[some], self.relative[some], self.largest[some])


@dataclass(frozen=True)
class Group:
    """Modules that agree in everything but their addresses.

    Args:
        wides: the wide operand of each, `[N, T, width]` or `[N, C, T, width]`.
        narrows: the narrow one.
        masks: int16 `[N, T]` or None.
        bases: the kept directions of the wide side, float32.
        inputs: which have the same wide operand, basis and mask, in order.
        covariance: the posteriors.
        variant: what is compiled.
    """

    wides: list[Tensor]
    narrows: list[Tensor]
    masks: list[Tensor | None]
    bases: list[Tensor]
    inputs: list[int]
    covariance: Covariance
    variant: Variant

    def __getitem__(self, some: slice) -> Group:
        """Some of the modules."""
        masks, inputs, covariance = self.masks[some], self.inputs[some], self.covariance[some]
        return Group(self.wides[some], self.narrows[some], masks, self.bases[some], inputs, covariance, self.variant)

    def parts(self, modules: int, first: int) -> Iterator[tuple[Group, Tensor]]:
        """So many modules at a time, each time with pointers to example `first` of each, then to those of each input;
        columns as in `kernel_rows.py`.
        """
        parts = [self[start : start + modules] for start in range(0, len(self.wides), modules)]
        rows = [part._rows(first) for part in parts]
        table = int64_table([row for some in rows for row in some], self.wides[0].device)
        yield from zip(parts, table.split([len(some) for some in rows]), strict=True)

    def _rows(self, first: int) -> list[tuple[int, ...]]:
        columns = self.wides, self.narrows, self.masks
        skipped = [0 if one[0] is None else first * one[0].stride(0) * one[0].element_size() for one in columns]
        rows = [
            (
                wide.data_ptr() + skipped[0],
                narrow.data_ptr() + skipped[1],
                0 if mask is None else mask.data_ptr() + skipped[2],
                basis.data_ptr(),
                which - self.inputs[0],
            )
            for wide, narrow, mask, basis, which in zip(*columns, self.bases, self.inputs, strict=True)
        ]
        return [*rows, *{row[-1]: row for row in rows}.values()]


def eigenbasis_rows(group: Group, table: Tensor, examples: int, padded: int, planes: torch.dtype | None) -> Tensor:
    """The narrow operands in their eigenbases, `[1 or 3, entries, examples, outputs, rows, padded]`: in three planes of
    a dtype, or in float32.
    """
    shape, narrow, entries = group.variant.shape, group.narrows[0], len(group.narrows)
    outputs, c_stride = (narrow.shape[1], narrow.stride(1)) if narrow.ndim == 4 else (1, 0)
    out = torch.empty(
        (3 if planes else 1, entries, examples, outputs, shape.rows, padded),
        dtype=planes or torch.float32,
        device=narrow.device,
    )
    c_, o_ = group.variant.narrow
    t_ = 2048 // (c_ * o_)  # what registers leave
    kernel_rows.narrow_rows_kernel[(triton.cdiv(padded, t_) * examples * entries,)](
        table, group.covariance.maps, out, out[0].numel(),
        outputs, shape.tokens, padded, narrow.shape[-1], shape.rows,
        narrow.stride(0), c_stride, *narrow.stride()[-2:], examples,
        # The interpreter cannot multiply bfloat16; float32 holds the same numbers.
        DTYPE=TYPES[narrow.dtype], AS=TYPES[torch.float32 if shape.interpreted else torch.bfloat16],
        MASKED=shape.masked, PLANES=planes is not None, C_=c_, O_=o_, T_=t_,
        num_warps=4, num_stages=1, maxnreg=255, enable_fp_fusion=True,
    )  # fmt: skip
    return out
