"""Pairs of texts for `retrieval.py`: the beginning of a story and its rest; a question and the texts that answer it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from stories_text import Stories

from ssm_zoo.evaluation.retrieval import RetrievalData, read_beir

Pair = tuple[str, str]
# A sentence ends at its mark, or at the quotation mark after it.
_FIRST = re.compile(r"(.+?[.!?][\"'\u2019\u201d]?)\s+(\S.*)", re.DOTALL)


@dataclass(frozen=True)
class Task:
    """Training pairs, and the texts to search.

    Attributes:
        train: pairs of a query and what it should find.
        trials: pairs of other queries, which judge learning rates.
        results: queries of neither, and all that can be found.
    """

    train: list[Pair]
    trials: list[Pair]
    results: RetrievalData


def split_story(story: str) -> Pair | None:
    """Return the first sentence and the rest; None where there is no rest."""
    found = _FIRST.fullmatch(story)
    return None if found is None else (found[1], found[2])


def stories_task(stories: Stories) -> Task:
    """Return a task in which first sentences retrieve the rests of their stories.

    Held-out stories are for the results, the last tenth of the others for trials. A sentence with which several stories
    begin may retrieve any of them.
    """
    train, results = (
        [pair for story in part if (pair := split_story(story))] for part in (stories.train, stories.held_out)
    )
    trials = len(train) // 10
    rests = {rest: f"d{index}" for index, rest in enumerate(dict.fromkeys(rest for _, rest in results))}
    queries = {first: f"q{index}" for index, first in enumerate(dict.fromkeys(first for first, _ in results))}
    relevant: dict[str, set[str]] = {identity: set() for identity in queries.values()}
    for first, rest in results:
        relevant[queries[first]].add(rests[rest])
    data = RetrievalData(
        {identity: first for first, identity in queries.items()},
        {identity: rest for rest, identity in rests.items()},
        {identity: frozenset(found) for identity, found in relevant.items()},
    )
    return Task(train[:-trials], train[-trials:], data)


def beir_task(folder: Path) -> Task:
    """Return a task of the judged queries of a folder in BEIR's layout, in random order.

    Of fifteen queries five are for the results, two for trials, and eight for training with each of their relevant
    documents. All documents can be retrieved.
    """
    data = read_beir(folder)
    queries = list(data.queries)
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0)).tolist()
    results, trials = len(queries) // 3, len(queries) * 7 // 15
    parts = [
        [queries[place] for place in order[part]]
        for part in (slice(results), slice(results, trials), slice(trials, None))
    ]

    def pairs(identities: Iterable[str]) -> list[Pair]:
        found = ((identity, document) for identity in identities for document in sorted(data.relevant[identity]))
        return [(data.queries[query], text) for query, document in found if (text := data.documents[document]).strip()]

    judged = RetrievalData(
        {identity: data.queries[identity] for identity in parts[0]},
        data.documents,
        {identity: data.relevant[identity] for identity in parts[0]},
    )
    return Task(pairs(parts[2]), pairs(parts[1]), judged)


def write_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """Write pairs as `ssm-zoo finetune embed` reads them."""
    rows = (json.dumps({"anchor": anchor, "positive": positive}) for anchor, positive in pairs)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
