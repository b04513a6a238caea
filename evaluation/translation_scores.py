"""Scores of translations: BLEU and chrF of the whole corpus, by source length, and the recall of names and numbers.

BLEU and chrF are computed once over all texts: a mean over batches or texts is another number. An entity is found
without a tagger: it is a word that stands in the source and in the reference letter by letter, and that has a digit, a
capital letter, or a mark inside as identifiers have it (`os.path`, `my_name`). Words of one letter, and the first word
of either text unless it has more than its initial capital or a digit, do not count as entities. A translation keeps an
entity if it is one of its words. (arXiv 2407.05489 asks NLTK for names in the reference and keeps those that the source
contains.)
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .metrics import BLEU, ChrF, EntityRecall
from .metrics.translation import words_of

__all__ = ["LENGTHS", "count_entities", "score_translations", "shared_entities"]

LENGTHS = (10, 20, 40, 80)
"""Bounds of the bins of source length, in words."""
FREQUENCIES = ("unseen", "regular", "frequent")
"""Bins of an entity's frequency in the training pairs: none, 1 to 15, 16 or more."""

_MARKED = re.compile(r"\w[._@/:\\-]\w|_")


def shared_entities(source: str, target: str) -> list[str]:
    """Return the entities that a source and its translation have in common, in the order of the translation."""
    words = [words_of(text) for text in (source, target)]
    first = {side[0] for side in words if side and _is_plain(side[0])}
    there = set(words[0])
    return [word for word in dict.fromkeys(words[1]) if word in there - first and _is_entity(word)]


def count_entities(sources: Iterable[str], targets: Iterable[str], entities: Iterable[Sequence[str]]) -> dict[str, int]:
    """Return for each entity the number of training pairs that have it as a word on both sides.

    Args:
        sources: sources of the training pairs.
        targets: their translations.
        entities: entities of each text that is scored.
    """
    wanted = {entity for each in entities for entity in each}
    counts: Counter[str] = Counter()
    for source, target in zip(sources, targets, strict=True):
        counts.update(wanted & set(words_of(source)) & set(words_of(target)))
    return {entity: counts[entity] for entity in sorted(wanted)}


def _is_plain(word: str) -> bool:
    """Return whether nothing but its initial capital makes a word an entity: any word that begins a text has one."""
    return not any(character.isdigit() or character.isupper() for character in word[1:]) and not (
        word[0].isdigit() or _MARKED.search(word)
    )


def _is_entity(word: str) -> bool:
    if any(character.isdigit() for character in word):
        return True
    return len(word) > 1 and (any(map(str.isupper, word)) or _MARKED.search(word) is not None)


def score_translations(
    hypotheses: Sequence[str],
    sources: Sequence[str],
    references: Sequence[str],
    *,
    training_counts: Mapping[str, int] | None = None,
    lengths: Sequence[int] = LENGTHS,
    tokenize: str = "13a",
) -> dict[str, Any]:
    """Score translations.

    Args:
        hypotheses: the translations.
        sources: the texts that were translated.
        references: a right translation of each.
        training_counts: result of :func:`count_entities`; None: entities are not divided by frequency.
        lengths: ascending bounds between the bins of source length, in words divided by white space.
        tokenize: sacrebleu's tokenizer for BLEU, e.g. "zh".

    Returns:
        "bleu" and "chrf" from 0 to 100 with "bleu_signature" and "chrf_signature"; "entities", a dictionary of "recall"
        and "entities" (None and 0 if there are none), and with counts the same for each of `FREQUENCIES`; "by_length",
        for every bin that has texts: "from" and "to" (words, None at the open end), "texts", "bleu" and "chrf".

    Raises:
        ValueError: if the arguments differ in length or `lengths` is not ascending.
    """
    check_lengths(lengths)
    if not len(hypotheses) == len(sources) == len(references):
        numbers = f"{len(hypotheses)}, {len(sources)} and {len(references)}"
        raise ValueError(f"`hypotheses`, `sources` and `references` must be equally many, got {numbers}.")
    return {
        **_corpus(hypotheses, references, tokenize),
        "entities": _entities(hypotheses, sources, references, training_counts),
        "by_length": [
            {"from": low, "to": high, "texts": len(chosen), **_numbers(hypotheses, references, chosen, tokenize)}
            for low, high, chosen in _bins(sources, lengths)
        ],
    }


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise a ValueError if bounds of lengths are not ascending numbers of at least 2."""
    if any(low >= high for low, high in pairwise(lengths)) or any(n < 2 for n in lengths):
        raise ValueError(f"`lengths` must be ascending numbers of at least 2, got {list(lengths)}.")


def _corpus(hypotheses: Sequence[str], references: Sequence[str], tokenize: str) -> dict[str, Any]:
    given = {"predictions": list(hypotheses), "references": list(references)}
    return BLEU(settings={"tokenize": tokenize}).compute(**given) | ChrF().compute(**given)


def _numbers(hypotheses: Sequence[str], references: Sequence[str], chosen: list[int], tokenize: str) -> dict[str, Any]:
    found = _corpus([hypotheses[i] for i in chosen], [references[i] for i in chosen], tokenize)
    return {key: found[key] for key in ("bleu", "chrf")}


def _bins(sources: Sequence[str], lengths: Sequence[int]) -> Iterable[tuple[int, int | None, list[int]]]:
    counts = [len(source.split()) for source in sources]
    edges: list[int | None] = [1, *lengths, None]
    for low, above in pairwise(edges):
        assert low is not None
        chosen = [i for i, count in enumerate(counts) if count >= low and (above is None or count < above)]
        if chosen:
            yield low, None if above is None else above - 1, chosen


def _entities(
    hypotheses: Sequence[str], sources: Sequence[str], references: Sequence[str], counts: Mapping[str, int] | None
) -> dict[str, Any]:
    entities = [shared_entities(source, target) for source, target in zip(sources, references, strict=True)]
    if not any(entities):
        return {"recall": None, "entities": 0}
    metric = EntityRecall(training_counts=counts, whole_words=True)
    found = metric.compute(predictions=list(hypotheses), references=entities)
    result: dict[str, Any] = {"recall": found["entity_recall"], "entities": found["entities"]}
    if counts is not None:
        for name in FREQUENCIES:
            recall = found[f"entity_recall_{name}"]
            result[name] = {
                "recall": None if math.isnan(recall) else recall,
                "entities": found[f"entities_{name}"],
            }
    return result
