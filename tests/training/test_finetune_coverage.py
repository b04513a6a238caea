"""Every adapter of every family learns, and one that does not is found."""

import io
from typing import Any

import pytest
import torch
from families import FAMILIES, draw_ids, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor, nn

from ssm_zoo.training.adapters import adapter_coverage, print_coverage
from ssm_zoo.training.packing import PackingCollator

BATCH = PackingCollator(24)([{"input_ids": draw_ids(length, seed=length)} for length in (11, 9, 5)])


def adapted(model: Any, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=3, **({"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options))
    found = get_peft_model(model, config)
    assert isinstance(found, PeftModel)
    return found


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


class Detached(nn.Module):
    """A layer whose output carries no gradient back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.layer(hidden_states).detach()


class RawWeight(nn.Module):
    """Uses a layer's weight and not the layer, as fused kernels do; but only in training."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.training:
            return nn.functional.linear(hidden_states, self.layer.get_parameter("weight"))
        return self.layer(hidden_states)


class Silenced(nn.Module):
    """A layer whose output counts for nothing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 0 * self.layer(hidden_states)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_projection_carries_an_adapter_that_learns(name: str, dora: bool) -> None:
    model = make_model(name)
    layers = linear_layers(model)
    coverage = adapter_coverage(adapted(model, use_dora=dora), BATCH)
    assert [entry["module"] for entry in coverage["adapters"]] == [layer for layer in layers if layer != "lm_head"]
    assert coverage["without_adapter"] == [{"module": "lm_head", "reason": "head"}]
    assert coverage["dead"] == []
    parts = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if dora else set())
    for entry in coverage["adapters"]:
        assert entry["gradients"].keys() == parts
        assert all(norm > 0 for norm in entry["gradients"].values()), entry["module"]
        assert entry["rank"] == 3


def test_it_leaves_no_trace() -> None:
    model = adapted(make_model("all-four"), lora_dropout=0.5)
    model.eval()
    next(iter(model.modules())).training = True  # modes that are mixed come back mixed
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    adapter_coverage(model, BATCH)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("wrapper", [Detached, RawWeight, Silenced])
def test_a_dead_adapter_is_found_by_name(wrapper: type[nn.Module]) -> None:
    model = make_model("mamba2")
    mixer = model.backbone.layers[1].mixer
    mixer.out_proj = wrapper(mixer.out_proj)
    dead = "backbone.layers.1.mixer.out_proj.layer"
    # The others let nothing back to the mixer's input projection either.
    expected = [dead] if wrapper is RawWeight else ["backbone.layers.1.mixer.in_proj", dead]
    coverage = adapter_coverage(adapted(model), BATCH)
    assert coverage["dead"] == expected
    entry = next(entry for entry in coverage["adapters"] if entry["module"] == dead)
    assert not any(entry["gradients"].values())
    printed = io.StringIO()
    print_coverage(coverage, Console(file=printed, width=120))
    assert f"dead adapter: {dead} receives no gradient" in printed.getvalue()


def test_layers_without_an_adapter_are_named() -> None:
    coverage = adapter_coverage(adapted(make_model("mamba2"), target_modules=["in_proj"]), BATCH)
    assert [entry["kind"] for entry in coverage["adapters"]] == ["in_proj"] * 2
    assert coverage["without_adapter"] == [
        {"module": "backbone.layers.0.mixer.out_proj", "reason": "not a target"},
        {"module": "backbone.layers.1.mixer.out_proj", "reason": "not a target"},
        {"module": "lm_head", "reason": "head"},
    ]
    printed = io.StringIO()
    print_coverage(coverage, Console(file=printed, width=120))
    text = printed.getvalue()
    assert "without an adapter (not a target): backbone.layers.0.mixer.out_proj, backbone.layers.1" in text
    assert "dead adapter" not in text
    weights = sum(entry["parameters"] for entry in coverage["adapters"])
    assert coverage["trainable_parameters"] == weights
    assert f"{weights:,} of {coverage['parameters']:,} parameters are trained" in text
