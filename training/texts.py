"""Read the texts of a training, tokenise them, and pack them into rows."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..harness.text_files import read_text_file
from .conversations import Example, encode_examples, example_of, examples_of, read_examples
from .objective_rows import FixedRows
from .packing import Document, PackedDocuments, Row
from .settings import LanguageModelSettings, TrainingSettings
from .sources import (
    BUILTIN,
    DATA_SETS,
    DATASETS,
    ROW_FILES,
    builtin_text,
    note_heldout_in_training,
    read_rows,
    text_at,
)
from .stream import PositionedRows, TextStream, mixed


def read_documents(
    sources: Sequence[str], field: str, *, separator: str | None = None, text_field: str = "text"
) -> list[str]:
    """Read the documents of several sources, in order; documents of white space only are skipped.

    Args:
        sources: UTF-8 text files (`.txt`: one document, or several with a separator between them), `.jsonl` files (a
            JSON object a line), `.parquet` files, data sets that `datasets.load_dataset` finds, "datasets:PATH,SPLIT"
            or "datasets:PATH,CONFIG,SPLIT", or "builtin:NAME", a text that ships with the package.
        field: "train" or "heldout", the part of a built-in text to read; errors name it.
        separator: what stands between the documents of a text file; None if each file is one document.
        text_field: field of the rows that holds the text.

    Raises:
        ValueError: naming the first source that is missing or malformed, or holds no text.
    """
    documents = []
    for source in sources:
        found = [text for text in _read(source, field, separator, text_field) if text.strip()]
        if not found:
            raise ValueError(f"{field}: {source!r} has no text.")
        documents += found
    return documents


def _read(source: str, field: str, separator: str | None, text_field: str) -> Iterator[str]:
    if source.startswith(BUILTIN):
        text = builtin_text(source, field, field)
    elif source.startswith(DATASETS) or Path(source).suffix in ROW_FILES:
        return (text_at(row, text_field, place) for place, row in read_rows(source, field))
    elif Path(source).suffix == ".txt":
        text = read_text_file(source, field).replace("\r\n", "\n")
    else:
        raise ValueError(
            f"`{field}` must be a .txt, .jsonl or .parquet file, {DATA_SETS}, or 'builtin:NAME', got {source!r}."
        )
    return iter([text] if separator is None else text.split(separator))


def encode(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, progress: bool = True
) -> list[Tensor]:
    """Encode documents as the tokenizer encodes a prompt, with an end-of-text token if the tokenizer has one.

    Args:
        documents: the texts.
        tokenizer: the model's tokenizer.
        vocab_size: size of the model's vocabulary.
        progress: show a progress bar.

    Returns:
        (length,) int32 ids for every document.

    Raises:
        ValueError: if the model has no embedding for an id.
    """
    end = tokenizer.eos_token_id
    encoded = []
    for text in tqdm(documents, desc="tokenising", unit="document", disable=not progress):
        # Not verbose: a document may be longer than the model's context.
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
        if isinstance(end, int) and ids[-1:] != [end]:
            ids = [*ids, end]
        encoded.append(torch.tensor(ids, dtype=torch.int32))
    check_ids((int(ids.max()) for ids in encoded if len(ids)), vocab_size)
    return encoded


def check_ids(ids: Iterable[int], vocab_size: int) -> None:
    """Raise a ValueError if a model has no embedding for a token id."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"model: the tokenizer's ids must be below the model's vocab_size, {vocab_size}, got {largest}. Use the "
            "tokenizer that belongs to the model."
        )


