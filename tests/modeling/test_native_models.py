"""transformers' own models on our ops: values, gradients, caches, adapters, and replacing and restoring of classes."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from native_configurations import SIZES, VOCABULARY, cache_name, tiny_native
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.utils import prune
from transformers import PreTrainedModel
from transformers.models.mamba import modeling_mamba

from ssm_zoo.modeling.native_models import (
    MODEL_TYPES,
    accelerate_transformers,
    accelerated_model_types,
    restore_transformers,
)

TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def models() -> Callable[[str], PreTrainedModel]:
    made: dict[str, PreTrainedModel] = {}

    def get(model_type: str) -> PreTrainedModel:
        if model_type not in made:
            made[model_type] = tiny_native(model_type)
        return made[model_type]

    return get


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def trained(model: PreTrainedModel, **inputs: Any) -> dict[str, Tensor]:
    """Return the logits of a training forward and the gradients of all parameters that get one."""
    model.train()
    logits = model(**inputs).logits
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    if (mask := inputs.get("attention_mask")) is not None:
        logits, cotangent = logits * mask[..., None], cotangent * mask[..., None]
    model.zero_grad()
    (logits * cotangent).mean().backward()
    model.eval()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"logits": logits.detach(), **found}


def steps(model: PreTrainedModel, row: Tensor, sizes: list[int]) -> Tensor:
    """Return the logits of a row that is fed in pieces of the given sizes, with a cache."""
    name, cache, found, past = cache_name(model), None, [], 0
    with torch.no_grad():
        for part in row.split(sizes, dim=1):
            positions = torch.arange(past, past + part.shape[1])[None].expand(len(row), -1)
            output = model(part, position_ids=positions, use_cache=True, **{name: cache})
            cache, past = output[name], past + part.shape[1]
            found.append(output.logits)
    return torch.cat(found, dim=1)


def test_every_model_type_has_a_tiny_model() -> None:
    assert set(SIZES) == set(MODEL_TYPES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_and_all_gradients_are_those_of_transformers(
    model_type: str, models: Callable[[str], PreTrainedModel]
) -> None:
    model, rows = models(model_type), tokens(2, 13)
    left, right = torch.ones_like(rows), torch.ones_like(rows)
    left[0, :4], right[1, 9:] = 0, 0
    for mask in (None, left, right):
        expected = trained(model, input_ids=rows, attention_mask=mask)
        with accelerate_transformers([model_type]):
            torch.testing.assert_close(trained(model, input_ids=rows, attention_mask=mask), expected, **TOLERANCE)
    assert any("A_log" in name for name in expected) and any("dt_" in name for name in expected)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_cached_tokens_one_by_one_or_several_equal_the_whole_row(
    model_type: str, models: Callable[[str], PreTrainedModel]
) -> None:
    model, rows = models(model_type), tokens(2, 13)
    with torch.no_grad():
        whole = model(rows, use_cache=False).logits
    torch.testing.assert_close(steps(model, rows, [5] + [1] * 8), whole, **TOLERANCE)  # transformers itself
    with accelerate_transformers([model_type]):
        torch.testing.assert_close(steps(model, rows, [1] * 13), whole, **TOLERANCE)
        torch.testing.assert_close(steps(model, rows, [2, 5, 1, 1, 4]), whole, **TOLERANCE)


@pytest.mark.parametrize("model_type", ["falcon_mamba", "bamba"])
def test_beam_search_finds_the_sequences_that_transformers_finds(
    model_type: str, models: Callable[[str], PreTrainedModel]
) -> None:
    model, rows = models(model_type), tokens(2, 6)
    rows[0, :2] = 0
    options: dict[str, Any] = {"attention_mask": (rows != 0).long(), "num_beams": 3, "max_new_tokens": 6}
    options |= {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(rows, **options)
    with accelerate_transformers([model_type]):
        found = model.generate(rows, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, **TOLERANCE)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("size", [1, 4])
def test_the_mask_of_tokens_after_a_cached_prefix_may_cover_the_prefix(
    size: int, model_type: str, models: Callable[[str], PreTrainedModel]
) -> None:
    model, rows = models(model_type), tokens(2, 6)
    mask = torch.ones_like(rows)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    name, first = cache_name(model), rows.shape[1] - size
    with accelerate_transformers([model_type]), torch.no_grad():
        expected = model(rows, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1:]
        given = {"attention_mask": mask[:, :first], "position_ids": positions[:, :first]}
        cache = model(rows[:, :first], use_cache=True, **given)[name]
        given = {"attention_mask": mask, "position_ids": positions[:, first:], name: cache}
        found = model(rows[:, first:], use_cache=True, **given).logits
    assert found.shape[1] == size
    torch.testing.assert_close(found[:, -1:], expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.float32], ids=str)
def test_a_mask_of_any_dtype_serves_a_cache(dtype: torch.dtype, models: Callable[[str], PreTrainedModel]) -> None:
    model, rows, found = models("mamba"), tokens(2, 5), []
    mask = torch.ones_like(rows)
    mask[0, :3] = 0  # fewer tokens than the convolution takes
    name = cache_name(model)
    for given in (mask, mask.to(dtype)):
        with accelerate_transformers(["mamba"]), torch.no_grad():
            output = model(rows, attention_mask=given, use_cache=True)
            found.append(model(tokens(2, 1), use_cache=True, **{name: output[name]}).logits)
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"use_mambapy": True, "use_associative_scan": False}])
def test_other_activations_and_algorithms_give_the_same_values(changes: dict[str, Any]) -> None:
    model, rows = tiny_native("mamba", **changes), tokens(2, 9)
    expected = trained(model, input_ids=rows)
    with accelerate_transformers(["mamba"]):
        torch.testing.assert_close(trained(model, input_ids=rows), expected, **TOLERANCE)
        cached = steps(model, rows, [3, 1, 1, 4])
    torch.testing.assert_close(cached, expected["logits"], **TOLERANCE)


def test_falcon_h1_gates_with_its_norm_too() -> None:
    model, rows = tiny_native("falcon_h1", mamba_rms_norm=True), tokens(1, 9)
    expected = trained(model, input_ids=rows)
    with accelerate_transformers(["falcon_h1"]):
        torch.testing.assert_close(trained(model, input_ids=rows), expected, **TOLERANCE)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "zamba"])
def test_weights_of_16_bits_are_as_close_to_float32_as_with_transformers(
    model_type: str, models: Callable[[str], PreTrainedModel]
) -> None:
    rows, half = tokens(2, 13), copy.deepcopy(models(model_type)).bfloat16()
    exact = copy.deepcopy(half).float()
    with torch.no_grad():
        wanted, theirs = exact(rows).logits, half(rows).logits.float()
        with accelerate_transformers([model_type]):
            ours = half(rows).logits.float()
            cached = steps(half, rows, [4, 3] + [1] * 6).float()
    allowed = 1.5 * (theirs - wanted).square().mean().sqrt()
    assert (ours - wanted).square().mean().sqrt() < allowed
    assert (cached - wanted).square().mean().sqrt() < allowed


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("mamba", ["in_proj", "x_proj", "dt_proj", "out_proj"]),
        ("jamba", ["in_proj", "x_proj", "dt_proj", "out_proj"]),
        ("mamba2", ["in_proj", "out_proj"]),
    ],
)
def test_an_adapter_on_any_projection_has_an_effect_and_gradients(model_type: str, targets: list[str]) -> None:
    """peft itself refuses out_proj of some of these models, because of the fused functions, but not of their layers."""
    rows = tokens(1, 9)
    for target in targets:
        model = tiny_native(model_type)
        with accelerate_transformers([model_type]):
            plain = model(rows).logits.detach()
            inject_adapter_in_model(
                LoraConfig(target_modules=[target], r=2, init_lora_weights=False), model.base_model.layers
            )
            found = trained(model, input_ids=rows)
        assert (found["logits"] - plain).abs().max() > 1e-3, target
        adapters = [each for each in model.modules() if isinstance(each, LoraLayer)]
        factors = [name for name in found if "lora_" in name]
        assert len(factors) == 2 * len(adapters) > 0
        assert all(found[name].abs().max() > 0 for name in factors), target
        for adapter in adapters:
            adapter.merge()
        torch.testing.assert_close(model(rows).logits, found["logits"], **TOLERANCE)  # transformers, merged weights


def test_a_pruned_projection_of_step_sizes_is_the_pruned_one(models: Callable[[str], PreTrainedModel]) -> None:
    model = copy.deepcopy(models("mamba"))
    layers, rows = [layer.mixer.dt_proj for layer in model.base_model.layers], tokens(1, 9)
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=0.5)  # the weight is made of `weight_orig` in every call
        with torch.no_grad():
            layer.weight_orig.mul_(3)  # as an optimiser changes it
    with accelerate_transformers(["mamba"]):
        found = model(rows).logits
    for layer in layers:
        prune.remove(layer, "weight")
    torch.testing.assert_close(found, model(rows).logits, **TOLERANCE)


def test_an_adapter_on_the_convolution_is_refused(models: Callable[[str], PreTrainedModel]) -> None:
    model = copy.deepcopy(models("mamba"))
    inject_adapter_in_model(LoraConfig(target_modules=["conv1d"], r=64), model.base_model.layers)
    with accelerate_transformers(["mamba"]), pytest.raises(ValueError, match=r"conv1d must not have an adapter.*Leave"):
        model(tokens(1, 5))


def test_weights_that_are_read_without_their_module_are_brought_by_accelerates_hooks() -> None:
    model, brought = tiny_native("mamba"), []

    class Hook(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            brought.append(type(module))
            return args, kwargs

    for layer in model.base_model.layers:
        for name in ("conv1d", "dt_proj"):
            add_hook_to_module(layer.mixer.get_submodule(name), Hook())
    with accelerate_transformers(["mamba"]):
        model(tokens(1, 5))
    assert brought == 2 * [torch.nn.Conv1d, torch.nn.Linear]


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "mamba2"])
def test_twenty_training_steps_have_the_losses_of_transformers(model_type: str) -> None:
    rows, losses = tokens(2, 12), []
    for accelerated in (False, True):
        model = tiny_native(model_type).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        with accelerate_transformers([model_type] if accelerated else []):
            for _ in range(20):
                loss = model(rows, labels=rows).loss
                loss.backward()
                optimiser.step()
                optimiser.zero_grad()
                losses.append(loss.item())
    assert losses[19] < losses[0] - 0.5
    torch.testing.assert_close(losses[20:], losses[:20], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_packed_rows_compile_without_graph_breaks(model_type: str, models: Callable[[str], PreTrainedModel]) -> None:
    model, rows = models(model_type), tokens(2, 12)
    packed = torch.tensor([0] * 5 + [1] * 7).expand(2, -1)
    with accelerate_transformers([model_type]), torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = compiled(rows, use_cache=False, seq_idx=packed).logits
        torch.testing.assert_close(found, model(rows, seq_idx=packed).logits, **TOLERANCE)


def test_an_exported_program_has_the_values_of_the_model(models: Callable[[str], PreTrainedModel]) -> None:
    model, rows = models("mamba"), tokens(2, 12)
    with accelerate_transformers(["mamba"]), torch.no_grad():
        program = torch.export.export(model, (rows,), {"use_cache": False})
        torch.testing.assert_close(program.module()(rows, use_cache=False).logits, model(rows).logits, **TOLERANCE)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_gradients_flow_through_the_cache(model_type: str, models: Callable[[str], PreTrainedModel]) -> None:
    """transformers' own steps overwrite what their backward needs."""
    model, rows, found = models(model_type), tokens(1, 6), []
    name = cache_name(model)
    with accelerate_transformers([model_type]):
        for sizes in ([6], [3, 1, 2]):
            cache, logits = None, []
            for part in rows.split(sizes, dim=1):
                output = model(part, use_cache=True, **{name: cache})
                cache = output[name]
                logits.append(output.logits)
            model.zero_grad()
            torch.cat(logits, dim=1).square().mean().backward()
            found.append({key: each.grad for key, each in model.named_parameters() if each.grad is not None})
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_one_trainable_parameter_gets_its_gradient_after_a_cached_prefix(
    model_type: str, models: Callable[[str], PreTrainedModel]
) -> None:
    """If nothing but step sizes of the first layer is trained, neither its inputs nor its state require gradients."""
    rows, found = tokens(1, 6), []
    for all_trained in (True, False):
        model = copy.deepcopy(models(model_type)).requires_grad_(all_trained)
        mixer, name = model.base_model.layers[0].mixer, cache_name(model)
        bias = (mixer.dt_proj.bias if model_type == "mamba" else mixer.dt_bias).requires_grad_()
        with accelerate_transformers([model_type]):
            with torch.no_grad():
                cache = model(rows[:, :3], use_cache=True)[name]
            loss = model(rows[:, 3:], use_cache=True, **{name: cache}).logits.square().mean()
        found.append(torch.autograd.grad(loss, bias)[0])
    torch.testing.assert_close(found[1], found[0], **TOLERANCE)


