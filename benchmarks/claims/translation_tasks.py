"""The texts of `translation.py`: a synthetic language with names that nobody has seen, and multi30k by segments."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssm_zoo.training.parallel_text import ParallelText, read_parallel

_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxz", "aeiouy"
_NAME = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Language:
    """Synthetic translation: words have translations, some exchange places, names are copied letter by letter.

    A sentence has a name at a random place. Its translation has the translation of every word in the same order, except
    that a modifier (a third of the words) and the word behind it exchange places. Names are random letters and digits
    that begin with a capital, drawn again for every sentence, so that those of a test are not in training; nothing but
    copying produces them.

    Attributes:
        words: number of words of the lexicon.
        seed: seed of the lexicon.
    """

    words: int = 100
    seed: int = 0

    @property
    def lexicon(self) -> dict[str, str]:
        """Words and their translations, all different."""
        draw = random.Random(f"{self.seed}/lexicon")
        made: dict[str, None] = {}
        while len(made) < 2 * self.words:
            word = "".join(draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(draw.randint(1, 3)))
            made[word + draw.choice(_CONSONANTS)] = None
        both = list(made)
        return dict(zip(both[: self.words], both[self.words :], strict=True))

    def pairs(self, number: int, words: Sequence[int], names: Sequence[int], seed: int | str) -> ParallelText:
        """Return sentences and their translations.

        Args:
            number: number of pairs.
            words: numbers of words of a sentence, one of which is drawn for each.
            names: lengths of a name in characters, one of which is drawn for each sentence.
            seed: seed of the sentences; others have other names.
        """
        draw, lexicon = random.Random(f"{self.seed}/{seed}"), self.lexicon
        known = list(lexicon)
        modifiers = set(known[: self.words // 3])
        sources, targets = [], []
        for _ in range(number):
            sentence = draw.choices(known, k=draw.choice(words))
            name = draw.choice(string.ascii_uppercase) + "".join(draw.choices(_NAME, k=draw.choice(names) - 1))
            # Not the first word, whose capital would not make it an entity.
            place = draw.randint(1, len(sentence))
            order = [*sentence[:place], name, *sentence[place:]]
            sources.append(" ".join(order))
            targets.append(" ".join(lexicon.get(word, word) for word in _exchanged(order, modifiers)))
        return ParallelText(sources, targets, [number])


def _exchanged(words: list[str], modifiers: set[str]) -> list[str]:
    found, index = [], 0
    while index < len(words):
        if words[index] in modifiers and index + 1 < len(words):
            found += [words[index + 1], words[index]]
            index += 2
        else:
            found.append(words[index])
            index += 1
    return found


def multi30k(folder: Path, target: str, part: str) -> ParallelText:
    """Return a part ("train", "val", "test_2016_flickr", …) of multi30k from English into "de" or "fr"."""
    return read_parallel([f"{folder / part}.en.gz,{folder / part}.{target}.gz"], "data")


def chance_of_name(length: int) -> float:
    """Return the probability that random characters are a name of so many characters."""
    return 1 / (len(string.ascii_uppercase) * len(_NAME) ** (length - 1))


def other_targets(pairs: ParallelText) -> list[str]:
    """Return for each pair the target of the next one, the last one's being the first: a text without a source."""
    return [*pairs.targets[1:], *pairs.targets[:1]]


def segments(pairs: ParallelText, count: int) -> ParallelText:
    """Return the pairs joined in groups of `count` consecutive ones, without a smaller group at the end."""
    starts = range(0, len(pairs) - count + 1, count)
    sources = [" ".join(pairs.sources[start : start + count]) for start in starts]
    targets = [" ".join(pairs.targets[start : start + count]) for start in starts]
    return ParallelText(sources, targets, [len(sources)])


def part_of(pairs: ParallelText, number: int | None) -> ParallelText:
    """Return the first pairs, or all."""
    sources, targets = pairs.sources[:number], pairs.targets[:number]
    return ParallelText(sources, targets, [len(sources)])


def write_pairs(pairs: ParallelText, stem: Path) -> str:
    """Write pairs into two files, and return them as a source of `ssm-zoo finetune translate`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    names = [stem.with_suffix(suffix) for suffix in (".source", ".target")]
    for name, side in zip(names, (pairs.sources, pairs.targets), strict=True):
        name.write_text("".join(f"{text}\n" for text in side), encoding="utf-8")
    return ",".join(map(str, names))
