"""Training objectives for recall: each makes samples [input | target] of tokens of text, with a loss on the target.

Source: Birdie (Blouir et al., arXiv 2411.01030), section 3 and the parameters in its published code. With c the control
token of an objective, s_i the sentinel of span i, T the token before a target and E the one behind it:

| objective | input | target |
|---|---|---|
| next_token | none | the text |
| prefix_lm | the first part of the text; spans of it may be replaced by sentinels | the rest |
| infilling | c, the text with sentinels in place of spans, T | s_0, span 0, s_1, span 1, ..., E |
| autoencoding | c, the text with sentinels in place of spans, T | the whole text, E |
| copying | c, the text, T | the text, E |
| selective_copying | c, question, context, T; or context, question | s_0, span 0, s_1, span 1, ..., E |
| deshuffling | c, the text with some tokens permuted, T | the text, E |

In selective copying the context is the text, with random tokens before and behind each of several spans as its
delimiters, and the question lists s_i and the two delimiters of span i, in random order. `<|context|>` stands before
the context. Next token and prefix LM have no control token, so that their samples look like prompts and texts.

Deviations from Birdie: deshuffling permutes tokens, not words or characters, since texts are tokenised before samples
are made; the sentinels in a corrupted prefix are those of infilling.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from .objective_settings import ObjectiveMix, ObjectiveSettings

CONTROLLED = ("infilling", "autoencoding", "copying", "selective_copying", "deshuffling")
"""Objectives whose input begins with a control token."""
CONTEXT, TARGET, END = "<|context|>", "<|target|>", "<|end_of_target|>"
_ATTEMPTS = 100


@dataclass(frozen=True)
class ObjectiveTokens:
    """Ids of the tokens that the objectives add to a text.

    Attributes:
        control: id of each controlled objective.
        sentinels: ids of the sentinels.
        context: id of the token before a context.
        target: id of the token before a target.
        end: id of the token behind a target.
        ordinary: ids of the tokenizer's other tokens, from which delimiters are drawn.
    """

    control: dict[str, int]
    sentinels: list[int]
    context: int
    target: int
    end: int
    ordinary: list[int]


@dataclass(frozen=True)
class Sample:
    """Tokens of a sample.

    Attributes:
        ids: input and target.
        prefix: number of tokens of the input.
        used: tokens of text that the sample is made of.
    """

    ids: list[int]
    prefix: int
    used: int


def add_tokens(tokenizer: PreTrainedTokenizerBase, mix: ObjectiveMix) -> ObjectiveTokens:
    """Add the tokens of the objectives to a tokenizer, as far as it has none of these names, and return their ids.

    They are special tokens and are saved with the tokenizer.

    Raises:
        ValueError: if the tokenizer does not take a token, e.g. because its class has a fixed vocabulary.
    """
    controls = {name: f"<|{name}|>" for name in CONTROLLED}
    sentinels = [f"<|span_{index}|>" for index in range(mix.sentinels)]
    wanted = [*controls.values(), CONTEXT, TARGET, END, *sentinels]
    tokenizer.add_tokens([name for name in wanted if name not in tokenizer.get_vocab()], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    missing = [name for name in wanted if name not in vocabulary]
    if missing:
        raise ValueError(
            f"tokenizer: objectives need the token {missing[0]!r}, which this tokenizer neither has nor takes. Give "
            "another tokenizer, e.g. --tokenizer bytes."
        )
    special = {*tokenizer.all_special_ids, *(vocabulary[name] for name in wanted)}
    return ObjectiveTokens(
        control={name: vocabulary[token] for name, token in controls.items()},
        sentinels=[vocabulary[name] for name in sentinels],
        context=vocabulary[CONTEXT],
        target=vocabulary[TARGET],
        end=vocabulary[END],
        ordinary=sorted(set(vocabulary.values()) - special),
    )


def least(objective: ObjectiveSettings) -> tuple[int, int]:
    """Return the smallest numbers of tokens of a text and of a room for which `make_sample` makes a sample."""
    if objective.objective in ("next_token", "prefix_lm"):
        return 2, 2
    if objective.objective == "selective_copying":
        width, shortest = objective.span_tokens or 0, (objective.delimiter_tokens or (0, 0))[0]
        return 2 * width, 2 * width + _overhead([(shortest, shortest)], width)
    return 2, 7


def make_sample(
    objective: ObjectiveSettings, text: Sequence[int], room: int, tokens: ObjectiveTokens, rng: random.Random
) -> Sample | None:
    """Make a sample of as much of a text as has room.

    Args:
        objective: the objective.
        text: tokens of the text.
        room: maximum number of tokens of the sample.
        tokens: ids of the objectives' tokens.
        rng: source of all random choices.

    Returns:
        The sample, or None if text or room is too short for it.
    """
    kind = objective.objective
    if kind == "next_token":
        return _next_token(text, room)
    if kind == "prefix_lm":
        return _prefix_lm(objective, text, room, tokens, rng)
    if kind == "selective_copying":
        return _selective_copying(objective, text, room, tokens, rng)
    if kind == "infilling":
        return _infilling(objective, text, room, tokens, rng)
    body = list(text[: max(room - 3, 0) // 2])
    if objective.corruption is not None:
        body = body[: _longest(objective, len(body), len(tokens.sentinels))]
    if len(body) < 2:
        return None
    if kind == "copying":
        shown = body
    elif kind == "deshuffling":
        shown = _shuffled(body, objective.share or 0.0, rng)
    else:
        shown = _with_sentinels(body, _spans(objective, len(body), rng), tokens)
    return _joined([tokens.control[kind], *shown], [*body, tokens.end], len(body), tokens)


def _joined(given: list[int], target: list[int], used: int, tokens: ObjectiveTokens) -> Sample:
    return Sample([*given, tokens.target, *target], len(given) + 1, used)


def _next_token(text: Sequence[int], room: int) -> Sample | None:
    body = list(text[:room])
    if len(body) < 2:
        return None
    # The last token is read again as the first of the next sample, so that every token is predicted once.
    return Sample(body, 0, len(body) - 1 if len(text) > len(body) else len(body))


def _prefix_lm(
    objective: ObjectiveSettings, text: Sequence[int], room: int, tokens: ObjectiveTokens, rng: random.Random
) -> Sample | None:
    share, body = objective.prefix or 0.0, list(text[:room])
    prefix = round(share * len(body))
    if objective.corruption and (longest := _longest(objective, prefix, len(tokens.sentinels))) < prefix:
        body = body[: int(longest / share)]
        prefix = longest
    if len(body) < 2:
        return None
    prefix = min(max(prefix, 1), len(body) - 1)
    given = body[:prefix]
    if objective.corruption and prefix > 1:
        given = _with_sentinels(given, _spans(objective, prefix, rng), tokens)
    return Sample([*given, *body[prefix:]], len(given), len(body))


def _infilling(
    objective: ObjectiveSettings, text: Sequence[int], room: int, tokens: ObjectiveTokens, rng: random.Random
) -> Sample | None:
    length = _longest(objective, min(len(text), room), len(tokens.sentinels))
    while length > 1 and length + 2 * _count(objective, length)[1] + 3 > room:
        length -= 1
    if length < 2:
        return None
    body = list(text[:length])
    spans = _spans(objective, length, rng)
    target = [token for span, (start, end) in enumerate(spans) for token in (tokens.sentinels[span], *body[start:end])]
    given = [tokens.control["infilling"], *_with_sentinels(body, spans, tokens)]
    return _joined(given, [*target, tokens.end], length, tokens)


def _selective_copying(
    objective: ObjectiveSettings, text: Sequence[int], room: int, tokens: ObjectiveTokens, rng: random.Random
) -> Sample | None:
    width, (shortest, longest) = objective.span_tokens or 0, objective.delimiter_tokens or (0, 0)
    drawn = [(rng.randint(shortest, longest), rng.randint(shortest, longest)) for _ in range(objective.spans or 0)]
    # As many spans as fit; if none does, one with the shortest delimiters, so that no draw decides whether it fits.
    for lengths in (*(drawn[:count] for count in range(len(drawn), 0, -1)), [(shortest, shortest)]):
        length = min(len(text), room - _overhead(lengths, width))
        if length >= 2 * width * len(lengths):
            break
    else:
        return None
    body = list(text[:length])
    starts = _apart(len(lengths), width, length, rng)
    delimiters = _delimiters(lengths, body, tokens.ordinary, rng)
    context, place = [tokens.context], 0
    for start, (before, behind) in zip(starts, delimiters, strict=True):
        context += [*body[place:start], *before, *body[start : start + width], *behind]
        place = start + width
    context += body[place:]
    question, target = [], []
    for sentinel, span in enumerate(rng.sample(range(len(starts)), len(starts))):
        question += [tokens.sentinels[sentinel], *delimiters[span][0], *delimiters[span][1]]
        target += [tokens.sentinels[sentinel], *body[starts[span] : starts[span] + width]]
    shown = [*question, *context] if objective.question == "before" else [*context, *question]
    return _joined([tokens.control["selective_copying"], *shown], [*target, tokens.end], length, tokens)


def _overhead(lengths: Sequence[tuple[int, int]], width: int) -> int:
    """Return the tokens of a selective copying beside its text, given the lengths of the spans' delimiters."""
    # Control, context, target and end tokens; each span costs its delimiters twice, two sentinels and itself.
    return 4 + sum(2 * sum(pair) + 2 + width for pair in lengths)


