"""Tokenizers of translating models: learnt from parallel text, or a checkpoint's own with a separator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .texts import check_ids

SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "sep_token": "<sep>", "bos_token": "<s>"}
"""Special tokens of a new tokenizer, in the order of their ids from 0, as in arXiv 2407.05489."""
SMALLEST_VOCABULARY = 256 + len(SPECIAL)
"""The bytes and the special tokens."""


def learn_joint_vocabulary(texts: Sequence[str], entries: int, *, progress: bool) -> PreTrainedTokenizerFast:
    """Learn one byte-level BPE for both languages, which normalises texts to NFKC and can encode any text.

    The same texts give the same tokenizer.

    Args:
        texts: sources and targets of the training data, and of nothing else.
        entries: maximum size of the vocabulary, at least 260. It is smaller if there are no more pairs to merge.
        progress: show a progress bar.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFKC()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL)


@dataclass(frozen=True)
class Separator:
    """The token between source and target of a pretrained tokenizer.

    Attributes:
        token: its text.
        id: its id.
        added: whether the tokenizer did not have it before.
    """

    token: str
    id: int
    added: bool


def set_separator(tokenizer: PreTrainedTokenizerBase, token: str | None) -> Separator:
    """Make a token the `sep_token` of a tokenizer, with which it is then saved.

    Args:
        tokenizer: changed in place; no other token changes its id.
        token: a token that it has, or a new one; None: its own `sep_token`, or "<sep>" if it has none of its own.

    Raises:
        ValueError: if the token has another meaning already.
    """
    meanings = {
        name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")
    }
    own = getattr(tokenizer, "sep_token", None)
    if token is None:
        token = own if isinstance(own, str) and own not in meanings.values() else SPECIAL["sep_token"]
    for name, other in meanings.items():
        if other == token:
            raise ValueError(f"`separator` must not be the tokenizer's `{name}`, got {token!r}.")
    added = token not in tokenizer.get_vocab()
    if token != own:
        options: Any = {"sep_token": token}
        tokenizer.add_special_tokens(options)
    identity = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(identity, int)
    return Separator(token, identity, added)


def fit_embeddings(model: PreTrainedModel, separator: Separator) -> None:
    """Give a model an embedding for an added separator: one more row, or an unused one if there is one.

    The row, and that of the head, is the mean of the others, which is a token without a meaning.

    Args:
        model: changed in place; all other weights keep their values.
        separator: what :func:`set_separator` returned.

    Raises:
        ValueError: if the model also lacks embeddings for other tokens, so that the tokenizer is not its own.
    """
    if not separator.added:
        return
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    check_ids([separator.id - 1], rows)
    if separator.id >= rows:
        # Not transformers' way to fill new rows, which draws them at random.
        model.resize_token_embeddings(separator.id + 1, mean_resizing=False)
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    used = [layer for layer in layers if layer is not None]
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in used}.values():
            others = torch.cat([weight[: separator.id], weight[separator.id + 1 :]])
            weight[separator.id] = others.double().mean(0).to(weight.dtype)
