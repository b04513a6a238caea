"""Division of a bounded memory's slots among the heads of a student, measured on a few thousand tokens.

Few heads of a Transformer look far back. A head that does not needs a window only, and a retrieval head with many slots
recalls what an even division forgets. For each key-value head and each of a few numbers of slots, the error of its
output behind the output projection is measured, relative to the residual stream it is added to. Slots then go, step by
step, to where they reduce the sum of these errors most per row (an optimum of the concave envelope of each head's
errors; errors of different heads are taken to add up). Each head also gets the decay of its scores, out of a few, with
which its slots serve it best: a retrieval head should not forget what it once attended to, and other heads should.

Symbols: B batch, L length, D width, H query heads, KV key-value heads, P head width, w window, s sinks.
"""

import heapq
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..kernels.bounded_attention import bounded_attention
from ..modeling.bounded_memory import BoundedAttentionSettings
from .teacher import Teacher

_CANDIDATES = (0, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_DECAYS = (1.0, 0.99, 0.97)
LENGTH = 1024
"""Tokens of the windows that the division is measured on: recall at a distance must show in it."""
WINDOWS = 3
"""Number of these windows."""


def divide_slots(
    teacher: Teacher,
    layers: Sequence[int],
    settings: BoundedAttentionSettings,
    rows: int,
    windows: Tensor,
    *,
    progress: bool = True,
) -> tuple[list[list[int]], list[list[float]]]:
    """Choose the slots and the decay of each key-value head, so that a head has `rows` rows on average.

    Args:
        teacher: in evaluation mode.
        layers: converted layers.
        settings: window, sinks and chunk size of the student's memory.
        rows: w + s + slots of a head, on average.
        windows: (N, L) int64 tokens; more slots than L are given to no head.
        progress: show a progress bar.

    Returns:
        The numbers of slots and the decays: a list for each of the teacher's layers with a number for each of its
        key-value heads, empty for a layer that is not converted.
    """
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    candidates = [number for number in _CANDIDATES if number < windows.shape[1]]
    errors = slot_errors(teacher, layers, settings, candidates, windows, progress=progress)
    least, decay = errors.flatten(0, 1).min(-1)
    budget = (rows - settings.window - settings.sinks) * heads * len(layers)
    chosen = allocate(least, candidates, budget)
    slots, decays = iter(chosen), iter(decay[head, candidates.index(number)] for head, number in enumerate(chosen))
    converted = [layer in layers for layer in range(teacher.num_layers)]
    return (
        [[next(slots) for _ in range(heads * each)] for each in converted],
        [[_DECAYS[int(next(decays))] for _ in range(heads * each)] for each in converted],
    )


def slot_errors(
    teacher: Teacher,
    layers: Sequence[int],
    settings: BoundedAttentionSettings,
    candidates: Sequence[int],
    windows: Tensor,
    *,
    progress: bool = True,
) -> Tensor:
    """Return the (layers, KV, candidates, decays) mean squared error of each key-value head, the layers in their order.

    The error is that of the head's share of the attention output, relative to the square of the residual stream.
    """
    order = sorted(layers)
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    errors = torch.zeros(len(order), heads, len(candidates), len(_DECAYS), dtype=torch.float64)

    @torch.no_grad()
    def on_layer(layer: int, block_input: Tensor, normed_input: Tensor) -> None:
        view = teacher.attention(layer)
        members = view.num_heads // heads
        queries, keys = view.queries_keys(normed_input)
        keys, values = keys[:, :, ::members], view.values(normed_input)[:, :, ::members]
        exact = view.head_outputs(normed_input)
        output = view.o.unflatten(1, (heads, -1))  # (D, KV, members P)
        stream = block_input.double().square().sum(-1)
        for (index, number), (which, decay) in product(enumerate(candidates), enumerate(_DECAYS)):
            if which and not number:  # without slots there is nothing to choose
                errors[order.index(layer), :, index, which] = errors[order.index(layer), :, index, 0]
                continue
            found, _ = bounded_attention(
                queries,
                keys,
                values,
                window=settings.window,
                sinks=settings.sinks,
                slots=[number] * heads,
                chunk_size=settings.chunk_size,
                decay=decay,
                scale=view.scaling,
            )
            difference = (found - exact).unflatten(2, (heads, members)).flatten(3)  # (B, L, KV, members P)
            for head in range(heads):
                error = (difference[:, :, head] @ output[:, head].T).double().square().sum(-1)
                errors[order.index(layer), head, index, which] += (error / stream).mean().cpu() / len(windows)

    for window in tqdm(windows, desc="divide slots", unit="window", disable=not progress, leave=False):
        ids = window[None].to(teacher.model.device)
        teacher.capture(ids, order, ("block_input", "normed_input"), on_layer=on_layer)
    return errors


def allocate(errors: Tensor, candidates: Sequence[int], budget: int) -> list[int]:
    """Give each head one of the candidate numbers of slots, `budget` in all at most.

    Args:
        errors: (heads, candidates) error of each head with each number of slots.
        candidates: increasing, the first 0.
        budget: slots to give.

    Returns:
        A number for each head. Each step takes the head and the larger number with the largest fall of the error per
        slot, until no step fits or lowers the error.
    """
    table = errors.tolist()
    chosen = [0] * len(table)

    def best_step(head: int, left: int) -> tuple[float, int] | None:
        now = chosen[head]
        steps = [
            ((table[head][now] - table[head][new]) / (candidates[new] - candidates[now]), new)
            for new in range(now + 1, len(candidates))
            if candidates[new] - candidates[now] <= left
        ]
        return max(steps, key=lambda step: step[0], default=None)

    queue: list[tuple[float, int, int]] = []

    def push(head: int) -> None:
        step = best_step(head, budget)
        if step is not None and step[0] > 0:
            heapq.heappush(queue, (-step[0], head, step[1]))

    for head in range(len(table)):
        push(head)
    while queue:
        _, head, new = heapq.heappop(queue)
        cost = candidates[new] - candidates[chosen[head]]
        if cost <= budget:
            chosen[head] = new
            budget -= cost
        push(head)
    return [candidates[index] for index in chosen]
