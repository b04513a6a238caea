"""Division of a bounded memory's slots among the heads of a student, measured on a few thousand tokens.

Few heads of a Transformer look far back. A head that does not needs a window only, and a retrieval head with many slots
recalls what an even division forgets. For each key-value head and each of a few numbers of slots, the error of its
output behind the output projection is measured, relative to the residual stream it is added to. Slots then go, step by
step, to where they reduce the sum of these errors most per row (an optimum of the concave envelope of each head's
errors; errors of different heads are taken to add up). Each head also gets the decay of its scores, out of a few, with
which its slots serve it best.

Ordinary text hardly shows recall: on it alone most heads would forget within a hundred tokens. So the error is also
measured where a passage is repeated, and the two are added with a fixed weight. On SmolLM2-135M-Instruct, 96 rows a
head, a weight of 0 gave a KL of 0.010 and a loss of 2.1 nats on a repetition after 416 tokens, the default weight 0.012
and 0.9 (docs/results.md).

Symbols: N windows, L length, D width, H query heads, KV key-value heads, P head width, w window, s sinks.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..kernels.bounded_attention import bounded_attention
from ..kernels.int8_rows import round_rows
from ..modeling.bounded_memory import BoundedAttentionSettings
from .data import TokenWindows
from .recipe import MIXERS_WITH, Recipe
from .teacher import Teacher

_CANDIDATES = (0, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
DECAYS = (1.0, 0.99, 0.97)
"""Candidates for the decay of a head."""
RECALL = 0.3
"""Weight of the errors on repeated passages."""
LENGTH = 2048
"""Tokens of the windows that the division is measured on. Heads forget what is farther than these windows show: with
376 rows the loss on a repetition after 1,500 tokens was 2.15 nats measured on 1,024 tokens, and 0.67 on 2,048."""
WINDOWS = 1
"""Number of these windows of ordinary text; there are as many with repeated passages."""
_DECAYS_UP_TO = 256  # Larger numbers of slots are only measured with the decay that is best at the last smaller one.


def divides_slots(recipe: Recipe) -> bool:
    """Return whether a recipe asks for the division."""
    return recipe.student.mixer in MIXERS_WITH["slots"][1] and recipe.student.slots == "calibrated"


def division_windows(recipe: Recipe, teacher: Teacher, train: TokenWindows) -> Tensor:
    """Return the (N, L) windows of the training text that a recipe's slots are divided on."""
    length = min(LENGTH, len(train), teacher.zoo_config.max_position_embeddings)
    return train.batch(0, min(WINDOWS, train.count(length)), length, recipe.seed + 1)


def divide_slots(
    teacher: Teacher,
    layers: Sequence[int],
    settings: BoundedAttentionSettings,
    rows: int,
    windows: Tensor,
    *,
    recall: float = RECALL,
    decays: Sequence[float] = DECAYS,
    progress: bool = True,
) -> tuple[list[list[int]], list[list[float]]]:
    """Choose the slots and the decay of each key-value head, so that a head has `rows` rows on average.

    Exact heads are left out: they get no slots, and the average is over the other heads of the converted layers.

    Args:
        teacher: in evaluation mode.
        layers: converted layers.
        settings: window, sinks, chunk size and exact heads of the student's memory.
        rows: w + s + slots of a head that is not exact, on average.
        windows: (N, L) int64 tokens of ordinary text; more slots than L are given to no head.
        recall: weight of the errors on repeated passages, at least 0; those on ordinary text have the weight 1.
        decays: candidates for a head's decay.
        progress: show a progress bar.

    Returns:
        The numbers of slots and the decays: a list for each of the teacher's layers with a number for each of its
        key-value heads, empty for a layer that is not converted. An exact head has 0 slots and the decay 1.

    Raises:
        ValueError: if an error is not finite.
    """
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    slots = [[0] * heads if layer in layers else [] for layer in range(teacher.num_layers)]
    chosen_decays = [[1.0] * len(numbers) for numbers in slots]
    measured = [layer for layer in sorted(layers) if len(settings.exact_of(layer)) < heads]
    if not measured:
        return slots, chosen_decays
    candidates = [number for number in _CANDIDATES if number < windows.shape[1]]
    weights, texts = torch.ones(windows.shape), windows
    if recall:
        repeated, scored = repeat_passages(windows)
        texts = torch.cat([windows, repeated])
        weights = torch.cat([weights, recall * scored / scored.mean(1, keepdim=True)])
    errors = slot_errors(
        teacher, measured, settings, candidates, texts, weights / len(windows), decays=decays, progress=progress
    )
    least, best = errors.flatten(0, 1).min(-1)
    places = [(layer, head) for layer in measured for head in range(heads)]
    bounded = [index for index, (layer, head) in enumerate(places) if head not in settings.exact_of(layer)]
    if not bool(least[bounded].isfinite().all()):
        raise ValueError(
            "teacher: the errors of its heads on the training text are not finite. Choose dtype float32 or, if it is, "
            "another teacher."
        )
    budget = (rows - settings.window - settings.sinks) * len(bounded)
    for index, number in zip(bounded, allocate(least[bounded], candidates, budget), strict=True):
        layer, head = places[index]
        slots[layer][head] = number
        chosen_decays[layer][head] = decays[int(best[index, candidates.index(number)])]
    return slots, chosen_decays


