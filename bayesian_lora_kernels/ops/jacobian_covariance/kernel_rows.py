"""What both routes of the kernels share: the table of pointers, and the narrow operand in its eigenbasis."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table of pointers.
WIDE, NARROW, MASK, BASIS, INPUT = (tl.constexpr(i) for i in range(5))
FIELDS = tl.constexpr(5)


@triton.jit
def entry_pointer(table, entry, field, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An entry's pointer of one column."""
    pointer = tl.load(table + entry * FIELDS + field).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def counted(table, entry, n, o_t, tokens, MASKED: tl.constexpr):
    """Which tokens there are, and count."""
    result = o_t < tokens
    if MASKED:
        mask = entry_pointer(table, entry, MASK, tl.int16, False) + n * tokens
        result = result & (tl.load(mask + o_t, mask=result, other=0) != 0)
    return result


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


@triton.jit(do_not_specialize=["tokens", "padded"])
def narrow_rows_kernel(
    table,  # [entries, 4]
    maps,  # [entries, width, rows] float32
    out,  # [3 if PLANES else 1, entries, examples, outputs, rows, padded]
    plane,
    outputs,
    tokens,
    padded,
    width,
    rows,
    stride_n,
    stride_c,
    stride_t,
    stride_d,
    examples,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    PLANES: tl.constexpr,
    T_: tl.constexpr,
    R_: tl.constexpr,
):
    """The narrow operand times the directions of its eigenbasis, tokens last, zero where there are none or none counts.

    With `PLANES` as a sum of three numbers of 8 bits. Reads it once, writes `4 rows` bytes (`6 rows`) and does
    `width rows` multiply-adds per token and output.
    """
    pid = tl.program_id(0).to(tl.int64)
    token_blocks = tl.cdiv(padded, T_)
    block, pid = pid % token_blocks, pid // token_blocks
    c, pid = pid % outputs, pid // outputs
    n, entry = pid % examples, pid // examples
    o_t = block * T_ + tl.arange(0, T_)
    o_r = tl.arange(0, R_).to(tl.int64)
    m_x = counted(table, entry, n, o_t, tokens, MASKED)
    p_x = entry_pointer(table, entry, NARROW, DTYPE, False) + n * stride_n + c * stride_c + o_t * stride_t
    x = tl.zeros([T_, R_], tl.float32)
    # Not a dot: for sm_100, Triton 3.6 makes one TF32 product of an "ieee" dot whose operand was widened or masked.
    for d in range(tl.cast(width, tl.int64)):
        b_x = tl.load(p_x + d * stride_d, mask=m_x, other=0.0).to(tl.float32)  # [T_]
        b_m = tl.load(maps + (entry * width + d) * rows + o_r, mask=o_r < rows, other=0.0)  # [R_]
        x += b_x[:, None] * b_m[None, :]
    p_out = out + (((entry * examples + n) * outputs + c) * rows + o_r)[None, :] * padded + o_t[:, None]
    m_out = (o_t < padded)[:, None] & (o_r < rows)[None, :]
    if PLANES:
        store_planes(x, p_out, plane, m_out)
    else:
        tl.store(p_out, x, mask=m_out)


@triton.jit
def store_gram(gram, partial, slot, n, examples, outputs, C_: tl.constexpr, O_: tl.constexpr):
    """To `partial [slots, examples, outputs, outputs]`, with unequal directions of the narrow side left out."""
    if O_ > 1:
        o_o = tl.arange(0, O_)
        same = (o_o[:, None] == o_o[None, :])[None, :, None, :]
        gram = tl.where(same, tl.reshape(gram, [C_, O_, C_, O_]), 0.0)
        gram = tl.sum(tl.sum(gram, axis=3), axis=1)
    o_c = tl.arange(0, C_)
    p_out = partial + ((slot * examples + n) * outputs + o_c)[:, None] * outputs + o_c[None, :]
    tl.store(p_out, gram, mask=(o_c < outputs)[:, None] & (o_c < outputs)[None, :])
