"""Load a base model of the zoo, put peft's adapters on its projections, check that they learn, and merge them."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
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
from ..harness.fingerprint import check_sources, fingerprint, pinned_revision
from ..modeling.heads import ZooForCausalLM
from ..modeling.pretrained import ZooPreTrainedModel
from .settings import FinetuningSettings, LanguageModelSettings
from .trainer import compute_dtype

ALL_LINEAR = "all-linear"

Finetuning = TypeVar("Finetuning", bound=FinetuningSettings)


def pinned(settings: Finetuning, output: Path) -> Finetuning:
    """Return the settings with a Hub model's revision pinned to a commit (`harness.fingerprint.pinned_revision`).

    Raises:
        ValueError: if a revision is given for a folder.
    """
    commit = pinned_revision(settings.model, settings.revision, output, "model")
    return settings.model_copy(update={"revision": commit})


def load_tokenizer(settings: LanguageModelSettings) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer."""
    return load_tokenizer_from(settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code)


def load_base(settings: LanguageModelSettings) -> ZooForCausalLM:
    """Load the base model with the package's own class.

    The weights are float32 if they are trained or if the run computes in float32. Otherwise (under adapters) they keep
    the checkpoint's dtype, or are quantised to 4 bits.

    Raises:
        ValueError: if it is not a causal language model of the zoo, weights are missing, or 4 bits are requested but
            not available on this machine.
    """
    if settings.load_in_4bit:
        _check_4bit()
    compute = compute_dtype(settings.dtype)
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
    # Only the package's own classes: code that comes with the checkpoint is never used.
    config = load_config(settings.model, revision=settings.revision)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not (isinstance(kind, type) and issubclass(kind, ZooForCausalLM)):
        raise ValueError(
            f"`model` must be a causal language model of the zoo, got {settings.model} of model_type "
            f"{config.model_type!r}. Convert it first with `ssm-zoo convert`."
        )
    model = load_model(settings.model, AutoModelForCausalLM, config=config, revision=settings.revision, **options)
    assert isinstance(model, ZooForCausalLM)
    return model


def _check_4bit() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("`load_in_4bit` needs the package bitsandbytes, which is not installed.")
    if not torch.cuda.is_available():
        raise ValueError("`load_in_4bit` needs a CUDA device, and there is none.")


def add_adapters(model: ZooPreTrainedModel, settings: FinetuningSettings, task_type: str = "CAUSAL_LM") -> PeftModel:
    """Put adapters on the layers that the settings name, and freeze all other weights.

    Adapters are float32. A is drawn from torch's random generator and B is zero, so the output is unchanged at first.

    Args:
        model: the base model.
        settings: the targets, rank and other options of the adapters.
        task_type: peft's name for the task.

    Raises:
        ValueError: if a target is not the name of a linear layer.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in linear})
    if settings.target_modules != ALL_LINEAR:
        for target in settings.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in linear):
                raise ValueError(f"`target_modules` must be among {', '.join(names)}, got {target!r}.")
            if target == "lm_head" and model.config.tie_word_embeddings:
                raise ValueError("`target_modules` must not name 'lm_head', whose weight is tied to the embedding.")
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


def check_same_base(settings: FinetuningSettings, output: Path) -> None:
    """Check that a base model to merge adapters into still has the weights that they were trained over.

    Raises:
        ValueError: if they have changed since the run in `output` was started.
    """
    if Path(settings.model).is_dir():  # a commit on the Hub does not change
        check_sources(output, {"model": fingerprint(settings.model)})


def merged(settings: LanguageModelSettings, adapter: Path) -> ZooForCausalLM:
    """Load the base model in the checkpoint's dtype and merge a saved adapter into its weights.

    The base is loaded again because an adapter trained over 4-bit weights is merged into the original ones.
    """
    return put_adapter(_load(settings, dtype="auto"), adapter).merge_and_unload()


# Standard deviation of the B of a probe: small enough to change the model little, far above float32's rounding.
_PROBE_STD = 1e-2
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def adapter_coverage(
    model: PeftModel, batch: Mapping[str, Tensor], compute_loss: Callable[[], Tensor] | None = None
) -> dict[str, Any]:
    """Compute every adapter's gradient on a batch, to find adapters that cannot learn.

    An adapter adds scale * B A x to a layer's output. If a model reads a layer's weight without calling the layer, or
    detaches its output, the adapter never learns, and the falling loss hides it. Its gradient shows it. A new adapter
    has B = 0, which makes the gradient of A zero, so B is drawn at random for this one backward pass.

    The model is in training mode during the pass. Weights, modes and random states are restored afterwards, and
    gradients are cleared.

    Args:
        model: model with adapters, on its device.
        batch: arguments of its forward, including labels, on the same device.
        compute_loss: returns the loss, for a model that does not return one for the batch.

    Returns:
        "adapters": for each its "module", "kind" (the last part of that name), "rank", "parameters", "gradients" (the
        norm for each of its weights, None if it received none) and "dead" (whether a gradient is missing, zero or not
        finite); "dead": the names of the dead adapters; "without_adapter": linear layers that have none, with the
        reason "head", "not a target" or "trained whole"; "trainable_parameters" and "parameters" of the whole model.
    """
    modules = dict(model.get_base_model().named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}
    adapter = model.active_adapters[0]
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
                    parameter.normal_(std=_PROBE_STD, generator=generator)
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
    whole = [name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)]
    inside = [*layers, *whole]
    return {
        "adapters": adapters,
        "dead": [entry["module"] for entry in adapters if entry["dead"]],
        "without_adapter": [
            {"module": name, "reason": "head" if module is head else "not a target"}
            for name, module in modules.items()
            # A wrapped layer and its adapter's own matrices are below the layer that carries the adapter.
            if isinstance(module, nn.Linear) and not any(f"{name}.".startswith(f"{carrier}.") for carrier in inside)
        ]
        + [{"module": name, "reason": "trained whole"} for name in whole],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _weights(layer: LoraLayer, adapter: str) -> dict[str, nn.Parameter]:
    """Return the weights of a layer's adapter by the names in `_PARTS`."""
    found = {part: getattr(layer, part)[adapter] for part in _PARTS if adapter in getattr(layer, part, {})}
    return {part: each if isinstance(each, nn.Parameter) else each.weight for part, each in found.items()}


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
    """Print a row for every kind of projection, then the names of dead adapters and of layers without an adapter.

    |dA| and |dB| are the smallest norms of the gradients of A and B among the adapters of a row.
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
        console.print(Text(f"dead adapter: {name} receives no gradient and will not learn", style="bold red"))
    bare: dict[str, list[str]] = {}
    for entry in coverage["without_adapter"]:
        bare.setdefault(entry["reason"], []).append(entry["module"])
    for reason, names in bare.items():
        console.print(Text(f"without an adapter ({reason}): {', '.join(names)}"))


def _smallest(entries: list[dict[str, Any]], part: str) -> str:
    norms = [norm or 0.0 for entry in entries for name, norm in entry["gradients"].items() if name.endswith(part)]
    return f"{min(norms):.2e}" if norms else ""
