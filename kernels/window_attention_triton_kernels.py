"""The Triton kernels of `window_attention`, launched from `window_attention_triton.py`.

Symbols: K columns, M selected tokens, H query heads, G key-value heads, P head width; T queries and S columns of a
tile; s_mj = scale q_m . k_j, of which the kernels have the logarithm to base 2: `factor` is scale log2(e).

A query sees the real columns from its start to before its end. One in a column that holds no token has the end 0: its
values are not read. Offsets count in 64 bits up to a tile and in 32 bits inside it.
"""

from __future__ import annotations

from ._triton import tl, triton
from .triton_math import dot, narrow


@triton.jit
def _ranges(starts_ptr, ends_ptr, at, inside):
    """(T) starts and ends of queries; an empty range for those outside."""
    starts = tl.load(starts_ptr + at, mask=inside, other=0)
    ends = tl.load(ends_ptr + at, mask=inside, other=0)
    return starts, ends


@triton.jit
def _real(real_ptr, column, columns):
    """(S) which columns hold a token; `real_ptr` is the row's."""
    held = column < columns
    if real_ptr is not None:
        held = held & (tl.load(real_ptr + column, mask=held, other=0) != 0)
    return held


@triton.jit
def _span(starts, ends):
    """The first column that any of the queries sees, and the one after the last."""
    return tl.min(tl.where(ends > 0, starts, 2147483647), 0), tl.max(ends, 0)


