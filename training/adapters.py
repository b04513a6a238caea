"""Base models of the zoo with peft's adapters on their projections, which of them learn, and merged again."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
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


# Small enough to leave the model what it is, far above what float32 loses.
_PROBE = 1e-2
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def adapter_coverage(
    model: PeftModel, batch: Mapping[str, Tensor], compute_loss: Callable[[], Tensor] | None = None
) -> dict[str, Any]:
    """Look at every adapter's gradient for a batch, with B drawn at random for that one backward.

    An adapter adds scale * B A x to a layer's output. Where a model uses a layer's weight and not the layer, or
    detaches what comes out, the adapter is trained in vain: nothing says so, and the loss falls by the others. Its
    gradient does say so. A fresh adapter has B = 0, and then A has no gradient by itself; hence the random B.

    In training mode, since a model may compute differently there. Weights, gradients, modes and random numbers are
    afterwards as they were, the gradients gone.

    Args:
        model: with adapters, on its device.
        batch: arguments of its forward, with labels, on the same device.
        compute_loss: gives the loss, where the model itself gives none for the batch.

    Returns:
        "adapters": for each its "module", "kind" (the last part of that name), "rank", "parameters", "gradients" (the
        norm for each of its weights, None where it got none) and "dead" (whether one of them is none, zero or not
        finite); "dead": the names of those; "without_adapter": linear layers without one, with the reason "head" or
        "not a target"; "trainable_parameters" and "parameters" of the whole model.
    """
    layers, adapter = _adapted_layers(model), model.active_adapters[0]
    weights = {name: _weights(layer, adapter) for name, layer in layers.items()}
    outer = [
        parameter
        for parts in weights.values()
        for part, parameter in parts.items()
        if part in ("lora_B", "lora_embedding_B")
    ]
    before = [parameter.detach().clone() for parameter in outer]
    modes = [(module, module.training) for module in model.modules()]
    device = next(iter(batch.values())).device
    generator = torch.Generator(device).manual_seed(0)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with torch.no_grad():
                for parameter in outer:
                    parameter.normal_(std=_PROBE, generator=generator)
            model.train()
            model.zero_grad()
            loss = model(**batch).loss if compute_loss is None else compute_loss()
            loss.backward()
        adapters = [_entry(name, parts) for name, parts in weights.items()]
    finally:
        with torch.no_grad():
            for parameter, value in zip(outer, before, strict=True):
                parameter.copy_(value)
        model.zero_grad()
        for module, training in modes:
            module.training = training
    head = model.get_base_model().get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return {
        "adapters": adapters,
        "dead": [entry["module"] for entry in adapters if entry["dead"]],
        "without_adapter": [
            {"module": name, "reason": "head" if module is head else "not a target"}
            for name, module in model.get_base_model().named_modules()
            if isinstance(module, nn.Linear) and not any(_within(name, carrier) for carrier in layers)
        ],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _adapted_layers(model: PeftModel) -> dict[str, LoraLayer]:
    found = model.get_base_model().named_modules()
    return {name: module for name, module in found if isinstance(module, LoraLayer)}


def _within(name: str, carrier: str) -> bool:
    """Whether a module is a part of a layer with an adapter: that layer itself, and the two of the adapter."""
    return name == carrier or name.startswith(f"{carrier}.")


def _weights(layer: LoraLayer, adapter: str) -> dict[str, nn.Parameter]:
    """The layer's trained tensors by what they are."""
    found = {}
    for part in _PARTS:
        holder = getattr(layer, part, {})
        if adapter in holder:
            held = holder[adapter]
            found[part] = held if isinstance(held, nn.Parameter) else held.weight
    return found


def _entry(name: str, parts: dict[str, nn.Parameter]) -> dict[str, Any]:
    gradients = {part: None if p.grad is None else p.grad.float().norm().item() for part, p in parts.items()}
    alive = all(norm is not None and 0 < norm < float("inf") for norm in gradients.values())
    rank = next(parameter.shape[0] for part, parameter in parts.items() if part.endswith("_A"))
    return {
        "module": name,
        "kind": name.rpartition(".")[2],
        "rank": rank,
        "parameters": sum(p.numel() for p in parts.values()),
        "gradients": gradients,
        "dead": not alive,
    }


def print_coverage(coverage: Mapping[str, Any], console: Console) -> None:
    """Print a row for every kind of projection, then the dead adapters and the layers without one by name.

    |dA| and |dB| are norms of gradients: the smallest among the adapters of the row.
    """
    table = Table(title="Adapters", title_justify="left")
    table.add_column("projection")
    for heading in ("layers", "rank", "parameters", "least |dA|", "least |dB|", "dead"):
        table.add_column(heading, justify="right", no_wrap=True)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in coverage["adapters"]:
        kinds.setdefault(entry["kind"], []).append(entry)
    for kind, entries in kinds.items():
        dead = sum(entry["dead"] for entry in entries)
        cells = [kind, str(len(entries)), str(entries[0]["rank"]), f"{sum(entry['parameters'] for entry in entries):,}"]
        cells += [_smallest(entries, "_A"), _smallest(entries, "_B"), str(dead)]
        table.add_row(*map(Text, cells), style="bold red" if dead else "")
    console.print(table)
    trained, total = coverage["trainable_parameters"], coverage["parameters"]
    console.print(Text(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"))
    for name in coverage["dead"]:
        console.print(Text(f"dead adapter: {name} gets no gradient and will not learn", style="bold red"))
    bare: dict[str, list[str]] = {}
    for entry in coverage["without_adapter"]:
        bare.setdefault(entry["reason"], []).append(entry["module"])
    for reason, names in bare.items():
        console.print(Text(f"without an adapter ({reason}): {', '.join(names)}"))


def _smallest(entries: list[dict[str, Any]], part: str) -> str:
    norms = [norm or 0.0 for entry in entries for name, norm in entry["gradients"].items() if name.endswith(part)]
    return f"{min(norms):.2e}" if norms else ""
