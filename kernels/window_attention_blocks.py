"""The torch path of `window_attention`: blocks of queries against the range of keys that they see.

Symbols as there: K columns, M selected tokens, H query heads, G key-value heads, P head width, w window; T queries of a
block, S columns of its range.

The queries of a row are sorted, so a block of T sees one range of columns: w, and as many as lie between its first and
its last query. Nothing is larger than a block's (H, T, S) scores.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import accumulator

# Queries of a block, at most; and its columns: so many times those of its first query, or so many. Where few tokens are
# selected, the range of more of them together would mostly be columns that one of them sees and the others do not.
_BLOCK, _STRETCH, _NARROW = 32, 2, 256


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor, starts: Tensor, ends: Tensor, real: Tensor | None
) -> Tensor:
    """Attention of queries that all see at least themselves, differentiable.

    Args:
        q: (M, H, P) queries.
        k, v: (B, K, G, P) keys and values.
        scale: of the scores.
        rows: (M) rows of the queries, non-decreasing.
        starts: (M) first column that a query sees, non-decreasing over the queries of a row.
        ends: (M) column after the last that it sees, increasing over the queries of a row.
        real: (B, K) columns that hold a token, None for all.

    Returns:
        (M, H, P) in the dtype of q.
    """
    o = _Blocks.apply(q, k, v, scale, rows, starts, ends, real)
    assert isinstance(o, Tensor)  # `apply` is untyped
    return o


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor, ends: Tensor, real: Tensor | None
) -> Tensor:
    """One query per row, as in decoding: M = B, all rows at once. Arguments and result as above, in any float dtype.

    Blocks would be one row each. Measured as those are, without a gradient, H = 8, P = 64, milliseconds of this / of
    blocks: B = 64 and K = 64 1.0 / 4.1, B = 8 and K = 2048 6.4 / 7.1. A batched matmul copies the keys: 63 ms there.
    """
    dtype = q.dtype
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = (tensor.to(accumulator(q)) for tensor in (q, k, v))
    column = torch.arange(k.shape[1], device=k.device)
    seen = (column >= starts[:, None]) & (column < ends[:, None])  # (B, K)
    if real is not None:
        seen = seen & real
        hidden = ~real[..., None, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    o = F.scaled_dot_product_attention(
        q[:, :, None],
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=seen[:, None, None],
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[1],
    )
    return o.squeeze(2).to(dtype)


class _Blocks(torch.autograd.Function):
    """Keeps its inputs only; scores and probabilities p are computed again.

    Backward, with ds = p (do . v - sum_j p_j do . v_j):  dq = scale sum_j ds_j k_j,  dk_j = scale sum_m ds_mj q_m,
    dv_j = sum_m p_mj do_m.

    Measured on 1 CPU core, fp32, torch 2.13, B = 1, K = 4096, H = G = 8, P = 64, milliseconds of processor time,
    forward / forward + backward, fastest of 3; SDPA and FlexAttention, which has no backward on the CPU and is not
    compiled, compute all queries and mask all keys:
        window                       512            2048
        this, 15 % selected          19 / 62        46 / 157
        this, all selected           82 / 282       220 / 781
        SDPA, boolean mask           469 / 1468     465 / 1501
        FlexAttention                2746           2603
    Blocks of 16 queries took 1.0 to 1.4 times as long, of 64 queries 0.9 to 1.2 times. SDPA in place of the products of
    a block of 64 queries and 939 columns: 1.7 / 6.0 ms, these 1.5 / 5.0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        rows: Tensor,
        starts: Tensor,
        ends: Tensor,
        real: Tensor | None,
    ) -> Tensor:
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        for block in _blocks(rows, starts, ends):
            queries = _by_group(q[block.queries], k.shape[2]) * scale
            weights = _weights(queries, _range(k, block, real, queries.dtype), starts, ends, real, block)
            o[block.queries] = _by_query(weights @ _range(v, block, real, queries.dtype), q.shape[1])
        ctx.save_for_backward(q, k, v, rows, starts, ends, real)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (do,) = gradients
        q, k, v, rows, starts, ends, real = ctx.saved_tensors
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros(t.shape, dtype=accumulator(q), device=t.device) for t in (k, v))
        for block in _blocks(rows, starts, ends):
            queries = _by_group(q[block.queries], k.shape[2]) * ctx.scale
            keys, values = _range(k, block, real, queries.dtype), _range(v, block, real, queries.dtype)
            cotangents = _by_group(do[block.queries], k.shape[2])
            weights = _weights(queries, keys, starts, ends, real, block)
            dweights = cotangents @ values.mT
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dq[block.queries] = _by_query(dscores @ keys, q.shape[1]) * ctx.scale
            dk[block.row, block.columns].transpose(0, 1).baddbmm_(dscores.mT, queries)
            dv[block.row, block.columns].transpose(0, 1).baddbmm_(weights.mT, cotangents)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


@dataclass(frozen=True)
class _Block:
    """T queries of a row, and the S columns that they see.

    Attributes:
        row: the row.
        queries: of all M.
        columns: of the row.
        shared: columns, counted from the first of `columns`, that are in the range of every query.
    """

    row: int
    queries: slice
    columns: slice
    shared: slice


def _blocks(rows: Tensor, starts: Tensor, ends: Tensor) -> Iterator[_Block]:
    """Cut every row's queries into blocks."""
    _, counts = rows.unique_consecutive(return_counts=True)
    first = 0
    row_of, lows, highs = rows.tolist(), starts.tolist(), ends.tolist()
    for count in counts.tolist():
        begin, first = first, first + count
        while begin < first:
            low, own = lows[begin], highs[begin]
            widest = low + max(_STRETCH * (own - low), _NARROW)
            end = bisect_right(highs, widest, begin + 1, min(begin + _BLOCK, first))
            shared = slice(lows[end - 1] - low, own - low)
            yield _Block(row_of[begin], slice(begin, end), slice(low, highs[end - 1]), shared)
            begin = end


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(T, H, P) to (G, H/G T, P), in the dtype of the computation."""
    by_head = x.to(accumulator(x)).transpose(0, 1)
    return by_head.reshape(groups, -1, x.shape[2])


def _by_query(x: Tensor, heads: int) -> Tensor:
    """(G, H/G T, P) to (T, H, P)."""
    return x.reshape(heads, -1, x.shape[2]).transpose(0, 1)


def _range(x: Tensor, block: _Block, real: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(G, S, P) keys or values of a block's range, with zeros where a column holds no token."""
    part = x[block.row, block.columns].to(dtype)
    if real is not None:
        part = part.masked_fill(~real[block.row, block.columns, None, None], 0)
    return part.transpose(0, 1)


def _weights(queries: Tensor, keys: Tensor, starts: Tensor, ends: Tensor, real: Tensor | None, block: _Block) -> Tensor:
    """(G, H/G T, S) probabilities; only the ends of the range, where some queries see and some do not, need masks."""
    scores = queries @ keys.mT
    by_query = scores.unflatten(1, (-1, block.queries.stop - block.queries.start))
    column = torch.arange(block.columns.start, block.columns.stop, device=scores.device)
    low, high = block.shared.start, block.shared.stop
    by_query[..., :low].masked_fill_(column[:low] < starts[block.queries, None], -math.inf)
    by_query[..., high:].masked_fill_(column[high:] >= ends[block.queries, None], -math.inf)
    if real is not None:
        by_query.masked_fill_(~real[block.row, block.columns], -math.inf)
    return scores.softmax(-1)
