"""The configurations that `kernel_launch.py` can ask for, as data for `make aot`."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from ..shipped import Shipped
from . import kernel
from .kernel_launch import configuration, kept_configuration

_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
# Outputs and directions of the narrow side: few classes with LoRA ranks 8 and 16, many, and a single row.
_SIZES = ((4, 8), (4, 16), (32, 8), (64, 8), (1, 8))
_KEPT = (0, 16, 32, 64)
_ONE_OUTPUT = {
    "sm_80": "two registers, once per tile: ptxas stays at 168, which lets a third block share a multiprocessor"
}


def shipped(architecture: str) -> list[Shipped]:
    """Every kernel for typical numbers of outputs, with every number of kept directions."""
    found = [_tile_bases(d_, k_) for d_ in (64, 32) for k_ in _KEPT if k_]
    found += [_narrow_rows(dtype, rows) for dtype in _TYPES for rows in (16, 32)]
    found += [_kept_rows(c_, k_) for c_ in (16, 32, 64) for k_ in _KEPT if k_]
    for dtype in _TYPES:
        for outputs, rows in _SIZES:
            for k_ in _KEPT if (outputs, rows) in _SIZES[:3:2] and dtype != "fp16" else (16,):
                found += [_wide(dtype, outputs, rows, k_, True), _wide(dtype, outputs, rows, k_, False)]
    return found


def _tile_bases(d_: int, k_: int) -> Shipped:
    types = {"table": "*i64", "bases": "*fp32", "mixing": "*fp32", "width": "i32", "columns": "i32", "tiles": "i32"}
    types |= {"stride_row": "i32"}
    constants = {"stride_column": 1, "D_": d_, "K_": k_}
    aligned = ("table", "bases", "mixing", "width", "tiles")
    return Shipped(f"jacobian tile_bases {d_}x{k_}", kernel.tile_bases_kernel, types, constants, 8, 1, aligned)


def _narrow_rows(dtype: str, rows: int) -> Shipped:
    types: dict[str, str] = {
        "table": "*i64",
        "maps": "*fp32",
        "out": "*bf16" if dtype == "bf16" else "*fp32",
        "plane": "i32",
    }
    types |= {name: "i32" for name in ("outputs", "tokens", "width", "rows", "stride_n", "stride_c", "stride_t")}
    types |= {"mask_stride_n": "i32", "examples": "i32"}
    constants = {
        "stride_d": 1,
        "mask_stride_t": 1,
        "DTYPE": _TYPES[dtype],
        "MASKED": True,
        "MAPPED": True,
        "PLANES": dtype == "bf16",
    }
    constants |= {"T_": 64, "D_": 16, "R_": rows}
    aligned = ("table", "maps", "out", "tokens")
    return Shipped(f"jacobian narrow_rows {dtype} {rows}", kernel.narrow_rows_kernel, types, constants, 4, 1, aligned)


def _wide(dtype: str, outputs: int, rows: int, k_: int, wide_input: bool) -> Shipped:
    planes = wide_input and dtype == "bf16"
    c_, o_, config = configuration(wide_input, planes, outputs, rows)
    types: dict[str, str] = {"table": "*i64", "narrow": "*bf16" if planes else "*fp32"}
    types |= dict.fromkeys(("bases", "relative", "largest", "kept", "partial"), "*fp32")
    sizes = (
        "examples",
        "outputs",
        "rows",
        "tokens",
        "width",
        "tiles",
        "tiles_per_program",
        "splits",
        "row_blocks",
        "columns",
    )
    types |= dict.fromkeys((*sizes, "stride_n", "stride_t", "mask_stride_n"), "i32")
    aligned = (*types, "plane") if wide_input else tuple(types)
    aligned = tuple(name for name in aligned if name not in sizes or name in ("tokens", "width"))
    constants: dict[str, Any] = {"stride_d": 1, "mask_stride_t": 1, "DTYPE": _TYPES[dtype], "ALIGNED": True}
    constants |= {"MASKED": True, "REST": True, "C_": c_, "O_": o_, "D_": config.width, "K_": k_}
    if wide_input:
        types["plane"] = "i32"
        constants |= {"PLANES": planes, "T_": config.tokens}
    else:
        types["stride_c"] = "i32"
    return Shipped(
        f"jacobian wide_{'input' if wide_input else 'output'} {dtype} C {outputs} rows {rows} k {k_}",
        kernel.wide_input_kernel if wide_input else kernel.wide_output_kernel,
        types,
        constants,
        config.num_warps,
        config.num_stages,
        aligned,
        matrix="mma",
        stack=_ONE_OUTPUT if wide_input and dtype == "fp32" and outputs == 1 else {},
    )


def _kept_rows(c_: int, k_: int) -> Shipped:
    l_, num_warps = kept_configuration(c_)
    types = dict.fromkeys(("kept", "mixing", "deviations", "relative", "largest", "partial"), "*fp32")
    types |= dict.fromkeys(("examples", "outputs", "rows", "length"), "i32")
    aligned = ("kept", "mixing", "deviations", "relative", "largest", "partial", "length")
    constants = {"REST": True, "C_": c_, "L_": l_, "K_": k_}
    return Shipped(
        f"jacobian kept_rows {c_}x{l_}x{k_}",
        kernel.kept_rows_kernel,
        types,
        constants,
        num_warps,
        2,
        aligned,
        matrix="mma",
    )
