"""Triton kernels for inner products of Jacobians in a Kronecker posterior covariance, without the Jacobians.

One side of the module is *wide* (`width`, thousands; for LoRA A the input) and one *narrow* (its rank). Four launches
serve any number of modules of equal shapes, found through a table of pointers:

1. `tile_bases_kernel`: the wide side's kept basis Q `[width, k]` cut into tiles of rows, each `Q_tile = U_tile R_tile`
   with orthonormal `U_tile [D, k]`.
2. `narrow_rows_kernel`: the narrow operand in its eigenbasis, `[Q_n, I - Q_n Q_n^T]`, one row per direction.
3. `wide_input_kernel` or `wide_output_kernel`: for every tile of D wide columns the Jacobian `J_tile [rows, D]` in
   registers, `z_tile = J_tile U_tile`, and the Gram matrix of the remainder `J_tile - z_tile U_tile^T`. Only z, a
   fraction k / D of the Jacobian, goes to memory.
4. `kept_rows_kernel`: `P = J Q = sum over tiles of z_tile R_tile`; the Gram matrices of P and of `z_tile - P R_tile^T`.

Why it is exact: `J - P Q^T`, the part outside Q, is within each tile `(J_tile - z_tile U_tile^T)` plus
`(z_tile - P R_tile^T) U_tile^T`, and the two are orthogonal. So one reading of the wide operand gives what otherwise
takes two (P must be complete before it can be subtracted), and every term is a Gram matrix: nothing positive is ever
subtracted from a Gram matrix, however far the curvature outweighs the prior.

Per module and example, with T tokens, R rows of the narrow side, C outputs, M = C R, m = 32 rows per program, b bytes
per element and D = 64, the wide input (step 3) takes

    device memory   width T b (the floor) + 4 M k width / D (z; step 4 reads as much)
    L2              width T b M / m + 6 M T width / D (the narrow operand, in three bfloat16 planes)
    multiply-adds   3 M T width in bfloat16 (or M T width in tf32x3) + (2 M k + M m) width in tf32x3, k rounded up to 16

For 8 examples of 256 tokens, width 4096, R = 8, k = 10, bfloat16, 224 modules: C = 4: 3.8 GB and 0.1 GB of z, 9.4 GB
from L2, 0.36 T and 0.015 T multiply-adds; C = 32: 3.8 GB and 0.9 GB of z, 75 GB from L2 (30 of a, 45 of the
planes), eight times the multiply-adds. L2 thus bounds C = 32, and `kernel_tokens.py` has another way.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .kernel_rows import BASIS, MASK, WIDE, counted, entry_pointer, store_gram


@triton.jit
def tile_bases_kernel(
    table,  # [entries, FIELDS]
    bases,  # [entries, tiles * D_, K_] float32, zero beyond the kept columns
    mixing,  # [entries, tiles * K_, K_] float32
    width,
    columns,
    tiles,
    stride_row,
    stride_column,
    D_: tl.constexpr,
    K_: tl.constexpr,
):
    """Orthonormal bases of the tiles of a basis, by Gram-Schmidt, three times per column.

    Reads and writes `8 width k` bytes, `6 width k^2` multiply-adds. A column that is no more than rounding once the
    others are taken out of it becomes zero, and so does what the tile has of it: less than rounding.
    """
    tile = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1).to(tl.int64)
    o_k = tl.arange(0, K_).to(tl.int64)
    o_d = tile * D_ + tl.arange(0, D_)
    basis = entry_pointer(table, entry, BASIS, tl.float32, False)
    p_q = basis + o_d[:, None] * stride_row + o_k[None, :] * stride_column
    q = tl.load(p_q, mask=(o_d < width)[:, None] & (o_k < columns)[None, :], other=0.0)  # [D_, K_]
    unit = tl.zeros([D_, K_], tl.float32)
    p_r = mixing + ((entry * tiles + tile) * K_ + o_k) * K_
    for k in range(K_):
        whole = tl.sum(tl.where((o_k == k)[None, :], q, 0.0), axis=1)  # [D_]
        column = whole
        for _ in tl.static_range(3):
            inside = tl.sum(unit * column[:, None], axis=0)  # [K_]
            column -= tl.sum(unit * inside[None, :], axis=1)
        before = tl.sum(whole * whole, axis=0)
        after = tl.sum(column * column, axis=0)
        norm = tl.sqrt(tl.where(after > 1e-13 * before, after, float("inf")))
        unit = tl.where((o_k == k)[None, :], (column / norm)[:, None], unit)
        tl.store(p_r + k, tl.sum(unit * whole[:, None], axis=0))
    tl.store(bases + ((entry * tiles * D_ + o_d)[:, None] * K_ + o_k[None, :]), unit)


@triton.jit
def _tile_terms(
    jacobian,  # [C_ * O_, D_] float32, rows (c, o)
    gram,
    p_basis,  # [D_, 16]
    p_z,  # [C_ * O_, 16]
    m_z,
    columns,  # of the basis, known at run time only so that this stays a loop: unrolled it needs more registers
    relative,  # [C_ * O_]
    largest,
    C_: tl.constexpr,
    O_: tl.constexpr,
    D_: tl.constexpr,
    K_: tl.constexpr,
    REST: tl.constexpr,
):
    """Stores what of the tile's Jacobian lies in the tile's basis, adds the Gram matrix of the remainder to `gram`.

    The basis goes in pieces of 16 columns, so that registers suffice; what earlier pieces took out of the Jacobian is
    orthogonal to later ones. Tensor cores truncate when they accumulate, so the running sum is kept outside of them:
    the product with `largest` stands between, which the compiler cannot take for part of the dot. `gram` has all pairs
    of rows; those of unequal directions are ballast that a matrix instruction carries for nothing.
    """
    if K_ > 0:
        for k in range(0, columns, 16):
            basis = tl.load(p_basis + k)
            z = tl.dot(jacobian, basis, input_precision="tf32x3")
            tl.store(p_z + k, z, mask=m_z)
            if REST:
                jacobian = tl.dot(-z, tl.trans(basis), jacobian, input_precision="tf32x3")
    if REST:
        jacobian *= relative[:, None]
        gram += tl.dot(jacobian, tl.trans(jacobian), input_precision="tf32x3") * largest
    return gram


@triton.jit
def wide_input_kernel(
    table,  # [entries, FIELDS]
    narrow,  # as narrow_rows_kernel writes it
    plane,
    bases,  # [entries, tiles * D_, K_] float32
    relative,  # [entries, rows] float32: standard deviations of the remainder over the largest
    largest,  # [entries] float32: that largest variance
    kept,  # [entries, examples, rows, outputs, tiles, K_] float32, out
    partial,  # [entries * splits * row_blocks, examples, outputs, outputs] float32, out
    examples,
    outputs,
    rows,
    tokens,
    padded,
    width,
    tiles,
    tiles_per_program,
    splits,
    row_blocks,
    columns,
    stride_n,
    stride_t,
    stride_d,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    PLANES: tl.constexpr,
    REST: tl.constexpr,
    C_: tl.constexpr,
    O_: tl.constexpr,
    T_: tl.constexpr,
    D_: tl.constexpr,
    K_: tl.constexpr,
):
    """Step 3 for a wide input `a [examples, tokens, width]` (LoRA A): a program has one example, a run of tiles and
    `O_` directions of the output for all outputs; programs that share a run are neighbours, so that L2 serves them.

    With bfloat16 `a` the narrow operand comes as a sum of three bfloat16 numbers (`PLANES`): every product is exact in
    float32, at half the price of tf32x3.
    """
    M_: tl.constexpr = C_ * O_
    pid = tl.program_id(0).to(tl.int64)
    row_block, pid = pid % row_blocks, pid // row_blocks
    split, pid = pid % splits, pid // splits
    n, entry = pid % examples, pid // examples

    o_m = tl.arange(0, M_).to(tl.int64)
    o_c = o_m // O_
    o_o = row_block * O_ + o_m % O_
    o_t = tl.arange(0, T_).to(tl.int64)
    o_k = tl.arange(0, 16)
    m_m = (o_c < outputs) & (o_o < rows)
    scale = tl.load(relative + entry * rows + o_o, mask=o_o < rows, other=0.0)
    variance = tl.load(largest + entry)

    p_x = narrow + (((entry * examples + n) * outputs + o_c) * rows + o_o)[:, None] * padded + o_t[None, :]
    p_z = kept + ((((entry * examples + n) * rows + o_o) * outputs + o_c) * tiles)[:, None] * K_ + o_k[None, :]
    a = entry_pointer(table, entry, WIDE, DTYPE, ALIGNED) + n * stride_n
    plane = tl.cast(plane, tl.int64)

    gram = tl.zeros([M_, M_], tl.float32)
    first = split * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, tiles)):
        o_d = tile * D_ + tl.arange(0, D_)
        m_d = o_d < width
        p_a = a + o_d[None, :] * stride_d
        jacobian = tl.zeros([M_, D_], tl.float32)
        for start in range(0, tokens, T_):
            o_s = start + o_t
            m_x = m_m[:, None] & (o_s < tokens)[None, :]
            m_s = counted(table, entry, n, o_s, tokens, MASKED)
            b_a = tl.load(p_a + o_s[:, None] * stride_t, mask=m_s[:, None] & m_d[None, :], other=0.0)  # [T_, D_]
            if PLANES:
                high = tl.load(p_x + start, mask=m_x, other=0.0)  # [M_, T_]
                middle = tl.load(p_x + plane + start, mask=m_x, other=0.0)
                low = tl.load(p_x + 2 * plane + start, mask=m_x, other=0.0)
                jacobian = tl.dot(low, b_a, jacobian, input_precision="ieee")
                jacobian = tl.dot(middle, b_a, jacobian, input_precision="ieee")
                jacobian = tl.dot(high, b_a, jacobian, input_precision="ieee")
            else:
                x = tl.load(p_x + start, mask=m_x, other=0.0)
                jacobian = tl.dot(x, b_a.to(tl.float32), jacobian, input_precision="tf32x3")
        p_basis = bases + ((entry * tiles + tile) * D_ + tl.arange(0, D_))[:, None] * K_ + o_k[None, :]
        gram = _tile_terms(
            jacobian, gram, p_basis, p_z + tile * K_, m_m[:, None], columns, scale, variance, C_, O_, D_, K_, REST
        )
    if REST:
        slot = (entry * splits + split) * row_blocks + row_block
        store_gram(gram, partial, slot, n, examples, outputs, C_, O_)


@triton.jit
def wide_output_kernel(
    table,  # [entries, FIELDS]
    narrow,  # [entries, examples, rows, padded] float32
    bases,
    relative,
    largest,
    kept,
    partial,
    examples,
    outputs,
    rows,
    tokens,
    padded,
    width,
    tiles,
    tiles_per_program,
    splits,
    row_blocks,
    columns,
    stride_n,
    stride_c,
    stride_t,
    stride_d,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    REST: tl.constexpr,
    C_: tl.constexpr,
    O_: tl.constexpr,
    T_: tl.constexpr,
    D_: tl.constexpr,
    K_: tl.constexpr,
):
    """Step 3 for a wide output `g [examples, outputs, tokens, width]` (LoRA B, or its weight gradient with as many
    pseudo-tokens as the rank). Each output has its own wide operand. Where those of all outputs and tokens fit beside
    each other (`T_` > 1), they are read once, and directions are taken by a matrix with a block for each output; else
    token by token, by multiply-adds.

    Bytes: `C T width b`, read once from device memory, without `T_` then `M` times `T width b` from L1. Multiply-adds:
    `M m width` in tf32x3, without `T_` `M T width` and no tensor cores; then as the wide input.
    """
    M_: tl.constexpr = C_ * O_
    pid = tl.program_id(0).to(tl.int64)
    split, pid = pid % splits, pid // splits
    n, entry = pid % examples, pid // examples

    o_m = tl.arange(0, M_).to(tl.int64)
    o_c = o_m // O_
    o_k = tl.arange(0, 16)
    m_c = o_c < outputs
    variance = tl.load(largest + entry)

    g = entry_pointer(table, entry, WIDE, DTYPE, ALIGNED) + n * stride_n
    if T_ > 1:
        o_g = tl.arange(0, C_ * T_)
        o_s = o_g % T_
        same = o_c[:, None] == (o_g // T_)[None, :]
        m_s = (o_g // T_ < outputs) & counted(table, entry, n, o_s, tokens, MASKED)
        p_s = g + (o_g // T_).to(tl.int64)[:, None] * stride_c + o_s.to(tl.int64)[:, None] * stride_t
    if MASKED:
        p_mask = entry_pointer(table, entry, MASK, tl.int16, False) + n * tokens

    gram = tl.zeros([M_, M_], tl.float32)
    first = split * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, tiles)):
        o_d = tile * D_ + tl.arange(0, D_)
        p_g = g + o_c[:, None] * stride_c + o_d[None, :] * stride_d
        m_g = m_c[:, None] & (o_d < width)[None, :]
        p_basis = bases + ((entry * tiles + tile) * D_ + tl.arange(0, D_))[:, None] * K_ + o_k[None, :]
        if T_ > 1:
            b_s = tl.load(p_s + o_d[None, :] * stride_d, mask=m_s[:, None] & (o_d < width)[None, :], other=0.0)
        for block in range(row_blocks):
            o_o = block * O_ + o_m % O_
            m_o = o_o < rows
            p_x = narrow + ((entry * examples + n) * rows + o_o) * padded
            if T_ > 1:
                x = tl.load(p_x[:, None] + o_s[None, :], mask=same & m_o[:, None] & (o_s < tokens)[None, :], other=0.0)
                jacobian = tl.dot(x, b_s.to(tl.float32), input_precision="tf32x3")
            else:
                jacobian = tl.zeros([M_, D_], tl.float32)
                for t in range(tl.cast(tokens, tl.int64)):
                    if MASKED:
                        counts = tl.load(p_mask + t + 0 * o_m) != 0  # [M_], all alike
                        b_g = tl.load(p_g + t * stride_t, mask=m_g & counts[:, None], other=0.0)
                    else:
                        b_g = tl.load(p_g + t * stride_t, mask=m_g, other=0.0)
                    x = tl.load(p_x + t, mask=m_o, other=0.0)  # [M_]
                    jacobian += x[:, None] * b_g.to(tl.float32)
            scale = tl.load(relative + entry * rows + o_o, mask=m_o, other=0.0)
            o_z = (((entry * examples + n) * rows + o_o) * outputs + o_c) * tiles + tile
            p_z = kept + o_z[:, None] * K_ + o_k[None, :]
            gram = _tile_terms(
                jacobian, gram, p_basis, p_z, (m_c & m_o)[:, None], columns, scale, variance, C_, O_, D_, K_, REST
            )
    if REST:
        slot = entry * splits + split
        store_gram(gram, partial, slot, n, examples, outputs, C_, O_)


@triton.jit
def kept_rows_kernel(
    kept,  # [entries, examples, rows, outputs, tiles * K_] float32
    mixing,  # [entries, tiles * K_, K_] float32
    deviations,  # [entries, rows, K_] float32: standard deviations on the kept directions of the wide side
    relative,  # [entries, rows]
    largest,  # [entries]
    partial,  # [entries * rows, examples, outputs, outputs] float32, out
    examples,
    outputs,
    rows,
    length,
    REST: tl.constexpr,
    C_: tl.constexpr,
    L_: tl.constexpr,
    K_: tl.constexpr,
):
    """Step 4, for one direction of the narrow side and one example: `P = Z R`, the Gram matrices of P and of
    `Z - P R^T`, with z of all tiles side by side, `Z [outputs, length]`.

    Reads Z twice (the second time from L2), `4 C length` bytes; `2 C k length + C^2 length` multiply-adds.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, pid = pid % rows, pid // rows
    n, entry = pid % examples, pid // examples
    o_c = tl.arange(0, C_)
    o_k = tl.arange(0, K_)
    o_l = tl.arange(0, L_)
    m_c = (o_c < outputs)[:, None]
    p_z = kept + (((entry * examples + n) * rows + row) * outputs + o_c)[:, None] * length + o_l[None, :]
    p_r = mixing + (entry * length + o_l)[:, None] * K_ + o_k[None, :]
    inside = tl.zeros([C_, K_], tl.float32)
    for start in range(0, length, L_):
        m_l = start + o_l < length
        z = tl.load(p_z + start, mask=m_c & m_l[None, :], other=0.0)  # [C_, L_]
        r = tl.load(p_r + start * K_, mask=m_l[:, None], other=0.0)  # [L_, K_]
        inside = tl.dot(z, r, inside, input_precision="tf32x3")
    deviation = tl.load(deviations + (entry * rows + row) * K_ + o_k)
    weighted = inside * deviation[None, :]
    gram = tl.dot(weighted, tl.trans(weighted), input_precision="tf32x3")
    if REST:
        scale = tl.load(relative + entry * rows + row)
        variance = tl.load(largest + entry)
        for start in range(0, length, L_):
            m_l = start + o_l < length
            z = tl.load(p_z + start, mask=m_c & m_l[None, :], other=0.0)
            r = tl.load(p_r + start * K_, mask=m_l[:, None], other=0.0)
            z = (z - tl.dot(inside, tl.trans(r), input_precision="tf32x3")) * scale
            gram += tl.dot(z, tl.trans(z), input_precision="tf32x3") * variance
    p_out = partial + (((entry * rows + row) * examples + n) * outputs + o_c)[:, None] * outputs + o_c[None, :]
    tl.store(p_out, gram, mask=m_c & (o_c < outputs)[None, :])
