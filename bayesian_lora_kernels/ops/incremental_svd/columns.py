"""Triton kernels around the touch of X: test columns, Gram matrices and products with l x l matrices in float64.

They read B and Y (``[d, l]``) and Z (``[M, l]``), a few percent of X. Every kernel is grouped: program axis 0 is the
module, axis 1 a part of its rows. A module is a row of the table; scratch of all modules lies in common
tensors of ``BL`` columns, ``BL`` the power of two that holds l, with zeros in the columns past l.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import sparse_signs

# Columns of the table, int64: addresses, then what `plan` knows. Loaded in place everywhere: the compiler forgets hints
# on the result of a call. The mask is int16 without gaps; so are rows and signs, and the result.
NUMBER_OF_FIELDS = tl.constexpr(18)
X, MASK, BASIS, OUT, ROWS, SIGNS, HEIGHT, WIDTH, STRIDE_XM, STRIDE_XD = (tl.constexpr(i) for i in range(10))
BASIS_COLUMNS, STRIDE_B0, STRIDE_B1, OUT_COLUMNS, COLUMNS, KEPT = (tl.constexpr(i) for i in range(10, 16))
FIRST_M, FIRST_D = tl.constexpr(16), tl.constexpr(17)
NONZEROS_PER_COLUMN = tl.constexpr(sparse_signs.NONZEROS_PER_COLUMN)
# A column of the basis counts as filled above this share of the largest squared norm: float32's eps, squared.
_FILLED = tl.constexpr(1.4210854715202004e-14)


@triton.jit
def norms_kernel(table_ptr, parts_ptr, BN: tl.constexpr, BL: tl.constexpr):
    """Squared norms of the columns of B over a part of its rows: ``parts[module, part, BL]``, float64."""
    module, part = tl.program_id(0), tl.program_id(1)
    row_ptr = table_ptr + module.to(tl.int64) * NUMBER_OF_FIELDS
    basis_ptr = tl.load(row_ptr + BASIS).to(tl.pointer_type(tl.float32))
    width = tl.load(row_ptr + WIDTH)
    basis_columns = tl.load(row_ptr + BASIS_COLUMNS)
    stride_b0, stride_b1 = tl.load(row_ptr + STRIDE_B0), tl.load(row_ptr + STRIDE_B1)
    o_l = tl.arange(0, BL)
    b_sum = tl.zeros([BL], dtype=tl.float64)
    step = tl.num_programs(1) * BN
    for start in range(part * BN, width, step):
        o_d = (start + tl.arange(0, BN)).to(tl.int64)
        m_b = (o_d < width)[:, None] & (o_l < basis_columns)[None, :]
        b_b = tl.load(basis_ptr + o_d[:, None] * stride_b0 + o_l[None, :] * stride_b1, mask=m_b, other=0.0)
        b_b = b_b.to(tl.float64)
        b_sum += tl.sum(b_b * b_b, axis=0)
    tl.store(parts_ptr + (module.to(tl.int64) * tl.num_programs(1) + part) * BL + o_l, b_sum)


@triton.jit
def filled_columns(parts_ptr, module, PARTS: tl.constexpr, BL: tl.constexpr):
    """Which columns the basis fills, ``[BL]``."""
    o_parts = tl.arange(0, PARTS)[:, None] * BL + tl.arange(0, BL)[None, :]
    squares = tl.sum(tl.load(parts_ptr + module.to(tl.int64) * PARTS * BL + o_parts), axis=0)
    return squares > _FILLED * tl.max(squares, axis=0)


@triton.jit
def fresh_kernel(
    table_ptr,
    parts_ptr,
    fresh_ptr,  # [sum of widths * BL] float32, per module [BL, width]
    present_ptr,  # [modules, BL] int32: whether the fresh column is not zero
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
):
    """One fresh column, the signed sum of its rows of X; nothing where the basis keeps its own (X unread)."""
    module, column = tl.program_id(0), tl.program_id(1)
    row_ptr = table_ptr + module.to(tl.int64) * NUMBER_OF_FIELDS
    columns, kept = tl.load(row_ptr + COLUMNS), tl.load(row_ptr + KEPT)
    filled = filled_columns(parts_ptr, module, PARTS, BL)
    is_filled = tl.sum(tl.where(tl.arange(0, BL) == column, filled.to(tl.int32), 0), axis=0) > 0
    wanted = (column < columns) & ((is_filled == 0) | (column >= kept))
    largest = tl.zeros([BN], dtype=tl.float32)
    if wanted:
        x_ptr = tl.load(row_ptr + X).to(tl.pointer_type(DTYPE))
        rows_ptr = tl.load(row_ptr + ROWS).to(tl.pointer_type(tl.int64)) + column * NONZEROS_PER_COLUMN
        signs_ptr = tl.load(row_ptr + SIGNS).to(tl.pointer_type(tl.float32)) + column * NONZEROS_PER_COLUMN
        width = tl.load(row_ptr + WIDTH)
        stride_xm, stride_xd = tl.load(row_ptr + STRIDE_XM), tl.load(row_ptr + STRIDE_XD)
        first_d = tl.load(row_ptr + FIRST_D)
        for start in range(0, width, BN):
            o_d = (start + tl.arange(0, BN)).to(tl.int64)
            m_d = o_d < width
            b_sum = tl.zeros([BN], dtype=tl.float32)
            for i in tl.static_range(NONZEROS_PER_COLUMN):
                sign = tl.load(signs_ptr + i)
                p_x = x_ptr + tl.load(rows_ptr + i) * stride_xm + o_d * stride_xd
                # A sign of 0 stands for a row that may hold anything.
                end = tl.where(sign == 0.0, 0, width)
                b_sum += sign * tl.load(p_x, mask=o_d < end, other=0.0).to(tl.float32)
            tl.store(fresh_ptr + first_d * BL + column * width + o_d, b_sum, mask=m_d)
            largest = tl.maximum(largest, tl.abs(b_sum))
    tl.store(present_ptr + module.to(tl.int64) * BL + column, (tl.max(largest, axis=0) > 0.0).to(tl.int32))


@triton.jit
def stack_kernel(
    table_ptr,
    parts_ptr,
    fresh_ptr,
    present_ptr,
    stack_ptr,  # [sum of widths, BL] float32
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BL: tl.constexpr,
):
    """The test columns before they are made orthonormal: of the basis or fresh, as the reference chooses."""
    module = tl.program_id(0)
    row_ptr = table_ptr + module.to(tl.int64) * NUMBER_OF_FIELDS
    basis_ptr = tl.load(row_ptr + BASIS).to(tl.pointer_type(tl.float32))
    width = tl.load(row_ptr + WIDTH)
    columns, kept = tl.load(row_ptr + COLUMNS), tl.load(row_ptr + KEPT)
    stride_b0, stride_b1 = tl.load(row_ptr + STRIDE_B0), tl.load(row_ptr + STRIDE_B1)
    first_d = tl.load(row_ptr + FIRST_D)
    o_l = tl.arange(0, BL)
    present = tl.load(present_ptr + module.to(tl.int64) * BL + o_l) > 0
    # A column that is filled but absent from `present` was either not wanted fresh, or has nothing to offer.
    is_old = filled_columns(parts_ptr, module, PARTS, BL) & ((o_l < kept) | (present == 0)) & (o_l < columns)
    is_new = (is_old == 0) & present & (o_l < columns)
    step = tl.num_programs(1) * BN
    for start in range(tl.program_id(1) * BN, width, step):
        o_d = (start + tl.arange(0, BN)).to(tl.int64)
        m_d = (o_d < width)[:, None]
        p_old = basis_ptr + o_d[:, None] * stride_b0 + o_l[None, :] * stride_b1
        p_new = fresh_ptr + first_d * BL + o_l[None, :] * width + o_d[:, None]
        b_old = tl.load(p_old, mask=m_d & is_old[None, :], other=0.0)
        b_new = tl.load(p_new, mask=m_d & is_new[None, :], other=0.0)
        tl.store(stack_ptr + (first_d + o_d[:, None]) * BL + o_l[None, :], b_old + b_new, mask=m_d)


@triton.jit
def gram_kernel(
    table_ptr,
    p_ptr,  # [rows, BL] float32, unless P_IS_BASIS
    q_ptr,  # [rows, BL] float32, unless SAME; float32 because Triton 3.6 does not compile bfloat16 into this product
    parts_ptr,  # [modules, parts, BL, BL] float64
    OVER_M: tl.constexpr,  # rows are those of X, else its columns
    P_IS_BASIS: tl.constexpr,
    SAME: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BL: tl.constexpr,
):
    """``P^T Q`` over a part of the rows, exact products summed in float64; program axis 2 is BC columns of Q."""
    module, part = tl.program_id(0), tl.program_id(1)
    row_ptr = table_ptr + module.to(tl.int64) * NUMBER_OF_FIELDS
    count = tl.load(row_ptr + (HEIGHT if OVER_M else WIDTH))
    first = tl.load(row_ptr + (FIRST_M if OVER_M else FIRST_D))
    o_l = tl.arange(0, BL)
    if P_IS_BASIS:
        basis_ptr = tl.load(row_ptr + BASIS).to(tl.pointer_type(tl.float32))
        basis_columns = tl.load(row_ptr + BASIS_COLUMNS)
        stride_b0, stride_b1 = tl.load(row_ptr + STRIDE_B0), tl.load(row_ptr + STRIDE_B1)
    o_c = tl.program_id(2) * BC + tl.arange(0, BC)
    b_sum = tl.zeros([BL, BC], dtype=tl.float64)
    step = tl.num_programs(1) * BN
    for start in range(part * BN, count, step):
        o_n = (start + tl.arange(0, BN)).to(tl.int64)
        m_n = (o_n < count)[:, None]
        o_scratch = (first + o_n[:, None]) * BL + o_l[None, :]
        if P_IS_BASIS:
            p_p = basis_ptr + o_n[:, None] * stride_b0 + o_l[None, :] * stride_b1
            b_p = tl.load(p_p, mask=m_n & (o_l < basis_columns)[None, :], other=0.0)
        else:
            b_p = tl.load(p_ptr + o_scratch, mask=m_n, other=0.0)
        b_p = b_p.to(tl.float64)
        b_q = b_p
        if not SAME or BC < BL:
            o_q = (first + o_n[:, None]) * BL + o_c[None, :]
            b_q = tl.load((p_ptr if SAME else q_ptr) + o_q, mask=m_n, other=0.0).to(tl.float64)
        b_sum = tl.dot(tl.trans(b_p), b_q, b_sum, input_precision="ieee", out_dtype=tl.float64)
    o_part = (module.to(tl.int64) * tl.num_programs(1) + part) * BL * BL
    tl.store(parts_ptr + o_part + o_l[:, None] * BL + o_c[None, :], b_sum)


@triton.jit
def orthonormalise_kernel(table_ptr, gram_ptr, w_ptr, DROPPED: tl.constexpr, BL: tl.constexpr):
    """``W``, upper triangular, with orthonormal columns in ``S W``, from ``S^T S``: Gram-Schmidt in the order of the
    columns.

    The order matters: a direction with massive activations stays in the first column instead of being mixed into all of
    them, where float32 could not tell the others apart. A column that depends on those before it becomes zero.
    """
    module = tl.program_id(0)
    columns = tl.load(table_ptr + module.to(tl.int64) * NUMBER_OF_FIELDS + COLUMNS)
    o = tl.arange(0, BL)
    o_square = module.to(tl.int64) * BL * BL + o[:, None] * BL + o[None, :]
    eye = o[:, None] == o[None, :]
    a = tl.load(gram_ptr + o_square)  # [BL, BL]
    squares = tl.sum(tl.where(eye, a, 0.0), axis=0)  # [BL]
    inverse = tl.where(squares > 0.0, 1.0 / tl.sqrt(tl.where(squares > 0.0, squares, 1.0)), 0.0)
    squares_0 = tl.sum(tl.where(eye, a, 0.0), axis=1)  # the same along the other dimension
    inverse_0 = tl.where(squares_0 > 0.0, 1.0 / tl.sqrt(tl.where(squares_0 > 0.0, squares_0, 1.0)), 0.0)
    a = a * inverse_0[:, None] * inverse[None, :]
    w = tl.where(eye, 1.0, 0.0).to(tl.float64)
    for j in range(columns):
        is_row, is_column = (o == j)[:, None], (o == j)[None, :]
        row = tl.sum(tl.where(is_row, a, 0.0), axis=0)  # [BL]
        column = tl.sum(tl.where(is_column, a, 0.0), axis=1)
        w_column = tl.sum(tl.where(is_column, w, 0.0), axis=1)
        pivot = tl.sum(tl.where(o == j, row, 0.0), axis=0)
        kept = pivot > DROPPED
        safe = tl.where(kept, pivot, 1.0)
        inverse_pivot = tl.where(kept, 1.0 / safe, 0.0)
        factor = tl.where(o > j, row * inverse_pivot, 0.0)
        a -= column[:, None] * factor[None, :]
        w -= w_column[:, None] * factor[None, :]
        w = tl.where(is_column, (w_column * tl.where(kept, 1.0 / tl.sqrt(safe), 0.0))[:, None], w)
    tl.store(w_ptr + o_square, w * inverse_0[:, None])


@triton.jit(do_not_specialize=["columns"])
def significant_kernel(
    w_ptr,  # [modules, columns, columns] float64
    gram_ptr,  # [modules, BL, BL] float64, Y^T Y
    whole_ptr,  # [modules, BL, BL] float64
    columns,
    EPS: tl.constexpr,
    BC: tl.constexpr,
    BL: tl.constexpr,
):
    """``W`` with zeros up to BL, and where a column of ``Y W`` would hold nothing but rounding: it is smaller than the
    rounding errors of the columns of Y that it combines. One program per module and BC columns.
    """
    module = tl.program_id(0).to(tl.int64)
    o_l, o_i = tl.arange(0, BL), tl.arange(0, 16)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = (o_c < columns)[None, :]
    w_ptr += module * columns * columns
    gram_ptr += module * BL * BL
    b_w = tl.load(w_ptr + o_l[:, None] * columns + o_c[None, :], mask=(o_l < columns)[:, None] & m_c, other=0.0)
    squares = tl.zeros([BC], dtype=tl.float64)  # of the columns of Y W
    terms = tl.zeros([BC], dtype=tl.float64)
    for start in range(0, BL, 16):
        o_r = start + o_i
        p_w = w_ptr + o_r[:, None] * columns + o_c[None, :]
        b_rows = tl.load(p_w, mask=(o_r < columns)[:, None] & m_c, other=0.0)  # [16, BC]
        b_gram = tl.load(gram_ptr + o_r[:, None] * BL + o_l[None, :])  # [16, BL]
        squares += tl.sum(b_rows * tl.dot(b_gram, b_w, input_precision="ieee", out_dtype=tl.float64), axis=0)
        norms = tl.sqrt(tl.load(gram_ptr + o_r * (BL + 1)))  # of the columns of Y
        terms += tl.sum(norms[:, None] * tl.abs(b_rows), axis=0)
    # So written that NaN is not dropped.
    dropped = tl.sqrt(tl.where(squares < 0.0, 0.0, squares)) <= EPS * terms
    p_whole = whole_ptr + module * BL * BL + o_l[:, None] * BL + o_c[None, :]
    tl.store(p_whole, tl.where(dropped[None, :], 0.0, b_w))


@triton.jit
def apply_kernel(
    table_ptr,
    p_ptr,  # [sum of widths, BL] float32
    w_ptr,  # [modules, BL, BL] float64
    q_ptr,  # [sum of widths, BL], unless TO_OUT
    rounded_ptr,  # [sum of widths, BL] float32: what q_ptr got, unless TO_OUT
    TO_OUT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BL: tl.constexpr,
):
    """``P W`` in float64, rounded to the dtype of its destination: scratch, or the result of the operation.

    Program axis 2 is a piece of BC columns of W: all of them would not fit the shared memory of every GPU.
    """
    module = tl.program_id(0)
    row_ptr = table_ptr + module.to(tl.int64) * NUMBER_OF_FIELDS
    width, first_d = tl.load(row_ptr + WIDTH), tl.load(row_ptr + FIRST_D)
    o_l = tl.arange(0, BL)
    o_c = tl.program_id(2) * BC + tl.arange(0, BC)
    b_w = tl.load(w_ptr + module.to(tl.int64) * BL * BL + o_l[:, None] * BL + o_c[None, :])  # [BL, BC]
    step = tl.num_programs(1) * BN
    for start in range(tl.program_id(1) * BN, width, step):
        o_d = (start + tl.arange(0, BN)).to(tl.int64)
        m_d = (o_d < width)[:, None]
        b_p = tl.load(p_ptr + (first_d + o_d[:, None]) * BL + o_l[None, :], mask=m_d, other=0.0).to(tl.float64)
        b_q = tl.dot(b_p, b_w, input_precision="ieee", out_dtype=tl.float64).to(tl.float32)
        if TO_OUT:
            out_ptr = tl.load(row_ptr + OUT).to(tl.pointer_type(tl.float32))
            out_columns = tl.load(row_ptr + OUT_COLUMNS)
            p_out = out_ptr + o_d[:, None] * out_columns + o_c[None, :]
            tl.store(p_out, b_q, mask=m_d & (o_c < out_columns)[None, :])
        else:
            b_rounded = b_q.to(q_ptr.dtype.element_ty)
            o_scratch = (first_d + o_d[:, None]) * BL + o_c[None, :]
            tl.store(q_ptr + o_scratch, b_rounded, mask=m_d)
            tl.store(rounded_ptr + o_scratch, b_rounded.to(tl.float32), mask=m_d)