@pytest.mark.parametrize("kind", ["forward", "backward", "replaced"])
def test_a_gated_norm_that_is_watched_or_replaced_is_called(
    kind: str, models: Callable[[str], PreTrainedModel]
) -> None:
    model, called = copy.deepcopy(models("mamba2")), []
    norm = model.base_model.layers[0].mixer.norm
    if kind == "forward":
        norm.register_forward_hook(lambda *_: called.append(kind))
    elif kind == "backward":
        norm.register_full_backward_hook(lambda *_: called.append(kind))
    else:
        own = norm.forward
        norm.forward = lambda y, gate: called.append(kind) or own(y, gate)
    with accelerate_transformers(["mamba2"]):
        model(tokens(1, 5)).logits.sum().backward()
    assert called == [kind]


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "zamba"])
def test_autocast_keeps_scans_in_float32(model_type: str, models: Callable[[str], PreTrainedModel]) -> None:
    model, rows = models(model_type), tokens(2, 13)
    with torch.no_grad():
        wanted = model(rows).logits
        with torch.autocast("cpu", torch.bfloat16):
            theirs = model(rows).logits.float()
            with accelerate_transformers([model_type]):
                ours = model(rows).logits.float()
    assert 0 < (ours - wanted).square().mean() < 1.5 * (theirs - wanted).square().mean()


