"""Sliding-window softmax attention of selected tokens: gathered queries over the keys of all tokens.

Symbols: B batch, K columns of a row of keys, M selected tokens of all rows, H query heads, G key-value heads, P head
width, w window.

For a selected token m in row b at column c, and every head h of group g = h // (H / G),

    o_m = sum_j softmax_j(scale q_m . k_j) v_j

over the visible columns j of row b: those that hold a token of m's document at a place p_j with p_m - w < p_j <= p_m.

Source: Taipan's selective attention (arXiv 2410.18572, eq. 4): softmax attention over a window, without positional
embedding, for the tokens that a gate selects. The window includes the token itself, as in transformers'
`sliding_window`. The caller passes the places as integers, so that keys can be excluded (padding, empty slots of a
cache, hidden tokens) without moving the others. The number of selected tokens is not bounded.

The torch path processes blocks of T queries of a row. Queries are sorted, so that a block sees one range of S columns:
the window, and the columns between its first and last query. The largest temporary tensor is the (H, T, S) scores of a
block. In a traced graph this is one operator. A model whose number of selected tokens depends on values cannot select
them there: :func:`attend_traced` computes all scores and masks invisible ones.
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

from .checks import (
    accumulator,
    check_devices,
    check_groups,
    check_integers,
    check_seq_idx,
    check_tensor,
    choose_implementation,
    empty_batch,
    without_autocast,
)
from .tracing import host_reads, opaque, tracing
from .window_attention_triton import WIDEST_HEAD, window_attention_triton


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    index: Tensor,
    positions: Tensor | None = None,
    seq_idx: Tensor | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Attend from selected tokens to the last `window` tokens of their row and document, including themselves.

    Args:
        q: (M, H, P) queries of the selected tokens of all rows, M >= 0.
        k: (B, K, G, P) keys of every column of every row, K >= 1; G divides H.
        v: (B, K, G, P) values of every column.
        window: w tokens that a query sees including itself, at least 1.
        index: (M) integer `row * K + column` of each query's token, strictly increasing. Its key is in that column.
        positions: (B, K) integer place of each column among its row's tokens, increasing along a row, possibly with
            gaps; negative for columns without a token (padding, empty slots of a cache, hidden keys), whose content
            affects neither outputs nor gradients. By default the index of the column.
        seq_idx: (B, K) integer document of each column, non-decreasing over real tokens and negative at padding. A
            query sees only its own document. By default each row is one document.
        scale: factor of the scores; P^(-1/2) if not given.
        implementation: "auto", "triton" or "torch" (see :mod:`checks`). Triton does not support P > 256.

    Returns:
        (M, H, P) in the dtype of `q`, zero for queries whose own column holds no token. Scores, softmax and sums are
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: if a shape, dtype, device, group count or `implementation` is invalid, `window` is below 1,
            `index` does not increase within the rows, or `positions` or `seq_idx` decreases along a row. Their order is
            checked on the CPU only, because reading values of a device would wait for it.
    """
    _check(q, k, v, window, index, positions, seq_idx)
    implementation = choose_implementation(
        implementation, "window_attention", q, q.shape[2] <= WIDEST_HEAD, traceable=True
    )
    if k.shape[0] == 0:
        return empty_batch(tuple(q.shape), q.dtype, q, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    index = index.long().contiguous()
    starts, ends, real = _visible(index, k, window, positions, seq_idx)
    if implementation == "triton":
        return window_attention_triton(q, k, v, scale, index, starts, ends, real)
    if tracing():
        return _traced_blocks(q, k, v, scale, index, starts, ends, real)
    if real is None or bool(real.all()):
        return _attend(q, k, v, scale, index, starts, ends, None)
    own = real.flatten()[index]
    kept = own.nonzero().squeeze(1)
    o = _attend(q[kept], k, v, scale, index[kept], starts[kept], ends[kept], real)
    return torch.zeros_like(q).index_copy(0, kept, o)


def window_attention_matrix(
    q: Tensor,
    k: Tensor,
    *,
    window: int,
    index: Tensor,
    positions: Tensor | None = None,
    seq_idx: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the probabilities of :func:`window_attention`, from each selected token to each column of its row.

    The matrix takes M x K elements per head: use it for inspection (`output_attentions`), not for inference. The
    arguments are those of :func:`window_attention`.

    Returns:
        (M, H, K) in float32 (float64 for float64 inputs). A row sums to 1, or is zero if the query's own column holds
        no token.

    Raises:
        ValueError: as in :func:`window_attention`.
    """
    _check(q, k, k, window, index, positions, seq_idx)
    if k.shape[0] == 0:
        return empty_batch((*q.shape[:2], k.shape[1]), accumulator(q), q, k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    index = index.long()
    B, K = k.shape[:2]
    starts, ends, real = _visible(index, k, window, positions, seq_idx)
    column = torch.arange(K, device=q.device)
    seen = (column >= starts[:, None]) & (column < ends[:, None])  # (M, K)
    if real is not None:
        held = real[index // K]
        seen = seen & held & held.gather(1, (index % K)[:, None])
        q = q.masked_fill(~seen.any(1)[:, None, None], 0)
        k = k.masked_fill(~real[..., None, None], 0)
    if tracing():  # it is unknown how many queries a row has: each is multiplied with the keys of all rows
        own = torch.arange(B, device=q.device) == (index // K)[:, None]
        with without_autocast(q):
            matrix = _probabilities(q, k.flatten(0, 1), (own[..., None] & seen[:, None]).flatten(1), scale)
        return matrix.unflatten(-1, (B, K)).sum(2)
    counts = (index // K).bincount(minlength=k.shape[0]).tolist()
    parts = zip(q.split(counts), seen.split(counts), k, strict=True)
    with without_autocast(q):
        return torch.cat([_probabilities(rows, keys, mask, scale) for rows, mask, keys in parts])


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    index: Tensor,
    positions: Tensor | None = None,
    seq_idx: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute :func:`window_attention` by its definition, query by query, with the same arguments."""
    _check(q, k, v, window, index, positions, seq_idx)
    M, H, P = q.shape
    B, K, G, _ = k.shape
    scale = 1 / math.sqrt(P) if scale is None else scale
    sums = accumulator(q)
    place = torch.arange(K, device=k.device).expand(B, K) if positions is None else positions
    document = torch.zeros_like(place) if seq_idx is None else seq_idx
    nothing = q.to(sums).masked_fill(torch.ones_like(q, dtype=torch.bool), 0)  # zeros in the autograd graph
    outputs = []
    for m in range(M):
        row, column = divmod(int(index[m]), K)
        own, here = int(place[row, column]), int(document[row, column])
        if own < 0 or here < 0:
            outputs.append(nothing[m])
            continue
        inside = (place[row] >= 0) & (place[row] > own - window) & (place[row] <= own)
        seen = (inside & (document[row] == here)).nonzero().squeeze(1)
        keys = k[row, seen].to(sums).repeat_interleave(H // G, dim=1)  # (seen, H, P)
        values = v[row, seen].to(sums).repeat_interleave(H // G, dim=1)
        probabilities = ((q[m].to(sums) * keys).sum(-1) * scale).softmax(0)
        outputs.append((probabilities[..., None] * values).sum(0))
    return (torch.stack(outputs) if outputs else nothing).to(q.dtype)


def _probabilities(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Return (N, H, K) probabilities of (N, H, P) queries over the (K, G, P) keys of their row, masked by (N, K)."""
    sums = accumulator(q)
    queries = (q.to(sums) * scale).transpose(0, 1).reshape(k.shape[1], -1, q.shape[2])  # (G, H/G N, P)
    scores = (queries @ k.to(sums).permute(1, 2, 0)).view(q.shape[1], *seen.shape).transpose(0, 1)
    hidden = ~seen[:, None]
    return scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, index: Tensor, starts: Tensor, ends: Tensor, real: Tensor | None
) -> Tensor:
    """Run the torch path for queries that all see at least themselves."""
    B, K = k.shape[:2]
    with without_autocast(q):
        rows = index // K
        if q.shape[0] == B and torch.equal(rows, torch.arange(B, device=index.device)):
            return attend_rows(q, k, v, scale, starts, ends, real)
        return attend_blocks(q, k, v, scale, rows, starts, ends, real)


def _visible(
    index: Tensor, k: Tensor, window: int, positions: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the columns that each query sees, without waiting for the device.

    Places and documents increase along a row, so a query sees the real columns of one range.

    Returns:
        starts: (M) first column of the range, non-decreasing over the queries of a row.
        ends: (M) column after the range, i.e. after the query's own.
        real: (B, K) mask of columns that hold a token, or None if all do. Queries in other columns see nothing.
    """
    B, K = k.shape[:2]
    column = index % K
    if positions is None and seq_idx is None:
        return (column - (window - 1)).clamp(min=0), column + 1, None
    place = torch.arange(K, device=k.device).expand(B, K) if positions is None else positions.long()
    real = place >= 0
    if seq_idx is not None:
        real = real & (seq_idx >= 0)
    # Running maxima are sorted, as searchsorted requires, and increase at real columns only.
    highest = place.masked_fill(~real, -1).cummax(1).values
    starts = torch.searchsorted(highest, highest - window, right=True)
    if seq_idx is not None:
        document = seq_idx.long().masked_fill(~real, -1).cummax(1).values
        starts = torch.maximum(starts, torch.searchsorted(document, document))
    return starts.flatten()[index], column + 1, real


def _check(
    q: Tensor, k: Tensor, v: Tensor, window: int, index: Tensor, positions: Tensor | None, seq_idx: Tensor | None
) -> None:
    check_tensor("q", q, (None, None, None), "(M, H, P)")
    M, heads, width = q.shape
    if heads * width == 0:
        raise ValueError(f"q must be (M, H, P) with H and P >= 1, got shape {tuple(q.shape)}")
    check_tensor("k", k, (None, None, None, width), "(B, K, G, P)")
    B, K, G, _ = k.shape
    if K == 0:
        raise ValueError(f"k must hold at least one column, got shape {tuple(k.shape)}")
    check_groups("k", G, heads)
    check_tensor("v", v, tuple(k.shape), "(B, K, G, P)")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    check_integers("index", index, (M,), "(M)")
    if positions is not None:
        check_integers("positions", positions, (B, K), "(B, K)")
    check_devices(q=q, k=k, v=v, index=index, positions=positions, seq_idx=seq_idx)
    check_seq_idx(seq_idx, B, K)
    _check_order(index.long(), B * K, positions)


def _check_order(index: Tensor, columns: int, positions: Tensor | None) -> None:
    """Raise ValueError unless `index` increases strictly within the columns, and `positions` along each row.

    This is checked on the CPU only, as in :func:`checks.check_seq_idx`.
    """
    if not host_reads(index):
        return
    # The bounds join the sequence, so that one comparison covers everything.
    bounds = index.new_tensor([-1, columns])
    unordered = (torch.cat([bounds[:1], index]) >= torch.cat([index, bounds[1:]])).any()
    if positions is not None:
        place = positions.long()
        before = torch.cat([torch.full_like(place[:, :1], -1), place.cummax(1).values[:, :-1]], dim=1)
        repeated = (place >= 0) & (place <= before)
        unordered = unordered | repeated.any()
    if not bool(unordered):
        return
    if positions is not None:
        wrong = repeated.nonzero().tolist()
        if wrong:
            row, column = wrong[0]
            raise ValueError(
                "positions must increase along a row (negative entries hold no token), "
                f"got {int(positions[row, column])} after {int(before[row, column])} in row {row}"
            )
    raise ValueError(
        f"index must increase strictly from 0 or more to at most B K - 1 = {columns - 1}, got {index.tolist()}"
    )


# Most queries per block, and most columns: a multiple of those of the first query, but not less than a minimum. If few
# tokens are selected, most columns of a wider range would be visible to a single query.
_BLOCK, _STRETCH, _NARROW = 32, 2, 256


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor, starts: Tensor, ends: Tensor, real: Tensor | None
) -> Tensor:
    """Attend with queries that all see at least themselves; differentiable.

    Args:
        q: (M, H, P) queries.
        k, v: (B, K, G, P) keys and values.
        scale: factor of the scores.
        rows: (M) rows of the queries, non-decreasing.
        starts: (M) first column that a query sees, non-decreasing over the queries of a row.
        ends: (M) column after the last one that it sees, increasing over the queries of a row.
        real: (B, K) mask of columns that hold a token, or None if all do.

    Returns:
        (M, H, P) in the dtype of q.
    """
    o: Any = _Blocks.apply(q, k, v, scale, rows, starts, ends, real)
    return o


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor, ends: Tensor, real: Tensor | None
) -> Tensor:
    """Attend with one query per row (M = B), as in decoding; arguments of :func:`attend_blocks` in any float dtype.

    Blocks would hold one row each. Measured as in :class:`_Blocks`, without a gradient, H = 8, P = 64, milliseconds of
    this / of blocks: 1.0 / 4.1 for B = 64 and K = 64, 6.4 / 7.1 for B = 8 and K = 2048. In the latter case a batched
    matmul, which copies the keys, takes 63 ms.
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
        q.unflatten(1, (k.shape[2], -1)),  # the heads of a group as if they were queries: they share their keys
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=seen[:, None, None],
        scale=scale,
    )
    return o.flatten(1, 2).to(dtype)


class _Blocks(torch.autograd.Function):
    """The torch path by blocks; saves its inputs only and recomputes scores and probabilities p.

    Backward, with ds = p (do . v - sum_j p_j do . v_j):  dq = scale sum_j ds_j k_j,  dk_j = scale sum_m ds_mj q_m,
    dv_j = sum_m p_mj do_m.

    Measured on 1 CPU core, fp32, torch 2.13, B = 1, K = 4096, H = G = 8, P = 64, milliseconds of processor time,
    forward / forward + backward, fastest of 3. SDPA and FlexAttention (not compiled, without a backward on the CPU)
    compute all queries over all keys with masks:
        window                       512            2048
        this, 15 % selected          19 / 62        46 / 157
        this, all selected           82 / 282       220 / 781
        SDPA, boolean mask           469 / 1468     465 / 1501
        FlexAttention                2746           2603
    Blocks of 16 queries took 1.0 to 1.4 times as long, of 64 queries 0.9 to 1.2 times. For a block of 64 queries and
    939 columns, SDPA took 1.7 / 6.0 ms, these products 1.5 / 5.0 ms.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        q, k, v, ctx.scale, rows, starts, ends, real = arguments
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        for block in _blocks(rows, starts, ends):
            queries = _by_group(q[block.queries], k.shape[2]) * ctx.scale
            weights = _weights(queries, _range(k, block, real, queries.dtype), starts, ends, real, block)
            o[block.queries] = _by_query(weights @ _range(v, block, real, queries.dtype), q.shape[1])
        ctx.save_for_backward(q, k, v, rows, starts, ends, real)
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


class _SelectedBlocks(torch.autograd.Function):
    """:class:`_Blocks` of those queries whose own column holds a token, for traced graphs; other outputs are zero."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        q, k, v, scale, index, starts, ends, real = arguments
        own = torch.ones_like(index, dtype=torch.bool) if real is None else real.flatten()[index]
        ctx.kept = own.nonzero().squeeze(1)
        rows, starts, ends = (each[ctx.kept] for each in (index // k.shape[1], starts, ends))
        o = _Blocks.forward(ctx, q[ctx.kept], k, v, scale, rows, starts, ends, real)
        return q.new_zeros(q.shape).index_copy_(0, ctx.kept, o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (do,) = gradients
        dq, *others = _Blocks.backward(ctx, do[ctx.kept])
        assert dq is not None
        return do.new_zeros(do.shape).index_copy_(0, ctx.kept, dq), *others


_traced_blocks = opaque(
    _SelectedBlocks,
    "window_attention",
    "Tensor q, Tensor k, Tensor v, float scale, Tensor index, Tensor starts, Tensor ends, Tensor? real",
    lambda q, *_: q.new_empty(q.shape),
    results=1,
)


@dataclass(frozen=True)
class _Block:
    """T queries of a row, and the S columns that they see.

    Attributes:
        row: index of the row.
        queries: range within all M queries.
        columns: range within the columns of the row.
        shared: columns in the range of every query, counted from the first of `columns`.
    """

    row: int
    queries: slice
    columns: slice
    shared: slice


def _blocks(rows: Tensor, starts: Tensor, ends: Tensor) -> Iterator[_Block]:
    """Yield the blocks of the queries of every row."""
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
    """Return (T, H, P) values as (G, H/G T, P), in the dtype of the computation."""
    by_head = x.to(accumulator(x)).transpose(0, 1)
    return by_head.reshape(groups, -1, x.shape[2])


def _by_query(x: Tensor, heads: int) -> Tensor:
    """Return (G, H/G T, P) values as (T, H, P)."""
    return x.reshape(heads, -1, x.shape[2]).transpose(0, 1)


def _range(x: Tensor, block: _Block, real: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the (G, S, P) keys or values of a block, with zeros in columns without a token."""
    part = x[block.row, block.columns].to(dtype)
    if real is not None:
        part = part.masked_fill(~real[block.row, block.columns, None, None], 0)
    return part.transpose(0, 1)


def _weights(queries: Tensor, keys: Tensor, starts: Tensor, ends: Tensor, real: Tensor | None, block: _Block) -> Tensor:
    """Return (G, H/G T, S) probabilities; masks are needed only at the ends of the range, outside of `shared`."""
    scores = queries @ keys.mT
    by_query = scores.unflatten(1, (-1, block.queries.stop - block.queries.start))
    column = torch.arange(block.columns.start, block.columns.stop, device=scores.device)
    low, high = block.shared.start, block.shared.stop
    by_query[..., :low].masked_fill_(column[:low] < starts[block.queries, None], -math.inf)
    by_query[..., high:].masked_fill_(column[high:] >= ends[block.queries, None], -math.inf)
    if real is not None:
        by_query.masked_fill_(~real[block.row, block.columns], -math.inf)
    return scores.softmax(-1)


def attend_traced(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, positions: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend from all tokens of a row to the last `window` ones in a traced graph.

    Args:
        q: (B, L, H, P) queries of the last L columns.
        k, v: (B, K, G, P) keys and values.
        window: tokens that a query sees, as in :func:`window_attention`.
        scale: factor of the scores.
        positions: (B, K) place of each column, or None.
        seq_idx: (B, K) document of each column, or None.

    Returns:
        (B, L, H, P) outputs in the dtype of q, and (B, H, L, K) probabilities in float32 (or float64); both are zero
        for queries whose own column holds no token.
    """
    length, columns, groups = q.shape[1], k.shape[1], k.shape[2]
    sums = accumulator(q)
    place = torch.arange(columns, device=k.device)[None] if positions is None else positions.long()
    real = place >= 0
    if seq_idx is not None:
        real = real & (seq_idx >= 0)
    own = place[:, columns - length :, None]
    distance = own - place[:, None]
    seen = (distance >= 0) & (distance < window) & real[:, None]  # (B or 1, L, K)
    if seq_idx is not None:
        seen = seen & (seq_idx[:, columns - length :, None] == seq_idx[:, None])
    held = real[:, columns - length :, None]
    seen = (seen & held)[:, None]
    # Columns without a token may contain NaN.
    hidden = ~real[..., None, None]
    k, v = k.masked_fill(hidden, 0).to(sums), v.masked_fill(hidden, 0).to(sums)
    queries = q.masked_fill(~held[..., None], 0).to(sums).transpose(1, 2).unflatten(1, (groups, -1))
    with without_autocast(q):
        scores = queries @ k.permute(0, 2, 3, 1)[:, :, None] * scale  # (B, G, H/G, L, K)
        # A row that sees nothing is not masked before the softmax, which would give NaN, but set to zero after it.
        scores = scores.flatten(1, 2).masked_fill(~seen & seen.any(-1, keepdim=True), -math.inf)
        probabilities = scores.softmax(-1).masked_fill(~seen, 0)
        grouped = probabilities.unflatten(1, (groups, -1))
        o = (grouped @ v.transpose(1, 2)[:, :, None]).flatten(1, 2).transpose(1, 2)
    return o.to(q.dtype), probabilities
