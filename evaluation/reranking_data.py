"""Judged collections and ranked lists: folders in BEIR's layout with grades, and run files in TREC's format.

Every mistake is one error that names the file and the line. A run is a mapping from query id to a mapping from document
id to score; its order is that of `trec_order`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..harness.text_files import read_json_lines_of, read_text_file
from ..harness.whole_files import write_text_whole
from .retrieval import RetrievalData, bm25_scores

Run = Mapping[str, Mapping[str, float]]
"""Query id to document id to score."""

_LARGEST_SCORE = float(np.finfo(np.float32).max)
LARGEST_GRADE = 1000
"""Largest grade of a judgement. From 2^31 on trec_eval would read other numbers: it has 32 bits for a grade."""


@dataclass(frozen=True)
class JudgedCollection:
    """Documents, and queries with at least one relevant document each.

    Attributes:
        queries: id to text.
        documents: id to text, which may be empty.
        grades: id of every query to the grades of its judged documents, whole numbers; above 0 is relevant.
        known: ids of all queries of the folder, with judgements or without.
        without_relevant: number of queries with judgements, but without a relevant document, that were left out.
    """

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    grades: Mapping[str, Mapping[str, int]]
    known: frozenset[str]
    without_relevant: int = 0

    def relevant(self, query: str) -> dict[str, int]:
        """Return the documents with a grade above 0 for a query, in the order of the file."""
        return {document: grade for document, grade in self.grades[query].items() if grade > 0}

    def only(self, queries: list[str]) -> JudgedCollection:
        """Return the collection with some of its queries, in their order here."""
        kept = set(queries)
        return JudgedCollection(
            {query: text for query, text in self.queries.items() if query in kept},
            self.documents,
            {query: grades for query, grades in self.grades.items() if query in kept},
            self.known,
        )


def folder_and_split(source: str) -> tuple[str, str | None]:
    """Split FOLDER or FOLDER,SPLIT; a folder whose name has a comma is taken whole."""
    name, comma, split = source.rpartition(",")
    return (name, split) if comma and not Path(source).is_dir() else (source, None)


def qrels_of(folder: Path) -> list[str]:
    """Return the names of the judgements in a folder in BEIR's layout."""
    return sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))


