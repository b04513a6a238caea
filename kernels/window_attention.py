"""Sliding-window softmax attention of selected tokens, whose queries are gathered and whose keys are all in place.

Symbols: B batch, K columns of a row of keys, M selected tokens of all rows, H query heads, G key-value heads, P head
width, w window.

For selected token m, in row b at column c, and every head h of group g = h // (H / G),

    o_m = sum_j softmax_j(scale q_m . k_j) v_j,  over the columns j of row b that m sees:
    those that hold a token of its document at a place p_j with p_m - w < p_j <= p_m.

Source: Taipan's selective attention (arXiv 2410.18572, eq. 4): softmax attention over a window, without
positional embedding, for the tokens that a gate selects. The window counts the token itself, as in transformers'
`sliding_window`. Places are integers of the caller's, so that keys can be left out (padding, empty slots of a cache,
tokens that nobody may see) without moving the others. How many tokens are selected is not bounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import (
    accumulator,
    check_devices,
    check_groups,
    check_integers,
    check_seq_idx,
    check_tensor,
    choose_implementation,
    of_no_rows,
)
from .window_attention_blocks import attend_blocks, attend_rows
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
    """Attention of selected tokens to the last `window` tokens of their row and document, themselves included.

    Args:
        q: (M, H, P) queries of the selected tokens of all rows, M >= 0.
        k: (B, K, G, P) keys of every column of every row, K >= 1; G divides H.
        v: (B, K, G, P) values of every column.
        window: w tokens that a query sees, itself included, at least 1.
        index: (M) integer `row * K + column` of each query's own token, strictly increasing. Its key stands there.
        positions: (B, K) integer place of each column among its row's tokens, increasing along a row with gaps
            allowed; negative where a column holds no token (padding, an empty slot of a cache, a key that nobody may
            see). What stands in such a column reaches neither an output nor a gradient. None: the columns themselves.
        seq_idx: (B, K) integer document of each column, non-decreasing over the real ones and negative at padding,
            which holds no token either. A query sees its own document only. None: a row is one document.
        scale: factor of the scores; P^(-1/2) if not given.
        implementation: "auto" (Triton for CUDA tensors, torch otherwise and where Triton does not serve: float64, or
            P > 256), "triton" or "torch".

    Returns:
        (M, H, P) in the dtype of `q`: zero for a query whose own column holds no token. Scores, softmax and sums are
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: if a shape, dtype, device, group count or `implementation` does not fit, `window` is below 1,
            `index` does not increase within the rows, or `positions` or `seq_idx` decreases along a row.
    """
    _check(q, k, v, window, index, positions, seq_idx)
    implementation = choose_implementation(implementation, "window_attention", q, q.shape[2] <= WIDEST_HEAD)
    if k.shape[0] == 0:
        return of_no_rows(tuple(q.shape), q.dtype, q, k, v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    index = index.long()
    starts, ends, real = _visible(index, k, window, positions, seq_idx)
    if implementation == "triton":
        return window_attention_triton(q, k, v, scale, index, starts, ends, real)
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
    """The probabilities of :func:`window_attention`: what each selected token gives to each column of its row.

    M x K numbers per head: for inspection (`output_attentions`), not for inference. Arguments as there.

    Returns:
        (M, H, K) in float32 (float64 for float64 inputs). A row sums to 1, or is zero for a query whose own column
        holds no token.

    Raises:
        ValueError: as :func:`window_attention`.
    """
    _check(q, k, k, window, index, positions, seq_idx)
    if k.shape[0] == 0:
        return of_no_rows((*q.shape[:2], k.shape[1]), accumulator(q), q, k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    index = index.long()
    K = k.shape[1]
    starts, ends, real = _visible(index, k, window, positions, seq_idx)
    column = torch.arange(K, device=q.device)
    seen = (column >= starts[:, None]) & (column < ends[:, None])  # (M, K)
    if real is not None:
        held = real[index // K]
        seen = seen & held & held.gather(1, (index % K)[:, None])
        q = q.masked_fill(~seen.any(1)[:, None, None], 0)
        k = k.masked_fill(~real[..., None, None], 0)
    counts = (index // K).bincount(minlength=k.shape[0]).tolist()
    parts = zip(q.split(counts), seen.split(counts), k, strict=True)
    with torch.autocast(q.device.type, enabled=False):
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
    """The definition of :func:`window_attention`: query by query, differentiated by autograd. Arguments as there."""
    _check(q, k, v, window, index, positions, seq_idx)
    M, H, P = q.shape
    B, K, G, _ = k.shape
    scale = 1 / math.sqrt(P) if scale is None else scale
    sums = accumulator(q)
    place = torch.arange(K, device=k.device).expand(B, K) if positions is None else positions
    document = torch.zeros_like(place) if seq_idx is None else seq_idx
    nothing = q.to(sums).masked_fill(torch.ones_like(q, dtype=torch.bool), 0)  # zeros that stay in the graph
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
    """(N, H, K) probabilities that (N, H, P) queries give to (K, G, P) keys of their row, of which they see (N, K)."""
    sums = accumulator(q)
    queries = (q.to(sums) * scale).transpose(0, 1).reshape(k.shape[1], -1, q.shape[2])  # (G, H/G N, P)
    scores = (queries @ k.to(sums).permute(1, 2, 0)).view(q.shape[1], *seen.shape).transpose(0, 1)
    hidden = ~seen[:, None]
    return scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, index: Tensor, starts: Tensor, ends: Tensor, real: Tensor | None
) -> Tensor:
    """The torch path, for queries that all see at least themselves."""
    B, K = k.shape[:2]
    with torch.autocast(q.device.type, enabled=False):  # the dtypes are chosen; autocast would round the products
        rows = index // K
        if q.shape[0] == B and torch.equal(rows, torch.arange(B, device=index.device)):
            return attend_rows(q, k, v, scale, starts, ends, real)
        return attend_blocks(q, k, v, scale, rows, starts, ends, real)


def _visible(
    index: Tensor, k: Tensor, window: int, positions: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What each query sees, without waiting for the device.

    Places and documents increase along a row, so what a query sees are the real columns of one range.

    Returns:
        starts: (M) first column of the range; non-decreasing over the queries of a row.
        ends: (M) the column after the range, that after the query's own.
        real: (B, K) whether a column holds a token, None where all do. A query in a column that does not sees nothing,
            whatever its range.
    """
    B, K = k.shape[:2]
    column = index % K
    if positions is None and seq_idx is None:
        return (column - (window - 1)).clamp(min=0), column + 1, None
    place = torch.arange(K, device=k.device).expand(B, K) if positions is None else positions.long()
    real = place >= 0
    if seq_idx is not None:
        real = real & (seq_idx >= 0)
    # Running maxima: sorted, as the search wants them, and they rise at real columns only.
    highest = place.masked_fill(~real, -1).cummax(1).values
    starts = torch.searchsorted(highest, highest - window, right=True)
    if seq_idx is not None:
        document = seq_idx.long().masked_fill(~real, -1).cummax(1).values
        starts = torch.maximum(starts, torch.searchsorted(document, document))
    return starts.flatten()[index], column + 1, real


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    index: Tensor,
    positions: Tensor | None,
    seq_idx: Tensor | None,
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
    if seq_idx is not None:
        check_seq_idx(seq_idx, B, K)
    _check_order(index.long(), B * K, positions)


def _check_order(index: Tensor, columns: int, positions: Tensor | None) -> None:
    """Raise ValueError unless `index` increases strictly within the columns, and `positions` along each row."""
    # Bounds join in as neighbours, so that one comparison finds all; and all comparisons wait for the device once.
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
