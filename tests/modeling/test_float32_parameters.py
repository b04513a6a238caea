"""The parameters that stay in float32 (`mixer.py`), however a model in half precision comes about."""

import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from families import ENCODERS, FAMILIES, draw_ids, make_config, make_head, make_model, perturb
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from ssm_zoo.modeling import RetrievalMixer, RetrievalMixerConfig, mixer


def declared() -> set[str]:
    """What the mixers of the package say of themselves."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("ssm_zoo.modeling.")]
    kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    return {name for kind in kinds for name in getattr(kind, "float32_parameters", ())}


FLOAT32_PARAMETERS = declared() | {"A_log", "D", "dt_bias", "dt_proj.bias", "decay_value"}
HALF = [torch.bfloat16, torch.float16]


def is_kept(name: str) -> bool:
    return f".{name}".endswith(tuple(f".{kept}" for kept in FLOAT32_PARAMETERS))


def check(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if is_kept(name) else dtype), name


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", FAMILIES)
def test_made_from_a_configuration(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name), dtype=dtype)
    check(model, dtype)
    model = FAMILIES[name].causal_lm._from_config(make_config(name), dtype=dtype)
    check(model, dtype)
    config = make_config(name)
    config.dtype = dtype
    check(FAMILIES[name].causal_lm._from_config(config), dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_with_adapters_dispatched_and_exported(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path)
    for options in ({}, {"trust_remote_code": True}):
        check(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **options), torch.bfloat16)
    with accelerate.init_empty_weights():
        empty = AutoModelForCausalLM.from_config(make_config(name), dtype=torch.bfloat16)
    empty.tie_weights()
    check(accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"}), torch.bfloat16)


@pytest.mark.parametrize("name", ENCODERS)
def test_what_a_causal_checkpoint_lacks(name: str, tmp_path: Path) -> None:
    """The scan of an encoder's other direction is made while loading, not loaded."""
    config = make_config(name)
    if config.model_type in ("masked_mixer", "zoo_retnet"):
        pytest.skip(f"{config.model_type} has no such parameters in both directions")
    config.bidirectional = False
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path, bidirectional=True, dtype=torch.bfloat16)
    check(model, torch.bfloat16)
    assert any("reverse" in key and is_kept(key) for key, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["mamba", "mamba2", "all-four", "mixer-columns", "taipan"])
def test_a_made_model_learns_with_sgd(name: str) -> None:
    """In bfloat16 none of them would move: 20 steps of a rate of 1e-2."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(make_config(name), dtype=torch.bfloat16)
    perturb(model)
    kept = {key: parameter for key, parameter in model.named_parameters() if is_kept(key)}
    before = {key: parameter.detach().clone() for key, parameter in kept.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    ids = draw_ids(2, 12)
    for _ in range(20):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    unmoved = [key for key, parameter in kept.items() if torch.equal(parameter, before[key])]
    assert not unmoved


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS])
def test_transformers_is_told_of_those_that_there_are_and_no_others(name: str) -> None:
    model = make_head(AutoModel, name)
    names = [f".{key}" for key, _ in model.named_parameters()]
    present = {kept for kept in FLOAT32_PARAMETERS if any(key.endswith(f".{kept}") for key in names)}
    assert set(model._keep_in_fp32_modules_strict) == present
    if name in FAMILIES:
        assert set(make_model(name)._keep_in_fp32_modules_strict) == present


def test_the_retrieval_mixer_has_none() -> None:
    model = RetrievalMixer(RetrievalMixerConfig(hidden_size=16, num_hidden_layers=1, max_position_embeddings=6))
    assert not set(model._keep_in_fp32_modules_strict)


@pytest.mark.parametrize("dtype", HALF)
def test_a_cast_of_the_whole_model_casts_them_and_says_so(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(mixer.logger, "warning_once", told.append)
    model = make_model("mamba2")
    model.to("cpu")
    model.double()
    assert not told
    model.to(dtype)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert len(set(told)) == 1  # of backbone and head the same, which is told once
    assert "lost" in told[0]
    assert "from_pretrained" in told[0]


def test_a_default_dtype_of_float64_is_obeyed() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = FAMILIES["mamba"].causal_lm(make_config("mamba"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", FAMILIES)
def test_under_fsdp_every_parameter_has_the_dtype_that_a_model_is_loaded_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(name).save_pretrained(tmp_path)
    told: list[str] = []
    monkeypatch.setattr(mixer.logger, "warning_once", told.append)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        AutoModelForCausalLM.from_config(make_config(name), dtype=torch.bfloat16),
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    has_some = any(is_kept(key) for key, _ in model.named_parameters())
    assert any("lost" in line for line in told) == has_some
    told.clear()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not told
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    check(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS])
def test_the_blocks_that_are_not_split_are_those_of_the_model(name: str) -> None:
    """Of every layer: accelerate refuses a name that it does not find, and would not shard a block without one."""
    model = make_head(AutoModel, name)
    assert set(model._no_split_modules) == {type(block).__name__ for block in model.layers}


def test_a_taipan_of_selective_attention_alone_names_no_other_block() -> None:
    model = make_model("taipan", num_hidden_layers=2, sal_layer_idx=[0, 1])
    assert set(model._no_split_modules) == set(model.backbone._no_split_modules) == {"SelectiveAttentionBlock"}
