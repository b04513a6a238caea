"""`generate` beyond the positions that a model has weights for: the last part of the context, encoded anew.

Weights of absolute positions know no token beyond the last position. With N of them a row of n tokens is read as its
last ones alone, which then stand at the first positions: all n while n < N, since the output of position N - 1 has
mostly not been trained; else all but the first s, where s is the smallest multiple of (N - 1) // 2 that leaves fewer
than N. So the context shrinks to about half whenever it is full and grows token by token until it is full again; each
row by its own tokens, whatever else is in the batch. What a row is read as depends on the number of its tokens alone:
with a cache, without one and in one call over a long prompt `generate` gives the same tokens.

Symbols: B batch, L columns, N positions.
"""

from typing import Any

import torch
from torch import Tensor


def tokens_to_drop(tokens: Tensor, positions: int) -> Tensor:
    """How many of its first tokens a row is read without, for the numbers of tokens of several rows."""
    most, half = positions - 1, (positions - 1) // 2
    return ((tokens - most).clamp(min=0) + half - 1) // half * half


def windowed_inputs(input_ids: Tensor, positions: int, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What `prepare_inputs_for_generation` is to be called with instead, where a row does not fit.

    A cache that holds tokens which are dropped now is emptied, and reads the rest again.

    Args:
        input_ids: (B, L) all tokens.
        positions: N.
        arguments: its other arguments.

    Raises:
        ValueError: if a row does not fit and the ids of all its tokens are not there.
    """
    cache = arguments.get("cache", arguments.get("past_key_values"))
    mask = arguments.get("attention_mask")
    past = 0 if cache is None else int(cache.get_seq_length())
    # After a prompt of embeddings the ids are those of the new tokens alone.
    columns = max(input_ids.shape[1], past + 1) if mask is None else mask.shape[1]
    if columns < positions:
        return input_ids, arguments
    shape = (input_ids.shape[0], columns)
    real = torch.ones(shape, dtype=torch.bool, device=input_ids.device) if mask is None else mask != 0
    rank = real.cumsum(-1)
    drop = tokens_to_drop(rank[:, -1], positions)
    if not bool(drop.any()):
        return input_ids, arguments
    if columns != input_ids.shape[1] or arguments.get("inputs_embeds") is not None:
        raise ValueError(
            f"max_position_embeddings: {columns} columns of {positions} positions, and context_overflow='window' reads "
            f"the last ones again: needed are the ids of all tokens as input_ids, got {input_ids.shape[1]}; accepted: "
            "neither inputs_embeds nor prefill_chunk_size"
        )
    kept = real & (rank > drop[:, None])
    first = int(kept.any(0).int().argmax())
    changes: dict[str, Any] = {"position_ids": None}
    if cache is None:
        return input_ids[:, first:], arguments | changes | {"attention_mask": kept[:, first:].long()}
    held = cache.layers[0].counts
    if held is None or not torch.equal(held, kept[:, :past].sum(-1).to(held.device)):
        cache.reset()
        for layer in cache.layers:
            layer.skip(first)
        changes["next_sequence_length"] = columns - first
    return input_ids, arguments | changes | {"attention_mask": kept.long()}
