"""Recall of values by their keys, from a list that stood earlier in the text.

A text is a list of pairs, `key:value` in a line each, then ordinary text, then a key of the list and a colon. Keys and
values are single words of the tokenizer, so that one prediction decides. It is the task of associative recall (Zoology,
arXiv 2312.04927) in the tokens of a pretrained model, which knows it from its training without being fine-tuned.

Symbols: N pairs, R lists, Q queries of a list.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ..modeling.rollback import restore, snapshot
from .hidden_states import evaluating, last_logits

__all__ = ["RecallLists", "draw_lists", "key_value_recall", "word_tokens"]

# A whole lower-case word with the space before it, in byte-level ("Ġ") and in SentencePiece ("▁") vocabularies.
_WORD = re.compile(r"[Ġ▁][a-z]{3,}")
# Rows of a forward over queries: each has a copy of the cache.
_ROWS = 8
_CHUNK = 512


@dataclass(frozen=True)
class RecallLists:
    """Lists of pairs, and queries into them.

    Attributes:
        lists: (R, T) tokens of the lists.
        values: (R, N) tokens of their values, all different within a list.
        queries: (R, Q, L) tokens of a line break, a key and a colon.
        answers: (R, Q) place in `values` of each query's answer.
    """

    lists: Tensor
    values: Tensor
    queries: Tensor
    answers: Tensor


def key_value_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    filler: Tensor,
    *,
    pairs: Sequence[int] = (4, 16, 64),
    distances: Sequence[int] = (0, 256, 1024),
    queries: int = 16,
    limit: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure how often the right one of a list's values is the most likely next token after its key.

    Every query is asked by itself: it sees the list, the filler and no other query. The lists of a number of pairs are
    the same at all distances and for all models.

    Args:
        model: a causal language model with a cache.
        tokenizer: its tokenizer.
        filler: (tokens) int64 ids of ordinary text, which stands between list and query.
        pairs: numbers of pairs of a list, N, each at least 2.
        distances: tokens of filler, each at least 0.
        queries: minimum number of queries at each number of pairs and distance; with fewer pairs there are more lists.
        limit: largest number of tokens that the model reads; combinations with more are left out.
        seed: seed of keys, values and queries.

    Returns:
        A dictionary for each number of pairs for which the vocabulary has enough words, and each distance for which
        the filler is long enough: "pairs", "distance", "queries", "accuracy" (share of queries, in [0, 1]) and
        "chance" (1 / pairs).

    Raises:
        ValueError: if an argument is not as described.
    """
    if any(distance < 0 for distance in distances):
        raise ValueError(f"`distances` must be at least 0, got {list(distances)}")
    rows: list[dict[str, Any]] = []
    with evaluating(model), torch.no_grad():
        for number in pairs:
            if len(_words(tokenizer, number)[0]) < 2 * number:
                continue
            drawn = draw_lists(tokenizer, number, queries=queries, avoid=filler, seed=seed)
            longest = len(filler) // len(drawn.lists)
            if limit is not None:
                longest = min(longest, limit - drawn.lists.shape[1] - drawn.queries.shape[2])
            wanted = sorted(distance for distance in set(distances) if distance <= longest)
            right = _right_answers(model, drawn, filler, wanted) if wanted else {}
            asked = drawn.answers.numel()
            rows += [
                {
                    "pairs": number,
                    "distance": distance,
                    "queries": asked,
                    "accuracy": right[distance] / asked,
                    "chance": 1 / number,
                }
                for distance in wanted
            ]
    return rows


