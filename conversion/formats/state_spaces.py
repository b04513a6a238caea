"""state-spaces/mamba's layout (e9594ce, `models/mixer_seq_simple.py`), and the three of our models that it holds.

Mamba-1 and Mamba-2 without anything else are `zoo_mamba` and `zoo_mamba2`, whose keys differ in one name. With an MLP
in each block or attention in some (`mamba2attn`), Mamba-2 is `zoo_hybrid`: attention has one matrix for queries, keys
and values there, and the MLP one for its two halves, the gated one first.

That library reads `pytorch_model.bin`; what is written here is safetensors, to be loaded with
`model.load_state_dict(safetensors.torch.load_file(...))`.
"""

import math
from typing import Any

from transformers import PreTrainedConfig

from ...modeling import (
    ZooHybridConfig,
    ZooHybridForCausalLM,
    ZooMamba2Config,
    ZooMamba2ForCausalLM,
    ZooMambaConfig,
    ZooMambaForCausalLM,
)
from ..rules import Rule, SplitRows
from .format import Format, head_rules, read_config, require
from .state_spaces_config import EPSILON, LARGEST_STEP, StateSpacesConfig, is_state_spaces, layer_kind, parse

BYTES = 256
"""Vocabulary of MambaByte (arXiv 2401.13660), whose checkpoints have this layout: the tokens are bytes, no others."""

_MLP_MULTIPLE = 128  # the official MLP rounds its width up to this
_LAYER = "backbone.layers.{layer}."


def _shared(parsed: StateSpacesConfig) -> dict[str, Any]:
    end = None if parsed.vocab_size == BYTES else 0  # that of GPT-NeoX, whose tokenizer the released models have
    return {
        "vocab_size": parsed.vocab_size,
        "hidden_size": parsed.model["d_model"],
        "num_hidden_layers": parsed.model["n_layer"],
        "tie_word_embeddings": parsed.model["tie_embeddings"],
        "bos_token_id": end,
        "eos_token_id": end,
    }


def _mixer(parsed: StateSpacesConfig) -> dict[str, Any]:
    """What is said of a mixer of either kind."""
    return {
        "state_size": parsed.mixer["d_state"],
        "expand": parsed.mixer["expand"],
        "conv_kernel": parsed.mixer["d_conv"],
        "use_bias": parsed.mixer["bias"],
        "use_conv_bias": parsed.mixer["conv_bias"],
    }


def _mixer2(parsed: StateSpacesConfig) -> dict[str, Any]:
    """What is said of a mixer of Mamba-2."""
    return {
        **_mixer(parsed),
        "head_dim": parsed.mixer["headdim"],
        "n_groups": parsed.mixer["ngroups"],
        "time_step_limit": parsed.mixer["dt_limit"],
    }


def _stack(parsed: StateSpacesConfig) -> dict[str, Any]:
    """What `zoo_mamba` and `zoo_mamba2` share beyond that."""
    return {
        **_shared(parsed),
        "layer_norm_epsilon": EPSILON,
        "residual_in_fp32": parsed.model["residual_in_fp32"],
        "time_step_min": parsed.mixer["dt_min"],
        "time_step_max": parsed.mixer["dt_max"],
        "time_step_floor": parsed.mixer["dt_init_floor"],
    }


def _mamba1(values: dict[str, Any]) -> ZooMambaConfig:
    parsed = parse(values)
    return ZooMambaConfig(**_stack(parsed), **_mixer(parsed), time_step_rank=parsed.mixer["dt_rank"])


def _mamba2(values: dict[str, Any]) -> ZooMamba2Config:
    parsed = parse(values)
    return ZooMamba2Config(
        **_stack(parsed),
        **_mixer2(parsed),
        A_init_bounds=[float(bound) for bound in parsed.mixer["A_init_range"]],
    )


