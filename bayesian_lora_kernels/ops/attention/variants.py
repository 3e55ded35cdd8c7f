"""What is compiled for which arguments of attention with tangents. Pure functions of sizes and dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import architecture

COLUMNS = 16  # heads are padded to a multiple of so many, and rows begin at one: 16 bytes are loaded at a time
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.bool: "bool"}


@dataclass(frozen=True)
class Configuration:
    """What a program takes: queries, keys of a step, columns of a head at once, columns of values, tangents (one where
    the columns are in parts); warps, pipeline depth, registers at most.
    """

    queries: int
    keys: int
    columns: int
    values: int
    tangents: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# By the wider of a head and its values, rounded up to a power of two. Registers bound all of them: operands of mma.sync
# stay there, while wgmma reads them from shared memory.
_HALF = {
    "sm_80": {
        64: Configuration(64, 16, 64, 64, 2, 4, 2),
        128: Configuration(64, 16, 128, 64, 1, 4, 2),
        256: Configuration(32, 16, 64, 128, 1, 4, 1),
    },
    "sm_90": {
        64: Configuration(64, 32, 64, 64, 2, 4, 2),
        128: Configuration(128, 32, 128, 128, 1, 8, 2),
        256: Configuration(64, 32, 32, 64, 1, 4, 1),
    },
    "sm_100": {
        64: Configuration(64, 32, 64, 64, 2, 4, 2),
        128: Configuration(64, 32, 128, 128, 1, 8, 2),
        256: Configuration(64, 32, 64, 64, 1, 4, 1),
    },
}
# A product of float32 takes three, and operands in two parts.
_FLOAT32 = {
    "sm_80": {256: Configuration(32, 16, 16, 32, 1, 8, 1, 255)},
    "sm_90": {256: Configuration(64, 16, 16, 32, 1, 4, 1)},
    "sm_100": {16: Configuration(64, 32, 32, 32, 1, 8, 1), 256: Configuration(64, 16, 32, 32, 1, 8, 1, 255)},
}


@dataclass(frozen=True)
class Variant:
    """All that selects what is compiled.

    Args:
        dtype: of everything but a mask.
        mask: its dtype, None where there is none.
        causal: whether a query sees no later key.
        even: whether no column of a tile is empty.
        parts: whether a head's columns are taken in parts.
        width: of a head and its values, rounded up to a power of two, or of a part.
        value_width: likewise.
        configuration: how it is cut.
    """

    dtype: torch.dtype
    mask: torch.dtype | None
    causal: bool
    even: bool
    parts: bool
    width: int
    value_width: int
    configuration: Configuration

    def __str__(self) -> str:
        one = self.configuration
        mask = [] if self.mask is None else [f"mask={_NAMES[self.mask]}"]
        flags = [name for name in ("causal", "even", "parts") if getattr(self, name)]
        sizes = f"D={self.width} V={self.value_width} M={one.queries} N={one.keys} G={one.tangents}"
        return " ".join([_NAMES[self.dtype], *mask, *flags, sizes])


def mask_dtype(query: Tensor, mask: Tensor | None) -> torch.dtype | None:
    """In which the kernels read it: as it is, or float32."""
    if mask is None or mask.dtype in (torch.bool, query.dtype):
        return None if mask is None else mask.dtype
    return torch.float32


def variants(
    out: Tensor,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Variant, ...]:
    """What ``attention_jvp`` compiles for these arguments."""
    columns, values = (-(-one.shape[3] // COLUMNS) * COLUMNS for one in (query, value))
    widest = 1 << (max(columns, values) - 1).bit_length()
    table = (_FLOAT32 if query.dtype == torch.float32 else _HALF)[architecture(query.device)]
    chosen = next(one for size, one in table.items() if widest <= size)
    width, value_width = min(widest, chosen.columns), min(widest, chosen.values)
    even = columns % width == 0 and values % value_width == 0
    return (Variant(query.dtype, mask_dtype(query, mask), causal, even, widest > width, width, value_width, chosen),)
