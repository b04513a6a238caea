"""Loss, time and memory of long texts by position, read chunk by chunk with a cache.

`evaluate_by_position` compares models on windows that one forward can read. Here a window may be as long as the text:
what a forward needs depends on the chunk, and what is kept on the cache alone.

Symbols: N windows, L length, C chunk.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from ..harness.machine import resident_memory
from ..modeling.cache import CACHE_FIELD
from .by_position import position_bins
from .decoding import held_bytes
from .hidden_states import evaluating, head_input
from .language_modeling import check_windows, checked_vocabulary, logits_of, predictions_at_once

__all__ = ["evaluate_long_texts"]


def evaluate_long_texts(
    model: PreTrainedModel, windows: Tensor, *, chunk: int = 1024, first: int = 128, progress: bool = True
) -> list[dict[str, Any]]:
    """Score a model on long windows, in bins of positions that double in size.

    Args:
        model: a causal language model with a cache.
        windows: (N, L) int64 token ids, N >= 1, L >= 2, without padding; each is read from an empty cache.
        chunk: C, tokens of a forward. A chunk also ends where a bin does. It changes results by rounding only.
        first: end of the first bin, at least 2; see :func:`position_bins`.
        progress: show a progress bar.

    Returns:
        A dictionary for each bin: "start" and "end" (positions from 0, the end excluded), "tokens" (number of
        predictions), "loss" (nats per token), "read" (tokens read, all windows together), "seconds" (for reading and
        scoring them), "cache_bytes" (what the cache holds at the end of the bin, the most of all windows) and
        "memory_bytes" (the most that was seen: resident memory of the process after a chunk, or on a GPU the most that
        was allocated).

    Raises:
        ValueError: if an argument is not as described, a token id is outside the vocabulary, or a loss is not finite.
    """
    check_windows(windows)
    if chunk < 1:
        raise ValueError(f"`chunk` must be at least 1, got {chunk}")
    length = windows.shape[1]
    bins = position_bins(length, first)
    rows: list[dict[str, Any]] = [
        {"start": start, "end": end, "read": 0, "seconds": 0.0, "cache_bytes": 0, "memory_bytes": 0}
        for start, end in bins
    ]
    losses: list[list[float]] = [[] for _ in bins]
    bar = tqdm(total=windows.numel(), desc="long texts", unit="token", leave=False, disable=not progress)
    with evaluating(model), torch.no_grad(), bar:
        vocabulary = checked_vocabulary(model, windows, model.device)
        for window in windows.to(model.device):
            cache = DynamicCache(config=model.config.get_text_config())
            last: Tensor | None = None  # the input of the head that predicts the next chunk's first token
            for row, found in zip(rows, losses, strict=True):
                for start in range(row["start"], row["end"], chunk):
                    end = min(start + chunk, row["end"])
                    began = _clock(model.device)
                    arguments: dict[str, Any] = {CACHE_FIELD: cache, "use_cache": True}
                    states = head_input(model, input_ids=window[None, start:end], **arguments)[0]
                    predicting = states[:-1] if last is None else torch.cat([last, states[:-1]])
                    targets = window[end - len(predicting) : end]
                    found += _losses(model, predicting, targets, vocabulary)
                    last = states[-1:].clone()  # a view would keep the chunk
                    row["seconds"] += _clock(model.device) - began
                    row["read"] += end - start
                    row["memory_bytes"] = max(row["memory_bytes"], _memory(model.device))
                    bar.update(end - start)
                row["cache_bytes"] = max(row["cache_bytes"], held_bytes(cache))
    for row, found in zip(rows, losses, strict=True):
        row |= {"tokens": len(found), "loss": math.fsum(found) / len(found)}
    return rows


def _losses(model: PreTrainedModel, states: Tensor, targets: Tensor, vocabulary: int) -> list[float]:
    """Return the losses of (T,) tokens from the (T, D) inputs of the head."""
    # Here, since evaluate and datasets, which the metrics need, take seconds to import.
    from .metrics.distillation import token_losses

    if not len(targets):
        return []
    size = predictions_at_once(states, vocabulary)
    parts = zip(states.split(size), targets.split(size), strict=True)
    losses = torch.cat([token_losses(logits_of(model, part), wanted).double() for part, wanted in parts])
    if not losses.isfinite().all():
        raise ValueError("`model` must compute finite losses, which it does not. Try another dtype, e.g. float32.")
    return losses.tolist()


def _clock(device: torch.device) -> float:
    """Return the time, once an accelerator has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _memory(device: torch.device) -> int:
    """Return the bytes in use: on a GPU the most since the last call."""
    if device.type != "cuda":
        return resident_memory()
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most
