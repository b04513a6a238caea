"""Softmax attention by the function that `config._attn_implementation` names, with grouped keys and values as they are.

"sdpa" and "eager" are computed here without a copy of the keys for every query head; flash attention, flex attention
and registered functions come from transformers' `ALL_ATTENTION_FUNCTIONS`. What a query may see is told to each in its
own form: a boolean mask, flex attention's block mask, or to flash attention the bounds of the documents or the padding.

Symbols: B batch, L new tokens, M key columns, H query heads, G key-value heads, P head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from ..kernels.tracing import tracing
from .layers import soft_capped
from .token_layout import Sequence


def softmax_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: Sequence,
    *,
    window: int | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend.

    Args:
        module: has `config`, the `scaling` of the scores, `is_causal` and `num_key_value_groups`, as transformers', and
            `softcap`, c in c tanh(s / c) of the scores s, or None.
        q: (B, H, L, P) queries.
        k: (B, G, M, P) keys, of which the last L are the new tokens'.
        v: (B, G, M, P) values.
        sequence: where the new tokens stand.
        window: tokens that a query sees, itself included; None: all.
        query_positions: (B, L) of a window, from the cache; None without a cache.
        key_positions: (B, M) of a window, -1 at empty columns.
        output_attentions: return the matrix, which "eager" computes whatever the configuration says.

    Returns:
        (B, L, H, P), and the (B, H, L, M) attention matrix in float32 if asked for.
    """
    implementation = implementation_of(module, output_attentions)
    if is_flash(implementation):
        if sequence.prefix is not None:
            raise ValueError(
                f"attn_implementation must be 'sdpa', 'eager' or 'flex_attention' with prefix_mask, got "
                f"{implementation!r}, which has no mask for a prefix in both directions"
            )
        return _flash(module, q, k, v, sequence, window, key_positions), None
    if not module.is_causal:
        mask = sequence.document_mask()
    elif window is None:
        mask = sequence.full_mask(k.shape[2])
    else:
        mask = sequence.window_mask(window, query_positions, key_positions)
    return attend_under_mask(module, q, k, v, mask, implementation, output_attentions)


