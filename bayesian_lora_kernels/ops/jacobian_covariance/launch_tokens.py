"""Launches the kernels of `kernel_tokens.py`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor, empty

from ..kernel_types import TYPES
from . import kernel_tokens
from .group import Group, eigenbasis_rows
from .variants import padded_tokens

# The basis of a float16 input is multiplied by this on its way to float16, whose numbers below 2^-14 lose digits.
_SCALE = 4096.0


def token_workspace(group: Group) -> int:
    """Elements of float32 that a module needs for an example."""
    shape, padded = group.variant.shape, padded_tokens(group.variant)
    return 3 * padded * (shape.outputs * shape.rows + padded + group.variant.kept) // 2


def launch_tokens(group: Group, table: Tensor, examples: int) -> Tensor:
    """Sum over the modules of a group for so many examples, `[examples, C, C]` float64."""
    chosen, covariance, wide, basis = group.variant, group.covariance, group.wides[0], group.bases[0]
    shape, main, tail, device = chosen.shape, chosen.main, chosen.tail, wide.device
    assert tail is not None
    interpreted, entries, inputs = shape.interpreted, len(group.wides), group.inputs[-1] - group.inputs[0] + 1
    padded, k_, n_ = padded_tokens(chosen), chosen.kept, chosen.columns
    of_inputs = table[entries:]
    # The interpreter cannot multiply bfloat16; float32 holds the same numbers.
    plane_type = torch.float32 if interpreted else torch.bfloat16
    options = {"enable_fp_fusion": True}

    columns = torch.empty(
        (inputs, shape.width, n_), dtype=wide.dtype if shape.basis_planes else torch.float32, device=device
    )
    scale = _SCALE if wide.dtype == torch.float16 else 1.0
    kernel_tokens.basis_columns_kernel[(triton.cdiv(shape.width, 4096 // n_), inputs)](
        of_inputs, columns, shape.width, shape.kept, *basis.stride(), scale,
        PLANES=shape.basis_planes, D_=4096 // n_, N_=n_, num_warps=4, num_stages=1, **options,
    )  # fmt: skip
    narrow = eigenbasis_rows(group, table, examples, padded, plane_type)

    similar = torch.empty((3, inputs, examples, padded, padded), dtype=plane_type, device=device)
    inside = torch.empty((3, inputs, examples, padded, k_), dtype=plane_type, device=device)
    planes = similar, similar[0].numel(), inside, inside[0].numel()
    flags = empty((inputs, examples), dtype=torch.int32, device=device)
    row_blocks = triton.cdiv(shape.rows, chosen.directions)
    partial = torch.empty(
        (entries * row_blocks, examples, shape.outputs, shape.outputs), dtype=torch.float32, device=device
    )
    dtype = TYPES[wide.dtype]
    of_input = {"DTYPE": dtype, "ALIGNED": shape.aligned, "MASKED": shape.masked, "K_": k_}

    def pairs(tile: int) -> int:
        tiles = padded // tile
        return tiles * (tiles + 1) // 2

    def similarities() -> None:
        kernel_tokens.similarities_kernel[(pairs(main.tokens) * examples * inputs,)](
            of_inputs, columns, *planes, flags, 1.0, 1.0 / scale,
            examples, shape.tokens, shape.width, padded, pairs(main.tokens), shape.kept, *wide.stride(),
            AS=TYPES[plane_type] if wide.dtype == torch.bfloat16 else dtype,
            PLANES=shape.basis_planes, T_=main.tokens, D_=main.width, N_=n_,
            num_warps=main.num_warps, num_stages=main.num_stages, **of_input, **options,
        )  # fmt: skip

    def remainders() -> None:
        kernel_tokens.remainder_similarities_kernel[(pairs(64) * examples * inputs,)](
            of_inputs, *planes, flags, 1.0,
            examples, shape.tokens, shape.width, padded, pairs(64), shape.kept, *wide.stride(), *basis.stride(),
            T_=64, D_=32, num_warps=8, num_stages=2, **of_input, **options,
        )  # fmt: skip

    def grams(again: bool) -> None:
        kernel_tokens.token_gram_kernel[(entries * examples * row_blocks,)](
            table, narrow, narrow[0].numel(), *planes,
            covariance.deviations, covariance.relative, covariance.largest, flags, partial, 1.0,
            examples, shape.outputs, shape.rows, padded, row_blocks,
            AGAIN=again, C_=chosen.outputs, O_=chosen.directions, T_=tail.width, S_=tail.tokens, K_=k_,
            num_warps=tail.num_warps, num_stages=tail.num_stages, **options,
        )  # fmt: skip

    similarities()
    grams(False)
    remainders()
    grams(True)
    return partial.sum(0, dtype=torch.float64)
