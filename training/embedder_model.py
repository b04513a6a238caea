"""Models of the zoo as embedders to be trained, with adapters or as a whole, and as what is saved in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import MODEL_MAPPING

from ..conversion.load_model import load_config
from ..evaluation.embedder import make_embedder
from ..modeling.backbone import ZooModel
from .adapters import add_adapters
from .embedder_settings import EmbedderSettings
from .trainer import compute_dtype

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_TASK = "FEATURE_EXTRACTION"


def load_embedder_to_train(settings: EmbedderSettings) -> SentenceTransformer:
    """The base model, by the package's own class and without its head, with a pooling; on the CPU.

    Its weights are float32 where they are trained or computing is in float32; otherwise, under adapters, they keep the
    checkpoint's dtype.

    Raises:
        ValueError: if it is no model of the zoo, or weights are missing.
    """
    _check_backbone(settings)
    master = settings.method == "full" or compute_dtype(settings) == torch.float32
    return _make(settings, "cpu", torch.float32 if master else "auto")


def _make(settings: EmbedderSettings, device: str | torch.device, dtype: torch.dtype | str) -> SentenceTransformer:
    return make_embedder(
        settings.model,
        revision=settings.revision,
        pooling=settings.pooling,
        max_tokens=settings.max_tokens,
        query_prompt=settings.query_prompt,
        document_prompt=settings.document_prompt,
        device=device,
        dtype=dtype,
        trust_remote_code=settings.trust_remote_code,
    )


def _check_backbone(settings: EmbedderSettings) -> None:
    config = load_config(settings.model, revision=settings.revision)
    kind = MODEL_MAPPING.get(type(config), None)
    if not (isinstance(kind, type) and issubclass(kind, ZooModel)):
        raise ValueError(f"model: {settings.model} is of model_type {config.model_type!r}; accepted: one of the zoo")


def backbone_of(embedder: SentenceTransformer) -> ZooModel | PeftModel:
    """The model inside, or the one with adapters around it."""
    transformer: Any = embedder[0]
    return transformer.model


def adapt(embedder: SentenceTransformer, settings: EmbedderSettings) -> None:
    """Put adapters into an embedder; see `ssm_zoo.training.adapters.add_adapters`."""
    transformer: Any = embedder[0]
    transformer.model = add_adapters(transformer.model, settings, _TASK)


def finished_embedder(embedder: SentenceTransformer, settings: EmbedderSettings) -> SentenceTransformer:
    """What is saved of a trained embedder: itself, or the base model, read anew, with the adapters in its weights.

    These are in the dtype of the checkpoint.
    """
    trained = backbone_of(embedder)
    if not isinstance(trained, PeftModel):
        return embedder
    whole = _make(settings, embedder.device, "auto")
    adapt(whole, settings)
    transformer: Any = whole[0]
    transformer.model.to(embedder.device)
    set_peft_model_state_dict(transformer.model, get_peft_model_state_dict(trained, save_embedding_layers=False))
    transformer.model = transformer.model.merge_and_unload()
    return whole
