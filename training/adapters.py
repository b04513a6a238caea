"""Base models of the zoo with peft's adapters on their projections, and merged again."""

import importlib.util
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from ..conversion.load_model import load_config, load_model, put_adapter
from ..conversion.load_model import load_tokenizer as load_tokenizer_from
from ..harness.fingerprint import pinned_revision
from ..modeling.heads import ZooForCausalLM
from ..modeling.pretrained import ZooPreTrainedModel
from .settings import FinetuningSettings, LanguageModelSettings
from .trainer import compute_dtype

ALL_LINEAR = "all-linear"

Finetuning = TypeVar("Finetuning", bound=FinetuningSettings)


def pinned(settings: Finetuning, output: Path) -> Finetuning:
    """The settings with a Hub model's revision as a commit, see `ssm_zoo.harness.fingerprint.pinned_revision`.

    Raises:
        ValueError: if there is a revision of a folder.
    """
    commit = pinned_revision(settings.model, settings.revision, output, "model")
    return settings.model_copy(update={"revision": commit})


def load_tokenizer(settings: LanguageModelSettings) -> PreTrainedTokenizerBase:
    """The base model's tokenizer."""
    return load_tokenizer_from(settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code)


def load_base(settings: LanguageModelSettings) -> ZooForCausalLM:
    """The base model, by the package's own class.

    Its weights are float32 where they are trained or computing is in float32; otherwise, under adapters, they keep the
    checkpoint's dtype, or have 4 bits.

    Raises:
        ValueError: if it is no causal language model of the zoo, weights are missing, or 4 bits are asked for where
            they are not to be had.
    """
    if settings.load_in_4bit:
        _check_4bit()
    compute = compute_dtype(settings)
    master = settings.method == "full" or compute == torch.float32
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["lm_head"],
    )
    model = _load(
        settings,
        dtype=torch.float32 if master else "auto",
        **({"quantization_config": quantisation} if settings.load_in_4bit else {}),
    )
    if settings.load_in_4bit:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.gradient_checkpointing)
    return model


def _load(settings: LanguageModelSettings, **options: Any) -> ZooForCausalLM:
    # The package's own class or none: code that the source brings would not be used.
    config = load_config(settings.model, revision=settings.revision)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not (isinstance(kind, type) and issubclass(kind, ZooForCausalLM)):
        raise ValueError(
            f"model: {settings.model} is of model_type {config.model_type!r}; accepted: a causal language model of the "
            "zoo"
        )
    model = load_model(settings.model, AutoModelForCausalLM, config=config, revision=settings.revision, **options)
    assert isinstance(model, ZooForCausalLM)
    return model


def _check_4bit() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit: needs the package bitsandbytes, which is not installed")
    if not torch.cuda.is_available():
        raise ValueError("load_in_4bit: needs a CUDA device; there is none")


def add_adapters(model: ZooPreTrainedModel, settings: FinetuningSettings, task_type: str = "CAUSAL_LM") -> PeftModel:
    """The model with adapters on the layers that the settings name; all else is frozen.

    Adapters are float32. The initial A are drawn from torch's generator; B is zero, so that nothing changes yet.

    Args:
        model: to put adapters into.
        settings: which.
        task_type: what peft calls what the model does.

    Raises:
        ValueError: if a name is not that of a linear layer.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in linear})
    if settings.target_modules != ALL_LINEAR:
        for target in settings.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in linear):
                raise ValueError(f"target_modules: got {target!r}; accepted: {', '.join(names)}")
            if target == "lm_head" and model.config.tie_word_embeddings:
                raise ValueError("target_modules: got 'lm_head', whose weight is the embeddings' too; accepted: others")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        use_dora=settings.dora,
        target_modules=settings.target_modules,
        task_type=task_type,
    )
    config.revision = settings.revision
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def merged(settings: LanguageModelSettings, adapter: Path) -> ZooForCausalLM:
    """A plain model that computes what the base model with a saved adapter does, in the dtype of the checkpoint.

    The base is loaded anew, so that an adapter that was trained over 4 bits goes into the weights themselves.
    """
    return put_adapter(_load(settings, dtype="auto"), adapter).merge_and_unload()