def attend_under_mask(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, implementation: str, output_attentions: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend, except by flash attention. Arguments as in :func:`softmax_attention`, and:

    Args:
        mask: (B or 1, 1, L, M), True where a query sees a key; None: earlier columns if `module.is_causal`, else all.
        implementation: name of the function.
    """
    if implementation == "sdpa" and module.softcap is not None:
        implementation = "eager"  # PyTorch's function has no cap
    if implementation == "sdpa":
        return _sdpa(q, k, v, mask, module.scaling, module.is_causal), None
    if implementation == "flex_attention":
        mask = _block_mask(q, k, mask, module.is_causal)  # pyright: ignore[reportAssignmentType]
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _eager)
    cap = {} if module.softcap is None else {"softcap": module.softcap}
    y, matrix = attend(module, q, k, v, mask, dropout=0.0, scaling=module.scaling, **cap)
    return y, matrix if output_attentions else None


def implementation_of(module: nn.Module, output_attentions: bool) -> str:
    """Return the name of the function that attends: "eager" alone computes the matrix."""
    config: Any = module.config
    return "eager" if output_attentions else config._attn_implementation


def is_flash(implementation: str) -> bool:
    """Return whether a name is that of a flash attention, which takes bounds of documents instead of masks."""
    return implementation != "eager" and is_flash_attention_requested(requested_attention_implementation=implementation)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = True) -> Tensor:
    """(B, L, H, P) by PyTorch's `scaled_dot_product_attention`.

    The query heads of a single token stand in the place of its length, so that a group reads its keys once. Measured on
    1 CPU core, float32, H = 9, G = 3, P = 64, milliseconds of this / `enable_gqa` / copied keys: M = 512 0.03 / 0.05 /
    0.26, M = 8192 0.8 / 1.4 / 16, M = 32768 3.1 / 7.2 / 70.
    """
    heads, groups = q.shape[1], k.shape[1]
    if q.shape[2] == 1:  # not part of an expression below: in a traced graph that is no bool, but a symbol
        members = q.reshape(q.shape[0], groups, heads // groups, q.shape[3])
        y = F.scaled_dot_product_attention(members, k, v, attn_mask=mask, scale=scale)
        return y.reshape(y.shape[0], 1, heads, y.shape[3])
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal and mask is None, "scale": scale}
    if heads == groups:
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    if mask is None or q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)
    return _by_member(q, k, v, options)


def _by_member(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """(B, L, H, P) with one call for the first query head of every group, one for the second, and so on.

    Under a mask a GPU's fast kernels take no grouped keys: PyTorch would compute all scores, with copied keys.
    """
    members = q.unflatten(1, (k.shape[1], -1)).unbind(2)
    parts = [F.scaled_dot_product_attention(member, k, v, **options) for member in members]
    return torch.stack(parts, dim=2).flatten(1, 2).transpose(1, 2)


def _eager(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """(B, L, H, P), and the (B, H, L, M) softmax in float32; causal, if the module is, where `mask` is None."""
    length, keys = q.shape[2], k.shape[2]
    scores = _by_group(q, k.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = soft_capped(scores, softcap)
    if mask is None and module.is_causal:
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
    matrix = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)
    return _by_group(matrix.to(v.dtype), v).transpose(1, 2), matrix


def _by_group(rows: Tensor, table: Tensor) -> Tensor:
    """(B, H, L, M) rows times the (B, G, M, N) table of their group, (B, H, L, N), without a copy for each head."""
    batch, heads, length, width = rows.shape
    groups = table.shape[1]
    if tracing():  # guards on products of lengths would tie a graph to them
        return (rows.unflatten(1, (groups, -1)) @ table[:, :, None]).flatten(1, 2)
    grouped = rows.reshape(batch, groups, heads // groups * length, width)
    return (grouped @ table).view(batch, heads, length, table.shape[3])


def _block_mask(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> BlockMask | None:
    """The mask in the form that flex attention takes; None where every token sees every column."""
    length, keys = q.shape[2], k.shape[2]
    if mask is None and (length == 1 or not causal):
        return None
    if mask is None:

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= query + (keys - length)

        return create_block_mask(seen, None, None, length, keys, device=q.device)
    whole = mask.expand(q.shape[0], 1, length, keys)
    return create_block_mask(
        lambda row, head, query, key: whole[row, 0, query, key], q.shape[0], None, length, keys, device=q.device
    )


def _flash(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: Sequence,
    window: int | None,
    key_positions: Tensor | None,
) -> Tensor:
    """(B, L, H, P) by transformers' flash attention, which knows documents one after another and padding."""
    config: Any = module.config
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, _eager)
    options: dict[str, Any] = {"dropout": 0.0, "scaling": module.scaling, "sliding_window": window}
    if module.softcap is not None:
        options["softcap"] = module.softcap
    if sequence.past == 0 and sequence.seq_idx is not None:
        # As one row with the documents of all rows; the padding of a row is one of them.
        batch, heads, length, width = q.shape
        row = torch.arange(batch, device=q.device)[:, None] * (length + 1)
        document, order = (row + sequence.seq_idx).flatten().sort(stable=True)
        counts = document.unique_consecutive(return_counts=True)[1]
        starts = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(counts.max())
        lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        line = [tensor.transpose(1, 2).flatten(0, 1)[order].transpose(0, 1)[None] for tensor in (q, k, v)]
        y, _ = attend(module, *line, None, **options, **lengths)
        return torch.empty_like(y[0]).index_copy(0, order, y[0]).view(batch, length, heads, width)
    real = sequence.attention_mask
    if key_positions is not None:
        real = key_positions >= 0
        real = None if bool(real.all()) else real
    y, _ = attend(module, q, k, v, real, **options)
    return y
