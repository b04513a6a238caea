"""Training text that is read while a model trains: endless, mixed of weighted sources, with a position to go on from.

The `datasets` library reads and mixes the sources. Documents are taken from it in windows of `WINDOW` rows; a window is
packed by itself and its rows come in a random order that depends on the seed and the window's number alone. So a
position is where the window began in the sources, and how many of its rows have been read.
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
"""Rows of a window: what is packed together, and how far a row may move from its place in the text."""

Read = Callable[[str], Iterator[tuple[str, str]]]
"""Documents of a source that is no data set, each as a text after where it is."""


def mixed(sources: Sequence[tuple[str, float | None]], read: Read, take: Callable[[Any, str], str], seed: int) -> Any:
    """Return one pass over some sources as an `IterableDataset` of "place" and "text".

    Args:
        sources: each with its weight, the share of the documents that are drawn from it, or all without: then they
            follow one another. Those that end begin again until all have ended.
        read: reads a source.
        take: makes a text of a row of a data set and its place.
        seed: of the mixture.
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


class TextStream(IterableDataset[Row]):
    """Rows without end, to be stacked by `RowCollator`.

    Args:
        passes: makes the documents of a pass over the sources, from its number: an `IterableDataset` of the `datasets`
            library with a "text" and its "place".
        encode: makes tokens of a text and its place.
        budget: most tokens of a row, 2 or more.
        packing: False puts every document, or piece of one, into a row of its own.
        seed: of the order of the rows.
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
        """Go through the rows from the position, which is the beginning until it is set."""
        self._windows.clear()
        for position, rows in self._read(self._start):
            self._windows.append(position)
            yield from rows[max(self._start["row"] - position["first"], 0) :]

    def first(self, count: int) -> list[Row]:
        """Return the first rows of the text, wherever the position is."""
        rows = (row for _, window in self._read({"pass": 0, "source": None, "window": 0, "first": 0}) for row in window)
        return list(islice(rows, count))

    def position(self, row: int) -> dict[str, Any]:
        """Return the position before a row, of the kinds that JSON knows.

        Args:
            row: the number of rows before it, from the beginning of the text; no less than in an earlier call.
        """
        while len(self._windows) > 1 and self._windows[1]["first"] <= row:
            self._windows.popleft()
        return {**(self._windows[0] if self._windows else self._start), "row": row}

    def go_to(self, position: dict[str, Any]) -> None:
        """Begin at a position that :meth:`position` gave."""
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
        """Yield windows, each after the position where it begins."""
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
                        raise ValueError("train: the sources hold no text")
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
            # Of use only once something has been read: before, it is that of the beginning.
            source = _copy(data.state_dict())
            # A hash, because seeds that differ by one can start similar streams in simple generators.
            digest = hashlib.sha256(f"{self._seed}/{window}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            order = torch.randperm(len(rows), generator=generator).tolist()
            yield position, [rows[index] for index in order]
            window, first = window + 1, first + len(rows)


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    """A state that changes no more, as a checkpoint holds it."""
    return json.loads(json.dumps(state))