def _delimiters(
    lengths: Sequence[tuple[int, int]], body: list[int], ordinary: list[int], rng: random.Random
) -> list[tuple[list[int], list[int]]]:
    """Draw delimiters, each of which neither occurs in the text nor equals another.

    Raises:
        ValueError: if that does not succeed, since the vocabulary is too small.
    """
    seen = {tuple(body[at : at + size]) for pair in lengths for size in pair for at in range(len(body) - size + 1)}
    found = []
    for pair in lengths:
        drawn = []
        for size in pair:
            for _ in range(_ATTEMPTS):
                delimiter = [rng.choice(ordinary) for _ in range(size)]
                if tuple(delimiter) not in seen:
                    break
            else:
                raise ValueError(
                    f"objectives: found no {size} tokens that do not occur in a text of {len(body)} tokens, to be "
                    f"delimiters, in a vocabulary of {len(ordinary)}. Raise `delimiter_tokens` of selective_copying."
                )
            seen.add(tuple(delimiter))
            drawn.append(delimiter)
        found.append((drawn[0], drawn[1]))
    return found


def _count(objective: ObjectiveSettings, length: int) -> tuple[int, int]:
    """Return the numbers of corrupted tokens and of spans in a text of at least two tokens (T5, arXiv 1910.10683)."""
    corrupted = min(max(round((objective.corruption or 0.0) * length), 1), length - 1)
    spans = max(round(corrupted / (objective.mean_span or 1.0)), 1)
    return corrupted, min(spans, corrupted, length - corrupted)