def repeat_passages(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the first tenth of each window further on, in each window at another distance.

    Args:
        windows: (N, L) int64 tokens.

    Returns:
        (N, L) int64 texts, and (N, L) float32: 1 at the tokens of the repetition but its first few, otherwise 0.
    """
    count, length = windows.shape
    passage = max(length // 10, 1)
    texts, scored = windows.clone(), torch.zeros(count, length)
    for number in range(count):
        start = passage + (length - 2 * passage) * (number + 1) // (count + 1)
        texts[number, start : start + passage] = windows[number, :passage]
        scored[number, start + passage // 16 : start + passage] = 1
    return texts, scored


def slot_errors(
    teacher: Teacher,
    layers: Sequence[int],
    settings: BoundedAttentionSettings,
    candidates: Sequence[int],
    windows: Tensor,
    weights: Tensor,
    *,
    decays: Sequence[float] = DECAYS,
    progress: bool = True,
) -> Tensor:
    """Return the (layers, KV, candidates, decays) mean squared error of each key-value head, the layers in their order.

    The error is that of the head's share of the attention output, relative to the square of the residual stream, times
    the (N, L) `weights`, averaged over the tokens of a window and summed over the windows; infinite where it was not
    measured. The candidates are in ascending order, the first at most 256.
    """
    order = sorted(layers)
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    errors = torch.full((len(order), heads, len(candidates), len(decays)), torch.inf, dtype=torch.float64)
    weights = weights.double().to(teacher.model.device)

    @torch.no_grad()
    def on_layer(layer: int, block_input: Tensor, normed_input: Tensor) -> None:
        view = teacher.attention(layer)
        members = view.num_heads // heads
        queries, keys = view.queries_keys(normed_input)
        keys, values = keys[:, :, ::members], view.values(normed_input)[:, :, ::members]
        exact = view.head_outputs(normed_input).unflatten(2, (heads, members))
        if settings.kv_dtype == "int8":
            keys, values = round_rows(keys), round_rows(values)
        output = view.o.unflatten(1, (heads, -1))  # (D, KV, members P)
        stream = block_input.double().square().sum(-1)
        row, every = errors[order.index(layer)], list(range(heads))

        def measure(index: int, pairs: list[tuple[int, int]]) -> None:
            """Fill in the errors of pairs of a head and a decay, all at once, each in a head of its own."""
            of_heads = torch.tensor([head for head, _ in pairs], device=keys.device)
            found, _ = bounded_attention(
                queries.unflatten(2, (heads, members))[:, :, of_heads].flatten(2, 3),
                keys[:, :, of_heads],
                values[:, :, of_heads],
                window=settings.window,
                sinks=settings.sinks,
                slots=[candidates[index]] * len(pairs),
                chunk_size=settings.chunk_size,
                decay=[decays[number] for _, number in pairs],
                scale=view.scaling,
                softcap=view.softcap,
            )
            difference = found.unflatten(2, (len(pairs), members)) - exact[:, :, of_heads]
            for place, (head, number) in enumerate(pairs):
                error = (difference[:, :, place].flatten(2) @ output[:, head].T).double().square().sum(-1)
                row[head, index, number] = (error / stream * weights).mean(1).sum().cpu()

        few = [index for index, number in enumerate(candidates) if number <= _DECAYS_UP_TO]
        for index in few:
            measure(index, [(head, number) for number in range(len(decays)) for head in every])
        best = row[:, few[-1]].argmin(-1).tolist()
        for index in range(len(few), len(candidates)):
            measure(index, list(enumerate(best)))
        bar.update()

    with tqdm(total=len(order), desc="divide slots", unit="layer", disable=not progress, leave=False) as bar:
        ids = windows.to(teacher.model.device)
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
