"""`window_attention` in Triton: tables, launches, gradients and kernels.

Symbols: B batch, K columns, M selected tokens, H query heads, G key-value heads, P head width; T queries and S columns
of a tile; scores s_mj = scale q_m . k_j, which the kernels compute to base 2: `factor` is scale log2(e).

The kernels follow FlashAttention-2 (arXiv 2307.08691) over ranges that come from tables. The queries of a row are
sorted, so that a tile of T queries sees one range of columns, slightly longer than the window, and a tile of S columns
is visible to one range of queries. The forward loops over columns and saves the denominators of the softmax. The
backward loops over columns for dq and over queries for dk and dv, and recomputes the weights. There are no atomics:
every sum has a fixed order. The tables are computed on the device without waiting for it.

A query sees the real columns from its start to its end, exclusive. Queries whose own column holds no token have the end
0 and are not read. Offsets are 64-bit up to a tile and 32-bit inside it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import INTERPRETED, tl, triton
from .tracing import opaque, tracing
from .triton_math import dot, narrow, strides, unit_stride

# (T, S, warps) of programs that hold queries (forward, dq) and of programs that hold keys and values (dk, dv), by bytes
# per element and largest head width. T is small because T selected tokens are spread over a stretch of the row, all of
# which is computed. Compiled by Triton 3.9 they spill at most 4 bytes of registers per thread on sm_90; on sm_80 they
# spill 72 bytes for 2-byte elements and P = 64, and 36 for 4-byte elements and P = 256. Shared memory is at most 96
# KiB. No tile has been timed on a device. float32 has no tensor cores at full precision; its products take registers.
_TILES = {
    (2, 64): ((64, 64, 4), (64, 64, 4)),
    (2, 128): ((64, 64, 8), (32, 64, 8)),
    (2, 256): ((32, 32, 8), (32, 32, 8)),
    (4, 64): ((32, 32, 4), (32, 32, 8)),
    (4, 128): ((16, 32, 8), (32, 16, 4)),
    (4, 256): ((16, 16, 4), (16, 16, 8)),
}
WIDEST_HEAD = 256


def window_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, scale: float, index: Tensor, starts: Tensor, ends: Tensor, real: Tensor | None
) -> Tensor:
    """Attend from each query to the real columns of its range; differentiable.

    Args:
        q: (M, H, P) queries, not float64.
        k, v: (B, K, G, P) keys and values.
        scale: factor of the scores.
        index: (M) `row * K + column` of the queries, increasing.
        starts: (M) first column of a query's range, non-decreasing over the queries of a row.
        ends: (M) column after the range, i.e. after the query's own.
        real: (B, K) mask of columns that hold a token, or None if all do.

    Returns:
        (M, H, P) in the dtype of q; zero for queries whose own column is not real.
    """
    dtype = q.dtype
    if not q.dtype == k.dtype == v.dtype:  # the operands of a dot product must have one dtype
        q, k, v = q.float(), k.float(), v.float()
    if real is not None:
        real = real.contiguous()
        ends = ends.where(real.flatten()[index], 0)
    attend = _traced if tracing() else _WindowAttention.apply
    o: Any = attend(q, k, v, scale, index, starts, ends, real)
    return o.to(dtype)


class _WindowAttention(torch.autograd.Function):
    """The Triton path; saves inputs, output and lse_m = log2 sum_j 2^(s_mj log2(e)) with s_mj = scale q_m . k_j.

    Backward, with p_mj = 2^(s_mj log2(e) - lse_m), delta_m = o_m . do_m and ds_mj = p_mj (do_m . v_j - delta_m):
    dq_m = scale sum_j ds_mj k_j,  dk_j = scale sum_m ds_mj q_m,  dv_j = sum_m p_mj do_m.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        q, k, v, ctx.scale, index, starts, ends, real = arguments
        q, k, v = map(unit_stride, (q, k, v))
        o = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        starts, ends = starts.int(), ends.int()
        over_queries, _ = _tiles(q)
        blocks = _blocks(index, k, over_queries["T"])
        if blocks.shape[0]:
            with torch.cuda.device_of(q):
                forward_kernel[(blocks.shape[0], q.shape[1])](
                    *(q, k, v, starts, ends, real, blocks, o, lse, ctx.scale * math.log2(math.e)),
                    *_sizes(q, k, v),
                    **over_queries,
                )
        ctx.save_for_backward(q, k, v, index, starts, ends, real, blocks, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, index, starts, ends, real, blocks, o, lse = ctx.saved_tensors
        do = unit_stride(gradients[0])
        dq = q.new_empty(q.shape)
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        delta = torch.empty_like(lse)
        factor = ctx.scale * math.log2(math.e)
        over_queries, over_keys = _tiles(q)
        tiles = triton.cdiv(k.shape[1], over_keys["S"])
        sizes = _sizes(q, k, v)
        with torch.cuda.device_of(q):
            if blocks.shape[0]:
                query_gradients_kernel[(blocks.shape[0], q.shape[1])](
                    *(q, k, v, starts, ends, real, blocks, o, lse, do, dq, delta, ctx.scale, factor),
                    *(*sizes, *strides(2, do)),
                    **over_queries,
                )
            key_gradients_kernel[(k.shape[0] * tiles, k.shape[2])](
                *(q, k, v, starts, ends, real, _seers(index, starts, k, over_keys["S"]), lse, delta, do, dk),
                *(dv, ctx.scale, factor, sizes[0], tiles),
                *(*sizes[1:], *strides(2, do)),
                **over_keys,
            )
        return dq, dk, dv, None, None, None, None, None


_traced = opaque(
    _WindowAttention,
    "window_attention",
    "Tensor q, Tensor k, Tensor v, float scale, Tensor index, Tensor starts, Tensor ends, Tensor? real",
    lambda q, *_: q.new_empty(q.shape),
    results=1,
)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Return the sizes and strides that the kernels take, in their order."""
    heads = q.shape[1]
    return k.shape[1], heads, heads // k.shape[2], *strides(2, q), *strides(3, k, v)


def _tiles(q: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Return the constants of the launches over queries and of the launch over keys."""
    width = q.shape[2]
    block_p = max(16, triton.next_power_of_2(width))
    shared = {"WIDTH": width, "BLOCK_P": block_p, "EMULATE": INTERPRETED, "num_stages": 2}
    tiles = _TILES[q.dtype.itemsize, max(64, block_p)]
    over_queries, over_keys = (shared | {"T": T, "S": S, "num_warps": warps} for T, S, warps in tiles)
    return over_queries, over_keys


def _blocks(index: Tensor, k: Tensor, size: int) -> Tensor:
    """Cut the queries of every row into blocks, without waiting for the device.

    Returns:
        (blocks, 3) int64 row, first query and number of queries. The number of blocks is an upper bound; surplus blocks
        have no queries.
    """
    B, K = k.shape[:2]
    M = index.shape[0]
    most = (M + min(B, M) * (size - 1)) // size
    bounds = torch.searchsorted(index, K * torch.arange(B + 1, device=index.device))  # (B+1) first query of each row
    through = ((bounds.diff() + (size - 1)) // size).cumsum(0)  # (B) number of blocks up to each row's last
    number = torch.arange(most, device=index.device)
    row = torch.searchsorted(through, number, right=True).clamp(max=B - 1)
    before = torch.cat([through.new_zeros(1), through])[row]
    first = bounds[row] + (number - before) * size
    count = (bounds[row + 1] - first).clamp(0, size)
    return torch.stack([row, first, count], dim=1)


def _seers(index: Tensor, starts: Tensor, k: Tensor, size: int) -> Tensor:
    """Return (B, K / S, 2) int64 first queries that may see a column of a tile, and the queries after the last."""
    B, K = k.shape[:2]
    rows = K * torch.arange(B, device=index.device)[:, None]
    edges = torch.arange(0, K, size, device=index.device)
    first = torch.searchsorted(index, rows + edges)
    # Starts do not decrease along a row and are below K, so that they are sorted after adding the row's offset.
    last = torch.searchsorted(index - index % K + starts, rows + (edges + size).clamp(max=K))
    return torch.stack([first, last], dim=2)


@triton.jit
def _ranges(starts_ptr, ends_ptr, at, inside):
    """Return the (T) starts and ends of queries, an empty range outside."""
    starts = tl.load(starts_ptr + at, mask=inside, other=0)
    ends = tl.load(ends_ptr + at, mask=inside, other=0)
    return starts, ends


@triton.jit
def _real(real_ptr, column, columns):
    """Return the (S) mask of columns that hold a token; `real_ptr` points to the row."""
    held = column < columns
    if real_ptr is not None:
        held = held & (tl.load(real_ptr + column, mask=held, other=0) != 0)
    return held


@triton.jit
def _span(starts, ends):
    """Return the first column that any of the queries sees, and the column after the last."""
    return tl.min(tl.where(ends > 0, starts, 2147483647), 0), tl.max(ends, 0)


@triton.jit(do_not_specialize=["columns"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, real_ptr, blocks_ptr, o_ptr, lse_ptr,
    factor, columns, heads, per_group,
    q_query, q_head, k_row, k_column, k_group, v_row, v_column, v_group,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, T: tl.constexpr, S: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Compute outputs and the (M, H) log2 of softmax denominators; a program handles a block of queries and a head."""
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
        # For queries that have seen nothing yet, -inf minus -inf would be NaN.
        base = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(highest - base)
        total = total * kept + tl.sum(weights, 1)
        v = tl.load(v_ptr + s[:, None] * v_column + p[None, :], mask=mask, other=0.0)
        o = dot(narrow(weights, v.dtype, EMULATE), v, o * kept[:, None], EMULATE)
        highest = raised
        k_ptr += S * k_column
        v_ptr += S * v_column
    # Queries that see nothing have zero outputs.
    total = tl.where(total == 0.0, 1.0, total)
    o /= total[:, None]
    place = first * heads + head
    offset = t[:, None] * (heads * WIDTH) + p[None, :]
    tl.store(o_ptr + place * WIDTH + offset, narrow(o, o_ptr.dtype.element_ty, EMULATE), mask=inside[:, None] & in_p)
    tl.store(lse_ptr + place + t * heads, highest + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["columns"])
def query_gradients_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, real_ptr, blocks_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, delta_ptr,
    scale, factor, columns, heads, per_group,
    q_query, q_head, k_row, k_column, k_group, v_row, v_column, v_group, do_query, do_head,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, T: tl.constexpr, S: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Compute dq, and (M, H) delta = o . do for the other gradients; programs handle a block of queries and a head."""
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
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, real_ptr, seers_ptr, lse_ptr, delta_ptr, do_ptr, dk_ptr, dv_ptr,
    scale, factor, columns, tiles, heads, per_group,
    q_query, q_head, k_row, k_column, k_group, v_row, v_column, v_group, do_query, do_head,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, T: tl.constexpr, S: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv, sums over the query heads of a group; a program handles a tile of columns and a group."""
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
