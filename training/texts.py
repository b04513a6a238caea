"""Texts of the user to documents of token ids, and to the rows of a training."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..harness.text_files import read_json_lines, read_text_file
from .packing import PackedDocuments
from .settings import TrainingSettings

DATASETS, BUILTIN = "datasets:", "builtin:"
_ACCEPTED = "a .txt or .jsonl file, 'datasets:PATH,SPLIT', 'datasets:PATH,CONFIG,SPLIT' or 'builtin:NAME'"


def read_documents(
    sources: Sequence[str], field: str, *, separator: str | None = None, text_field: str = "text"
) -> list[str]:
    """Read the documents of some sources, in order; those of nothing but white space are passed over.

    Args:
        sources: UTF-8 text files (`.txt`: one document, or several with a separator between them), `.jsonl` files (a
            JSON object a line), data sets that `datasets.load_dataset` finds, "datasets:PATH,SPLIT" or
            "datasets:PATH,CONFIG,SPLIT", or "builtin:NAME", a text that ships with the package.
        field: "train" or "heldout", the part of a built-in text to read; errors name it.
        separator: what stands between the documents of a text file; None if each file is one document.
        text_field: where the objects and the data sets' rows hold the text.

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
    if source.startswith(DATASETS):
        return _read_data_set(source, field, text_field)
    if source.startswith(BUILTIN):
        text = builtin_text(source, field, field)
        return iter([text] if separator is None else text.split(separator))
    suffix = Path(source).suffix
    if suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{field}: got {source!r}; accepted: {_ACCEPTED}")
    text = read_text_file(source, field)
    if suffix == ".jsonl":
        return _read_lines(text, f"{field}: {source!r}", text_field)
    text = text.replace("\r\n", "\n")
    return iter([text] if separator is None else text.split(separator))


def builtin_text(source: str, part: str, field: str) -> str:
    """Return one part of a text that ships with the package.

    Args:
        source: "builtin:NAME".
        part: "train" or "heldout".
        field: what to call the source in an error.

    Raises:
        ValueError: if there is no such text.
    """
    name, texts = source.removeprefix(BUILTIN), resources.files("ssm_zoo.distill").joinpath("data")
    available = sorted(folder.name for folder in texts.iterdir() if folder.joinpath(f"{part}.txt").is_file())
    if name not in available:
        accepted = ", ".join(f"{BUILTIN}{folder}" for folder in available)
        raise ValueError(f"{field}: got {source!r}; accepted: {accepted}, or the path of a text file")
    return texts.joinpath(name, f"{part}.txt").read_text(encoding="utf-8")


def _read_lines(text: str, name: str, text_field: str) -> Iterator[str]:
    for number, value in read_json_lines(text, name):
        if not isinstance(value, dict) or not isinstance(value.get(text_field), str):
            raise ValueError(f"{name}, line {number}: accepted: an object with a text under {text_field!r}")
        yield value[text_field]


def _read_data_set(source: str, field: str, text_field: str) -> Iterator[str]:
    data = load_data_set(source, field, _ACCEPTED)
    if text_field not in data.column_names or not all(isinstance(text, str) for text in data[text_field]):
        raise ValueError(
            f"text_field: got {text_field!r} for {source!r}; accepted: a column of texts, of {data.column_names}"
        )
    yield from data[text_field]


def load_data_set(source: str, field: str, accepted: str) -> Any:
    """The data set of "datasets:PATH,SPLIT" or "datasets:PATH,CONFIG,SPLIT", as `datasets.load_dataset` finds it.

    Args:
        source: the text.
        field: what to call it in an error.
        accepted: what to say is accepted where the text is no such thing.
    """
    import datasets

    path, *configuration = source.removeprefix(DATASETS).split(",")
    if not path or len(configuration) not in (1, 2):
        raise ValueError(f"{field}: got {source!r}; accepted: {accepted}")
    *name, split = configuration
    return datasets.load_dataset(path, *name, split=split)


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
        if max(ids, default=0) >= vocab_size:
            raise ValueError(
                f"model: its tokenizer gave the id {max(ids)}, but its vocab_size is {vocab_size}; the tokenizer and "
                "the model do not belong together"
            )
        encoded.append(torch.tensor(ids, dtype=torch.int32))
    return encoded


def fingerprint(documents: Sequence[Tensor]) -> str:
    """SHA-256 of the ids and of where the documents end, in hexadecimal."""
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.numpy().astype("<i4").tobytes())
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


def read_texts(settings: TrainingSettings) -> dict[str, list[str]]:
    """The documents, for "train" and "heldout"; errors as `ssm_zoo.training.texts.read_documents`."""
    return {
        field: read_documents(
            getattr(settings, field), field, separator=settings.separator, text_field=settings.text_field
        )
        for field in _FIELDS
    }


def make_rows(
    texts: Mapping[str, list[str]],
    settings: TrainingSettings,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    *,
    progress: bool,
) -> TextRows:
    """Tokenise and pack.

    Args:
        texts: the documents, for "train" and "heldout".
        settings: say how long rows are.
        tokenizer: the model's.
        vocab_size: of the model.
        progress: show a progress bar.

    Raises:
        ValueError: if a text has no token to predict, or the model lacks an embedding for one.
    """
    rows, fingerprints = {}, {}
    for field in _FIELDS:
        ids = encode(texts[field], tokenizer, vocab_size, progress=progress)
        fingerprints[field] = fingerprint(ids)
        try:
            rows[field] = PackedDocuments(ids, settings.row_tokens, packing=settings.packing)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
    return TextRows(**rows, documents={field: len(texts[field]) for field in _FIELDS}, fingerprints=fingerprints)
