"""Rows filled up at their left with padding that counts as text: what some checkpoints were trained with.

A masked mixer that was trained on rows padded at the left to its whole context, without a mask, has learned what stands
before a text: weights of absolute positions and the padding token's own states. It needs both at inference too.

Symbols: B batch, L length, D width, N positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..kernels.tracing import host_reads


def fill_context(
    embeddings: nn.Module, config: Any, input_ids: Tensor | None, arguments: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """The arguments of a forward over rows filled up to N - 1 tokens, whose last output is the last trained one.

    Longer rows are left as they are: a row of N tokens is what the checkpoint saw in training.

    Args:
        embeddings: the model's.
        config: gives `max_position_embeddings` (N) and `pad_token_id`.
        input_ids: (B, L) tokens, or None.
        arguments: the other arguments of the forward. `position_ids` are not read: positions are columns.

    Returns:
        The arguments, with (B, N - 1, D) or longer `inputs_embeds`, and how many columns were put before a row.

    Raises:
        ValueError: if padding stands elsewhere than at the left, rows are packed, or a cache is given or asked for.
    """
    arguments = dict(arguments)
    mask = arguments.pop("attention_mask", None)
    arguments.pop("position_ids", None)
    if mask is not None and host_reads(mask) and bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("pad_mode='as_trained' takes padding at the left only, attention_mask has some elsewhere")
    packed = [name for name in ("seq_idx", "cu_seqlens", "cu_seq_lens_q") if arguments.get(name) is not None]
    if packed:
        raise ValueError(f"pad_mode='as_trained' takes one document a row: {packed[0]} must be None")
    for name in ("past_key_values", "cache", "cache_params"):
        if arguments.pop(name, None) is not None or arguments.get("use_cache"):
            raise ValueError(
                "pad_mode='as_trained' has no cache, as a new token moves all others: use_cache must be False and "
                "past_key_values None"
            )
    states = arguments.pop("inputs_embeds", None)
    if (input_ids is None) == (states is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if states is None:
        states = embeddings(input_ids)
    added = max(config.max_position_embeddings - 1 - states.shape[1], 0)
    if added:
        pad = embeddings(torch.full((1, 1), config.pad_token_id, device=states.device))
        states = torch.cat([pad.to(states.dtype).expand(states.shape[0], added, -1), states], dim=1)
    return arguments | {"inputs_embeds": states, "use_cache": False}, added


def without_fill(output: Any, added: int) -> Any:
    """The output of a forward without the columns that were put before the rows."""
    if not isinstance(output, BaseModelOutputWithPast):  # a tuple
        return tuple(_cut(value, added) for value in output)
    for name, value in list(output.items()):
        output[name] = _cut(value, added)
    return output


def _cut(value: Any, added: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_cut(part, added) for part in value)
    if not isinstance(value, Tensor):
        return value
    return value[:, :, added:, added:] if value.dim() == 4 else value[:, added:]