@triton.jit(do_not_specialize=["columns"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    starts_ptr,
    ends_ptr,
    real_ptr,
    blocks_ptr,
    o_ptr,
    lse_ptr,
    factor,
    columns,
    heads,
    per_group,
    q_query,
    q_head,
    k_row,
    k_column,
    k_group,
    v_row,
    v_column,
    v_group,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Outputs and (M, H) log2 of the softmax's denominators, a block of a row's queries and a head to a program."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.load(blocks_ptr + 3 * tl.program_id(0))
    first = tl.load(blocks_ptr + 3 * tl.program_id(0) + 1)
    count = tl.load(blocks_ptr + 3 * tl.program_id(0) + 2)
    t = tl.arange(0, T)
    s = tl.arange(0, S)
    p = tl.arange(0, BLOCK_P)
    in_p = (p < WIDTH)[None, :]
    inside = t < count
    starts, ends = _ranges(starts_ptr, ends_ptr, first + t, inside)
    low, high = _span(starts, ends)
    q_offset = t[:, None] * q_query + p[None, :]
    q = tl.load(q_ptr + first * q_query + head * q_head + q_offset, mask=(ends > 0)[:, None] & in_p, other=0.0)
    k_ptr += row * k_row + (head // per_group) * k_group + low.to(tl.int64) * k_column
    v_ptr += row * v_row + (head // per_group) * v_group + low.to(tl.int64) * v_column
    if real_ptr is not None:
        real_ptr += row * columns

    highest = tl.full((T,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((T,), dtype=tl.float32)
    o = tl.zeros((T, BLOCK_P), dtype=tl.float32)
    for at in range(low, high, S):
        column = at + s
        held = _real(real_ptr, column, columns)
        mask = held[:, None] & in_p
        k = tl.load(k_ptr + s[:, None] * k_column + p[None, :], mask=mask, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((T, S), dtype=tl.float32), EMULATE) * factor
        seen = held[None, :] & (column[None, :] >= starts[:, None]) & (column[None, :] < ends[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))
        # A query that has seen nothing yet: -inf less -inf would be NaN.
        base = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(highest - base)
        total = total * kept + tl.sum(weights, 1)
        v = tl.load(v_ptr + s[:, None] * v_column + p[None, :], mask=mask, other=0.0)
        o = dot(narrow(weights, v.dtype, EMULATE), v, o * kept[:, None], EMULATE)
        highest = raised
        k_ptr += S * k_column
        v_ptr += S * v_column
    # That sees nothing: o is zero already.
    total = tl.where(total == 0.0, 1.0, total)
    o /= total[:, None]
    place = first * heads + head
    offset = t[:, None] * (heads * WIDTH) + p[None, :]
    tl.store(o_ptr + place * WIDTH + offset, narrow(o, o_ptr.dtype.element_ty, EMULATE), mask=inside[:, None] & in_p)
    tl.store(lse_ptr + place + t * heads, highest + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["columns"])
def query_gradients_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    starts_ptr,
    ends_ptr,
    real_ptr,
    blocks_ptr,
    o_ptr,
    lse_ptr,
    do_ptr,
    dq_ptr,
    delta_ptr,
    scale,
    factor,
    columns,
    heads,
    per_group,
    q_query,
    q_head,
    k_row,
    k_column,
    k_group,
    v_row,
    v_column,
    v_group,
    do_query,
    do_head,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """dq, and for the gradients of keys and values (M, H) delta = o . do; programs as of the forward kernel."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.load(blocks_ptr + 3 * tl.program_id(0))
    first = tl.load(blocks_ptr + 3 * tl.program_id(0) + 1)
    count = tl.load(blocks_ptr + 3 * tl.program_id(0) + 2)
    t = tl.arange(0, T)
    s = tl.arange(0, S)
    p = tl.arange(0, BLOCK_P)
    in_p = (p < WIDTH)[None, :]
    inside = t < count
    starts, ends = _ranges(starts_ptr, ends_ptr, first + t, inside)
    low, high = _span(starts, ends)
    live = (ends > 0)[:, None] & in_p
    place = first * heads + head
    offset = t[:, None] * (heads * WIDTH) + p[None, :]
    q_offset = t[:, None] * q_query + p[None, :]
    do_offset = t[:, None] * do_query + p[None, :]
    q = tl.load(q_ptr + first * q_query + head * q_head + q_offset, mask=live, other=0.0)
    do = tl.load(do_ptr + first * do_query + head * do_head + do_offset, mask=live, other=0.0)
    o = tl.load(o_ptr + place * WIDTH + offset, mask=live, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(lse_ptr + place + t * heads, mask=inside, other=0.0)
    tl.store(delta_ptr + place + t * heads, delta, mask=inside)
    k_ptr += row * k_row + (head // per_group) * k_group + low.to(tl.int64) * k_column
    v_ptr += row * v_row + (head // per_group) * v_group + low.to(tl.int64) * v_column
    if real_ptr is not None:
        real_ptr += row * columns

    dq = tl.zeros((T, BLOCK_P), dtype=tl.float32)
    for at in range(low, high, S):
        column = at + s
        held = _real(real_ptr, column, columns)
        mask = held[:, None] & in_p
        k = tl.load(k_ptr + s[:, None] * k_column + p[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + s[:, None] * v_column + p[None, :], mask=mask, other=0.0)
        scores = dot(q, tl.trans(k), tl.zeros((T, S), dtype=tl.float32), EMULATE) * factor
        dweights = dot(do, tl.trans(v), tl.zeros((T, S), dtype=tl.float32), EMULATE)
        seen = held[None, :] & (column[None, :] >= starts[:, None]) & (column[None, :] < ends[:, None])
        weights = tl.exp2(tl.where(seen, scores - lse[:, None], float("-inf")))
        dscores = weights * (dweights - delta[:, None])
        dq = dot(narrow(dscores, k.dtype, EMULATE), k, dq, EMULATE)
        k_ptr += S * k_column
        v_ptr += S * v_column
    dq = narrow(dq * scale, dq_ptr.dtype.element_ty, EMULATE)
    tl.store(dq_ptr + place * WIDTH + offset, dq, mask=inside[:, None] & in_p)


@triton.jit(do_not_specialize=["columns"])
def key_gradients_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    starts_ptr,
    ends_ptr,
    real_ptr,
    seers_ptr,
    lse_ptr,
    delta_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    factor,
    columns,
    tiles,
    heads,
    per_group,
    q_query,
    q_head,
    k_row,
    k_column,
    k_group,
    v_row,
    v_column,
    v_group,
    do_query,
    do_head,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """dk and dv, summed over the group's query heads; a tile of a row's columns and a group to a program."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles) * S
    group = tl.program_id(1).to(tl.int64)
    first = tl.load(seers_ptr + 2 * tl.program_id(0))
    last = tl.load(seers_ptr + 2 * tl.program_id(0) + 1)
    t = tl.arange(0, T)
    s = tl.arange(0, S)
    p = tl.arange(0, BLOCK_P)
    in_p = (p < WIDTH)[None, :]
    column = at + s
    if real_ptr is not None:
        real_ptr += row * columns
    held = _real(real_ptr, column, columns)
    mask = held[:, None] & in_p
    k_ptr += row * k_row + group * k_group + at.to(tl.int64) * k_column
    v_ptr += row * v_row + group * v_group + at.to(tl.int64) * v_column
    k = tl.load(k_ptr + s[:, None] * k_column + p[None, :], mask=mask, other=0.0)
    v = tl.load(v_ptr + s[:, None] * v_column + p[None, :], mask=mask, other=0.0)

    dk = tl.zeros((S, BLOCK_P), dtype=tl.float32)
    dv = tl.zeros((S, BLOCK_P), dtype=tl.float32)
    for member in range(per_group):
        head = group * per_group + member
        for m in range(first, last, T):
            starts, ends = _ranges(starts_ptr, ends_ptr, m + t, m + t < last)
            live = ends > 0
            read = live[:, None] & in_p
            q_offset = t[:, None] * q_query + p[None, :]
            do_offset = t[:, None] * do_query + p[None, :]
            q = tl.load(q_ptr + m * q_query + head * q_head + q_offset, mask=read, other=0.0)
            do = tl.load(do_ptr + m * do_query + head * do_head + do_offset, mask=read, other=0.0)
            place = m * heads + head
            lse = tl.load(lse_ptr + place + t * heads, mask=live, other=0.0)
            delta = tl.load(delta_ptr + place + t * heads, mask=live, other=0.0)
            scores = dot(k, tl.trans(q), tl.zeros((S, T), dtype=tl.float32), EMULATE) * factor
            seen = held[:, None] & (column[:, None] >= starts[None, :]) & (column[:, None] < ends[None, :])
            weights = tl.exp2(tl.where(seen, scores - lse[None, :], float("-inf")))
            dv = dot(narrow(weights, do.dtype, EMULATE), do, dv, EMULATE)
            dweights = dot(v, tl.trans(do), tl.zeros((S, T), dtype=tl.float32), EMULATE)
            dscores = weights * (dweights - delta[None, :])
            dk = dot(narrow(dscores, q.dtype, EMULATE), q, dk, EMULATE)
    groups = heads // per_group
    place = ((row * columns + at) * groups + group) * WIDTH
    offset = s[:, None] * (groups * WIDTH) + p[None, :]
    mask = (column < columns)[:, None] & in_p
    tl.store(dk_ptr + place + offset, narrow(dk * scale, dk_ptr.dtype.element_ty, EMULATE), mask=mask)
    tl.store(dv_ptr + place + offset, narrow(dv, dv_ptr.dtype.element_ty, EMULATE), mask=mask)
