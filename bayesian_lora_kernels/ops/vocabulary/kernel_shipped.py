"""The configurations that `kernel_launch.py` can ask for, as data for `make aot`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..shipped import Shipped
from . import kernel, kernel_scratch
from .kernel_launch import SCRATCH_TILE, Configuration, configurations, group


@dataclass(frozen=True)
class _Operands:
    """Types of the weight and of the columns; how many tensors the columns are a sum of."""

    name: str
    weight: str
    columns: str
    planes: int

    @property
    def half(self) -> bool:
        return self.columns != "fp32"


# float16 alone compiles to what bfloat16 does, but for the type of the matrix instruction.
_OPERANDS = (
    _Operands("bf16", "bf16", "bf16", 1),
    _Operands("bf16xfp32", "bf16", "bf16", 3),
    _Operands("fp32", "fp32", "fp32", 1),
    _Operands("fp16xfp32", "fp16", "fp32", 1),
)
_HEAD: dict[str, Any] = {"HAS_BIAS": True, "SOFTCAP": True}
_STRIDES = ("stride_wv", "stride_p", "stride_n", "stride_s")
_SCRATCH = {"stored_ptr": "*fp32", "maxima_ptr": "*fp32", "logsumexp_ptr": "*fp64"}


def shipped(architecture: str) -> list[Shipped]:
    """Every kernel in every tile configuration and combination of dtypes, for 64 samples (columns of a factor) each:
    several examples in a wide tile, one example in several narrow ones.
    """
    found = []
    for operands in _OPERANDS:
        for chosen in configurations(architecture, operands.planes, operands.half):
            found += [_exponentials(operands, chosen), _means(operands, chosen), _squares(operands, chosen)]
    tiles = {one.constants["BV"] for one in found}
    return [*found, _merge(), *(one(tile) for tile in sorted(tiles) for one in (_stored_means, _stored_statistics))]


def _product(
    kernel_name: str,
    function: Any,
    operands: _Operands,
    chosen: Configuration,
    types: dict[str, str],
    constants: dict[str, Any],
) -> Shipped:
    """A kernel that has a product in it, with its own arguments."""
    tile = f"{chosen.block_v}x{chosen.block_c}x{chosen.block_k}"
    types = {"weight_ptr": f"*{operands.weight}", "columns_ptr": f"*{operands.columns}"} | types
    pointers = [name for name in types if name.endswith("_ptr")]
    types |= dict.fromkeys(("examples", "samples", "width", *_STRIDES), "i32")
    constants = {"stride_wd": 1, "stride_d": 1, "PADDED": 64, "PLANES": operands.planes} | constants
    constants |= {"WIDEN": operands.weight != operands.columns, "PRECISION": "ieee" if operands.half else "tf32x3"}
    constants |= {"BV": chosen.block_v, "BC": chosen.block_c, "BK": chosen.block_k, "GROUP": group(chosen)}
    return Shipped(
        f"vocabulary {kernel_name} {operands.name} {tile}",
        function,
        types,
        constants,
        chosen.num_warps,
        chosen.num_stages,
        aligned=(*pointers, "width", *_STRIDES),
        matrix="best" if operands.half else "mma",
    )


def _exponentials(operands: _Operands, chosen: Configuration) -> Shipped:
    """With everything: bias, soft cap, targets, and the exponentials stored."""
    types = dict.fromkeys(("maxima_ptr", "sums_ptr", "stored_ptr", "target_logits_ptr", "bias_ptr"), "*fp32")
    types |= {"targets_ptr": "*i64", "softcap": "fp32", "first_token": "i32", "end_token": "i32"}
    flags = _HEAD | {"HAS_TARGETS": True, "STORE": True}
    return _product("exponentials", kernel.exponentials_kernel, operands, chosen, types, flags)


def _means(operands: _Operands, chosen: Configuration) -> Shipped:
    types = {"out_ptr": "*fp32", "logsumexp_ptr": "*fp64", "bias_ptr": "*fp32", "softcap": "fp32"}
    types |= {"tokens": "i32", "stride_o": "i32"}
    return _product("means", kernel.means_kernel, operands, chosen, types, _HEAD)


def _squares(operands: _Operands, chosen: Configuration) -> Shipped:
    types = {"out_ptr": "*fp32", "tokens": "i32", "stride_o": "i32"}
    return _product("squares", kernel.squares_kernel, operands, chosen, types, {})


def _merge() -> Shipped:
    types = {"logsumexp_ptr": "*fp64", "maxima_ptr": "*fp32", "sums_ptr": "*fp32"}
    types |= dict.fromkeys(("token_tiles", "columns", "examples", "samples"), "i32")
    aligned = ("logsumexp_ptr", "maxima_ptr", "sums_ptr", "columns")
    constants = {"PADDED": 64, "BT": 32, "BC": 32}
    return Shipped("vocabulary merge", kernel.merge_kernel, types, constants, 4, 2, aligned)


def _stored_means(tile: int) -> Shipped:
    types = {"out_ptr": "*fp32"} | _SCRATCH | dict.fromkeys(("tokens", "samples", "row", "stride_o"), "i32")
    return _stored("stored_means", kernel_scratch.stored_means_kernel, tile, types)


def _stored_statistics(tile: int) -> Shipped:
    types = {"entropy_ptr": "*fp32", "information_ptr": "*fp32"} | _SCRATCH
    types |= dict.fromkeys(("tokens", "samples", "row"), "i32")
    return _stored("stored_statistics", kernel_scratch.stored_statistics_kernel, tile, types)


def _stored(kernel_name: str, function: Any, tile: int, types: dict[str, str]) -> Shipped:
    block, samples = SCRATCH_TILE
    aligned = (*(name for name in types if name.endswith("_ptr")), "row")
    constants = {"PADDED": 64, "TILE": tile, "BV": block, "BS": samples}
    return Shipped(f"vocabulary {kernel_name} {tile}", function, types, constants, 4, 2, aligned)
