"""`window_attention` by Triton: tables, launches, and the gradient.

Symbols: B batch, K columns, M selected tokens, H query heads, G key-value heads, P head width; T queries and S columns
of a tile.

FlashAttention-2's scheme (arXiv 2307.08691) over ranges that come from tables. The queries of a row are sorted, so a
tile of T of them sees one range of columns, a little longer than the window, and a tile of S columns is seen by one
range of the row's queries. The forward goes over the first and keeps the softmax's denominators; the backward goes over
the first for dq and over the second for dk and dv, with the weights computed again. Everything is summed in a fixed
order: no atomics. The tables are made by the device, and nothing waits for them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._triton import INTERPRETED, triton
from .window_attention_triton_kernels import forward_kernel, key_gradients_kernel, query_gradients_kernel

# (T, S, warps) of the programs that hold queries (forward, dq) and of those that hold keys and values (dk and dv), by
# bytes of an element and head width up to. T is small because T selected tokens spread over a stretch of the row, all
# of which is computed. Compiled by Triton 3.9 they spill at most 4 bytes of registers a thread on sm_90, and on sm_80
# 72 at 2 bytes and P = 64, 36 at 4 bytes and P = 256; shared memory is at most 96 KiB. No tile has been timed on a
# device. float32 has no tensor cores at full precision, and its products take registers.
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    index: Tensor,
    starts: Tensor,
    ends: Tensor,
    real: Tensor | None,
) -> Tensor:
    """Attention of each query to the real columns of its range, differentiable.

    Args:
        q: (M, H, P) queries, not float64.
        k, v: (B, K, G, P) keys and values.
        scale: of the scores.
        index: (M) `row * K + column` of the queries, increasing.
        starts: (M) first column of a query's range, non-decreasing over the queries of a row.
        ends: (M) column after the last of the range, that after the query's own.
        real: (B, K) columns that hold a token, None for all.

    Returns:
        (M, H, P) in the dtype of q; zero for a query whose own column is not real.
    """
    dtype = q.dtype
    if not q.dtype == k.dtype == v.dtype:  # a dot product takes two operands of one dtype
        q, k, v = q.float(), k.float(), v.float()
    if real is not None:
        ends = ends.where(real.flatten()[index], 0)
    o = _WindowAttention.apply(q, k, v, scale, index, starts, ends, real)
    assert isinstance(o, Tensor)  # `apply` is untyped
    return o.to(dtype)


class _WindowAttention(torch.autograd.Function):
    """Saves inputs, output and the denominators: lse_m = log2 sum_j 2^(s_mj log2(e)), s_mj = scale q_m . k_j.

    Backward, with p_mj = 2^(s_mj log2(e) - lse_m), delta_m = o_m . do_m and ds_mj = p_mj (do_m . v_j - delta_m):
    dq_m = scale sum_j ds_mj k_j,  dk_j = scale sum_m ds_mj q_m,  dv_j = sum_m p_mj do_m.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        index: Tensor,
        starts: Tensor,
        ends: Tensor,
        real: Tensor | None,
    ) -> Tensor:
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        o = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        starts, ends = starts.int(), ends.int()
        over_queries, _ = _tiles(q)
        blocks = _blocks(index, k, over_queries["T"])
        if blocks.shape[0]:
            with torch.cuda.device_of(q):
                forward_kernel[(blocks.shape[0], q.shape[1])](
                    q,
                    k,
                    v,
                    starts,
                    ends,
                    real,
                    blocks,
                    o,
                    lse,
                    scale * math.log2(math.e),
                    *_sizes(q, k, v),
                    **over_queries,
                )
        ctx.save_for_backward(q, k, v, index, starts, ends, real, blocks, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, index, starts, ends, real, blocks, o, lse = ctx.saved_tensors
        do = _unit_stride(gradients[0])
        dq = q.new_empty(q.shape)
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        delta = torch.empty_like(lse)
        factor = ctx.scale * math.log2(math.e)
        over_queries, over_keys = _tiles(q)
        tiles = triton.cdiv(k.shape[1], over_keys["S"])
        sizes, strides = _sizes(q, k, v), do.stride()[:2]
        with torch.cuda.device_of(q):
            if blocks.shape[0]:
                query_gradients_kernel[(blocks.shape[0], q.shape[1])](
                    q,
                    k,
                    v,
                    starts,
                    ends,
                    real,
                    blocks,
                    o,
                    lse,
                    do,
                    dq,
                    delta,
                    ctx.scale,
                    factor,
                    *sizes,
                    *strides,
                    **over_queries,
                )
            key_gradients_kernel[(k.shape[0] * tiles, k.shape[2])](
                q,
                k,
                v,
                starts,
                ends,
                real,
                _seers(index, starts, k, over_keys["S"]),
                lse,
                delta,
                do,
                dk,
                dv,
                ctx.scale,
                factor,
                sizes[0],
                tiles,
                *sizes[1:],
                *strides,
                **over_keys,
            )
        return dq, dk, dv, None, None, None, None, None


def _unit_stride(tensor: Tensor) -> Tensor:
    """A tensor whose last dimension is dense; views of a wider projection stay as they are."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """What the kernels take of shapes and strides, in their order."""
    heads = q.shape[1]
    return k.shape[1], heads, heads // k.shape[2], *q.stride()[:2], *k.stride()[:3], *v.stride()[:3]


def _tiles(q: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """The constants of the launches over queries and of the one over keys."""
    width = q.shape[2]
    block_p = max(16, triton.next_power_of_2(width))
    over_queries, over_keys = (
        {
            "WIDTH": width,
            "BLOCK_P": block_p,
            "T": T,
            "S": S,
            "EMULATE": INTERPRETED,
            "num_warps": warps,
            "num_stages": 2,
        }
        for T, S, warps in _TILES[q.dtype.itemsize, max(64, block_p)]
    )
    return over_queries, over_keys


def _blocks(index: Tensor, k: Tensor, size: int) -> Tensor:
    """Cut the queries of every row into blocks.

    Returns:
        (blocks, 3) int64 row, first query and number of queries. There are as many as the row lengths could ask for,
        so that the device need not be waited for; those that are too many have no queries.
    """
    B, K = k.shape[:2]
    M = index.shape[0]
    most = (M + min(B, M) * (size - 1)) // size
    bounds = torch.searchsorted(index, K * torch.arange(B + 1, device=index.device))  # (B+1) first queries of the rows
    through = ((bounds.diff() + (size - 1)) // size).cumsum(0)  # (B) blocks up to a row's last
    number = torch.arange(most, device=index.device)
    row = torch.searchsorted(through, number, right=True).clamp(max=B - 1)
    before = torch.cat([through.new_zeros(1), through])[row]
    first = bounds[row] + (number - before) * size
    count = (bounds[row + 1] - first).clamp(0, size)
    return torch.stack([row, first, count], dim=1)


def _seers(index: Tensor, starts: Tensor, k: Tensor, size: int) -> Tensor:
    """(B, K / S, 2) int64 first query that may see some column of a tile, and the one after the last."""
    B, K = k.shape[:2]
    rows = K * torch.arange(B, device=index.device)[:, None]
    edges = torch.arange(0, K, size, device=index.device)
    first = torch.searchsorted(index, rows + edges)
    # Starts do not decrease along a row, and are below K: with the row before them they are sorted.
    last = torch.searchsorted(index - index % K + starts, rows + (edges + size).clamp(max=K))
    return torch.stack([first, last], dim=2)