def fingerprint(documents: Sequence[Tensor | Document]) -> str:
    """Return the SHA-256 of the ids, the labels (if there are any) and the lengths of documents, in hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document,) if isinstance(document, Tensor) else document:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.numpy().astype("<i4").tobytes())
    return digest.hexdigest()


_FIELDS = ("train", "heldout")


@dataclass(frozen=True)
class TextRows:
    """The rows of both texts.

    Attributes:
        train: to train on.
        heldout: to measure the loss on.
        documents: number of documents for "train" and "heldout"; None for a stream.
        fingerprints: SHA-256 of the tokens for "train" and "heldout"; `TextStream.fingerprint` for a stream.
        objectives: for each training objective, rows of the held-out text to measure its loss on; empty for the next
            token alone.
    """

    train: PackedDocuments | PositionedRows
    heldout: PackedDocuments
    documents: dict[str, int | None]
    fingerprints: dict[str, str]
    objectives: dict[str, FixedRows]

    @property
    def length(self) -> int | None:
        """Rows of a pass over the training text; None of a stream."""
        return None if isinstance(self.train, PositionedRows) else len(self.train)

    def longest(self, row_tokens: int) -> int:
        """Return the number of tokens of the longest document in a row; `row_tokens` for rows made while training."""
        both = (self.train, self.heldout)
        return max(row_tokens if isinstance(rows, PositionedRows) else rows.longest for rows in both)

    def first(self, count: int) -> list[Row]:
        """Return the first rows to train on, or all."""
        if isinstance(self.train, PositionedRows):
            return self.train.first(count)
        return [self.train[index] for index in range(min(count, len(self.train)))]


Texts = dict[str, list[str]]
Examples = dict[str, list[Example]]


def read_texts(settings: TrainingSettings) -> Texts:
    """Read the documents for "train" and "heldout" as :func:`read_documents` does; a stream is not read yet."""
    return {
        field: read_documents(
            getattr(settings, field), field, separator=settings.separator, text_field=settings.text_field
        )
        for field in _FIELDS
        if not _is_stream(settings, field)
    }


def _is_stream(settings: TrainingSettings, field: str) -> bool:
    return field == "train" and settings.streamed


def read_texts_or_examples(settings: LanguageModelSettings) -> Texts | Examples:
    """Read the documents, or the rows with answers, for "train" and "heldout"."""
    if settings.examples == "text":
        return read_texts(settings)
    return {
        field: read_examples(getattr(settings, field), field, settings.examples)
        for field in _FIELDS
        if not _is_stream(settings, field)
    }


def make_rows(
    texts: Texts | Examples,
    settings: TrainingSettings,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    progress: bool,
    replace: Callable[[Sequence[Tensor], Sequence[Tensor]], dict[str, Any]] | None = None,
) -> TextRows:
    """Tokenise and pack the texts.

    Args:
        texts: documents or rows for "train" and "heldout".
        settings: settings of the run, e.g. the length of rows.
        tokenizer: the model's tokenizer.
        vocab_size: size of the model's vocabulary.
        progress: show a progress bar.
        replace: builds the training rows, and further fields of the result, from the tokens of both texts, instead of
            packing them.

    Raises:
        ValueError: if a text has no token to predict, or the model lacks an embedding for one.
    """
    if progress:
        note_heldout_in_training(settings.train, settings.heldout, "heldout")
    rows: dict[str, Any] = {"objectives": {}}
    tokens: dict[str, Any] = {}
    fingerprints: dict[str, str] = {}
    for field in _FIELDS:
        if _is_stream(settings, field):
            rows[field] = stream = _stream(settings, tokenizer, vocab_size)
            fingerprints[field] = stream.fingerprint([source for source, _ in settings.mixture])
            continue
        tokens[field] = encoded = _encode(texts[field], tokenizer, vocab_size, progress=progress)
        fingerprints[field] = fingerprint(encoded)
        if field == "train" and replace is not None:
            continue
        try:
            rows[field] = PackedDocuments(encoded, settings.row_tokens, packing=settings.packing)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    if replace is not None:
        rows |= replace(tokens["train"], tokens["heldout"])
    counts = {field: len(texts[field]) if field in texts else None for field in _FIELDS}
    return TextRows(**rows, documents=counts, fingerprints=fingerprints)


def _stream(settings: TrainingSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TextStream:
    kind = settings.examples if isinstance(settings, LanguageModelSettings) else "text"
    read = partial(_documents, kind=kind, separator=settings.separator, text_field=settings.text_field)
    take = partial(_take, kind=kind, text_field=settings.text_field)

    def encode_one(text: str, place: str) -> Tensor | Document:
        document = text if kind == "text" else Example(place, *json.loads(text))
        (encoded,) = _encode([document], tokenizer, vocab_size, progress=False)  # pyright: ignore[reportArgumentType]
        return encoded

    return TextStream(
        lambda number: mixed(settings.mixture, read, take, settings.seed + number),
        encode_one,
        settings.row_tokens,
        packing=settings.packing,
        seed=settings.seed,
    )


def _documents(source: str, *, kind: str, separator: str | None, text_field: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every document of a file or built-in text."""
    found = False
    if kind == "text":
        texts = ((f"train: {source!r}", text) for text in _read(source, "train", separator, text_field))
    else:
        texts = ((example.place, _json(example)) for example in examples_of(source, "train", kind))
    for place, text in texts:
        found = found or bool(text.strip())
        yield place, text
    if not found:
        raise ValueError(f"train: {source!r} has no text.")


def _take(row: Mapping[str, Any], place: str, *, kind: str, text_field: str) -> str:
    """Return the document of a row as a text."""
    return text_at(row, text_field, place) if kind == "text" else _json(example_of(row, place, kind))


def _json(example: Example) -> str:
    return json.dumps([example.prompt, example.completion])


def _encode(
    documents: Sequence[str] | Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    progress: bool,
) -> Sequence[Tensor | Document]:
    examples = [document for document in documents if isinstance(document, Example)]
    if not examples:
        texts = [document for document in documents if isinstance(document, str)]
        return encode(texts, tokenizer, vocab_size, progress=progress)
    encoded = encode_examples(examples, tokenizer, progress=progress)
    check_ids((int(ids.max()) for ids, _ in encoded), vocab_size)
    return encoded
