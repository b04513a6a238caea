"""The texts of a training as rows of tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .packing import PackedDocuments
from .settings import TrainingSettings
from .texts import encode, fingerprint, read_documents

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