def read_judged(folder: str | Path, split: str | None = None, *, field: str = "folder") -> JudgedCollection:
    """Read a folder in BEIR's layout (arXiv 2104.08663) strictly.

    It holds `corpus.jsonl` (objects with "_id", "text" and perhaps "title"), `queries.jsonl` ("_id" and "text") and
    `qrels/SPLIT.tsv` (a header, then query id, document id and grade, with tabs). A title is put before its text unless
    the text begins with it. A document may be without text, a query may not. Queries without a relevant document in
    this split are left out.

    Args:
        folder: the folder.
        split: name of the judgements; None: the only ones.
        field: what to call the folder in an error.

    Raises:
        ValueError: naming file and line, if a file is missing, or has wrong columns, an unknown or repeated id, an
            empty query, a grade that is no whole number up to `LARGEST_GRADE`, or no query with a relevant document.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`{field}` must be an existing folder, got {str(folder)!r}.")
    found = qrels_of(folder)
    if split is None and len(found) == 1:
        split = found[0]
    if split not in found:
        wanted = "no split" if split is None else repr(split)
        raise ValueError(
            f"`{field}`: the judgements must be one of {str(folder / 'qrels')!r}, {', '.join(found) or 'none'}, got "
            f"{wanted}."
        )
    documents = _texts(folder / "corpus.jsonl", field, queries=False)
    queries = _texts(folder / "queries.jsonl", field, queries=True)
    grades = _qrels(folder / "qrels" / f"{split}.tsv", field, queries, documents)
    kept = [query for query in queries if any(grade > 0 for grade in grades.get(query, {}).values())]
    if not kept:
        raise ValueError(f"{field}: {str(folder / 'qrels' / f'{split}.tsv')!r} has no query with a relevant document.")
    texts = {query: queries[query] for query in kept}
    judged = {query: grades[query] for query in kept}
    return JudgedCollection(texts, documents, judged, frozenset(queries), len(grades) - len(kept))


def _texts(path: Path, field: str, *, queries: bool) -> dict[str, str]:
    """Read the texts of a file of objects with ids, each after its title if there is one."""
    found: dict[str, str] = {}
    for number, row in read_json_lines_of(path, field):
        place = f"{field}: {str(path)!r}, line {number}"
        identity, text = (row.get("_id"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(identity, str) or not identity or not isinstance(text, str):
            raise ValueError(f"{place} must be an object with texts under '_id' and 'text'.")
        if identity.split() != [identity]:
            raise ValueError(f"{place}: the id must be without spaces, as TREC's run files need, got {identity!r}.")
        if identity in found:
            raise ValueError(f"{place} repeats the id {identity!r}.")
        if queries and not text.strip():
            raise ValueError(f"{place}: the query {identity!r} must have a text.")
        title = None if queries else row.get("title")
        if isinstance(title, str) and not text.startswith(title):
            text = f"{title} {text}"
        found[identity] = text
    if not found:
        raise ValueError(f"{field}: {str(path)!r} has no texts.")
    return found


def _qrels(
    path: Path, field: str, queries: Mapping[str, str], documents: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    grades: dict[str, dict[str, int]] = {}
    for number, line in enumerate(read_text_file(path, field).split("\n"), start=1):
        cells, place = line.split("\t"), f"{field}: {str(path)!r}, line {number}"
        if not line.strip():
            continue
        if len(cells) != 3:
            raise ValueError(
                f"{place} must have three columns with tabs between them (query id, document id, grade), got "
                f"{len(cells)}."
            )
        query, document, grade = (cell.strip() for cell in cells)
        whole = grade.isascii() and grade.isdigit()
        if number == 1:
            if whole:
                raise ValueError(f"{place} must be a header, e.g. query-id, corpus-id and score, got a judgement.")
            continue
        if not whole or int(grade) > LARGEST_GRADE:
            raise ValueError(f"{place}: the grade must be a whole number, 0 to {LARGEST_GRADE:,}, got {grade!r}.")
        for identity, known, file in ((query, queries, "queries.jsonl"), (document, documents, "corpus.jsonl")):
            if identity not in known:
                raise ValueError(f"{place}: {file} has no id {identity!r}.")
        if document in grades.setdefault(query, {}):
            raise ValueError(f"{place} judges document {document!r} for query {query!r} again.")
        grades[query][document] = int(grade)
    return grades


def trec_order(scores: Mapping[str, float]) -> list[str]:
    """Return the documents of a query in the order of trec_eval: by score in float32, then by id, both descending."""
    by_id = sorted(scores, reverse=True)
    return sorted(by_id, key=lambda document: -np.float32(scores[document]))


def cut(run: Run, depth: int | None) -> dict[str, dict[str, float]]:
    """Return the best `depth` documents of every query, or all with None, best first."""
    return {query: {one: scores[one] for one in trec_order(scores)[:depth]} for query, scores in run.items()}


def without_list(run: Run) -> int:
    """Return the number of queries with an empty list."""
    return sum(not documents for documents in run.values())


def read_run(path: str | Path, field: str, collection: JudgedCollection) -> dict[str, dict[str, float]]:
    """Read a run file in TREC's format: query id, "Q0", document id, rank, score and name, with spaces between them.

    As in trec_eval, the scores decide the order and the ranks are not read. Lists of queries without judgements in this
    split are left out, since a file may serve several splits. A query without a line has an empty list, since a system
    that finds nothing writes none: see :func:`without_list`.

    Args:
        path: the file.
        field: what to call it in an error.
        collection: the queries and the documents.

    Raises:
        ValueError: naming the file and the line, if a line is malformed, an id is unknown, a document is twice in a
            list, or a score is not finite in float32, in which trec_eval computes; or if no query has a list.
    """
    run: dict[str, dict[str, float]] = {}
    for number, line in enumerate(read_text_file(path, field).split("\n"), start=1):
        cells, place = line.split(), f"{field}: {str(path)!r}, line {number}"
        if not cells:
            continue
        if len(cells) != 6:
            raise ValueError(
                f"{place} must have six columns (query id, Q0, document id, rank, score, name), got {len(cells)}."
            )
        query, _, document, _, score, _ = cells
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if not abs(value) <= _LARGEST_SCORE:
            raise ValueError(f"{place}: the score must be a finite number in float32, got {score!r}.")
        for identity, known, file in (
            (query, collection.known, "queries.jsonl"),
            (document, collection.documents, "corpus.jsonl"),
        ):
            if identity not in known:
                raise ValueError(f"{place}: {file} has no id {identity!r}.")
        if document in run.setdefault(query, {}):
            raise ValueError(f"{place} has document {document!r} again in the list of query {query!r}.")
        run[query][document] = value
    if not run.keys() & collection.queries.keys():
        raise ValueError(
            f"{field}: {str(path)!r} must have a list for at least one of the {len(collection.queries):,} queries with "
            "judgements, and has none. Check the split."
        )
    return {query: run.get(query, {}) for query in collection.queries}


def write_run(run: Run, path: Path, name: str) -> None:
    """Write a run file in TREC's format, never seen half-written; trec_eval reads the same order from it.

    Args:
        run: the lists; scores are written in float32, which trec_eval computes in.
        path: the file.
        name: last column, without spaces.
    """
    lines = [
        f"{query} Q0 {document} {rank} {np.float32(scores[document]):.9g} {name}\n"
        for query, scores in run.items()
        for rank, document in enumerate(trec_order(scores), start=1)
    ]
    write_text_whole(path, "".join(lines))


def bm25_run(collection: JudgedCollection, depth: int) -> dict[str, dict[str, float]]:
    """Return the best documents of every query by BM25 (`ssm_zoo.evaluation.retrieval.bm25_scores`).

    A document that shares no word with a query is not in its list, which may be shorter than `depth` or empty.
    """
    data = RetrievalData(collection.queries, collection.documents, {})
    scores, identities, run = bm25_scores(data), list(collection.documents), {}
    for number, query in enumerate(collection.queries):
        row = scores(slice(number, number + 1))[0]
        positive = int((row > 0).sum())
        # More than `depth`, so that ties at the cut are broken by id.
        border = row.topk(min(depth, positive)).values[-1:] if positive else row[:0]
        places = torch.nonzero(row >= border[0])[:, 0].tolist() if positive else []
        run[query] = {identities[place]: float(row[place]) for place in places}
    return cut(run, depth)
