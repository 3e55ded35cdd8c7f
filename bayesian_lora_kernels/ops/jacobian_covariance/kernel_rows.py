"""What both routes of the kernels share: the table of pointers, and the narrow operand in its eigenbasis."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .planes import planes_product, split, store_planes

# Columns of the table of pointers.
WIDE, NARROW, MASK, BASIS, INPUT = (tl.constexpr(i) for i in range(5))
FIELDS = tl.constexpr(5)

# Of which no code depends on whether they are 1 or multiples of 16.
_SIZES = ["outputs", "tokens", "width", "rows", "stride_n", "stride_c", "stride_t", "examples"]


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


@triton.jit(do_not_specialize=_SIZES)
def narrow_rows_kernel(
    table,  # [entries, FIELDS]
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
    AS: tl.constexpr,
    MASKED: tl.constexpr,
    PLANES: tl.constexpr,
    C_: tl.constexpr,
    O_: tl.constexpr,
    T_: tl.constexpr,
):
    """The narrow operand times the directions of its eigenbasis, tokens last, zero where there are none or none counts.

    With `PLANES` as a sum of three numbers of 8 bits. Reads it once, writes `4 rows` bytes (`6 rows`) per token and
    output. `C_` outputs go side by side, by a matrix with a block for each, so that a matrix instruction is filled:
    `3 C_ width rows` multiply-adds per token and output, all in bfloat16, which holds a bfloat16 operand exactly; of
    another type the operand is three such numbers, too, and the multiply-adds are twice as many.
    """
    D_: tl.constexpr = min(O_, 64)  # no narrow side is wider
    pid = tl.program_id(0).to(tl.int64)
    token_blocks = tl.cdiv(padded, T_)
    block, pid = pid % token_blocks, pid // token_blocks
    n, entry = pid % examples, pid // examples
    o_t = block * T_ + tl.arange(0, T_)
    o_x = tl.arange(0, C_ * D_).to(tl.int64)
    o_y = tl.arange(0, C_ * O_).to(tl.int64)
    c_x, o_d, c_y, o_o = o_x // D_, o_x % D_, o_y // O_, o_y % O_
    m_m = (c_y[:, None] == c_x[None, :]) & (o_o < rows)[:, None] & (o_d < width)[None, :]
    b_m = tl.load(maps + (entry * width + o_d)[None, :] * rows + o_o[:, None], mask=m_m, other=0.0)
    m_high, m_middle, m_low = split(b_m, AS)  # [C_ * O_, C_ * D_]
    m_t = counted(table, entry, n, o_t, tokens, MASKED)
    x = entry_pointer(table, entry, NARROW, DTYPE, False) + n * stride_n
    p_x = x + (c_x * stride_c + o_d * stride_d)[:, None] + (o_t * stride_t)[None, :]
    p_out = out + (((entry * examples + n) * outputs + c_y) * rows + o_o)[:, None] * padded + o_t[None, :]
    for first in range(0, outputs, C_):
        m_x = ((o_d < width) & (first + c_x < outputs))[:, None] & m_t[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0)  # [C_ * D_, T_]
        if b_x.dtype.is_bf16():
            b_x = b_x.to(AS)
            y = tl.dot(m_low, b_x, input_precision="ieee")
            y = tl.dot(m_middle, b_x, y, input_precision="ieee")
            y = tl.dot(m_high, b_x, y, input_precision="ieee")
        else:
            high, middle, low = split(b_x.to(tl.float32), AS)
            y = planes_product(m_high, m_middle, m_low, high, middle, low)
        m_out = ((o_o < rows) & (first + c_y < outputs))[:, None] & (o_t < padded)[None, :]
        if PLANES:
            store_planes(y, p_out, plane, m_out)
        else:
            tl.store(p_out, y, mask=m_out)
        p_x += tl.cast(stride_c, tl.int64) * C_
        p_out += tl.cast(padded, tl.int64) * (C_ * rows)


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
