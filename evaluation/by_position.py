"""Loss and divergence by the position of a token in its text, which show up to which length a model holds.

Symbols: N windows, L length, V vocabulary, P predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .hidden_states import KeptStates, evaluating
from .language_modeling import check_windows, checked_vocabulary, logits_of, predictions_at_once

__all__ = ["evaluate_by_position", "position_bins"]


def evaluate_by_position(
    models: Mapping[str, PreTrainedModel],
    windows: Tensor,
    *,
    teacher: str | None = None,
    first: int = 128,
    kept: KeptStates | None = None,
    progress: bool = True,
) -> dict[str, list[dict[str, Any]]]:
    """Score models on the same windows, in bins of positions that double in size.

    A prediction belongs to the bin of the token that it predicts. The means of all bins, weighted by their numbers of
    predictions, are the values of `evaluate_language_model` on these windows.

    Args:
        models: models of one vocabulary on one device, by name.
        windows: (N, L) int64 token ids, N >= 1, L >= 2, without padding. A forward reads one of them.
        teacher: name of the model with which the others are compared; None: they are not compared.
        first: end of the first bin, positive; see :func:`position_bins`.
        kept: where hidden states are kept for measurements on the same windows.
        progress: show a progress bar.

    Returns:
        For every model, by name, a dictionary for each bin: "start" and "end" (positions from 0, the end excluded),
        "tokens" (number of predictions), "loss" (nats per token) and, with a teacher, "kl" (KL(teacher || model), nats
        per token) and "top1_agreement" (share of predictions), both None for the teacher itself.

    Raises:
        ValueError: if an argument is not as described, a token id is outside a vocabulary, or the vocabularies differ.
    """
    check_windows(windows)
    if teacher is not None and teacher not in models:
        raise ValueError(f"`teacher` must be the name of one of the models, {', '.join(models)}, got {teacher!r}")
    order = sorted(models, key=lambda name: name != teacher)  # the teacher first
    bins = position_bins(windows.shape[1], first)
    values: dict[str, dict[str, list[Tensor]]] = {name: {} for name in models}
    with evaluating(*models.values()), torch.no_grad():
        sizes = {name: checked_vocabulary(model, windows, model.device) for name, model in models.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"`models` must have vocabularies of one size, got {sizes}")
        for window in tqdm(windows, desc="by position", unit="window", leave=False, disable=not progress):
            states = {name: _states(models[name], window, kept or KeptStates(0)) for name in order}
            parts = predictions_at_once(next(iter(states.values())), next(iter(sizes.values())))
            for start in range(0, len(window) - 1, parts):
                _add(values, models, states, window, slice(start, start + parts), teacher)
    return {name: [_mean_of(values[name], start, end, len(windows)) for start, end in bins] for name in models}


def position_bins(length: int, first: int = 128) -> list[tuple[int, int]]:
    """Return the bins of positions of a window, [0, first), [first, 2 first), [2 first, 4 first), …, up to its length.

    Args:
        length: L, at least 2.
        first: end of the first bin, at least 2, since nothing predicts the first token.
    """
    if first < 2:
        raise ValueError(f"`first` must be at least 2, got {first}")
    ends = [first]
    while ends[-1] < length:
        ends.append(2 * ends[-1])
    return [(start, min(end, length)) for start, end in zip([0, *ends], ends, strict=False)]


def _states(model: PreTrainedModel, window: Tensor, kept: KeptStates) -> Tensor:
    """Return the (L - 1, D) inputs of a model's output head that predict the window's tokens from the second on."""
    return kept.head_input(model, window[None].to(model.device))[0, :-1]


def _add(
    values: dict[str, dict[str, list[Tensor]]],
    models: Mapping[str, PreTrainedModel],
    states: Mapping[str, Tensor],
    window: Tensor,
    part: slice,
    teacher: str | None,
) -> None:
    """Add the values of a part of a window's predictions; the teacher is the first of `states`."""
    # Here, since evaluate and datasets, which the metrics need, take seconds to import.
    from .metrics.distillation import token_divergences, token_losses

    theirs: Tensor | None = None
    for name, inputs in states.items():
        logits = logits_of(models[name], inputs[part])
        found = {"loss": token_losses(logits, window[1:][part].to(logits.device))}
        if name == teacher:
            theirs = logits
        elif theirs is not None:
            found["kl"] = token_divergences(logits, theirs)[0]
            found["top1_agreement"] = (logits.argmax(-1) == theirs.argmax(-1)).float()
        for key, column in found.items():
            values[name].setdefault(key, []).append(column.double().cpu())


def _mean_of(values: Mapping[str, list[Tensor]], start: int, end: int, windows: int) -> dict[str, Any]:
    """Return the means over the predictions of the tokens from `start` to `end`."""
    part = slice(max(start - 1, 0), end - 1)  # the prediction at i is that of the token at i + 1
    row: dict[str, Any] = {"start": start, "end": end, "tokens": windows * (part.stop - part.start)}
    for key in ("loss", "kl", "top1_agreement"):
        columns = torch.cat(values[key]).view(windows, -1)[:, part] if key in values else None
        row[key] = None if columns is None else math.fsum(columns.flatten().tolist()) / columns.numel()
    return row
