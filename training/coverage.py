"""Which layers carry adapters, and whether each of them learns.

An adapter adds scale * B A x to a layer's output. Where a model uses a layer's weight and not the layer, or detaches
what comes out, the adapter is trained in vain: nothing says so, and the loss falls by the others. Its gradient does
say so. A fresh adapter has B = 0, and then A has no gradient by itself; so B is moved a little for one backward.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

# Small enough to leave the model what it is, far above what float32 loses.
_PROBE = 1e-2
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def adapter_coverage(
    model: PeftModel, batch: Mapping[str, Tensor], compute_loss: Callable[[], Tensor] | None = None
) -> dict[str, Any]:
    """Look at every adapter's gradient for a batch, with B drawn at random for that one backward.

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
