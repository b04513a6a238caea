"""Metrics of translations: BLEU and chrF by sacrebleu, and the share of names that are kept."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Value

from .metric import ZooMetric, require_package

# Names of the frequencies of an entity in the training text, and the least and the most pairs that have it.
_FREQUENCIES = (("unseen", 0, 0), ("regular", 1, 15), ("frequent", 16, math.inf))
# One reference or several for every text.
_TEXTS = [
    {"predictions": Value("string"), "references": [Value("string")]},
    {"predictions": Value("string"), "references": Value("string")},
]


def words_of(text: str) -> list[str]:
    """Return the words of a text, divided by white space, without the punctuation around them."""
    return [word for word in (re.sub(r"^[\W_]+|[\W_]+$", "", piece) for piece in text.split()) if word]


class SacrebleuMetric(ZooMetric):
    """A corpus-level score of sacrebleu, from 0 to 100, with the signature that says how it was computed.

    Inputs: `predictions`, texts without tokenization; `references`, for every text one translation, or a list of as
    many as for every other text.
    """

    INPUTS = _TEXTS
    SCORER = ""
    NAME = ""

    def __init__(self, *, settings: dict[str, Any] | None = None, **options: Any) -> None:
        """Create an empty metric.

        Args:
            settings: arguments of sacrebleu's class of the same name, e.g. {"tokenize": "zh"} for BLEU or
                {"word_order": 2} for chrF++.
            **options: see :class:`ZooMetric`.

        Raises:
            ValueError: if sacrebleu is not installed.
        """
        require_package("sacrebleu", "sacrebleu", type(self).__name__)
        self.settings = settings or {}
        super().__init__(**options)

    def _compute(self, *, predictions: Sequence[str], references: Sequence[str | list[str]]) -> dict[str, float | str]:
        from sacrebleu import metrics

        several = [[one] if isinstance(one, str) else one for one in references]
        counts = {len(each) for each in several}
        if len(counts) > 1 or 0 in counts:
            raise ValueError(
                f"`references` must have equally many translations of every text, got {min(counts)} to {max(counts)}"
            )
        scorer = getattr(metrics, self.SCORER)(**self.settings)
        score = scorer.corpus_score(list(predictions), [list(column) for column in zip(*several, strict=True)])
        return {self.NAME: score.score, f"{self.NAME}_signature": scorer.get_signature().format()}


class BLEU(SacrebleuMetric):
    __doc__ = SacrebleuMetric.__doc__
    SCORER, NAME = "BLEU", "bleu"


class ChrF(SacrebleuMetric):
    __doc__ = SacrebleuMetric.__doc__
    SCORER, NAME = "CHRF", "chrf"


class EntityRecall(ZooMetric):
    """Share of the entities that occur in the translations, letter by letter ("entity_recall"), and their number.

    An entity occurs wherever its letters do, so "5" is in "1957"; with `whole_words` only as a word.

    Inputs: `predictions`, texts; `references`, for every text the list of entities that it should contain, e.g. the
    names that source and reference have in common. Texts without entities do not count.

    With `training_counts` also the recall and the number of the entities that the training text has not at all
    ("entity_recall_unseen", "entities_unseen"), 1 to 15 times ("regular") and 16 times or more ("frequent"), as in
    arXiv 2407.05489. The recall of no entities is NaN.
    """

    INPUTS = {"predictions": Value("string"), "references": [Value("string")]}

    def __init__(
        self, *, training_counts: Mapping[str, int] | None = None, whole_words: bool = False, **options: Any
    ) -> None:
        """Create an empty metric.

        Args:
            whole_words: entities are single words, and occur where one of :func:`words_of` equals them.
            training_counts: for each entity the number of training pairs that have it on both sides; one that is not
                named has none.
            **options: see :class:`ZooMetric`.
        """
        self.training_counts, self.whole_words = training_counts, whole_words
        super().__init__(**options)

    def _compute(self, *, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        texts = [set(words_of(text)) for text in predictions] if self.whole_words else predictions
        pairs = zip(texts, references, strict=True)
        found = [(entity, entity in text) for text, entities in pairs for entity in entities]
        if not found:
            raise ValueError("`references` must name at least one entity, got none in any text")
        result = {"entity_recall": sum(kept for _, kept in found) / len(found), "entities": len(found)}
        if self.training_counts is not None:
            counted = [(self.training_counts.get(entity, 0), kept) for entity, kept in found]
            for name, least, most in _FREQUENCIES:
                kept = [each for count, each in counted if least <= count <= most]
                result[f"entity_recall_{name}"] = sum(kept) / len(kept) if kept else math.nan
                result[f"entities_{name}"] = len(kept)
        return result
