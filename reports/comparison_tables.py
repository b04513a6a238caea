"""Teacher, control and student side by side: the tables of reports and cards, and the rows of the terminal's table."""

from __future__ import annotations

from .distillation_report import Comparison, Decoding
from .markdown import MISSING, binary_size, code, count, number, percent, seconds, short, table

__all__ = ["comparison_names", "comparison_rows", "comparison_section"]


def comparison_names(comparison: Comparison) -> list[str]:
    """Return how the models are called, in order."""
    return [f"after {model.name}" if model.kind == "stage" else model.name for model in comparison.models]


def comparison_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Return what is compared in short: a label and a cell for each model, in order.

    "recall 16 at 0/256" is the recall of 16 pairs with 0 and with 256 tokens between the list and the query.
    """
    models, rows = comparison.models, []
    for index, place in enumerate(comparison.teacher.by_position[-1:], start=len(comparison.teacher.by_position) - 1):
        label = f"KL at {_positions(place.start, place.end)}"
        rows.append((label, [number(model.by_position[index].kl) for model in models]))
    for index, repeat in enumerate(comparison.teacher.repeat):
        label = f"repeat loss at {count(repeat.distance)}"
        rows.append((label, [number(model.repeat[index].loss) for model in models]))
    for pairs in dict.fromkeys(recall.pairs for recall in comparison.teacher.recall):
        distances = [str(recall.distance) for recall in comparison.teacher.recall if recall.pairs == pairs]
        cells = []
        for model in models:
            shares = [f"{100 * recall.accuracy:.0f}" for recall in model.recall if recall.pairs == pairs]
            cells.append(f"{'/'.join(shares)} %")
        rows.append((f"recall {pairs} at {'/'.join(distances)}", cells))
    if comparison.teacher.choice is not None:
        found = [(model.choice.accuracy, model.choice.agreement) for model in models if model.choice is not None]
        cells = [f"{100 * right:.0f}/{100 * same:.0f} %" for right, same in found]
        rows.append(("choice: right/teacher's", cells))
    for index, decoding in enumerate(comparison.teacher.decoding):
        context = count(decoding.context)
        rates = [short(1 / model.decoding[index].decode_seconds) for model in models]
        rows.append((f"tokens/s at {context}", rates))
        rows.append((f"cache at {context}", [binary_size(model.decoding[index].cache_bytes) for model in models]))
    return rows


def comparison_section(comparison: Comparison) -> str:
    """Return the section on the comparison as Markdown, without its heading and its plot."""
    duration = sum(comparison.seconds.values())
    names = [code(model.name) for model in comparison.models]
    parts = [
        f"{names[0]}, {names[1]} and the student after {names[2]}, measured once at the end in {seconds(duration)} "
        "seconds.",
        *_by_position(comparison, names),
        *_repeat(comparison, names),
        *_recall(comparison, names),
        *_choice(comparison, names),
        *_continuations(comparison, names),
        *_decoding(comparison, names),
    ]
    return "\n\n".join(parts)


def _positions(start: int, end: int) -> str:
    return f"{count(start)}-{count(end)}"


def _by_position(comparison: Comparison, names: list[str]) -> list[str]:
    header = ["Positions", "Predictions", *(f"Loss, {name}" for name in names), *(f"KL, {name}" for name in names[1:])]
    rows = []
    for bins in zip(*(model.by_position for model in comparison.models), strict=True):
        first = bins[0]
        losses = [number(each.loss) for each in bins]
        divergences = [number(each.kl) for each in bins[1:]]
        rows.append([_positions(first.start, first.end), count(first.tokens), *losses, *divergences])
    text = "Held-out loss and KL divergence, in nats per token, by the position of the token in long windows:"
    return [text, table(header, rows)] if rows else []


def _repeat(comparison: Comparison, names: list[str]) -> list[str]:
    rows = [
        [f"{count(losses[0].distance)} tokens", *(number(each.loss) for each in losses)]
        for losses in zip(*(model.repeat for model in comparison.models), strict=True)
    ]
    text = "Repeat loss, in nats per token on a passage of 96 tokens that was read before, by distance:"
    return [text, table(["Distance", *names], rows)] if rows else []


def _recall(comparison: Comparison, names: list[str]) -> list[str]:
    rows = [
        [
            str(found[0].pairs),
            count(found[0].distance),
            *(percent(each.accuracy) for each in found),
            percent(found[0].chance),
            str(found[0].queries),
        ]
        for found in zip(*(model.recall for model in comparison.models), strict=True)
    ]
    text = (
        "Key-value recall: share of queries for which the right one of the list's values is the most likely next "
        "token, by the number of pairs in the list and the tokens of other text between list and query:"
    )
    return [text, table(["Pairs", "Distance", *names, "Chance", "Queries"], rows, left=0)] if rows else []


def _choice(comparison: Comparison, names: list[str]) -> list[str]:
    rows = [
        [
            name,
            percent(found.accuracy),
            f"{percent(min(found.accuracies))} to {percent(max(found.accuracies))}",
            percent(found.consistency),
            percent(max(found.letters)),
            percent(found.agreement),
        ]
        for name, found in zip(names, (model.choice for model in comparison.models), strict=True)
        if found is not None
    ]
    if comparison.teacher.choice is None:
        return []
    questions = comparison.teacher.choice.questions
    text = (
        f"Multiple choice: which of four texts continues a passage of the held-out text? {questions} questions in four "
        "orders of the options; chance is 25.0%."
    )
    header = ["Model", "Right", "By order", "Same choice in all orders", "Most frequent letter", "The teacher's choice"]
    return [text, table(header, rows)]


def _continuations(comparison: Comparison, names: list[str]) -> list[str]:
    rows = [
        [
            name,
            percent(model.continuations.agreement),
            short(model.continuations.common_prefix),
            percent(model.continuations.repetition),
        ]
        for name, model in zip(names, comparison.models, strict=True)
        if model.continuations is not None
    ]
    text = "Greedy continuations of the recipe's prompts against the teacher's:"
    header = ["Model", "Tokens equal to the teacher's", "Equal tokens at the beginning", "4-grams repeated"]
    return [text, table(header, rows)] if rows else []


def _decoding(comparison: Comparison, names: list[str]) -> list[str]:
    rows = [
        _decoding_row(name, model.decoding[index], comparison.teacher.decoding[index])
        for index in range(len(comparison.teacher.decoding))
        for name, model in zip(names, comparison.models, strict=True)
    ]
    if not rows:
        return []
    text = (
        "Speed and cache by context, one text at a time in float32. The models take turns in one process; a time is "
        "the median over single steps."
    )
    if not all(decoding.prefilled for decoding in comparison.teacher.decoding):
        text += " Contexts without a prefill were not read: their caches were filled with repetitions."
    speed = ["Decoding (tokens/s)", "Times the teacher's", "CPU ms per token"]
    prefill = ["Prefill (tokens/s)", "Times the teacher's"]
    return [text, table(["Context", "Model", *speed, *prefill, "Cache", "Of the teacher's"], rows, left=2)]


def _decoding_row(name: str, found: Decoding, teacher: Decoding) -> list[str]:
    prefill = ratio = MISSING
    if found.prefill_seconds and teacher.prefill_seconds:
        prefill, ratio = short(1 / found.prefill_seconds), short(teacher.prefill_seconds / found.prefill_seconds)
    return [
        count(found.context),
        name,
        short(1 / found.decode_seconds),
        short(teacher.decode_seconds / found.decode_seconds),
        short(1e3 * found.decode_cpu_seconds),
        prefill,
        ratio,
        binary_size(found.cache_bytes),
        percent(found.cache_bytes / teacher.cache_bytes),
    ]
