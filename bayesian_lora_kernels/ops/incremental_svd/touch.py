"""The touch of X: ``Z = X Omega`` and ``Y = X^T Z + B R``, all that is ever read of X.

``project`` makes some rows of Z, ``back_project`` some rows of Y, which needs all of Z of its module.
``touch_kernel`` is both in one launch: programs draw tickets, in an order in which the products of a module follow
its projections at a distance of ``lag`` modules, so that the second reading of X finds it in the L2 cache. A program
waits for projections that hold smaller tickets, and so run already: it cannot wait for one that does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import (
    BASIS,
    BASIS_COLUMNS,
    FIRST_D,
    FIRST_M,
    HEIGHT,
    MASK,
    NUMBER_OF_FIELDS,
    STRIDE_B0,
    STRIDE_B1,
    STRIDE_XD,
    STRIDE_XM,
    WIDTH,
    X,
)


@triton.jit
def project(
    table_ptr,
    omega_ptr,  # [sum of widths, BL] in the dtype of X
    z_ptr,  # [sum of heights, BL] float32
    high_ptr,  # [sum of heights, BL] bfloat16, Z = high + low, if HALVES
    low_ptr,
    module,
    block,
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
):
    """``Z[block] = X[block] Omega``; rows that the mask does not count are never read and give zeros."""
    row_ptr = table_ptr + module.to(tl.int64) * NUMBER_OF_FIELDS
    x_ptr = tl.load(row_ptr + X).to(tl.pointer_type(DTYPE))
    height, width = tl.load(row_ptr + HEIGHT), tl.load(row_ptr + WIDTH)
    stride_xm = tl.load(row_ptr + STRIDE_XM)
    if CONTIGUOUS:
        x_ptr = tl.multiple_of(x_ptr, 16)
        stride_xm = tl.multiple_of(stride_xm, 4 if tl.float32 == DTYPE else 8)
        width = tl.multiple_of(width, 4 if tl.float32 == DTYPE else 8)
        stride_xd = 1
    else:
        stride_xd = tl.load(row_ptr + STRIDE_XD)
    o_m = (block * BM + tl.arange(0, BM)).to(tl.int64)
    o_k = tl.arange(0, BK)
    o_l = tl.arange(0, BL)
    m_m = o_m < height
    m_counts = m_m
    if HAS_MASK:
        mask_ptr = tl.load(row_ptr + MASK).to(tl.pointer_type(tl.int16))
        m_counts = m_m & (tl.load(mask_ptr + o_m, mask=m_m, other=0) != 0)
    p_x = x_ptr + o_m[:, None] * stride_xm + o_k[None, :].to(tl.int64) * stride_xd  # [BM, BK]
    p_omega = omega_ptr + (tl.load(row_ptr + FIRST_D) + o_k[:, None]) * BL + o_l[None, :]  # [BK, BL]
    b_z = tl.zeros([BM, BL], dtype=tl.float32)
    for start in range(0, width, BK):
        m_k = o_k < width - start
        b_x = tl.load(p_x, mask=m_counts[:, None] & m_k[None, :], other=0.0)
        b_omega = tl.load(p_omega, mask=m_k[:, None], other=0.0)
        b_z = tl.dot(b_x, b_omega, b_z, input_precision=PRECISION)
        p_x += tl.full([], BK, tl.int64) * stride_xd
        p_omega += BK * BL
    o_z = (tl.load(row_ptr + FIRST_M) + o_m[:, None]) * BL + o_l[None, :]
    tl.store(z_ptr + o_z, b_z, mask=m_m[:, None])
    if HALVES:
        b_high = b_z.to(tl.bfloat16)
        tl.store(high_ptr + o_z, b_high, mask=m_m[:, None])
        tl.store(low_ptr + o_z, (b_z - b_high.to(tl.float32)).to(tl.bfloat16), mask=m_m[:, None])


@triton.jit
def back_project(
    table_ptr,
    z_ptr,
    high_ptr,
    low_ptr,
    r_ptr,  # [modules, BL, BL] float32
    y_ptr,  # [sum of widths, BL] float32
    module,
    block,
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HALVES: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
):
    """``Y[block] = (X^T Z)[block] + (B R)[block]``.

    X in bfloat16 is exact, so that the high and the low half of Z make the product good to 2^-17 of Z. Two products,
    each finished, then their sum: on top of ``B R`` every step would round at the size of the whole stream.
    """
    row_ptr = table_ptr + module.to(tl.int64) * NUMBER_OF_FIELDS
    x_ptr = tl.load(row_ptr + X).to(tl.pointer_type(DTYPE))
    height, width = tl.load(row_ptr + HEIGHT), tl.load(row_ptr + WIDTH)
    stride_xm = tl.load(row_ptr + STRIDE_XM)
    if CONTIGUOUS:
        x_ptr = tl.multiple_of(x_ptr, 16)
        stride_xm = tl.multiple_of(stride_xm, 4 if tl.float32 == DTYPE else 8)
        width = tl.multiple_of(width, 4 if tl.float32 == DTYPE else 8)
        stride_xd = 1
    else:
        stride_xd = tl.load(row_ptr + STRIDE_XD)
    o_d = block * BD + tl.arange(0, BD)
    o_m = tl.arange(0, BM)
    o_l = tl.arange(0, BL)
    m_d = o_d < width
    p_x = x_ptr + o_m[None, :].to(tl.int64) * stride_xm + o_d[:, None].to(tl.int64) * stride_xd  # [BD, BM]
    o_z = (tl.load(row_ptr + FIRST_M) + o_m[:, None]) * BL + o_l[None, :]  # [BM, BL]
    p_z, p_high, p_low = z_ptr + o_z, high_ptr + o_z, low_ptr + o_z
    if HAS_MASK:
        p_mask = tl.load(row_ptr + MASK).to(tl.pointer_type(tl.int16)) + o_m
    b_y = tl.zeros([BD, BL], dtype=tl.float32)
    for start in range(0, height, BM):
        m_m = o_m < height - start
        m_counts = m_m
        if HAS_MASK:
            m_counts = m_m & (tl.load(p_mask, mask=m_m, other=0) != 0)
            p_mask += BM
        b_x = tl.load(p_x, mask=m_d[:, None] & m_counts[None, :], other=0.0)
        if HALVES:
            b_high = tl.load(p_high, mask=m_m[:, None], other=0.0)
            b_low = tl.load(p_low, mask=m_m[:, None], other=0.0)
            b_y = tl.dot(b_x, b_high, b_y, input_precision="ieee")
            b_y = tl.dot(b_x, b_low, b_y, input_precision="ieee")
            p_high += BM * BL
            p_low += BM * BL
        else:
            b_z = tl.load(p_z, mask=m_m[:, None], other=0.0)
            b_y = tl.dot(b_x.to(tl.float32), b_z, b_y, input_precision="tf32x3")
            p_z += BM * BL
        p_x += tl.full([], BM, tl.int64) * stride_xm

    p_y = y_ptr + (tl.load(row_ptr + FIRST_D) + o_d[:, None]) * BL + o_l[None, :]
    if BD * BL > 8192:  # registers do not hold both sums
        tl.store(p_y, b_y, mask=m_d[:, None])
        tl.debug_barrier()  # threads may read back what others wrote
    basis_columns = tl.load(row_ptr + BASIS_COLUMNS)
    basis_ptr = tl.load(row_ptr + BASIS).to(tl.pointer_type(tl.float32))
    stride_b0, stride_b1 = tl.load(row_ptr + STRIDE_B0), tl.load(row_ptr + STRIDE_B1)
    b_br = tl.zeros([BD, BL], dtype=tl.float32)
    o_c = tl.arange(0, 16)
    for start in range(0, basis_columns, 16):
        o_b = start + o_c
        m_b = m_d[:, None] & (o_b < basis_columns)[None, :]
        b_b = tl.load(basis_ptr + o_d[:, None].to(tl.int64) * stride_b0 + o_b[None, :] * stride_b1, mask=m_b, other=0.0)
        b_r = tl.load(r_ptr + module.to(tl.int64) * BL * BL + o_b[:, None] * BL + o_l[None, :])  # [16, BL]
        b_br = tl.dot(b_b, b_r, b_br, input_precision="tf32x3")
    if BD * BL > 8192:
        b_y = tl.load(p_y, mask=m_d[:, None], other=0.0)
    tl.store(p_y, b_y + b_br, mask=m_d[:, None])


@triton.jit
def project_kernel(
    table_ptr,
    omega_ptr,
    z_ptr,
    high_ptr,
    low_ptr,
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BL: tl.constexpr,
):
    """``project``, one program per block and module."""
    block, module = tl.program_id(0), tl.program_id(1)
    height = tl.load(table_ptr + module.to(tl.int64) * NUMBER_OF_FIELDS + HEIGHT)
    if block * BM < height:
        project(
            table_ptr,
            omega_ptr,
            z_ptr,
            high_ptr,
            low_ptr,
            module,
            block,
            DTYPE,
            CONTIGUOUS,
            HAS_MASK,
            HALVES,
            PRECISION,
            BM,
            BK,
            BL,
        )


@triton.jit
def back_project_kernel(
    table_ptr,
    z_ptr,
    high_ptr,
    low_ptr,
    r_ptr,
    y_ptr,
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HALVES: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
):
    """``back_project``, one program per block and module."""
    block, module = tl.program_id(0), tl.program_id(1)
    width = tl.load(table_ptr + module.to(tl.int64) * NUMBER_OF_FIELDS + WIDTH)
    if block * BD < width:
        back_project(
            table_ptr,
            z_ptr,
            high_ptr,
            low_ptr,
            r_ptr,
            y_ptr,
            module,
            block,
            DTYPE,
            CONTIGUOUS,
            HAS_MASK,
            HALVES,
            BM,
            BD,
            BL,
        )


@triton.jit(do_not_specialize=["modules", "projections", "products", "lag"])
def touch_kernel(
    table_ptr,
    omega_ptr,
    z_ptr,
    high_ptr,
    low_ptr,
    r_ptr,
    y_ptr,
    counters_ptr,  # [1 + modules] int32, zeros: the next ticket, and the finished projections of each module
    modules,
    projections,  # most blocks of rows that a module has
    products,  # most blocks of columns
    lag,  # modules between the two readings of one
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
):
    """Both in one launch, as tickets are drawn."""
    ticket = tl.atomic_add(counters_ptr, 1)
    stage = ticket // (projections + products)
    block = ticket % (projections + products)
    if block < products:
        module = stage - lag
        if (module >= 0) & (module < modules):
            row_ptr = table_ptr + module.to(tl.int64) * NUMBER_OF_FIELDS
            if block * BD < tl.load(row_ptr + WIDTH):
                wanted = tl.cdiv(tl.load(row_ptr + HEIGHT), BM)
                while tl.atomic_add(counters_ptr + 1 + module, 0, sem="acquire") < wanted:
                    pass
                tl.debug_barrier()  # nobody reads Z before the thread that waited has seen it finished
                back_project(
                    table_ptr,
                    z_ptr,
                    high_ptr,
                    low_ptr,
                    r_ptr,
                    y_ptr,
                    module,
                    block,
                    DTYPE,
                    CONTIGUOUS,
                    HAS_MASK,
                    HALVES,
                    BK,
                    BD,
                    BL,
                )
    else:
        block = block - products
        if stage < modules:
            height = tl.load(table_ptr + stage.to(tl.int64) * NUMBER_OF_FIELDS + HEIGHT)
            if block * BM < height:
                project(
                    table_ptr,
                    omega_ptr,
                    z_ptr,
                    high_ptr,
                    low_ptr,
                    stage,
                    block,
                    DTYPE,
                    CONTIGUOUS,
                    HAS_MASK,
                    HALVES,
                    PRECISION,
                    BM,
                    BK,
                    BL,
                )
                tl.debug_barrier()  # all threads have written their part of Z
                tl.atomic_add(counters_ptr + 1 + stage, 1, sem="release")
