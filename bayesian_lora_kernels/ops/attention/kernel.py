"""Triton kernels for attention with many tangents: P is formed in tiles, and nowhere stored.

Two launches. `attention_kernel` is attention as usual, by online softmax: `out`, and of every query the largest score
and the sum of its weights over `exp` of that. `tangents_kernel` has a block of M queries of one head and G tangents:
for each tile of N keys it forms the weights P once, then for each tangent `dA = scale (dq k^T + q dk^T)`, and adds up
`(P o dA) v + P dv` and the row sums of `P o dA`, which give the means: `dout = ((P o dA) v + P dv) - mean out`.

A head wider than its tile is taken in parts (`PARTS`), q, dq, k and dk again for each tile; values wider than theirs by
as many programs, each with its own scores. Registers hold no more.

Per head, T queries and keys of width d, S tangents, b bytes, G tangents a program, in multiply-adds and bytes:

    arithmetic   2 T^2 d (attention) + S T^2 d (4 + 1 / G): half of it if causal
    memory       8 T d b S (the tangents read, dout written) + 4 T d b
    L2           (T / M) T d b (2 S + 2 S / G): keys and values once for every block of queries
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005 (Triton compiles no unpacking)

from __future__ import annotations

import triton
import triton.language as tl

# Arguments that say sizes and strides that a caller chooses: no value of them is compiled into a kernel.
_SIZES = ("heads", "group", "queries", "keys", "mask_n", "mask_h", "mask_q", "mask_k")


@triton.jit
def _excluded_or_added(
    scores,  # [M_, N_] float32
    p_mask,  # [M_, N_]
    m_m,
    o_m,
    o_n,
    keys,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The scores, minus infinity where a query does not see a key."""
    seen = (o_n < keys)[None, :]
    if CAUSAL:
        seen = seen & (o_m[:, None] >= o_n[None, :])
    if MASK == "bool":
        seen = seen & (tl.load(p_mask, mask=m_m[:, None] & seen, other=0) != 0)
    elif MASK == "added":
        scores += tl.load(p_mask, mask=m_m[:, None] & seen, other=0.0).to(tl.float32)
    return tl.where(seen, scores, float("-inf"))


