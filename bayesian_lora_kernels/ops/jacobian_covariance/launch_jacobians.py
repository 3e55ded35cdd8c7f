"""Launches the kernels of `kernel_jacobians.py`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..kernel_types import TYPES
from . import kernel_jacobians
from .group import Group, eigenbasis_rows
from .variants import power

# Programs per launch beyond which a program takes several tiles: 8 per multiprocessor of an H100.
_PROGRAMS = 1056


def jacobian_workspace(group: Group) -> int:
    """Elements of float32 that a module needs for an example."""
    chosen, shape = group.variant, group.variant.shape
    tiles = triton.cdiv(shape.width, chosen.main.width)
    return shape.rows * (
        shape.tokens * (shape.outputs if shape.wide_input else 1) + shape.outputs * tiles * chosen.kept
    )


def kept_configuration(outputs: int) -> tuple[int, int]:
    """Columns of z that `kept_rows_kernel` takes at once, and its warps: what registers leave."""
    return (32, 4) if outputs <= 32 else (16, 8)


def launch_jacobians(group: Group, table: Tensor, examples: int) -> Tensor:
    """Sum over the modules of a group for so many examples, `[examples, C, C]` float64."""
    chosen, covariance, wide, basis = group.variant, group.covariance, group.wides[0], group.bases[0]
    shape, main, k_, entries, device = chosen.shape, chosen.main, chosen.kept, len(group.wides), wide.device
    outputs, rows, tiles = shape.outputs, shape.rows, triton.cdiv(shape.width, main.width)
    padded = triton.cdiv(shape.tokens, 16) * 16

    def workspace(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    # Dummies where nothing is kept: the kernels do not touch them.
    unit = workspace(entries, tiles * main.width, k_) if k_ else table
    mixing = workspace(entries, tiles * k_, k_) if k_ else table
    z = workspace(entries, examples, rows, outputs, tiles * k_) if k_ else table
    if k_:
        kernel_jacobians.tile_bases_kernel[(tiles, entries)](
            table, unit, mixing, shape.width, shape.kept, tiles, *basis.stride(),
            D_=main.width, K_=k_, num_warps=8, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    narrow = eigenbasis_rows(group, table, examples, padded, torch.bfloat16 if shape.planes else None)

    row_blocks = triton.cdiv(rows, chosen.directions)
    sharing = row_blocks if shape.wide_input else 1  # programs that share a run of tiles
    per_program = max(1, min(8, entries * examples * sharing * tiles // _PROGRAMS))
    splits = triton.cdiv(tiles, per_program)
    blocks = entries * splits * sharing if shape.rest else 0
    partial = workspace(blocks + (entries * rows if k_ else 0), examples, outputs, outputs)
    grid = (entries * examples * splits * sharing,)
    tensors = (unit, covariance.relative, covariance.largest, z, partial)
    sizes = (examples, outputs, rows, shape.tokens, padded, shape.width, tiles, per_program, splits, row_blocks, k_)
    shared = {
        "DTYPE": TYPES[wide.dtype],
        "ALIGNED": shape.aligned,
        "MASKED": shape.masked,
        "REST": shape.rest,
        "C_": chosen.outputs,
        "O_": chosen.directions,
        "T_": main.tokens,
        "D_": main.width,
        "K_": k_,
        "num_warps": main.num_warps,
        "num_stages": main.num_stages,
        "maxnreg": main.max_registers,
        "enable_fp_fusion": True,
    }
    if shape.wide_input:
        kernel_jacobians.wide_input_kernel[grid](
            table, narrow, narrow[0].numel(), *tensors, *sizes, *wide.stride(),
            PLANES=shape.planes, **shared,
        )  # fmt: skip
    else:
        kernel_jacobians.wide_output_kernel[grid](table, narrow, *tensors, *sizes, *wide.stride(), **shared)
    if k_:
        columns, warps = kept_configuration(outputs)
        kernel_jacobians.kept_rows_kernel[(entries * examples * rows,)](
            z, mixing, covariance.deviations, covariance.relative, covariance.largest, partial[blocks:],
            examples, outputs, rows, tiles * k_,
            REST=shape.rest, C_=power(outputs, 16), L_=columns, K_=k_,
            num_warps=warps, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return partial.sum(0, dtype=torch.float64)