def test_classes_are_replaced_once_and_put_back_by_whoever_replaced_them() -> None:
    original = modeling_mamba.MambaMixer.forward
    signature = inspect.signature(modeling_mamba.MambaForCausalLM.forward)
    with accelerate_transformers(["mamba"]) as outer:
        assert outer.model_types == ("mamba",) and outer.classes == ("MambaMixer",)
        assert accelerated_model_types() == ("mamba",)
        ours = modeling_mamba.MambaMixer.forward
        assert ours is not original
        assert inspect.signature(modeling_mamba.MambaForCausalLM.forward) == signature
        with accelerate_transformers(["mamba", "jamba"]) as inner:
            assert inner.model_types == ("jamba",) and inner.classes == ("MambaMixer", "JambaMambaMixer")
            assert modeling_mamba.MambaMixer.forward is ours
        assert accelerated_model_types() == ("mamba",)
    assert modeling_mamba.MambaMixer.forward is original and not accelerated_model_types()
    accelerate_transformers()
    try:
        assert accelerated_model_types() == MODEL_TYPES
    finally:
        restore_transformers()
    assert modeling_mamba.MambaMixer.forward is original and not accelerated_model_types()


def test_wrong_model_types_are_refused_before_anything_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"model_types must be some of bamba, .*, got 'llama'"):
        accelerate_transformers(["mamba", "llama"])
    with pytest.raises(ValueError, match="model_types must be a list of model types, got the string 'mamba'"):
        accelerate_transformers("mamba")
    monkeypatch.delattr(modeling_mamba, "MambaMixer")
    with pytest.raises(ValueError, match=r"model_types must be ones that transformers .* got 'mamba'"):
        accelerate_transformers(["jamba", "mamba"])
    assert not accelerated_model_types()