def draw_lists(
    tokenizer: PreTrainedTokenizerBase,
    pairs: int,
    *,
    queries: int = 16,
    avoid: Tensor | None = None,
    seed: int = 0,
) -> RecallLists:
    """Draw lists of different keys with different values, and different keys of each as queries.

    Args:
        tokenizer: the tokenizer whose words are drawn.
        pairs: N, at least 2.
        queries: minimum number of queries over all lists, positive.
        avoid: ids that are neither keys nor values, if there are enough others.
        seed: seed of the draw.

    Raises:
        ValueError: if an argument is too small, or the vocabulary has fewer than 2 N words.
    """
    for field, value, least in (("pairs", pairs, 2), ("queries", queries, 1)):
        if value < least:
            raise ValueError(f"`{field}` must be at least {least}, got {value}")
    words, colon, line_break = _words(tokenizer, pairs)
    if len(words) < 2 * pairs:
        raise ValueError(f"`pairs` must be at most {len(words) // 2} with this vocabulary, got {pairs}")
    other = words[~torch.isin(words, avoid.cpu())] if avoid is not None else words
    words = other if len(other) >= 2 * pairs else words
    of_each = min(pairs, queries)
    lists, values, asked, answers = [], [], [], []
    for index in range(-(-queries // of_each)):
        digest = hashlib.sha256(f"{seed}/{pairs}/{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        keys, own = words[torch.randperm(len(words), generator=generator)[: 2 * pairs]].chunk(2)
        lines = [torch.cat([key[None], colon, value[None], line_break]) for key, value in zip(keys, own, strict=True)]
        chosen = torch.randperm(pairs, generator=generator)[:of_each]
        lists.append(torch.cat(lines))
        values.append(own)
        asked.append(torch.stack([torch.cat([line_break, keys[place][None], colon]) for place in chosen]))
        answers.append(chosen)
    return RecallLists(torch.stack(lists), torch.stack(values), torch.stack(asked), torch.stack(answers))


def word_tokens(tokenizer: PreTrainedTokenizerBase, least: int, exclude: Sequence[int] = ()) -> Tensor:
    """Return the ids of the vocabulary's words: a space and three or more lower-case letters each, ascending.

    A vocabulary with fewer than `least` of them, as those of tests, gives all its tokens but special ones.

    Args:
        tokenizer: the tokenizer.
        least: number of tokens that are needed.
        exclude: ids that are left out.
    """
    left_out = {*tokenizer.all_special_ids, *exclude}
    vocabulary = {token: number for token, number in tokenizer.get_vocab().items() if number not in left_out}
    words = sorted(number for token, number in vocabulary.items() if _WORD.fullmatch(token))
    found = words if len(words) >= least else sorted(vocabulary.values())
    return torch.tensor(found, dtype=torch.long)


def _words(tokenizer: PreTrainedTokenizerBase, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the words for lists of so many pairs, and the tokens of a colon and of a line break."""
    colon, line_break = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (":", "\n"))
    words = word_tokens(tokenizer, 2 * pairs, exclude=[*colon, *line_break])
    return words, torch.tensor(colon, dtype=torch.long), torch.tensor(line_break, dtype=torch.long)


def _right_answers(
    model: PreTrainedModel, drawn: RecallLists, filler: Tensor, distances: Sequence[int]
) -> dict[int, int]:
    """Return the number of right answers at each of the ascending distances."""
    right = dict.fromkeys(distances, 0)
    stretch = len(filler) // len(drawn.lists)
    for index, pairs in enumerate(drawn.lists):
        own = filler[index * stretch : (index + 1) * stretch]
        cache, read = DynamicCache(config=model.config), 0
        _read(model, pairs, cache)
        for distance in distances:
            _read(model, own[read:distance], cache)
            read = distance
            scores = _ask(model, drawn.queries[index], cache)[:, drawn.values[index].to(model.device)]
            right[distance] += int((scores.argmax(-1).cpu() == drawn.answers[index]).sum())
    return right


def _read(model: PreTrainedModel, ids: Tensor, cache: Cache) -> None:
    """Read (T) tokens into a cache."""
    for chunk in ids.split(_CHUNK) if len(ids) else ():
        last_logits(model, chunk[None], cache)


def _ask(model: PreTrainedModel, queries: Tensor, cache: Cache) -> Tensor:
    """Return the (Q, V) logits after each of the (Q, L) queries, which see the cache and not one another."""
    saved, parts = snapshot(cache), []
    for rows in queries.split(_ROWS):
        copy = DynamicCache(config=model.config)
        restore(copy, saved)
        copy.batch_repeat_interleave(len(rows))
        parts.append(last_logits(model, rows, copy))
    return torch.cat(parts)
