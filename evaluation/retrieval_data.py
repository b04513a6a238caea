"""What retrieval is measured on: queries, documents, and which document answers which query."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..harness.text_files import read_json_lines, read_text_file

_FIELD = "folder"


@dataclass(frozen=True)
class RetrievalData:
    """Queries with at least one relevant document each, and the documents.

    Attributes:
        queries: id to text.
        documents: id to text, which may be empty.
        relevant: id of every query to the ids of its relevant documents, one or more.
    """

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    relevant: Mapping[str, frozenset[str]]

    @property
    def largest_pool(self) -> int:
        """Most candidates of which every query has one relevant document and others that are not."""
        return 1 + len(self.documents) - max(map(len, self.relevant.values()))


def read_beir(folder: str | Path, split: str = "test") -> RetrievalData:
    """Read a folder in the layout of BEIR (arXiv 2104.08663).

    It holds `corpus.jsonl` (objects with "_id", "text" and perhaps "title"), `queries.jsonl` ("_id" and "text") and
    `qrels/SPLIT.tsv` (a header, then query id, document id and grade). A title is put before its text unless the text
    begins with it. Every grade above 0 is relevant, and all are alike. Queries without a relevant document are left
    out, as are judgements of documents that the corpus does not hold.

    Args:
        folder: the folder.
        split: which judgements.

    Raises:
        ValueError: if a file is missing or malformed, or no query is left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{_FIELD}: there is no folder {str(folder)!r}")
    documents = _read_texts(folder / "corpus.jsonl", titles=True)
    queries = _read_texts(folder / "queries.jsonl", titles=False)
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        found = sorted(entry.stem for entry in path.parent.glob("*.tsv"))
        raise ValueError(f"split: got {split!r}; accepted with {str(folder)!r}: {', '.join(found) or 'none'}")
    relevant: dict[str, set[str]] = {}
    rows = csv.reader(io.StringIO(read_text_file(path, _FIELD), newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    for number, row in enumerate(rows, start=1):
        if number == 1 or not row:
            continue
        if len(row) != 3 or not row[2].strip().lstrip("-").isdigit():
            raise ValueError(f"{_FIELD}: {str(path)!r}, line {number}: accepted: query id, document id, whole number")
        query, document, grade = row
        if query not in queries:
            raise ValueError(f"{_FIELD}: {str(path)!r}, line {number}: there is no query {query!r}")
        if int(grade) > 0 and document in documents:
            relevant.setdefault(query, set()).add(document)
    if not relevant:
        raise ValueError(f"{_FIELD}: {str(path)!r} has no query with a relevant document")
    return RetrievalData(
        {query: text for query, text in queries.items() if query in relevant},
        documents,
        {query: frozenset(relevant[query]) for query in queries if query in relevant},
    )


def _read_texts(path: Path, *, titles: bool) -> dict[str, str]:
    name, found = f"{_FIELD}: {str(path)!r}", {}
    for number, row in read_json_lines(read_text_file(path, _FIELD), name):
        identity, text = (row.get("_id"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(identity, str) or not isinstance(text, str) or not (titles or text.strip()):
            raise ValueError(f"{name}, line {number}: accepted: an object with texts under '_id' and 'text'")
        if identity in found:
            raise ValueError(f"{name}, line {number}: the id {identity!r} is there a second time")
        title = row.get("title") if titles else None
        if isinstance(title, str) and not text.startswith(title):
            text = f"{title} {text}"
        found[identity] = text
    if not found:
        raise ValueError(f"{name} holds no texts")
    return found
