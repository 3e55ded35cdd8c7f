"""The configurations that `kernel_launch.py` can ask for, as data for `make aot`."""

from __future__ import annotations

from typing import Any

from ..kernel_types import TYPES
from ..shipped import Shipped
from . import kernel
from .kernel_launch import configuration, kept_configuration, narrow_tokens

_TYPES = {kind.name: kind for kind in TYPES.values()}
# Outputs and directions of the narrow side: one row of each class that `configuration` knows, and how many are kept (a
# loop whose length is known at run time: 16 stands for all).
_SIZES = ((1, 8, 16), (4, 4, 0), (4, 4, 16), (4, 8, 0), (4, 8, 16), (32, 8, 16), (64, 8, 0), (64, 8, 16))


def shipped(architecture: str) -> list[Shipped]:
    """Every kernel in every configuration, masked, which is more code than unmasked."""
    found = [_tile_bases(d_, k_) for d_ in (64, 32) for k_ in (16, 32, 64)]
    found += [_narrow_rows(dtype, rows) for dtype in _TYPES for rows in (16, 32, 64, 128)]
    found += [_kept_rows(c_, k_) for c_ in (16, 32, 64) for k_ in (16, 32, 64)]
    found += [_wide(dtype, *sizes, True) for dtype in _TYPES for sizes in _SIZES]
    found += [_wide(dtype, *sizes, False) for dtype in ("bf16", "fp32") for sizes in _SIZES]  # fp16 as bf16
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
    constants |= {"T_": narrow_tokens(rows), "R_": rows}
    aligned = ("table", "maps", "out", "tokens")
    return Shipped(
        f"jacobian narrow_rows {dtype} {rows}", kernel.narrow_rows_kernel, types, constants, 4, 1, aligned, "fma"
    )


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
    aligned = [name for name in types if name not in sizes or name in ("tokens", "width")]
    aligned.append("plane" if wide_input else "stride_c")
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
        tuple(aligned),
        matrix="best" if c_ * o_ >= 64 else "mma",
        max_registers=config.max_registers,
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
        matrix="best" if c_ >= 64 else "mma",
    )
