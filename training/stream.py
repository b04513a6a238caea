"""Training text that is read during training: endless, mixed from weighted sources, with a position to resume from.

The `datasets` library reads and mixes the sources. Documents are read in windows of about `WINDOW` rows. Each window is
packed separately, and its rows are shuffled by the seed and the window's number alone. A position is therefore the
start of a window in the sources, and the number of its rows that have been read.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from .packing import Document, PackedDocuments, Row
from .sources import DATASETS, load_data_set

WINDOW = 64
"""Rows of a window, within which documents are packed and rows are shuffled."""

Read = Callable[[str], Iterator[tuple[str, str]]]
"""Reader of a file or built-in text: yields the place (for errors) and the text of every document."""


def mixed(sources: Sequence[tuple[str, float | None]], read: Read, take: Callable[[Any, str], str], seed: int) -> Any:
    """Return one pass over some sources as an `IterableDataset` of "place" and "text".

    Args:
        sources: sources with weights, the probabilities with which documents are drawn; a source that ends starts again
            until all have ended. Without weights the sources follow one another.
        read: reads a source that is not a data set.
        take: returns the text of a data set's row, given the row and its place.
        seed: seed of the mixture.
    """
    import datasets

    parts = []
    for source, _ in sources:
        if source.startswith(DATASETS):
            place = f"train: {source!r}"
            data = load_data_set(source, "train", streaming=True)
            data = data.map(lambda row, place=place: {"place": place, "text": take(row, place)})
            parts.append(data.select_columns(["place", "text"]))
        else:
            parts.append(datasets.IterableDataset.from_generator(_rows, gen_kwargs={"source": source, "read": read}))
    weights = [weight for _, weight in sources if weight is not None]
    if not weights:
        return datasets.concatenate_datasets(parts)
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(parts, shares, seed=seed, stopping_strategy="all_exhausted")


def _rows(source: str, read: Read) -> Iterator[dict[str, str]]:
    for place, text in read(source):
        yield {"place": place, "text": text}


class PositionedRows(IterableDataset[Row]):
    """Endless rows for `RowCollator`, with a position to resume from."""

    def position(self, row: int) -> dict[str, Any]:
        """Return the position before a row, as values that JSON can represent.

        Args:
            row: number of the row from the beginning, not smaller than in an earlier call.
        """
        raise NotImplementedError

    def go_to(self, position: dict[str, Any]) -> None:
        """Set the position to one that :meth:`position` returned."""
        raise NotImplementedError

    def first(self, count: int) -> list[Row]:
        """Return the first rows, independently of the position."""
        raise NotImplementedError


class TextStream(PositionedRows):
    """Rows of texts that are read during training.

    Args:
        passes: returns the documents of a pass over the sources, given its number: an `IterableDataset` of the
            `datasets` library with a "text" and its "place".
        encode: tokenises a text, given the text and its place.
        budget: maximum number of tokens of a row, at least 2.
        packing: False puts every document, or piece of a document, into its own row.
        seed: seed of the order of the rows.
    """

    def __init__(
        self,
        passes: Callable[[int], Any],
        encode: Callable[[str, str], Tensor | Document],
        budget: int,
        *,
        packing: bool,
        seed: int,
    ) -> None:
        self._passes, self._encode, self._budget, self._packing, self._seed = passes, encode, budget, packing, seed
        self._start: dict[str, Any] = {"pass": 0, "source": None, "window": 0, "first": 0, "row": 0}
        self._windows: deque[dict[str, Any]] = deque()

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows from the position, by default from the beginning."""
        self._windows.clear()
        for position, rows in self._read(self._start):
            self._windows.append(position)
            yield from rows[max(self._start["row"] - position["first"], 0) :]

    def first(self, count: int) -> list[Row]:
        rows = (row for _, window in self._read({"pass": 0, "source": None, "window": 0, "first": 0}) for row in window)
        return list(islice(rows, count))

    def position(self, row: int) -> dict[str, Any]:
        while len(self._windows) > 1 and self._windows[1]["first"] <= row:
            self._windows.popleft()
        return {**(self._windows[0] if self._windows else self._start), "row": row}

    def go_to(self, position: dict[str, Any]) -> None:
        self._start = position

    def fingerprint(self, sources: Sequence[str]) -> str:
        """Return a SHA-256 of the first window's tokens and of the sizes of the files, in hexadecimal."""
        digest = hashlib.sha256()
        for row in self.first(WINDOW):
            for part in (row["input_ids"], row["labels"]):
                digest.update(part.numpy().astype("<i8").tobytes())
        sizes = [Path(source).stat().st_size if Path(source).is_file() else None for source in sources]
        digest.update(json.dumps(sizes).encode())
        return digest.hexdigest()

    def _read(self, start: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[Row]]]:
        """Yield the position and the rows of every window."""
        number, window, first = start["pass"], start["window"], start["first"]
        data, source = self._passes(number), start["source"]
        if source is not None:
            data.load_state_dict(source)
        documents, found = iter(data), True
        while True:
            position = {"pass": number, "source": source, "window": window, "first": first}
            taken, tokens = [], 0
            while tokens < WINDOW * self._budget:
                document = next(documents, None)
                if document is None:
                    if not found:
                        raise ValueError("train: the sources have no text.")
                    number += 1
                    data = self._passes(number)
                    documents, found = iter(data), False
                    continue
                if not document["text"].strip():
                    continue
                found = True
                encoded = self._encode(document["text"], document["place"])
                taken.append(encoded)
                tokens += max(len(encoded if isinstance(encoded, Tensor) else encoded[0]), 1)
            rows = PackedDocuments(taken, self._budget, packing=self._packing)
            # Through JSON: a copy that later reading does not change, as a checkpoint stores it.
            source = json.loads(json.dumps(data.state_dict()))
            # A hash, because seeds that differ by one can start similar streams in simple generators.
            digest = hashlib.sha256(f"{self._seed}/{window}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            order = torch.randperm(len(rows), generator=generator).tolist()
            yield position, [rows[index] for index in order]
            window, first = window + 1, first + len(rows)
