"""The attention of :mod:`window_attention` in a traced graph (:mod:`tracing`): every token is a query.

How many tokens are selected is not known there, and neither are the columns that they see: all scores are computed, and
what a query does not see is masked. Symbols as there; L tokens of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import accumulator


def attend_traced(
    q: Tensor, k: Tensor, v: Tensor, window: int, positions: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of all tokens of a row to its last `window` ones.

    Args:
        q: (B, L, H, P) queries of the last L columns.
        k, v: (B, K, G, P) keys and values.
        window: as in `window_attention`, and so are:
        positions: (B, K) place of each column, or None.
        seq_idx: (B, K) document of each column, or None.

    Returns:
        (B, L, H, P) in the dtype of q, and the (B, H, L, K) probabilities in float32 (or float64); both are zero for a
        query whose own column holds no token.
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
    # What stands in a column without a token is out of reach, even a NaN.
    hidden = ~real[..., None, None]
    k, v = k.masked_fill(hidden, 0).to(sums), v.masked_fill(hidden, 0).to(sums)
    queries = q.masked_fill(~held[..., None], 0).to(sums).transpose(1, 2).unflatten(1, (groups, -1))
    with torch.autocast(q.device.type, enabled=False):
        scores = queries @ k.permute(0, 2, 3, 1)[:, :, None] * (1 / math.sqrt(q.shape[-1]))  # (B, G, H/G, L, K)
        # A row without anything to see is uniform before it is set to zero: a softmax of nothing would be NaN.
        scores = scores.flatten(1, 2).masked_fill(~seen & seen.any(-1, keepdim=True), -math.inf)
        probabilities = scores.softmax(-1).masked_fill(~seen, 0)
        grouped = probabilities.unflatten(1, (groups, -1))
        o = (grouped @ v.transpose(1, 2)[:, :, None]).flatten(1, 2).transpose(1, 2)
    return o.to(q.dtype), probabilities
