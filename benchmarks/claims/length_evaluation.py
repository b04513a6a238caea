"""Held-out loss of the same tokens with more and with less text before them, for `length.py`.

The text is cut into windows of the longest context. A shorter context cuts every window into pieces, each of which a
model reads from its start, without what came before. So every length predicts the same tokens, each of them once, and
what differs between lengths is how far back the model can look and how far out it is. With pieces of L tokens the
target at place t of a window has (t mod L) + 1 tokens before it.

Symbols: N windows, M tokens of a window, L tokens of a piece.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


def windows_of(ids: Tensor, longest: int, count: int) -> Tensor:
    """Return the first (N, M + 1) windows of M = `longest` targets, each from the last token of the previous one.

    Raises:
        ValueError: if the text has fewer than `count` of them.
    """
    available = (len(ids) - 1) // longest
    if available < count:
        raise ValueError(f"count must be at most {available}, windows of {longest} tokens in the text, got {count}")
    return ids[: count * longest + 1].unfold(0, longest + 1, longest)


@torch.no_grad()
def losses_of(model: PreTrainedModel, windows: Tensor, length: int, budget: int) -> tuple[Tensor, float | None]:
    """Return the loss of every target of (N, M + 1) windows, read in pieces of `length` tokens, which divides M.

    Args:
        model: is put into evaluation mode.
        windows: as :func:`windows_of` gives them.
        length: L.
        budget: tokens of a forward, about.

    Returns:
        (N, M) nats, and the share of the tokens that selective attention chose; None where the model does not choose.
    """
    model.eval()
    inputs, targets = (part.reshape(-1, length) for part in (windows[:, :-1], windows[:, 1:]))
    found, chosen = [], []
    size = max(budget // length, 1)
    for part, wanted in zip(inputs.split(size), targets.split(size), strict=True):
        output = model(part, use_cache=False)
        found.append(F.cross_entropy(output.logits.float().transpose(1, 2), wanted, reduction="none"))
        rates = getattr(output, "selection_rate", None)
        if rates is not None:
            chosen.append(float(rates.mean()) * len(part))
    losses = torch.cat(found).view(len(windows), -1)
    return losses, sum(chosen) / len(inputs) if chosen else None


def evaluate(model: PreTrainedModel, windows: Tensor, lengths: list[int], width: int, budget: int) -> dict[str, Any]:
    """Return the fields of a row that describe a trained model.

    Args:
        model: the model.
        windows: (N, M + 1), M the last of `lengths`.
        lengths: rising; each divides the last.
        width: places of a window that are averaged for the losses by position; divides M.
        budget: tokens of a forward, about.

    Returns:
        By length, as text: `held_out`, the mean loss; `by_position`, the mean loss at the first `width` places of all
        windows, at the next ones and so on; `change`, the mean of the loss less that at the first length, and its
        standard error over windows; `selection_rate`, if the model selects.
    """
    result: dict[str, Any] = {"held_out": {}, "by_position": {}, "change": {}}
    first = None
    for length in lengths:
        losses, rate = losses_of(model, windows, length, budget)
        first = losses if first is None else first
        change = (losses - first).mean(1)
        error = float(change.std()) / len(change) ** 0.5 if len(change) > 1 else None
        result["held_out"][str(length)] = float(losses.double().mean())
        result["by_position"][str(length)] = losses.unflatten(1, (-1, width)).mean((0, 2)).tolist()
        result["change"][str(length)] = {"mean": float(change.double().mean()), "error": error}
        if rate is not None:
            result.setdefault("selection_rate", {})[str(length)] = rate
    return result