def _longest(objective: ObjectiveSettings, length: int, sentinels: int) -> int:
    """Return the largest number of tokens, at most `length`, for whose spans there are sentinels."""
    while length > 1 and _count(objective, length)[1] > sentinels:
        length -= 1
    return length


def _spans(objective: ObjectiveSettings, length: int, rng: random.Random) -> list[tuple[int, int]]:
    """Draw the start and end of spans that do not touch, with at least one kept token before each."""
    corrupted, spans = _count(objective, length)
    removed, kept = _parts(corrupted, spans, rng), _parts(length - corrupted, spans, rng)
    found, place = [], 0
    for gap, size in zip(kept, removed, strict=True):
        found.append((place + gap, place + gap + size))
        place += gap + size
    return found


def _parts(total: int, parts: int, rng: random.Random) -> list[int]:
    """Divide a number into positive parts, every division being equally likely."""
    cuts = [0, *sorted(rng.sample(range(1, total), parts - 1)), total]
    return [end - start for start, end in pairwise(cuts)]


def _apart(spans: int, width: int, length: int, rng: random.Random) -> list[int]:
    """Draw the starts of spans of equal width that do not overlap."""
    free = length - spans * width
    gaps = sorted(rng.randint(0, free) for _ in range(spans))
    return [gap + span * width for span, gap in enumerate(gaps)]


def _with_sentinels(body: list[int], spans: list[tuple[int, int]], tokens: ObjectiveTokens) -> list[int]:
    """Return the text with a sentinel in place of each span."""
    shown, place = [], 0
    for span, (start, end) in enumerate(spans):
        shown += [*body[place:start], tokens.sentinels[span]]
        place = end
    return [*shown, *body[place:]]


def _shuffled(body: list[int], share: float, rng: random.Random) -> list[int]:
    """Permute a share of the tokens, at least two, among their places."""
    places = sorted(rng.sample(range(len(body)), min(max(round(share * len(body)), 2), len(body))))
    moved = [body[place] for place in places]
    rng.shuffle(moved)
    shuffled = list(body)
    for place, token in zip(places, moved, strict=True):
        shuffled[place] = token
    return shuffled
