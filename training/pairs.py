"""Pairs of texts that belong together, to learn embeddings from."""

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..harness.text_files import read_text_file
from .sources import DATA_SETS, DATASETS, ROW_FILES, read_rows


@dataclass(frozen=True)
class Pairs:
    """Texts by column, row by row.

    Attributes:
        anchors: texts to search with.
        positives: the text that each anchor should find.
        negatives: columns of hard negatives, texts that the anchors should not find.
    """

    anchors: list[str]
    positives: list[str]
    negatives: list[list[str]]

    def __len__(self) -> int:
        return len(self.anchors)

    @property
    def columns(self) -> dict[str, list[str]]:
        """Name to texts, the anchors first and the positives second: the order that the losses go by."""
        named = {f"negative_{index}": texts for index, texts in enumerate(self.negatives, start=1)}
        return {"anchor": self.anchors, "positive": self.positives, **named}

    @property
    def documents(self) -> list[str]:
        """Every positive and negative once, in order."""
        return list(dict.fromkeys(text for texts in (self.positives, *self.negatives) for text in texts))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the texts and their order, in hexadecimal."""
        digest = hashlib.sha256()
        for texts in self.columns.values():
            for text in texts:
                encoded = text.encode()
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
        return digest.hexdigest()


def read_pairs(
    sources: Sequence[str],
    field: str,
    *,
    anchor: str = "anchor",
    positive: str = "positive",
    negatives: Sequence[str] = (),
) -> Pairs:
    """Read the pairs of some sources, in order.

    Args:
        sources: UTF-8 files, or data sets that `datasets.load_dataset` finds, "datasets:PATH,SPLIT" or
            "datasets:PATH,CONFIG,SPLIT". `.jsonl`: a JSON object a line; `.parquet`; `.csv`: a header and
            rows, quoted where they need it; `.tsv`: a header and rows, tabs between the texts and no quoting.
        field: name of the setting, for errors.
        anchor: column of the texts to search with.
        positive: column of the texts that they should find.
        negatives: columns of the texts that they should not find.

    Raises:
        ValueError: naming the first source that is missing or malformed, lacks a column, or has an empty text in one.
    """
    columns = [anchor, positive, *negatives]
    texts: list[list[str]] = [[] for _ in columns]
    for source in sources:
        found = False
        for place, row in _rows(source, field, columns):
            found = True
            for column, kept in zip(columns, texts, strict=True):
                text = row[column]
                if not isinstance(text, str) or not text.strip():
                    given = "nothing" if text is None or text == "" else repr(text)
                    raise ValueError(f"{place}: `{column}` must be a text that is not empty, got {given}.")
                kept.append(text)
        if not found:
            raise ValueError(f"{field}: {source!r} has no pairs.")
    return Pairs(texts[0], texts[1], texts[2:])


def _rows(source: str, field: str, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield where each row of a source is, in words, and the row, which has the columns."""
    suffix = Path(source).suffix
    if source.startswith(DATASETS) or suffix in ROW_FILES:
        for place, row in read_rows(source, field):
            _check_columns(columns, list(row), place)
            yield place, row
        return
    if suffix not in (".csv", ".tsv"):
        raise ValueError(f"`{field}` must be a .jsonl, .parquet, .csv or .tsv file, or {DATA_SETS}, got {source!r}.")
    text, name = read_text_file(source, field), f"{field}: {source!r}"
    quoting: dict[str, Any] = {"strict": True} if suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(io.StringIO(text, newline=""), **quoting)
    header: list[str] | None = None
    try:
        for cells in reader:
            if header is None:
                header = cells
                _check_columns(columns, header, name)
            elif len(cells) not in (0, len(header)):
                raise ValueError(f"{name}, line {reader.line_num} must have {len(header)} texts, got {len(cells)}.")
            elif cells:
                yield f"{name}, line {reader.line_num}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}") from None


def _check_columns(columns: Sequence[str], found: Sequence[str], name: str) -> None:
    for column in columns:
        if found.count(column) > 1:
            raise ValueError(f"{name} has {found.count(column)} columns {column!r}, of which only one can be meant.")
        if column not in found:
            raise ValueError(f"{name} has no column {column!r}; it has {', '.join(map(repr, found)) or 'none'}")
