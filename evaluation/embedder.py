"""Text embedders of sentence-transformers, made of any family of the zoo or any other that it can load."""

from __future__ import annotations

import importlib.util
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..conversion.load_model import check_finite, load_model, quiet_loading
from ..conversion.remote_code import check_remote_code
from ..harness.extras import install_command
from ..harness.json_files import read_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

POOLINGS = {"last": "lasttoken", "mean": "mean"}
"""Names of the poolings, with sentence-transformers' names for them. Both ignore padding, on either side."""

HEADS = ("lm_head.", "score.", "classifier.", "qa_outputs.", "cls.")
"""Prefixes of the names of heads, which a checkpoint may have and an embedder does not use."""

POOLERS = ("pooler.",)
"""Prefixes of the names of layers after the hidden states, which a checkpoint may lack."""


def require_sentence_transformers() -> None:
    """Raise a ValueError if sentence-transformers, or datasets, which it trains with, is not installed."""
    for name in ("sentence_transformers", "datasets"):
        if importlib.util.find_spec(name) is None:
            package = name.replace("_", "-")
            raise ValueError(
                f"embedders need the package {package}, which is not installed. {install_command('embed')}"
            )


# `_check_weights` reports mismatched shapes, together with missing and unexpected weights.
_STRICT = {"use_safetensors": True, "ignore_mismatched_sizes": True}


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
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """Make an embedder of a model; a head is left out.

    Args:
        source: folder or Hub id of the model, with its tokenizer.
        revision: branch, tag or commit, for a Hub id.
        pooling: a name in `POOLINGS`.
        max_tokens: maximum length of a text, which is cut there; None: that of the tokenizer and the model.
        query_prompt: text put before every query.
        document_prompt: text put before every document.
        device: device of the embedder; None: the choice of sentence-transformers.
        dtype: data type of the weights; "auto" is the checkpoint's.
        trust_remote_code: run the code that the source brings.

    Raises:
        ValueError: if weights other than those of a head are missing, left over or not finite.
    """
    require_sentence_transformers()
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be {' or '.join(POOLINGS)}, got {pooling!r}")
    check_remote_code(source, trusted=trust_remote_code, field="model", revision=revision, auto_class="AutoModel")
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with quiet_loading(source, "model"):
        transformer = Transformer(
            source,
            model_kwargs={**options, "dtype": dtype, **_STRICT},
            config_kwargs=dict(options),
            processor_kwargs=dict(options),
        )
    _check_weights(transformer, source, "", options)
    if max_tokens is not None:
        transformer.max_seq_length = max_tokens
    tokenizer: Any = transformer.tokenizer
    if tokenizer.pad_token is None:
        # Any token will do, since padding is masked.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    width = transformer.get_embedding_dimension()
    return SentenceTransformer(
        modules=[transformer, Pooling(width, POOLINGS[pooling])],  # pyright: ignore[reportArgumentType]
        prompts={"query": query_prompt, "document": document_prompt},
        device=None if device is None else str(device),
    )


def load_embedder(
    source: str,
    *,
    revision: str | None = None,
    pooling: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> SentenceTransformer:
    """Load an embedder that sentence-transformers has saved, or make one of a plain model.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit, for a Hub id.
        pooling: pooling of a plain model; see :func:`make_embedder`. A saved embedder has its own.
        device: device of the embedder; None: the choice of sentence-transformers.
        trust_remote_code: run the code that the source brings.
        **options: further arguments of :func:`make_embedder`, for a plain model.

    Raises:
        ValueError: if no pooling is given for a plain model, or pooling or options are given for a saved embedder; or
            if weights other than those of a head are missing, left over, in a pickle or not finite.
    """
    require_sentence_transformers()
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import is_sentence_transformer_model

    if not is_sentence_transformer_model(source, revision=revision):
        if pooling is None:
            raise ValueError(f"`pooling` must be {' or '.join(POOLINGS)}, since {source} is a plain model without one")
        options |= {"device": device, "trust_remote_code": trust_remote_code}
        return make_embedder(source, revision=revision, pooling=pooling, **options)
    given = {"pooling": pooling, **options}
    for name, value in given.items():
        if value:
            raise ValueError(f"`{name}` must be left out with the embedder {source}, which has its own; got {value!r}")
    check_remote_code(
        source, trusted=trust_remote_code, field="model", revision=revision, auto_class="AutoModel", tokenizer=True
    )
    folders = _module_folders(source, revision)
    with quiet_loading(source, "model"):
        embedder = SentenceTransformer(
            source, revision=revision, device=device, trust_remote_code=trust_remote_code, model_kwargs=dict(_STRICT)
        )
    loading = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    for module, folder in zip(embedder, folders, strict=True):
        _check_weights(module, source, folder, loading)
    check_finite(embedder, f"model: {source}")
    return embedder


def _check_weights(module: Any, source: str, folder: str, options: dict[str, Any]) -> None:
    """Check that a module's model has exactly the weights of the source, which sentence-transformers does not report.

    The model is loaded once more on the meta device, which reads only the names and shapes of the weights.
    """
    model = getattr(module, "model", None)
    if not isinstance(model, PreTrainedModel):
        return  # a pooling or a layer, which sentence-transformers loads strictly
    check_finite(model, f"model: {source}")
    load_model(source, type(model), may_lack=POOLERS, may_add=HEADS, device_map="meta", subfolder=folder, **options)


def _module_folders(source: str, revision: str | None) -> list[str]:
    """Return the folders of a saved embedder's modules, in order.

    Raises:
        ValueError: if one of them has its weights in a pickle only.
    """
    from sentence_transformers.util import load_file_path

    path = load_file_path(source, "modules.json", revision=revision)
    assert path is not None  # as is_sentence_transformer_model has found
    modules = read_json(path, f"model: modules.json of {source}")
    if not isinstance(modules, list) or not all(isinstance(each, dict) and "path" in each for each in modules):
        raise ValueError(f"model: modules.json of {source} must be a list of objects with a `path`.")
    folders = [str(module["path"]) for module in modules]
    for folder in folders:
        names = [str(PurePosixPath(folder) / name) for name in ("model.safetensors", "pytorch_model.bin")]
        found = [folder and load_file_path(source, name, revision=revision) for name in names]
        if found[1] and not found[0]:
            raise ValueError(
                f"model: {source} has weights in {names[1]}, a pickle, which can hold code. Only safetensors are read: "
                "load it with sentence-transformers where you trust it, and save it again."
            )
    return folders
