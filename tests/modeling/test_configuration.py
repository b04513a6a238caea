"""Configurations: derived sizes, what is accepted, and one clear error for each thing that is not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import draw_ids, make_model
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from ssm_zoo.modeling import ZooHybridConfig, ZooMamba2Config, ZooMambaConfig

MAMBA = {"hidden_size": 40, "num_hidden_layers": 2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8, "state_size": 4}
HYBRID = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}

MALFORMED = [
    (ZooMambaConfig, {"vocab_size": 0}, r"vocab_size must be at least 1, got 0"),
    (ZooMambaConfig, {"hidden_size": -16}, r"hidden_size must be at least 1, got -16"),
    (ZooMambaConfig, {"num_hidden_layers": 0}, r"num_hidden_layers must be at least 1, got 0"),
    (ZooMambaConfig, {"state_size": 0}, r"state_size must be at least 1, got 0"),
    (ZooMambaConfig, {"expand": 0}, r"expand must be at least 1, got 0"),
    (ZooMambaConfig, {"time_step_rank": 0}, r"time_step_rank must be at least 1, got 0"),
    (ZooMambaConfig, {"time_step_rank": "half"}, r"'time_step_rank'.*'auto'.*'half'"),
    (ZooMambaConfig, {"conv_kernel": 1}, r"conv_kernel must be at least 2, got 1"),
    (ZooMambaConfig, {"layer_norm_epsilon": 0.0}, r"layer_norm_epsilon must be positive, got 0.0"),
    (ZooMambaConfig, {"mixer_rms_eps": -1e-6}, r"mixer_rms_eps must be positive, got -1e-06"),
    (ZooMambaConfig, {"time_step_min": 0.0}, r"0 < min <= max, got 0.0 and 0.1"),
    (ZooMambaConfig, {"time_step_min": 0.2}, r"0 < min <= max, got 0.2 and 0.1"),
    (ZooMamba2Config, {"vocab_size": 0}, r"vocab_size must be at least 1, got 0"),
    (ZooMamba2Config, {"hidden_size": -16}, r"hidden_size must be at least 1, got -16"),
    (ZooMamba2Config, {"num_hidden_layers": 0}, r"num_hidden_layers must be at least 1, got 0"),
    (ZooMamba2Config, {"head_dim": 0}, r"head_dim must be at least 1, got 0"),
    (ZooMamba2Config, {"state_size": 0}, r"state_size must be at least 1, got 0"),
    (ZooMamba2Config, {"expand": 0}, r"expand must be at least 1, got 0"),
    (ZooMamba2Config, {"hidden_size": 15}, r"num_heads \* head_dim \(3 \* 8\) must equal expand \* hidden_size"),
    (ZooMamba2Config, {"num_heads": 3}, r"num_heads \* head_dim \(3 \* 8\) must equal .* \(2 \* 16\)"),
    (ZooMamba2Config, {"n_groups": 3}, r"n_groups must divide num_heads \(4\), got 3"),
    (ZooMamba2Config, {"conv_kernel": 1}, r"conv_kernel must be at least 2, got 1"),
    (ZooMamba2Config, {"layer_norm_epsilon": 0.0}, r"layer_norm_epsilon must be positive, got 0.0"),
    (
        ZooMamba2Config,
        {"time_step_limit": (0.5, 0.1)},
        r"time_step_limit must be \(low, high\) .* got \(0.5, 0.1\)",
    ),
    (ZooMamba2Config, {"time_step_limit": [0.5]}, r"time_step_limit must be \(low, high\) .* got \[0.5\]"),
    (ZooMamba2Config, {"A_init_bounds": (-1.0, 1.0)}, r"A_init_bounds must be \(low, high\) .* got \(-1.0, 1.0\)"),
    (ZooMamba2Config, {"A_init_bounds": (0.0, 0.0)}, r"A_init_bounds must .* got \(0.0, 0.0\)"),
    (ZooMamba2Config, {"time_step_min": 0.2}, r"0 < min <= max, got 0.2 and 0.1"),
    (ZooMamba2Config, {"hidden_size": "16"}, r"'hidden_size' expected int, got str \(value: '16'\)"),
    (ZooMamba2Config, {"use_bias": 1.5}, r"'use_bias' expected bool, got float"),
    (ZooMambaConfig, {"mixer_rms_weight": True}, r"mixer_rms_eps must be given with mixer_rms_weight=True, got None"),
    (ZooHybridConfig, {"intermediate_size": 0}, r"intermediate_size must be at least 1, got 0"),
    (ZooHybridConfig, {"num_attention_heads": 0}, r"num_attention_heads must be at least 1, got 0"),
    (ZooHybridConfig, {"mixer_types": ["mamba2"]}, r"mixer_types must have one entry for each of the 2 blocks, got 1"),
    (ZooHybridConfig, {"mixer_types": ["mamba2", "rnn"]}, r"mixer_types\[1\] must be one of full_.*, got 'rnn'"),
    (
        ZooHybridConfig,
        {"num_key_value_heads": 3},
        r"num_key_value_heads must divide num_attention_heads \(4\), got 3",
    ),
    (ZooHybridConfig, {"num_key_value_heads": 0}, r"num_key_value_heads must be at least 1, got 0"),
    (ZooHybridConfig, {"head_dim": 5}, r"head_dim must be even, for the rotary embedding, got 5"),
    (ZooHybridConfig, {"hidden_size": 18}, r"num_attention_heads must divide hidden_size \(18\) .* got 4"),
    (
        ZooHybridConfig,
        {"mixer_types": ["discrete_mamba2"] * 2, "ssm_rotary": True, "state_size": 6},
        r"state_size must be head_dim \(4\) with rotary=True, got 6",
    ),
    (ZooHybridConfig, {"conv_kernel": 0}, r"conv_kernel must be at least 2, got 0"),
    (ZooHybridConfig, {"attention_conv_kernel": 1}, r"full_attention: conv_kernel must be 0 or at least 2, got 1"),
    (ZooHybridConfig, {"sliding_window": 0}, r"sliding_window must be at least 1, got 0"),
    (ZooHybridConfig, {"feature_map": "relu"}, r"feature_map must be one of identity, softplus, hedgehog, got 'relu'"),
    (
        ZooHybridConfig,
        {"normalize": True},
        r"feature_map must be 'softplus' or 'hedgehog' with normalize=True, got 'identity'",
    ),
    (ZooHybridConfig, {"hidden_act": "swash"}, r"hidden_act must be an activation of transformers, got 'swash'"),
    (ZooHybridConfig, {"rms_norm_eps": -1e-5}, r"rms_norm_eps must be positive, got -1e-05"),
    (
        ZooHybridConfig,
        {"mixer_types": ["mamba2", "mamba2"], "mamba_head_dim": 7},
        r"num_heads \* head_dim \(4 \* 7\) must equal expand \* hidden_size \(2 \* 16\)",
    ),
    (ZooHybridConfig, {"mixer_types": ["mamba"] * 2, "time_step_rank": 0}, r"time_step_rank must be at least 1, got 0"),
    (
        ZooHybridConfig,
        {"mixer_types": ["mamba"] * 2, "mixer_rms_weight": True},
        r"mixer_rms_eps must be given with mixer_rms_weight=True, got None",
    ),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [pytest.param(*case, id=f"{case[0].model_type}-{'-'.join(case[1])}") for case in MALFORMED],
)
def test_malformed_raises(kind: type, change: dict[str, Any], message: str) -> None:
    sizes = {ZooMambaConfig: MAMBA, ZooMamba2Config: SMALL, ZooHybridConfig: HYBRID}[kind]
    kind(**sizes)
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        kind(**(sizes | change))


@pytest.mark.parametrize("rank", [None, "auto"])
def test_derived_sizes_of_mamba(rank: str | None) -> None:
    config = ZooMambaConfig(**MAMBA, time_step_rank=rank)
    assert (config.time_step_rank, config.intermediate_size) == (3, 80)
    assert config.layer_types == ["zoo_recurrent", "zoo_recurrent"]
    assert ZooMambaConfig(**MAMBA, time_step_rank=5, expand=3).intermediate_size == 120
    assert ZooMambaConfig().time_step_rank == 48


def test_derived_sizes_of_mamba2() -> None:
    config = ZooMamba2Config(**SMALL)
    assert (config.num_heads, config.intermediate_size) == (4, 32)
    assert config.layer_types == ["zoo_recurrent", "zoo_recurrent"]
    published = ZooMamba2Config()
    assert (published.num_heads, published.intermediate_size, published.time_step_limit) == (
        24,
        1536,
        (0.0, math.inf),
    )


def test_derived_sizes_of_the_hybrid() -> None:
    config = ZooHybridConfig(**HYBRID)
    assert (config.head_dim, config.num_key_value_heads) == (4, 4)
    assert config.mixer_types == ["full_attention", "full_attention"]
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    mixed = ["sliding_attention", "mamba2", "discrete_mamba2", "full_attention"]
    config = ZooHybridConfig(**(HYBRID | {"num_hidden_layers": 4}), mixer_types=mixed, mamba_head_dim=8, n_groups=2)
    assert config.layer_types == ["zoo_window", "zoo_recurrent", "zoo_recurrent", "full_attention"]
    assert config.discrete_mamba2["state_size"] == 4
    inner = config.settings_of("mamba2").sizes(config)
    assert (inner.num_heads, inner.head_dim, inner.n_groups, inner.state_size, inner.hidden_size) == (
        4,
        8,
        2,
        4,
        16,
    )


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ZooMambaConfig(**MAMBA), id="zoo_mamba-defaults"),
        pytest.param(ZooMambaConfig(**MAMBA, time_step_rank=5, mixer_rms_eps=1e-6), id="zoo_mamba"),
        pytest.param(ZooMamba2Config(**SMALL, time_step_limit=(0.0, math.inf)), id="zoo_mamba2-unlimited"),
        pytest.param(ZooMamba2Config(**SMALL, time_step_limit=(0.1, 2.5), n_groups=2), id="zoo_mamba2"),
        pytest.param(
            ZooHybridConfig(
                **HYBRID,
                mixer_types=["sliding_attention", "discrete_mamba2"],
                rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
                eos_token_id=[1, 2],
            ),
            id="zoo_hybrid",
        ),
    ],
)
def test_saved_and_loaded(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    for name, value in config.to_dict().items():
        actual = getattr(loaded, name) if hasattr(loaded, name) else loaded.to_dict()[name]
        if name not in ("_name_or_path", "transformers_version"):
            assert (tuple(actual) if isinstance(value, tuple) else actual) == value, name
    assert loaded.layer_types == config.layer_types


# The settings of mixers, by kind

OLD = {  # as saved before 2026-11, all keys in one
    "mixer_types": ["mamba2", "discrete_mamba2", "selective_attention", "masked_mixing"],
    "num_hidden_layers": 4,
    "state_size": 8,
    "conv_kernel": 3,
    "mamba_head_dim": 8,
    "mamba_proj_bias": True,
    "feature_map": "softplus",
    "ssm_rotary": False,
    "sliding_window": 7,
    "attention_capacity": 0.4,
    "mixing": "toeplitz",
    "mixing_heads": 2,
    "time_step_rank": 5,
    "max_position_embeddings": 32,
}


def test_keys_of_before_become_settings_of_the_kinds_that_have_them(tmp_path: Path) -> None:
    config = ZooHybridConfig(**(HYBRID | OLD))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["mamba2"].items() >= {"state_size": 8, "conv_kernel": 3, "head_dim": 8, "use_bias": True}.items()
    assert saved["discrete_mamba2"] == {
        "state_size": 8,
        "conv_kernel": 3,
        "feature_map": "softplus",
        "normalize": False,
        "rotary": False,
    }
    assert (saved["selective_attention"]["sliding_window"], config.attention_capacity) == (7, 0.4)
    assert (saved["masked_mixing"]["mixing"], saved["masked_mixing"]["num_heads"]) == ("toeplitz", 2)
    left = OLD.keys() - {"mixer_types", "num_hidden_layers", "max_position_embeddings"}
    assert not left & saved.keys() and "mamba" not in saved  # no block has that kind
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.changed_settings() == config.changed_settings()


def test_a_checkpoint_with_keys_of_before_gives_equal_logits(tmp_path: Path) -> None:
    model, ids = make_model("all-four"), draw_ids(2, 9)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for kind in ("mamba2", "discrete_mamba2", "sliding_attention", "full_attention"):
        del values[kind]
    flat = {"sliding_window": 5, "state_size": 6, "ssm_rotary": True, "mamba_head_dim": 8, "n_groups": 2}
    (tmp_path / "config.json").write_text(json.dumps(values | flat))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mamba2": {"state": 8}}, r"settings of mamba2 must be among state_size, expand, .*use_bias.*, got 'state'"),
        ({"mamba2": 8}, r"mamba2 must be a mapping of settings, got 8"),
        (
            {"mamba2": {"head_dim": 8}, "mamba_head_dim": 4},
            r"mamba_head_dim must be left out, got 4: it is mamba2\['head_dim'\] now, which is 8",
        ),
        ({"mamba2": {"state_size": "8"}}, r"mamba2: .*'state_size'.*'8'"),
        ({"mamba2": {"head_dim": 7}}, r"mamba2: num_heads \* head_dim \(4 \* 7\) must equal"),
    ],
    ids=["unknown", "no mapping", "contradicting", "of another type", "not fitting"],
)
def test_settings_that_do_not_hold_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        ZooHybridConfig(**HYBRID, mixer_types=["mamba2", "full_attention"], **given)
