"""Texts of the user to documents of token ids, and to the rows of a training."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..harness.text_files import read_text_file
from .conversations import Example, encode_examples, read_examples
from .packing import Document, PackedDocuments
from .settings import LanguageModelSettings, TrainingSettings
from .sources import BUILTIN, DATA_SETS, DATASETS, ROW_FILES, builtin_text, read_rows, text_at

_ACCEPTED = f"a .txt, .jsonl or .parquet file, {DATA_SETS}, or 'builtin:NAME'"


def read_documents(
    sources: Sequence[str], field: str, *, separator: str | None = None, text_field: str = "text"
) -> list[str]:
    """Read the documents of some sources, in order; those of nothing but white space are passed over.

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
            raise ValueError(f"{field}: {source!r} holds no text")
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
        raise ValueError(f"{field}: got {source!r}; accepted: {_ACCEPTED}")
    return iter([text] if separator is None else text.split(separator))


def encode(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, progress: bool = True
) -> list[Tensor]:
    """Token ids of documents, each as the tokenizer encodes a prompt, with an end-of-text token if it has one.

    Args:
        documents: the texts.
        tokenizer: the model's.
        vocab_size: of the model.
        progress: show a progress bar.

    Returns:
        (length,) int32 ids for every document.

    Raises:
        ValueError: if the model has no embedding for an id.
    """
    end = tokenizer.eos_token_id
    encoded = []
    for text in tqdm(documents, desc="tokenising", unit="document", disable=not progress):
        # verbose: off, since a document may be longer than what the model reads at once.
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
        if isinstance(end, int) and ids[-1:] != [end]:
            ids = [*ids, end]
        encoded.append(torch.tensor(ids, dtype=torch.int32))
    _check_ids(encoded, vocab_size)
    return encoded


def _check_ids(documents: Sequence[Tensor], vocab_size: int) -> None:
    largest = max((int(ids.max()) for ids in documents if len(ids)), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"model: its tokenizer gave the id {largest}, but its vocab_size is {vocab_size}; the tokenizer and the "
            "model do not belong together"
        )


def fingerprint(documents: Sequence[Tensor | Document]) -> str:
    """Return the SHA-256 of the ids, of labels of their own, and of where the documents end, in hexadecimal."""
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
        documents: number of documents, for "train" and "heldout".
        fingerprints: SHA-256 of the tokens, for "train" and "heldout".
    """

    train: PackedDocuments
    heldout: PackedDocuments
    documents: dict[str, int]
    fingerprints: dict[str, str]


Texts = dict[str, list[str]]
Examples = dict[str, list[Example]]


def read_texts(settings: TrainingSettings) -> Texts:
    """Read the documents, for "train" and "heldout"; errors as `ssm_zoo.training.texts.read_documents`."""
    return {
        field: read_documents(
            getattr(settings, field), field, separator=settings.separator, text_field=settings.text_field
        )
        for field in _FIELDS
    }


def read_texts_or_examples(settings: LanguageModelSettings) -> Texts | Examples:
    """Read the documents, or the rows whose answers are learnt, for "train" and "heldout"."""
    if settings.examples == "text":
        return read_texts(settings)
    return {field: read_examples(getattr(settings, field), field, settings.examples) for field in _FIELDS}


def make_rows(
    texts: Texts | Examples,
    settings: TrainingSettings,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    progress: bool,
) -> TextRows:
    """Tokenise and pack.

    Args:
        texts: the documents or rows, for "train" and "heldout".
        settings: say how long rows are.
        tokenizer: the model's.
        vocab_size: of the model.
        progress: show a progress bar.

    Raises:
        ValueError: if a text has no token to predict, or the model lacks an embedding for one.
    """
    rows, fingerprints = {}, {}
    for field in _FIELDS:
        encoded = _encode(texts[field], tokenizer, vocab_size, progress=progress)
        fingerprints[field] = fingerprint(encoded)
        try:
            rows[field] = PackedDocuments(encoded, settings.row_tokens, packing=settings.packing)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    return TextRows(**rows, documents={field: len(texts[field]) for field in _FIELDS}, fingerprints=fingerprints)


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
    _check_ids([ids for ids, _ in encoded], vocab_size)
    return encoded