def _hybrid(values: dict[str, Any]) -> ZooHybridConfig:
    parsed = parse(values)
    layers, inner = parsed.model["n_layer"], parsed.model["d_intermediate"]
    at = set(parsed.model["attn_layer_idx"])
    # Without attention its sizes are of no use, but have to be some.
    attention = parsed.attention or {"num_heads": 1, "num_heads_kv": 1, "head_dim": 2, "qkv_proj_bias": False}
    turned = attention.get("rotary_emb_dim", 0)
    mixers = ["full_attention" if layer in at else "mamba2" for layer in range(layers)]
    settings: dict[str, Any] = {
        "full_attention": {"conv_kernel": attention.get("d_conv", 0)},
        "mamba2": _mixer2(parsed),
    }
    return ZooHybridConfig(
        **_shared(parsed),
        intermediate_size=-(-inner // _MLP_MULTIPLE) * _MLP_MULTIPLE,
        mixer_types=mixers,
        **settings,
        mlp_types=["gated" if inner else "none"] * layers,
        num_attention_heads=attention["num_heads"],
        num_key_value_heads=attention["num_heads_kv"],
        head_dim=attention["head_dim"],
        attention_bias=attention["qkv_proj_bias"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(attention.get("rotary_emb_base", 10000.0)),
            "partial_rotary_factor": _factor(turned, attention["head_dim"]),
        },
        rms_norm_eps=EPSILON,
    )


def _factor(turned: int, width: int) -> float:
    """The part of `width` channels that, rounded down as transformers does, is `turned`."""
    factor = turned / width
    return factor if int(width * factor) == turned else math.nextafter(factor, 2.0)


def _written(config: Any, mixer: Any, layer: str, other: dict[str, Any], **model: Any) -> dict[str, Any]:
    """A config.json of a model's configuration and its mixers', which may be the same."""
    epsilon = "rms_norm_eps" if isinstance(config, ZooHybridConfig) else "layer_norm_epsilon"
    require(epsilon, getattr(config, epsilon), EPSILON, "state-spaces has no other")
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            "layer": layer,
            "d_state": mixer.state_size,
            "expand": mixer.expand,
            "d_conv": mixer.conv_kernel,
            "bias": mixer.use_bias,
            "conv_bias": mixer.use_conv_bias,
            **other,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": getattr(config, "residual_in_fp32", True),
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_word_embeddings,
        **model,
    }


def _mamba1_written(config: ZooMambaConfig) -> dict[str, Any]:
    require("mixer_rms_eps", config.mixer_rms_eps, None, "state-spaces has no norms on B, C and the step sizes")
    return _written(config, config, "Mamba1", {"dt_rank": config.time_step_rank} | _steps(config))


def _mamba2_written(config: ZooMamba2Config) -> dict[str, Any]:
    require("bidirectional", config.bidirectional, False, "state-spaces' Mamba-2 is causal")
    ranges = {"A_init_range": list(config.A_init_bounds)}
    return _written(config, config, "Mamba2", _heads(config) | _steps(config) | ranges)


def _steps(config: ZooMambaConfig | ZooMamba2Config) -> dict[str, float]:
    return {
        "dt_min": config.time_step_min,
        "dt_max": config.time_step_max,
        "dt_init_floor": config.time_step_floor,
    }


def _heads(mixer: Any) -> dict[str, Any]:
    low, high = mixer.time_step_limit
    # Where the default is meant nothing is written: it has an infinity, which JSON does not have.
    limit = {} if (low, high) == (0.0, math.inf) else {"dt_limit": [low, min(high, LARGEST_STEP)]}
    return {"headdim": mixer.head_dim, "ngroups": mixer.n_groups, **limit}


def _hybrid_written(config: ZooHybridConfig) -> dict[str, Any]:
    mixers, mlps = config.mixer_types or [], config.mlp_types or []
    for layer, mixer in enumerate(mixers):
        if mixer not in ("mamba2", "full_attention"):
            raise ValueError(
                f"config.json: mixer_types[{layer}]: got {mixer!r}; accepted for state-spaces: 'mamba2', "
                "'full_attention'"
            )
        require(f"mlp_types[{layer}]", mlps[layer], mlps[0], "that of the first block: state-spaces has one for all")
    inner = config.intermediate_size if mlps[0] == "gated" else 0
    if inner:
        if inner % _MLP_MULTIPLE:
            raise ValueError(
                f"config.json: intermediate_size: got {inner}; accepted: a multiple of {_MLP_MULTIPLE} (to which "
                "state-spaces rounds up)"
            )
        require("hidden_act", config.hidden_act, "silu", "the only one of state-spaces")
        require("mlp_bias", config.mlp_bias, False, "state-spaces has none")
    attention: dict[str, Any] = {}
    at = [layer for layer, kind in enumerate(mixers) if kind == "full_attention"]
    if at:
        rotary = dict(config.rope_parameters or {})
        require("rope_parameters.rope_type", rotary["rope_type"], "default", "the only one of state-spaces")
        attention = {
            "num_heads": config.num_attention_heads,
            "num_heads_kv": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "qkv_proj_bias": config.attention_bias,
            "out_proj_bias": config.attention_bias,
            "causal": True,
            "d_conv": config.settings_of("full_attention").conv_kernel,
            "rotary_emb_dim": int(int(config.head_dim or 0) * rotary.get("partial_rotary_factor", 1.0)),
            "rotary_emb_base": rotary["rope_theta"],
        }
    model = {"d_intermediate": inner, "attn_layer_idx": at, "attn_cfg": attention}
    mixer = config.settings_of("mamba2")
    return _written(config, mixer, "Mamba2", _heads(mixer), **model)


