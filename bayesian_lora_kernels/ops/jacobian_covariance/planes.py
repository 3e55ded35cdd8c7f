"""A float32 as the sum of three bfloat16 numbers: matrix instructions then lose nothing of a product."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split(x, TYPE: tl.constexpr):
    """A float32 as the sum of three numbers of 8 bits each, which bfloat16 holds exactly (so does float32)."""
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    x -= high
    middle = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(TYPE), middle.to(TYPE), (x - middle).to(TYPE)


@triton.jit
def store_planes(x, pointers, plane, mask):
    """To `pointers` and the same one and two planes on."""
    high, middle, low = split(x, pointers.dtype.element_ty)
    plane = tl.cast(plane, tl.int64)
    tl.store(pointers, high, mask=mask)
    tl.store(pointers + plane, middle, mask=mask)
    tl.store(pointers + 2 * plane, low, mask=mask)


@triton.jit
def planes_product(x_high, x_middle, x_low, y_high, y_middle, y_low):
    """`x @ y` but for less than the 24 bits of a float32; small terms first."""
    total = tl.dot(x_low, y_high, input_precision="ieee")
    total = tl.dot(x_high, y_low, total, input_precision="ieee")
    total = tl.dot(x_middle, y_middle, total, input_precision="ieee")
    total = tl.dot(x_middle, y_high, total, input_precision="ieee")
    total = tl.dot(x_high, y_middle, total, input_precision="ieee")
    return tl.dot(x_high, y_high, total, input_precision="ieee")