@triton.jit(do_not_specialize=_SIZES)
def attention_kernel(
    q,  # [examples, heads, queries, width], and so on
    k,
    v,
    mask,
    out,  # [examples, heads, queries, value_width]
    largest,  # [examples, heads, queries] float32, out; 0 where a query sees no key
    total,  # likewise: the sum of exp(score - largest)
    scale,
    heads,
    group,
    queries,
    keys,
    width,
    value_width,
    q_n,
    q_h,
    q_t,
    k_n,
    k_h,
    k_t,
    v_n,
    v_h,
    v_t,
    mask_n,
    mask_h,
    mask_q,
    mask_k,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    M_: tl.constexpr,
    N_: tl.constexpr,
    D_: tl.constexpr,
    V_: tl.constexpr,
):
    """A block of queries of one head."""
    blocks = tl.cdiv(queries, M_)
    slices = tl.cdiv(value_width, V_)
    pid = tl.program_id(0).to(tl.int64)
    block, pid = pid % blocks, pid // blocks
    part, pair = pid % slices, pid // slices
    n, h = pair // heads, pair % heads
    o_m = block * M_ + tl.arange(0, M_)
    o_d, o_v = tl.arange(0, D_), part * V_ + tl.arange(0, V_)
    m_m, m_d, m_v = o_m < queries, o_d < width, o_v < value_width
    m_q = m_m[:, None] if EVEN else m_m[:, None] & m_d[None, :]
    p_q = q + n * q_n + h * q_h + o_m[:, None] * q_t + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [M_, D_], all of a head's columns, or the first
    p_k = k + n * k_n + (h // group) * k_h + o_d[None, :]
    p_v = v + n * v_n + (h // group) * v_h + o_v[None, :]
    p_mask = mask + n * mask_n + h * mask_h + o_m[:, None] * mask_q

    b_largest = tl.full([M_], float("-inf"), tl.float32)
    b_total = tl.zeros([M_], tl.float32)
    acc = tl.zeros([M_, V_], tl.float32)
    end = tl.minimum(keys, ((block + 1) * M_).to(tl.int32)) if CAUSAL else keys
    for start in range(0, end, N_):
        o_n = start + tl.arange(0, N_).to(tl.int64)
        m_n = (o_n < keys)[:, None]
        b_k = tl.load(p_k + o_n[:, None] * k_t, mask=m_n if EVEN else m_n & m_d[None, :], other=0.0)  # [N_, D_]
        b_v = tl.load(p_v + o_n[:, None] * v_t, mask=m_n if EVEN else m_n & m_v[None, :], other=0.0)  # [N_, V_]
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if PARTS:
            for d in range(D_, width, D_):
                m_rest = (d + o_d < width)[None, :]
                b_rest = tl.load(p_q + d, mask=m_m[:, None] & m_rest, other=0.0)
                b_k = tl.load(p_k + d + o_n[:, None] * k_t, mask=m_n & m_rest, other=0.0)
                scores = tl.dot(b_rest, tl.trans(b_k), scores, input_precision=PRECISION)
        scores *= scale
        scores = _excluded_or_added(scores, p_mask + o_n[None, :] * mask_k, m_m, o_m, o_n, keys, MASK, CAUSAL)
        now = tl.maximum(b_largest, tl.max(scores, axis=1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp(scores - shift[:, None])
        before = tl.exp(b_largest - shift)
        b_total = b_total * before + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(b_v.dtype), b_v, acc * before[:, None], input_precision=PRECISION)
        b_largest = now
    row = (pair * queries + o_m).to(tl.int64)
    tl.store(largest + row, tl.where(b_largest == float("-inf"), 0.0, b_largest), mask=m_m)
    tl.store(total + row, b_total, mask=m_m)
    acc = acc / tl.where(b_total == 0.0, 1.0, b_total)[:, None]
    tl.store(out + row[:, None] * value_width + o_v[None, :], acc, mask=m_m[:, None] & m_v[None, :])


@triton.jit(do_not_specialize=("tangents", "pairs", *_SIZES))
def tangents_kernel(
    q,
    k,
    v,
    mask,
    dq,  # [tangents, examples, heads, queries, width], and so on
    dk,
    dv,
    out,
    largest,  # as `attention_kernel` writes them
    total,
    dout,  # [tangents, examples, heads, queries, value_width]
    scale,
    tangents,
    pairs,
    heads,
    group,
    queries,
    keys,
    width,
    value_width,
    q_n,
    q_h,
    q_t,
    k_n,
    k_h,
    k_t,
    v_n,
    v_h,
    v_t,
    dq_s,
    dq_n,
    dq_h,
    dq_t,
    dk_s,
    dk_n,
    dk_h,
    dk_t,
    dv_s,
    dv_n,
    dv_h,
    dv_t,
    mask_n,
    mask_h,
    mask_q,
    mask_k,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    M_: tl.constexpr,
    N_: tl.constexpr,
    D_: tl.constexpr,
    V_: tl.constexpr,
    G_: tl.constexpr,
):
    """A block of queries of one head and `G_` tangents; a last one that is not there repeats the one before it."""
    blocks = tl.cdiv(queries, M_)
    slices = tl.cdiv(value_width, V_)
    pid = tl.program_id(0).to(tl.int64)
    block, pid = pid % blocks, pid // blocks
    part, pid = pid % slices, pid // slices
    pair, first = pid % pairs, pid // pairs * G_
    n, h = pair // heads, pair % heads
    o_m = block * M_ + tl.arange(0, M_)
    o_d, o_v = tl.arange(0, D_), part * V_ + tl.arange(0, V_)
    m_m, m_d, m_v = o_m < queries, o_d < width, o_v < value_width
    m_q = m_m[:, None] if EVEN else m_m[:, None] & m_d[None, :]
    p_q = q + n * q_n + h * q_h + o_m[:, None] * q_t + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [M_, D_], all of a head's columns, or the first
    p_dq = dq + n * dq_n + h * dq_h + o_m[:, None] * dq_t + o_d[None, :]
    p_k = k + n * k_n + (h // group) * k_h + o_d[None, :]
    p_v = v + n * v_n + (h // group) * v_h + o_v[None, :]
    p_dk = dk + n * dk_n + (h // group) * dk_h + o_d[None, :]
    p_dv = dv + n * dv_n + (h // group) * dv_h + o_v[None, :]
    p_mask = mask + n * mask_n + h * mask_h + o_m[:, None] * mask_q
    row = (pair * queries + o_m).to(tl.int64)
    shift = tl.load(largest + row, mask=m_m, other=0.0)

    b_dq, acc, sums = (), (), ()
    for g in tl.static_range(G_):
        s = tl.minimum(first + g, tangents - 1)
        b_dq = b_dq + (tl.load(p_dq + s * dq_s, mask=m_q, other=0.0),)
        acc = acc + (tl.zeros([M_, V_], tl.float32),)
        sums = sums + (tl.zeros([M_], tl.float32),)
    end = tl.minimum(keys, ((block + 1) * M_).to(tl.int32)) if CAUSAL else keys
    for start in range(0, end, N_):
        o_n = start + tl.arange(0, N_).to(tl.int64)
        m_n = (o_n < keys)[:, None]
        m_k = m_n if EVEN else m_n & m_d[None, :]
        m_value = m_n if EVEN else m_n & m_v[None, :]
        b_k = tl.load(p_k + o_n[:, None] * k_t, mask=m_k, other=0.0)  # [N_, D_]
        b_v = tl.load(p_v + o_n[:, None] * v_t, mask=m_value, other=0.0)  # [N_, V_]
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        more = tl.zeros([M_, N_], tl.float32)
        if PARTS:
            for d in range(D_, width, D_):
                m_rest = (d + o_d < width)[None, :]
                b_rest = tl.load(p_q + d, mask=m_m[:, None] & m_rest, other=0.0)
                b_drest = tl.load(p_dq + first * dq_s + d, mask=m_m[:, None] & m_rest, other=0.0)
                b_krest = tl.load(p_k + d + o_n[:, None] * k_t, mask=m_n & m_rest, other=0.0)
                b_dkrest = tl.load(p_dk + first * dk_s + d + o_n[:, None] * dk_t, mask=m_n & m_rest, other=0.0)
                scores = tl.dot(b_rest, tl.trans(b_krest), scores, input_precision=PRECISION)
                more = tl.dot(b_drest, tl.trans(b_krest), more, input_precision=PRECISION)
                more = tl.dot(b_rest, tl.trans(b_dkrest), more, input_precision=PRECISION)
        scores *= scale
        scores = _excluded_or_added(scores, p_mask + o_n[None, :] * mask_k, m_m, o_m, o_n, keys, MASK, CAUSAL)
        weights = tl.exp(scores - shift[:, None])
        new_acc, new_sums = (), ()
        for g in tl.static_range(G_):
            s = tl.minimum(first + g, tangents - 1)
            b_dk = tl.load(p_dk + s * dk_s + o_n[:, None] * dk_t, mask=m_k, other=0.0)
            b_dv = tl.load(p_dv + s * dv_s + o_n[:, None] * dv_t, mask=m_value, other=0.0)
            change = tl.dot(b_dq[g], tl.trans(b_k), more, input_precision=PRECISION)
            change = tl.dot(b_q, tl.trans(b_dk), change, input_precision=PRECISION)
            change = weights * (change * scale)
            one = tl.dot(change.to(b_v.dtype), b_v, acc[g], input_precision=PRECISION)
            one = tl.dot(weights.to(b_v.dtype), b_dv, one, input_precision=PRECISION)
            new_acc = new_acc + (one,)
            new_sums = new_sums + (sums[g] + tl.sum(change, axis=1),)
        acc, sums = new_acc, new_sums
    b_total = tl.load(total + row, mask=m_m, other=1.0)
    over = 1.0 / tl.where(b_total == 0.0, 1.0, b_total)
    p_out = row[:, None] * value_width + o_v[None, :]
    m_out = m_m[:, None] & m_v[None, :]
    b_out = tl.load(out + p_out, mask=m_out, other=0.0).to(tl.float32)
    for g in tl.static_range(G_):
        result = (acc[g] - sums[g][:, None] * b_out) * over[:, None]
        if first + g < tangents:
            tl.store(dout + (first + g) * pairs * queries * value_width + p_out, result, mask=m_out)