def _stack_rules(config: PreTrainedConfig) -> list[Rule]:
    return [
        Rule("backbone.embedding.weight", "backbone.embeddings.weight"),
        Rule(_LAYER + "{rest}", _LAYER + "{rest}"),
        Rule("backbone.norm_f.weight", "backbone.norm_f.weight"),
        *head_rules(config),
    ]


def _hybrid_rules(config: ZooHybridConfig) -> list[Rule]:
    mixers = config.mixer_types or []
    rules = [
        Rule("backbone.embedding.weight", "backbone.embeddings.weight"),
        Rule(_LAYER + "norm.weight", _LAYER + "input_layernorm.weight"),
        Rule("backbone.norm_f.weight", "backbone.norm_f.weight"),
        *head_rules(config),
    ]
    if states := [layer for layer, mixer in enumerate(mixers) if mixer == "mamba2"]:
        rules.append(Rule(_LAYER + "mixer.{rest}", _LAYER + "mixer.{rest}", layers=states))
    if at := [layer for layer, mixer in enumerate(mixers) if mixer == "full_attention"]:
        width = int(config.head_dim or 0)
        kv = width * int(config.num_key_value_heads or 0)
        split = SplitRows((width * config.num_attention_heads, kv, kv))
        projections = tuple(f"{_LAYER}mixer.{name}.{{rest}}" for name in ("q_proj", "k_proj", "v_proj"))
        rules.append(Rule(_LAYER + "mixer.in_proj.{rest}", projections, split, layers=at))
        rules.append(Rule(_LAYER + "mixer.out_proj.{rest}", _LAYER + "mixer.o_proj.{rest}", layers=at))
        if config.settings_of("full_attention").conv_kernel:  # its channels are in the order of in_proj's rows
            rules.append(Rule(_LAYER + "mixer.conv1d.{rest}", _LAYER + "mixer.conv1d.{rest}", layers=at))
    if "gated" in (config.mlp_types or []):
        halves = (_LAYER + "mlp.up_proj.{rest}", _LAYER + "mlp.gate_proj.{rest}")
        rules.append(Rule(_LAYER + "norm2.weight", _LAYER + "post_attention_layernorm.weight"))
        rules.append(Rule(_LAYER + "mlp.fc1.{rest}", halves, SplitRows((config.intermediate_size,) * 2)))
        rules.append(Rule(_LAYER + "mlp.fc2.{rest}", _LAYER + "mlp.down_proj.{rest}"))
    return rules


MAMBA1 = Format(
    name="state-spaces Mamba-1",
    library="state-spaces",
    zoo_class=ZooMambaForCausalLM,
    # What is of neither kind is parsed as this one and refused there, by its field.
    reads=lambda values: is_state_spaces(values) and layer_kind(values)[0] != "Mamba2",
    read=read_config,
    zoo_config=_mamba1,
    config=_mamba1_written,
    rules=_stack_rules,
    keeps_tied_head=True,
)
MAMBA2 = Format(
    name="state-spaces Mamba-2",
    library="state-spaces",
    zoo_class=ZooMamba2ForCausalLM,
    reads=lambda values: is_state_spaces(values) and layer_kind(values) == ("Mamba2", True),
    read=read_config,
    zoo_config=_mamba2,
    config=_mamba2_written,
    rules=_stack_rules,
    keeps_tied_head=True,
)
MAMBA2_HYBRID = Format(
    name="state-spaces Mamba-2 with attention or MLP",
    library="state-spaces",
    zoo_class=ZooHybridForCausalLM,
    reads=lambda values: is_state_spaces(values) and layer_kind(values) == ("Mamba2", False),
    read=read_config,
    zoo_config=_hybrid,
    config=_hybrid_written,
    rules=_hybrid_rules,
    keeps_tied_head=True,
)
