"""The model and the tokenizer of a reranker: one template for pairs, in training and scoring.

A causal model reads the document first, so that it reads the query knowing the document, and the score is read at the
end token; a bidirectional one reads the query first:

    causal          Document:\\n{document}\\n\\nQuery:\\n{query}{end}
    bidirectional   {begin}Query:\\n{query}\\n\\nDocument:\\n{document}{end}

The order is that of "State Space Models are Strong Text Rerankers" (arXiv 2412.14354). The template is the tokenizer's
post-processor for pairs, always called with (query, document), so that every user of the saved tokenizer applies it.
Only the document is cut: "only_second" of the tokenizer, and the template is added after the cut.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from ..conversion.load_model import check_finite, load_config, load_model, load_tokenizer, quiet_loading
from ..evaluation.embedder import HEADS
from ..evaluation.long_documents import CONFIG_KEY, TRUNCATION
from ..modeling.heads import ZooForSequenceClassification
from ..modeling.pretrained import is_bidirectional
from .adapters import add_adapters
from .reranker_settings import RerankerSettings
from .trainer import compute_dtype

_DOCUMENT, _QUERY = "Document:\n", "Query:\n"
_GAP = "\n\n"


def template_of(tokenizer: PreTrainedTokenizerBase, bidirectional: bool) -> str:
    """Return the template in words, for reports."""
    begin, end = _ends(tokenizer, bidirectional)
    document, query = f"{_DOCUMENT}{{document}}", f"{_QUERY}{{query}}"
    first, second = (query, document) if bidirectional else (document, query)
    return f"{begin or ''}{first}{_GAP}{second}{end}"


def _ends(tokenizer: PreTrainedTokenizerBase, bidirectional: bool) -> tuple[str | None, str]:
    """Return the tokens before and after a pair."""
    if bidirectional:
        end = tokenizer.sep_token or tokenizer.eos_token
        begin = tokenizer.cls_token
    else:
        begin, end = None, tokenizer.eos_token
    if not end:
        raise ValueError("`model` must have a tokenizer with an end-of-text token (eos_token), and it has none.")
    return (str(begin) if begin else None), str(end)


def reranker_tokenizer(
    tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, bidirectional: bool
) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose pairs (query, document) have the template.

    It is of transformers' general class: the classes of some models replace the post-processor when they are loaded.
    Padding is another special token than the end token if there is one. Otherwise it is the end token itself, and the
    attention mask alone tells them apart, which the zoo's heads read.

    Args:
        tokenizer: the base model's.
        max_tokens: tokens of a pair at most.
        bidirectional: order of the template; see this file.

    Raises:
        ValueError: if it is no fast tokenizer, has no end token, or no tokens for the template's words.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError("`model` must have a fast tokenizer (of the library tokenizers), to store the template in.")
    begin, end = _ends(tokenizer, bidirectional)
    backend = Tokenizer.from_str(backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    special: list[dict[str, Any]] = []

    def words(name: str, text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"`model` must have a tokenizer with tokens for {text!r}, which is part of the template.")
        special.append({"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)})
        return name

    def token(text: str) -> str:
        if all(one["id"] != text for one in special):
            special.append({"id": text, "ids": [tokenizer.convert_tokens_to_ids(text)], "tokens": [text]})
        return text

    if bidirectional:
        pieces = [words("query", _QUERY), "$A:0", words("document", f"{_GAP}{_DOCUMENT}"), "$B:0", token(end)]
    else:
        pieces = [words("document", _DOCUMENT), "$B:0", words("query", f"{_GAP}{_QUERY}"), "$A:0", token(end)]
    if begin:
        pieces.insert(0, token(begin))
    backend.post_processor = TemplateProcessing(single=["$A:0", token(end)], pair=pieces, special_tokens=special)
    others = [tokenizer.pad_token, tokenizer.unk_token, *tokenizer.all_special_tokens]
    pad = next((str(one) for one in others if one and str(one) != end), end)
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")
    kept = {name: str(getattr(tokenizer, name)) for name in names if getattr(tokenizer, name, None)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **kept,
        pad_token=pad,
        model_max_length=max_tokens,
        padding_side=tokenizer.padding_side,
        truncation_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def load_reranker_to_train(settings: RerankerSettings) -> CrossEncoder:
    """Load the base model with the package's own class and a new score, with the template, on the CPU.

    The score is drawn by the seed, unless the base already has one. The weights are float32 if they are trained or if
    the run computes in float32. Otherwise (under adapters) they keep the checkpoint's dtype.

    Raises:
        ValueError: if it is not a model of the zoo, weights are missing, its tokenizer does not suit, or `max_tokens`
            or `packing` are more than the model can read.
    """
    config = load_config(settings.model, revision=settings.revision)
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if not (isinstance(kind, type) and issubclass(kind, ZooForSequenceClassification)):
        raise ValueError(
            f"`model` must be a model of the zoo, got {settings.model} of model_type {config.model_type!r}. Convert it "
            "first with `ssm-zoo convert`."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and settings.limit > positions:
        raise ValueError(
            f"`max_tokens` must be at most {positions:,}, the positions of {settings.model}, got {settings.limit:,}."
        )
    if settings.packing and getattr(config, "pad_mode", None) == "as_trained":
        raise ValueError(
            f"`packing` must be False for {settings.model}, which has pad_mode 'as_trained' and takes one document a "
            "row. Pass --no-packing."
        )
    master = settings.method == "full" or compute_dtype(settings.dtype) == torch.float32
    return _make(settings, torch.float32 if master else "auto")


def _make(settings: RerankerSettings, dtype: torch.dtype | str) -> CrossEncoder:
    options: dict[str, Any] = {
        "revision": settings.revision or "main",
        "trust_remote_code": settings.trust_remote_code,
    }
    set_seed(settings.seed)
    with quiet_loading(settings.model, "model"):
        transformer = Transformer(
            settings.model,
            transformer_task="sequence-classification",
            model_kwargs={**options, "dtype": dtype, "use_safetensors": True, "ignore_mismatched_sizes": True},
            config_kwargs={**options, "num_labels": 1},
            processor_kwargs=dict(options),
            processing_kwargs={"text": {"truncation": TRUNCATION}},
            # A base model with a chat template would read pairs as messages, and the template of pairs replaces it.
            modality_config={"text": {"method": "forward", "method_output_name": "logits"}},
            module_output_name="scores",
        )
    model: Any = transformer.model
    # sentence-transformers turns it off, and the model would be saved that way.
    model.config.use_cache = load_config(settings.model, revision=settings.revision).use_cache
    # Loaded once more without memory for the weights: sentence-transformers does not report missing ones.
    load_model(
        settings.model,
        type(model),
        config=model.config,
        device_map="meta",
        may_lack=("score.",),
        may_add=tuple(name for name in HEADS if name != "score."),
        **options,
    )
    check_finite(model, f"model: {settings.model}")
    tokenizer = reranker_tokenizer(
        load_tokenizer(settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code),
        settings.limit,
        bidirectional=is_bidirectional(model.config),
    )
    transformer.processor = tokenizer
    # Only for a caller without a mask. If padding is the end token, its id says nothing about where a text ends.
    model.config.pad_token_id = None if tokenizer.pad_token_id == end_of(tokenizer) else tokenizer.pad_token_id
    setattr(model.config, CONFIG_KEY, settings.rule.entry())
    # A list-wise score is not a probability, and a sigmoid would make large ones equal.
    return CrossEncoder(modules=[transformer], activation_fn=nn.Identity(), device="cpu")


def end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token at which a pair is read."""
    ids: Any = tokenizer([""], [""])["input_ids"]
    return ids[0][-1]


def backbone_of(reranker: CrossEncoder) -> Any:
    """Return the model inside a reranker, with its adapters if it has any."""
    transformer: Any = reranker[0]
    return transformer.model


def adapt(reranker: CrossEncoder, settings: RerankerSettings) -> None:
    """Put adapters into a reranker; the score is trained whole. See `ssm_zoo.training.adapters.add_adapters`."""
    transformer: Any = reranker[0]
    transformer.model = add_adapters(transformer.model, settings, "SEQ_CLS")
    for parameter in transformer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def finished_reranker(reranker: CrossEncoder, settings: RerankerSettings) -> CrossEncoder:
    """Return the reranker to save: the trained one, or the reloaded base model with the adapters merged.

    Merged weights have the checkpoint's dtype.
    """
    trained: Any = backbone_of(reranker)
    if not isinstance(trained, PeftModel):
        return reranker
    whole = _make(settings, "auto")
    adapt(whole, settings)
    transformer: Any = whole[0]
    whole.to(reranker.device)
    set_peft_model_state_dict(transformer.model, get_peft_model_state_dict(trained, save_embedding_layers=False))
    merged = transformer.model.merge_and_unload()
    merged.score.to(merged.get_input_embeddings().weight.dtype)
    transformer.model = merged
    return whole
