"""Embedders of texts by sentence-transformers, of any family of the zoo and of any other that it reads."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from .. import modeling as _  # noqa: F401 - registers the zoo's classes

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

POOLINGS = {"last": "lasttoken", "mean": "mean"}
"""Name to what sentence-transformers calls it. Both read real tokens alone, on whichever side padding stands."""


def require_sentence_transformers() -> None:
    """Raise a ValueError if sentence-transformers or what it trains with is not installed."""
    for name in ("sentence_transformers", "datasets"):
        if importlib.util.find_spec(name) is None:
            package = name.replace("_", "-")
            raise ValueError(
                f"embedders need the package {package}, which is not installed: pip install ssm-zoo[embed]"
            )


def make_embedder(
    source: str,
    *,
    revision: str | None = None,
    pooling: str = "last",
    max_tokens: int | None = None,
    query_prompt: str = "",
    document_prompt: str = "",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
) -> SentenceTransformer:
    """An embedder from a model without a head, or with a head that is left out.

    Args:
        source: folder or Hub id of the model, with its tokenizer.
        revision: branch, tag or commit, for a Hub id.
        pooling: a name in `POOLINGS`.
        max_tokens: longer texts are cut; None: what the tokenizer and the model say.
        query_prompt: put before every query.
        document_prompt: put before every document.
        device: where to; sentence-transformers' choice if None.
        dtype: of the weights; "auto" is the checkpoint's.
    """
    require_sentence_transformers()
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    if pooling not in POOLINGS:
        raise ValueError(f"pooling: got {pooling!r}; accepted: {', '.join(POOLINGS)}")
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    transformer = Transformer(
        source,
        model_kwargs={**options, "dtype": dtype, "use_safetensors": True},
        config_kwargs=dict(options),
        processor_kwargs=dict(options),
    )
    if max_tokens is not None:
        transformer.max_seq_length = max_tokens
    tokenizer: Any = transformer.tokenizer
    if tokenizer.pad_token is None:
        # Any will do: masks tell padding from text.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    width = transformer.get_embedding_dimension()
    return SentenceTransformer(
        modules=[transformer, Pooling(width, POOLINGS[pooling])],  # pyright: ignore[reportArgumentType]
        prompts={"query": query_prompt, "document": document_prompt},
        device=None if device is None else str(device),
    )


def load_embedder(
    source: str, *, revision: str | None = None, pooling: str | None = None, device: str | None = None, **options: Any
) -> SentenceTransformer:
    """An embedder that sentence-transformers has saved, or one made of a plain model.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit, for a Hub id.
        pooling: for a plain model, how to pool; see :func:`make_embedder`. A saved embedder has its own.
        device: where to; sentence-transformers' choice if None.
        **options: for a plain model, further arguments of :func:`make_embedder`.

    Raises:
        ValueError: if a plain model comes without a pooling, or a saved embedder with one or with options.
    """
    require_sentence_transformers()
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import is_sentence_transformer_model

    if not is_sentence_transformer_model(source, revision=revision):
        if pooling is None:
            raise ValueError(f"pooling: {source} is a plain model; accepted: {', '.join(POOLINGS)}")
        return make_embedder(source, revision=revision, pooling=pooling, device=device, **options)
    given = {"pooling": pooling, **options}
    for name, value in given.items():
        if value:
            raise ValueError(f"{name}: got {value!r}; accepted with the embedder {source}: none, it has its own")
    return SentenceTransformer(source, revision=revision, device=device)
