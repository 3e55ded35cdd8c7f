"""Triton kernels for the same inner products through the tokens' own: no Jacobian is formed, and a wide input `a`
[tokens, width] of few tokens is read once, whatever the number of outputs.

With `J_c = g_c^T a` of the narrow operand g (in its eigenbasis) and the kept basis Q, of which `B = a Q`:
`<J_c, J_c'> = g_c^T (a a^T) g_c'`, the kept part is `P_c = g_c^T B`, and the remainder's inner products are the
difference of the two. Launches, for any number of modules of equal shapes:

1. `basis_columns_kernel`: Q as the columns of one matrix product.
2. `narrow_rows_kernel`: g in its eigenbasis, in three planes.
3. `similarities_kernel`, once for modules that share a, Q and mask: `K = a a^T` (lower tiles) and B, in three planes.
4. `token_gram_kernel`: P, `g^T K g` (half of it: K is symmetric), their weighted difference, and the Gram matrix of P.
5. The last two once more, for examples whose difference cancels too much: `remainder_similarities_kernel` forms
   `K = (a - B Q^T) (a - B Q^T)^T`, with nothing to subtract afterwards. Programs of other examples end at once.

How exact: K and `g^T K g` are good to about 1e-6 of `size = w (|J|^2 + sum_t |g_t|^2 |a_t|^2)`, w the remainder's
variance. Step 5 redoes an example where `size` is more than `_CANCELS` of any output's result, for it and a direction
of g: the rest is good to 1e-6 `_CANCELS`. After step 5 J is that of the remainder, which is left of the limits: an
error of 1e-6 of what cancels among tokens outside Q.

Per module and example, with T tokens (padded to t), R rows of the narrow side, C outputs, M = C R, m = 64 rows per
program (32 but on sm_90), b bytes per element, t = 128 or 64 tokens of a tile, N = 3 k columns (rounded up to 16, 32 or
128) and K_ = k rounded up to a power of two; terms with a share are divided by how many modules share their input:

    device memory   width T b + 4 k width, a share (the floor); written and read again: 6 T^2 (K, a share) and 6 M T (g)
    L2              width (T^2 b / t + 2 T N / t), a share; (3 T (T + 64) + 6 m T ((T + 64) / 128 + 2)) M / m
    multiply-adds   width (T (T + t) / 2 + T N), a share; 6 M T ((T + 64) / 2 + m + K_); all in bfloat16
    launches        6, and 2 that add up, for as many modules as the workspace holds

For 8 examples of 256 tokens, width 4096, R = 8, k = 10, bfloat16, 224 modules, nothing shared: step 3 has 0.41 T
multiply-adds, 4.4 GB of device memory and 8.5 GB from L2. On an H100 (3 TB/s, 5.5 TB/s, 0.3 T multiply-adds/ms) 1.5 ms,
which memory bounds; 0.9 ms where q, k, v and gate, up share. C = 32 adds 0.3 ms (step 2: 0.94 GB) and 0.7 ms (step 4:
0.17 T multiply-adds, 1.5 GB); C = 4 an eighth of that. Step 5 costs 0.1 ms, and 8 times step 3 for the examples that
need it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ..outer_product.tiles import lower_tile
from .kernel_rows import BASIS, FIELDS, INPUT, WIDE, counted, entry_pointer, store_gram
from .planes import planes_product, split, store_planes

# How many times the result an example's `size` may be.
_CANCELS = tl.constexpr(64.0)


@triton.jit
def basis_columns_kernel(
    table,  # [inputs, FIELDS]
    out,  # [inputs, width, N_], of the input's dtype if PLANES, else float32
    width,
    columns,
    stride_row,
    stride_column,
    scale,
    PLANES: tl.constexpr,
    D_: tl.constexpr,
    N_: tl.constexpr,
):
    """A basis times `scale`, with `PLANES` as the sum of three numbers of 16 bits side by side; zeros beyond."""
    entry = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0).to(tl.int64) * D_ + tl.arange(0, D_)
    o_n = tl.arange(0, N_).to(tl.int64)
    column = o_n % columns
    basis = entry_pointer(table, entry, BASIS, tl.float32, False)
    p_q = basis + o_d[:, None] * stride_row + column[None, :] * stride_column
    m_d = (o_d < width)[:, None]
    sides: tl.constexpr = 3 if PLANES else 1
    q = tl.load(p_q, mask=m_d & (o_n < sides * columns)[None, :], other=0.0) * scale
    if PLANES:
        high, middle, low = split(q, out.dtype.element_ty)
        side = (o_n // columns)[None, :]
        q = tl.where(side == 0, high, tl.where(side == 1, middle, low))
    tl.store(out + (entry * width + o_d)[:, None] * N_ + o_n[None, :], q, mask=m_d)


@triton.jit
def similarities_kernel(
    table,  # [inputs, FIELDS]
    basis,  # as basis_columns_kernel writes it
    similar,  # [3, inputs, examples, padded, padded], out: lower tiles only
    plane,
    inside,  # [3, inputs, examples, padded, K_], out
    inside_plane,
    flags,  # [inputs, examples] int32, out: zeros
    unit,  # 1. Tensor cores truncate when they accumulate: a factor that the compiler does not know keeps sums outside
    unscale,  # one over `scale` of basis_columns_kernel
    examples,
    tokens,
    width,
    padded,
    pairs,
    columns,
    stride_n,
    stride_t,
    stride_d,
    DTYPE: tl.constexpr,
    AS: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    PLANES: tl.constexpr,
    T_: tl.constexpr,
    D_: tl.constexpr,
    N_: tl.constexpr,
    K_: tl.constexpr,
):
    """Step 3: a program has one tile of K, on the diagonal also these tokens' rows of B."""
    pid = tl.program_id(0).to(tl.int64)
    row, column = lower_tile(pid % pairs)
    pid = pid // pairs
    n, entry = pid % examples, pid // examples
    o_i = row * T_ + tl.arange(0, T_).to(tl.int64)
    o_j = column * T_ + tl.arange(0, T_).to(tl.int64)
    o_d = tl.arange(0, D_).to(tl.int64)
    a = entry_pointer(table, entry, WIDE, DTYPE, ALIGNED) + n * stride_n
    p_i = a + o_i[:, None] * stride_t + o_d[None, :] * stride_d
    m_i = counted(table, entry, n, o_i, tokens, MASKED)[:, None]
    p_similar = similar + ((entry * examples + n) * padded + o_i)[:, None] * padded + o_j[None, :]
    total = tl.zeros([T_, T_], tl.float32)
    if row == column:
        tl.store(flags + pid, 0)
        o_n = tl.arange(0, N_)
        o_k = tl.arange(0, K_)
        p_q = basis + (entry * width + o_d)[:, None] * N_ + o_n[None, :]
        projected = tl.zeros([T_, N_], tl.float32)
        for start in range(0, width, D_):
            m_d = start + o_d < width
            b_i = tl.load(p_i, mask=m_i & m_d[None, :], other=0.0).to(AS)  # [T_, D_]
            b_q = tl.load(p_q, mask=m_d[:, None], other=0.0)  # [D_, N_]
            total += tl.dot(b_i, tl.trans(b_i), input_precision="tf32x3") * unit
            projected += tl.dot(b_i.to(b_q.dtype), b_q, input_precision="tf32x3") * unscale
            p_i += D_ * stride_d
            p_q += D_ * N_
        store_planes(total, p_similar, plane, None)
        if PLANES:  # adds the three up
            fold = tl.where((o_n % columns)[:, None] == o_k[None, :], 1.0, 0.0).to(inside.dtype.element_ty)
            high, middle, low = split(projected, inside.dtype.element_ty)
            projected = tl.dot(low, fold, input_precision="ieee")
            projected = tl.dot(middle, fold, projected, input_precision="ieee")
            projected = tl.dot(high, fold, projected, input_precision="ieee")
        p_inside = inside + ((entry * examples + n) * padded + o_i)[:, None] * K_ + o_k[None, :]
        store_planes(projected, p_inside, inside_plane, None)
    else:
        p_j = a + o_j[:, None] * stride_t + o_d[None, :] * stride_d
        m_j = counted(table, entry, n, o_j, tokens, MASKED)[:, None]
        for start in range(0, width, D_):
            m_d = start + o_d < width
            b_i = tl.load(p_i, mask=m_i & m_d[None, :], other=0.0).to(AS)
            b_j = tl.load(p_j, mask=m_j & m_d[None, :], other=0.0).to(AS)
            total += tl.dot(b_i, tl.trans(b_j), input_precision="tf32x3") * unit
            p_i += D_ * stride_d
            p_j += D_ * stride_d
        store_planes(total, p_similar, plane, None)


