"""What transformers' and peft's own tests (`make test-contracts`) found, in small."""

import math
import warnings
from typing import Any

import pytest
import torch
from families import ENCODERS, FAMILIES, draw_ids, make_config, make_head, make_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, GenerationMixin
from transformers.cache_utils import DynamicCache

from ssm_zoo.modeling import ZooMamba2Config
from ssm_zoo.modeling.cache import CACHE_FIELD
from tolerances import TOLERANCES

IDS = draw_ids(3, 9)
deprecates = pytest.mark.skipif(CACHE_FIELD != "cache", reason="transformers before 5.24 has the old name alone")


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    rtol, atol = TOLERANCES[torch.float32]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def linear_inputs(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes that the linear layers see in a forward over `IDS`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, arguments, name=name: shapes.__setitem__(name, tuple(arguments[0].shape))
            )
    with torch.no_grad():
        model(IDS)
    return shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_every_projection_sees_rows_and_places(name: str) -> None:
    shapes = linear_inputs(make_model(name))
    assert shapes and {shape[:2] for shape in shapes.values()} == {tuple(IDS.shape)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_with_an_adapter_for_each_row_is_each_adapter_alone(name: str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model: Any = get_peft_model(make_model(name), config, adapter_name="first")
    model.add_adapter("second", config)
    model.eval()
    chosen = ["first", "__base__", "second"]
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=chosen).logits
        alone = {}
        for adapter in ("first", "second"):
            model.set_adapter(adapter)
            alone[adapter] = model(input_ids=IDS).logits
        with model.disable_adapter():
            alone["__base__"] = model(input_ids=IDS).logits
    assert (alone["first"] - alone["second"]).abs().max() > 1e-2
    for row, adapter in enumerate(chosen):
        assert_close(mixed[row], alone[adapter][row])


@pytest.mark.parametrize("name", ["taipan", "taipan-options", "selective-mamba2"])
def test_an_adapter_behind_its_invocation_runs_over_selected_tokens(name: str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", alora_invocation_tokens=[5]
    )
    ids = IDS.masked_fill(IDS == 5, 6)
    ids[:, 4] = 5
    model: Any = get_peft_model(make_model(name), config).eval()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
    assert_close(adapted[:, :4], plain[:, :4])
    assert (adapted[:, 4:] - plain[:, 4:]).abs().max() > 1e-2


@deprecates
@pytest.mark.parametrize("old", ["past_key_values", "cache_params"])
@pytest.mark.parametrize("name", ["mamba", "taipan"])
def test_an_old_name_of_the_cache_warns_and_the_new_one_does_not(name: str, old: str) -> None:
    models = [make_model(name), make_head(AutoModelForSequenceClassification, name, pad_token_id=0)]
    for model in [*models, models[0].backbone]:
        with torch.no_grad(), pytest.warns(FutureWarning, match=f"`{old}` is deprecated.*pass `cache`") as caught:
            old_output = model(IDS, **{old: DynamicCache(config=model.config)})
        assert sum("is deprecated" in str(warning.message) for warning in caught) == 1
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            new_output = model(IDS, cache=DynamicCache(config=model.config))
        assert torch.equal(old_output[0], new_output[0])


@deprecates
def test_generate_uses_the_new_name_of_the_cache() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        make_model("jamba").generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS])
def test_what_looks_like_a_width_of_initialisation_is_one_number(name: str) -> None:
    for key, value in make_config(name).to_dict().items():
        if "init_range" in key or "initializer_range" in key or key.endswith("_std"):
            assert isinstance(value, float), key


def test_configurations_with_the_old_name_of_the_initial_decay_rates_load() -> None:
    config = ZooMamba2Config.from_dict({"hidden_size": 16, "head_dim": 8, "A_init_range": [2.0, 3.0]})
    assert config.A_init_bounds == [2.0, 3.0] == config.A_init_range
    assert "A_init_range" not in config.to_dict()
    assert ZooMamba2Config.from_dict({"time_step_limit": [0.0, math.inf]}).A_init_bounds == (1.0, 16.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_class_that_generates_says_so_itself(name: str) -> None:
    assert GenerationMixin in FAMILIES[name].causal_lm.__bases__
