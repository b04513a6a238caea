"""Groups to learn ranking from: a query, documents and their labels, from files or mined from judged collections.

Negatives are documents of the first-stage list of a query. A document with a grade above 0 is never one, nor is one
with the same text, nor one without text. Others may be relevant without being judged: `skip` leaves out the top of the
list, where most of them stand; nothing else is done about them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.reranking_data import (
    LARGEST_GRADE,
    JudgedCollection,
    Run,
    bm25_run,
    cut,
    folder_and_split,
    read_judged,
    read_run,
    trec_order,
)
from .ranking_losses import LISTWISE
from .reranker_settings import RerankerSettings
from .sources import read_rows

_LARGEST = float(np.finfo(np.float32).max)
# The gain of a grade in LambdaLoss is 2^grade - 1 in float32.
_LARGEST_OF_LAMBDA = 100


@dataclass(frozen=True)
class Group:
    """A query with two documents or more.

    Attributes:
        query: text of the query.
        documents: texts, all different; the positive is first, unless the loss reads lists.
        labels: grade of each document, at least 0.
        teacher: a teacher's score of each document, or None.
    """

    query: str
    documents: tuple[str, ...]
    labels: tuple[float, ...]
    teacher: tuple[float, ...] | None = None


@dataclass(frozen=True)
class RankingData:
    """Groups to train on, and held-out queries with the lists to re-rank.

    Attributes:
        groups: the groups.
        left_out: number of queries, or positives, without a group, by the reason.
        collection: held-out queries, documents and judgements.
        run: held-out lists.
        first_stage: name of the system that made the lists; None for groups from files, which have no order.
    """

    groups: list[Group]
    left_out: Mapping[str, int]
    collection: JudgedCollection
    run: Run
    first_stage: str | None

    def fingerprints(self) -> dict[str, str]:
        """Return the SHA-256 of the groups and of the held-out lists, in hexadecimal."""
        held = self.collection
        texts = [[held.queries[query], dict(held.grades[query]), dict(self.run[query])] for query in held.queries]
        shown = {document for query in self.run for document in self.run[query]}
        documents = [[one, text] for one, text in held.documents.items() if one in shown]
        groups = [[group.query, group.documents, group.labels, group.teacher] for group in self.groups]
        return {"train": _sha256(groups), "heldout": _sha256([texts, documents])}


def read_ranking_data(settings: RerankerSettings) -> RankingData:
    """Read the training groups and the held-out lists of a run.

    Raises:
        ValueError: naming file and line, if a file is malformed; if a query is both trained on and held out; or if no
            group is left.
    """
    left_out: Counter[str] = Counter()
    folder = judged = None
    if settings.in_folder:
        folder, split = folder_and_split(settings.train[0])
        judged = read_judged(folder, split, field="train")
    collection, run, first_stage = None, None, None
    if not settings.heldout:
        assert judged is not None and folder is not None
        whole = judged
        judged, collection = split_queries(whole, settings.share, settings.seed)
        lists, first_stage = _lists(whole, settings.run, "run", settings.depth)
        run, train_lists = ({query: lists[query] for query in part.queries} for part in (collection, judged))
    else:
        train_lists = None if judged is None else _lists(judged, settings.run, "run", settings.depth)[0]
        if settings.heldout[0].endswith(".jsonl"):
            collection = collection_of(_read_files(settings.heldout, "heldout"))
            run = {query: dict.fromkeys(grades, 0.0) for query, grades in collection.grades.items()}
        else:
            collection = read_judged(*folder_and_split(settings.heldout[0]), field="heldout")
            run, first_stage = _lists(collection, settings.heldout_run, "heldout_run", settings.depth)
    if judged is not None:
        assert train_lists is not None
        groups = mine_groups(judged, train_lists, settings, left_out)
    else:
        groups = list(_shaped(_read_files(settings.train, "train"), settings))
    if not groups:
        reasons = "; ".join(f"{number:,} {reason}" for reason, number in left_out.items())
        raise ValueError(f"`train` must have a positive with at least one negative; left out: {reasons}.")
    largest = max(max(group.labels) for group in groups)
    if settings.loss == "lambda" and largest > _LARGEST_OF_LAMBDA:
        raise ValueError(
            f"`loss` must be another than 'lambda' for grades above {_LARGEST_OF_LAMBDA}, whose gain of 2^grade - 1 it "
            f"cannot compute, got {largest:g}."
        )
    _refuse_overlap({group.query for group in groups}, collection)
    return RankingData(groups, left_out, collection, run, first_stage)


def _lists(
    judged: JudgedCollection, file: str | None, field: str, depth: int
) -> tuple[dict[str, dict[str, float]], str]:
    """Return the first-stage lists, from a file or by BM25, and the name of their system."""
    if file is None:
        return bm25_run(judged, depth), "BM25"
    return cut(read_run(file, field, judged), depth), Path(file).name


def split_queries(judged: JudgedCollection, share: float, seed: int) -> tuple[JudgedCollection, JudgedCollection]:
    """Split the queries by a seed into those to train on and those held out, at least one each.

    Queries with the same text stay together.

    Raises:
        ValueError: if there are fewer than two different queries.
    """
    texts = sorted({_plain(text) for text in judged.queries.values()})
    if len(texts) < 2:
        raise ValueError("`train` must have at least two different queries to hold one out. Give --heldout instead.")
    number = min(max(round(share * len(texts)), 1), len(texts) - 1)
    held = {texts[index] for index in np.random.default_rng(seed).permutation(len(texts))[:number]}
    parts: tuple[list[str], list[str]] = ([], [])
    for query, text in judged.queries.items():
        parts[_plain(text) in held].append(query)
    return judged.only(parts[0]), judged.only(parts[1])


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _refuse_overlap(trained: set[str], heldout: JudgedCollection) -> None:
    plain = {_plain(text) for text in trained}
    for text in heldout.queries.values():
        if _plain(text) in plain:
            raise ValueError(
                f"`heldout` must have no query that is trained on, but both have {text!r:.80}. Remove it from one."
            )


def mine_groups(judged: JudgedCollection, run: Run, settings: RerankerSettings, left_out: Counter[str]) -> list[Group]:
    """Make groups of judged documents and negatives from first-stage lists, by the seed.

    For the losses of one positive there is a group for each document with a grade above 0, with `settings.negatives`
    drawn without replacement, or as many as there are. For the list-wise ones there is a group for each query: half of
    its documents or fewer are relevant ones, drawn if there are more.

    Args:
        judged: the collection.
        run: first-stage lists.
        settings: the loss, and how negatives are drawn.
        left_out: counts what has no group, by the reason.
    """
    groups: list[Group] = []
    for number, query in enumerate(judged.queries):
        query_text, relevant = judged.queries[query], judged.relevant(query)
        same = {judged.documents[document] for document in relevant}
        listed = trec_order(run[query])[: settings.depth][settings.skip :]
        candidates = list(
            dict.fromkeys(
                judged.documents[document]
                for document in listed
                if document not in relevant
                and judged.documents[document].strip()
                and judged.documents[document] not in same
            )
        )
        positives: dict[str, int] = {}
        for document, grade in relevant.items():
            text = judged.documents[document]
            if not text.strip():
                left_out["relevant documents without text"] += 1
                continue
            # Once for each text, with the highest of its grades.
            left_out["relevant documents with the text of another"] += text in positives
            positives[text] = max(grade, positives.get(text, 0))
        if not candidates:
            left_out["queries without negatives"] += 1
            continue
        places = np.random.default_rng([settings.seed, number])
        if settings.loss in LISTWISE:
            texts, most = list(positives), max(1, (settings.negatives + 1) // 2)
            chosen = [texts[index] for index in sorted(places.permutation(len(texts))[:most])]
            if chosen:
                drawn = _drawn(candidates, settings.negatives + 1 - len(chosen), places)
                groups.append(_group(query_text, {one: positives[one] for one in chosen}, drawn))
            continue
        groups += [
            _group(query_text, {positive: grade}, _drawn(candidates, settings.negatives, places))
            for positive, grade in positives.items()
        ]
    return groups


def _drawn(candidates: Sequence[Any], number: int, places: np.random.Generator) -> list[Any]:
    return [candidates[index] for index in places.permutation(len(candidates))[:number]]


def _group(query: str, positives: Mapping[str, float], negatives: Sequence[str]) -> Group:
    labels = (*(float(grade) for grade in positives.values()), *(0.0 for _ in negatives))
    return Group(query, (*positives, *negatives), labels)


def collection_of(groups: Sequence[tuple[str, Group]]) -> JudgedCollection:
    """Return the judged collection in which every query has the documents of its groups.

    Args:
        groups: place of each group, for errors, and the group.

    Raises:
        ValueError: if two groups give a document of a query different labels, or a label is no whole number or too
            large.
    """
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    grades: dict[str, dict[str, int]] = {}
    for place, group in groups:
        query = queries.setdefault(group.query, f"q{len(queries)}")
        judged = grades.setdefault(query, {})
        for text, label in zip(group.documents, group.labels, strict=True):
            document = documents.setdefault(text, f"d{len(documents)}")
            if label != int(label) or label > LARGEST_GRADE or judged.setdefault(document, int(label)) != int(label):
                raise ValueError(
                    f"{place}: a held-out label must be a whole number of at most {LARGEST_GRADE:,}, and the same "
                    f"wherever the query has this document, got {label:g} for {text!r:.60}."
                )
    texts = {identity: text for text, identity in queries.items()}
    return JudgedCollection(texts, {one: text for text, one in documents.items()}, grades, frozenset(texts))


def _read_files(sources: Sequence[str], field: str) -> list[tuple[str, Group]]:
    found = []
    for source in sources:
        rows = [(place, _parsed(row, place)) for place, row in read_rows(source, field)]
        if not rows:
            raise ValueError(f"{field}: {source!r} has no groups.")
        found += rows
    return found


def _parsed(row: Mapping[str, Any], place: str) -> Group:
    """Return the group of a row.

    A row has `query`, and either `positive` with `negative` or `negatives`, or `documents` with `labels`. It may have
    `scores` of a teacher, the positive's first. Further keys are ignored, but a row with both forms is an error.
    """
    query = _text(row.get("query"), "query", place)
    lists, pairs = row.keys() & {"documents", "labels"}, row.keys() & {"positive", "negative", "negatives"}
    if lists == {"documents", "labels"} and not pairs:
        documents, labels = row["documents"], _numbers(row["labels"], "labels", place, least=0.0)
        if not isinstance(documents, list):
            raise ValueError(f"{place}: `documents` must be a list of texts, got {documents!r:.60}.")
        texts = [_text(text, "documents", place) for text in documents]
    elif "positive" in row and len(pairs) == 2 and not lists:
        name = "negative" if "negative" in row else "negatives"
        negatives = row[name] if isinstance(row[name], list) else [row[name]]
        texts = [_text(row["positive"], "positive", place), *(_text(text, name, place) for text in negatives)]
        labels = [1.0, *(0.0 for _ in negatives)]
    else:
        raise ValueError(
            f"{place} must have either `positive` with `negative` or `negatives`, or `documents` with `labels`; it has "
            f"{', '.join(map(repr, row))}."
        )
    if len(labels) != len(texts):
        raise ValueError(f"{place}: `labels` must have a number for each of {len(texts)} documents, got {len(labels)}.")
    if len(set(texts)) < len(texts):
        raise ValueError(f"{place} must not have a document twice in one group.")
    if max(labels, default=0) <= 0 or min(labels) > 0:
        raise ValueError(f"{place} must have a document with a label above 0 and one with 0.")
    teacher = None
    if row.get("scores") is not None:
        teacher = tuple(_numbers(row["scores"], "scores", place, least=-math.inf))
        if len(teacher) != len(texts):
            raise ValueError(
                f"{place}: `scores` must have a number for each of {len(texts)} documents, got {len(teacher)}."
            )
    return Group(query, tuple(texts), tuple(labels), teacher)


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        given = "nothing" if value is None or value == "" else repr(value)
        raise ValueError(f"{place}: `{name}` must be a text that is not empty, got {given:.60}.")
    return value


def _numbers(value: Any, name: str, place: str, *, least: float) -> list[float]:
    kind = "numbers" if least == -math.inf else "numbers of at least 0"
    if not isinstance(value, list) or not all(type(one) in (int, float) for one in value):
        raise ValueError(f"{place}: `{name}` must be a list of {kind}, got {value!r:.60}.")
    for one in value:
        if not abs(one) <= _LARGEST:
            raise ValueError(f"{place}: `{name}` must be a list of finite numbers in float32, got {one!r:.60} in it.")
        if one < least:
            raise ValueError(f"{place}: `{name}` must be a list of {kind}, got {one!r} in it.")
    return [float(one) for one in value]


def _shaped(groups: Sequence[tuple[str, Group]], settings: RerankerSettings) -> Iterator[Group]:
    """Convert groups from files to the form that the loss expects.

    They have at most `settings.negatives` negatives, drawn by the seed. A list keeps its order, and all documents
    with a label above 0.
    """
    for number, (place, group) in enumerate(groups):
        if settings.loss == "margin_mse" and group.teacher is None:
            raise ValueError(f"{place}: `scores` of a teacher are missing, which the loss 'margin_mse' needs.")
        places = np.random.default_rng([settings.seed, number])
        positives = [index for index, label in enumerate(group.labels) if label > 0]
        negatives = [index for index, label in enumerate(group.labels) if label == 0]
        if settings.loss in LISTWISE:
            yield _part(group, sorted([*positives, *_drawn(negatives, settings.negatives, places)]))
            continue
        for positive in positives:
            yield _part(group, [positive, *_drawn(negatives, settings.negatives, places)])


def _part(group: Group, chosen: Sequence[int]) -> Group:
    """Return the group with some of its documents, in this order."""
    columns = (group.documents, group.labels, group.teacher)
    parts = [None if column is None else tuple(column[index] for index in chosen) for column in columns]
    return Group(group.query, *parts)  # pyright: ignore[reportArgumentType]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