@triton.jit
def _load_planes(pointers, plane, mask):
    other: tl.constexpr = None if mask is None else 0.0
    plane = tl.cast(plane, tl.int64)
    high = tl.load(pointers, mask=mask, other=other)
    middle = tl.load(pointers + plane, mask=mask, other=other)
    low = tl.load(pointers + 2 * plane, mask=mask, other=other)
    return high, middle, low


@triton.jit
def _sum_of_planes(pointers, plane):
    high, middle, low = _load_planes(pointers, plane, None)
    return high.to(tl.float32) + (middle.to(tl.float32) + low.to(tl.float32))


@triton.jit
def _outside(p_a, m_a, inside, q):
    """What of a tile of tokens lies outside the basis, float32."""
    a = tl.load(p_a, mask=m_a, other=0.0).to(tl.float32)
    return tl.dot(-inside, tl.trans(q), a, input_precision="tf32x3")


@triton.jit
def remainder_similarities_kernel(
    table,  # [inputs, FIELDS]
    similar,  # as similarities_kernel writes it, in and out
    plane,
    inside,
    inside_plane,
    flags,  # [inputs, examples] int32: which examples
    unit,
    examples,
    tokens,
    width,
    padded,
    pairs,
    columns,
    stride_n,
    stride_t,
    stride_d,
    stride_row,
    stride_column,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    T_: tl.constexpr,
    D_: tl.constexpr,
    K_: tl.constexpr,
):
    """Step 5: K of what of the tokens lies outside the basis, in tf32x3."""
    pid = tl.program_id(0).to(tl.int64)
    row, column = lower_tile(pid % pairs)
    pid = pid // pairs
    n, entry = pid % examples, pid // examples
    if tl.load(flags + pid) != 0:
        o_i = row * T_ + tl.arange(0, T_).to(tl.int64)
        o_j = column * T_ + tl.arange(0, T_).to(tl.int64)
        o_d = tl.arange(0, D_).to(tl.int64)
        o_k = tl.arange(0, K_)
        m_i = counted(table, entry, n, o_i, tokens, MASKED)
        m_j = counted(table, entry, n, o_j, tokens, MASKED)
        p_inside = inside + pid * padded * K_ + o_k[None, :]
        inside_i = _sum_of_planes(p_inside + o_i[:, None] * K_, inside_plane)  # [T_, K_]
        inside_j = _sum_of_planes(p_inside + o_j[:, None] * K_, inside_plane)
        basis = entry_pointer(table, entry, BASIS, tl.float32, False)
        p_q = basis + o_d[:, None] * stride_row + o_k[None, :] * stride_column
        a = entry_pointer(table, entry, WIDE, DTYPE, ALIGNED) + n * stride_n
        p_i = a + o_i[:, None] * stride_t + o_d[None, :] * stride_d
        p_j = a + o_j[:, None] * stride_t + o_d[None, :] * stride_d
        total = tl.zeros([T_, T_], tl.float32)
        for start in range(0, width, D_):
            m_d = start + o_d < width
            q = tl.load(p_q, mask=m_d[:, None] & (o_k < columns)[None, :], other=0.0)  # [D_, K_]
            b_i = _outside(p_i, m_i[:, None] & m_d[None, :], inside_i, q)  # [T_, D_]
            b_j = _outside(p_j, m_j[:, None] & m_d[None, :], inside_j, q)
            total += tl.dot(b_i, tl.trans(b_j), input_precision="tf32x3") * unit
            p_i += D_ * stride_d
            p_j += D_ * stride_d
            p_q += D_ * stride_row
        p_similar = similar + (pid * padded + o_i)[:, None] * padded + o_j[None, :]
        store_planes(total, p_similar, plane, None)


@triton.jit
def _product_with_transposed(x, y_high, y_middle, y_low):
    high, middle, low = split(x, y_high.dtype)
    return planes_product(high, middle, low, tl.trans(y_high), tl.trans(y_middle), tl.trans(y_low))


@triton.jit
def token_gram_kernel(
    table,  # [entries, FIELDS]
    narrow,  # [3, entries, examples, outputs, rows, padded]
    narrow_plane,
    similar,  # [3, inputs, examples, padded, padded]
    plane,
    inside,  # [3, inputs, examples, padded, K_]
    inside_plane,
    deviations,  # [entries, rows, K_] float32: standard deviations on the kept directions of the wide side
    relative,  # [entries, rows] float32: standard deviations of the remainder over the largest
    largest,  # [entries] float32: that largest variance
    flags,  # [inputs, examples] int32, in and out; with AGAIN, which examples
    partial,  # [entries * row_blocks, examples, outputs, outputs] float32, out
    unit,
    examples,
    outputs,
    rows,
    padded,
    row_blocks,
    AGAIN: tl.constexpr,
    C_: tl.constexpr,
    O_: tl.constexpr,
    T_: tl.constexpr,
    S_: tl.constexpr,
    K_: tl.constexpr,
):
    """Step 4, and the second part of step 5 (`AGAIN`), for one example and `O_` directions of g: rows (c, o)."""
    M_: tl.constexpr = C_ * O_
    pid = tl.program_id(0).to(tl.int64)
    row_block, pid = pid % row_blocks, pid // row_blocks
    n, entry = pid % examples, pid // examples
    which = tl.load(table + entry * FIELDS + INPUT) * examples + n
    wanted = tl.load(flags + which) != 0 if AGAIN else True
    if wanted:
        o_m = tl.arange(0, M_)
        o_c = o_m // O_
        o_o = row_block.to(tl.int32) * O_ + o_m % O_
        o_t = tl.arange(0, T_)
        o_s = tl.arange(0, S_)
        o_k = tl.arange(0, K_)
        m_o = o_o < rows
        m_m = ((o_c < outputs) & m_o)[:, None]
        variance = tl.load(largest + entry)
        similar += which * padded * padded
        p_inside = inside + which * padded * K_ + o_t[:, None] * K_ + o_k[None, :]
        p_x = narrow + pid * outputs * rows * padded + ((o_c * rows + o_o) * padded)[:, None] + o_t[None, :]
        p_y = narrow + pid * outputs * rows * padded + ((o_c * rows + o_o) * padded)[:, None] + o_s[None, :]

        gram = tl.zeros([M_, M_], tl.float32)
        for first in range(0, padded, T_):
            product = tl.zeros([M_, T_], tl.float32)
            for second in range(0, first + T_, S_):
                high, middle, low = _load_planes(p_y + second, narrow_plane, m_m)
                p_s = similar + (first + o_t)[None, :] * padded + (second + o_s)[:, None]
                s_high, s_middle, s_low = _load_planes(p_s, plane, None)  # [T_, T_]
                # The other triangle: the result is made symmetric at last.
                twice = tl.where(second < first, 2.0, 1.0)
                product += planes_product(high, middle, low, s_high, s_middle, s_low) * twice
            high, middle, low = _load_planes(p_x + first, narrow_plane, m_m)
            gram += _product_with_transposed(product, high, middle, low) * variance

        kept = tl.zeros([M_, K_], tl.float32)
        alone = tl.zeros([M_], tl.float32)  # the sum of |g_t|^2 |a_t|^2
        for first in range(0, padded, T_):
            high, middle, low = _load_planes(p_x + first, narrow_plane, m_m)  # [M_, T_]
            b_high, b_middle, b_low = _load_planes(p_inside + first * K_, inside_plane, None)  # [T_, K_]
            kept += planes_product(high, middle, low, b_high, b_middle, b_low) * unit
            if not AGAIN:
                square = tl.load(similar + (first + o_t) * (padded + 1)).to(tl.float32)
                x = high.to(tl.float32)
                alone += tl.sum(x * x * square[None, :], axis=1)

        scale = tl.load(relative + entry * rows + o_o, mask=m_o, other=0.0)
        scale *= scale
        same = o_m[:, None] == o_m[None, :]
        size = (alone * variance + tl.sum(tl.where(same, gram, 0.0), axis=1)) * scale
        if not AGAIN:
            high, middle, low = split(kept, narrow.dtype.element_ty)
            gram -= _product_with_transposed(kept, high, middle, low) * variance
        kept *= tl.load(deviations + (entry * rows + o_o)[:, None] * K_ + o_k[None, :], mask=m_o[:, None], other=0.0)
        high, middle, low = split(kept, narrow.dtype.element_ty)
        gram = gram * scale[:, None] + _product_with_transposed(kept, high, middle, low)
        if not AGAIN:
            result = tl.sum(tl.where(same, gram, 0.0), axis=1)
            if tl.sum((size > _CANCELS * result).to(tl.int32), axis=0) > 0:
                tl.store(flags + which, 1)
        store_gram(gram, partial, entry * row_blocks + row_block, n, examples, outputs, C_, O_)
