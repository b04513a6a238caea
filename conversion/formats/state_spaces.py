"""The layout of state-spaces/mamba (e9594ce, `models/mixer_seq_simple.py`), which three of our models read and write.

Plain stacks of Mamba-1 and Mamba-2 become `zoo_mamba` and `zoo_mamba2`, whose keys differ in one name. Mamba-2 with an
MLP in each block, or with attention in some blocks (`mamba2attn`), becomes `zoo_hybrid`. The layout has one matrix for
queries, keys and values, and one for the two halves of the MLP, the up projection first.

That library reads `pytorch_model.bin`. Safetensors are written here; load them with
`model.load_state_dict(safetensors.torch.load_file(...))`.

Its config.json has no model type. A field that is unknown, or has a value that our models cannot express, is an error
that names it. Fields that affect only initialisation or speed are ignored.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from ...modeling import (
    ZooHybridConfig,
    ZooHybridForCausalLM,
    ZooMamba2Config,
    ZooMamba2ForCausalLM,
    ZooMambaConfig,
    ZooMambaForCausalLM,
)
from ..rules import Rule, SplitRows
from .format import Format, filled, head_rules, positive, read_config, require, require_one_of
from .transformer_blocks import has_llama_blocks

BYTES = 256
"""Vocabulary size of MambaByte (arXiv 2401.13660), whose checkpoints have this layout. Its tokens are the bytes."""

_EPSILON = 1e-5
"""Epsilon of every norm, which the configuration cannot change."""

_IGNORED = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_commit_hash")
"""Fields that transformers writes and that do not affect what is computed."""

_LARGEST_STEP = 3.4028234663852886e38
"""The largest float32. JSON has no infinity, so an unlimited step size is written as this limit, which no step size in
float32 exceeds."""

_MODEL = {
    "d_model": None,
    "d_intermediate": 0,
    "n_layer": None,
    "vocab_size": None,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
_MIXER = {"expand": 2, "d_conv": 4, "bias": False, "conv_bias": True, "dt_min": 0.001, "dt_max": 0.1}
_MIXER |= {"dt_init_floor": 1e-4}
_MAMBA1 = {**_MIXER, "d_state": 16, "dt_rank": "auto", "dt_init": "random", "dt_scale": 1.0, "use_fast_path": True}
_MAMBA2 = {
    **_MIXER,
    "d_state": 128,
    "headdim": 64,
    "ngroups": 1,
    "d_ssm": None,
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
    "A_init_range": [1, 16],
    "dt_limit": [0.0, float("inf")],
    "conv_init": None,
    "chunk_size": 256,
    "use_mem_eff_path": True,
    "process_group": None,
    "sequence_parallel": True,
}
_ATTENTION = {
    "num_heads": None,
    "num_heads_kv": None,
    "head_dim": None,
    "mlp_dim": 0,
    "qkv_proj_bias": True,
    "out_proj_bias": True,
    "softmax_scale": None,
    "causal": False,
    "d_conv": 0,
    "rotary_emb_dim": 0,
    "rotary_emb_base": 10000.0,
    "rotary_emb_interleaved": False,
}
_MIXERS = {"Mamba1": _MAMBA1, "Mamba2": _MAMBA2}
_MLP_MULTIPLE = 128  # the official MLP rounds its width up to this
_LAYER = "backbone.layers.{layer}."


@dataclass(frozen=True)
class _StateSpacesConfig:
    """The content of a config.json, with every default filled in.

    Attributes:
        layer: "Mamba1" or "Mamba2".
        model: fields of the model.
        mixer: fields of `ssm_cfg`.
        attention: fields of `attn_cfg`; empty if there are no attention layers.
        vocab_size: rows of the embedding, including padding.
    """

    layer: str
    model: dict[str, Any]
    mixer: dict[str, Any]
    attention: dict[str, Any]
    vocab_size: int


def _layer_kind(values: dict[str, Any]) -> tuple[str, bool]:
    """Return the kind of the state-space layers in `ssm_cfg`, and whether every block is such a mixer without an MLP.

    If every block has attention, `ssm_cfg` is not used, and the kind is "Mamba2", the one that goes with attention.
    """
    if _attends_everywhere(values):
        return "Mamba2", False
    mixer = values.get("ssm_cfg") or {}
    layer = str(mixer.get("layer", "Mamba1")) if isinstance(mixer, dict) else ""
    return layer, not values.get("attn_layer_idx") and not values.get("d_intermediate")


def _attends_everywhere(values: dict[str, Any]) -> bool:
    layers, count = values.get("attn_layer_idx"), values.get("n_layer")
    if not isinstance(layers, list) or type(count) is not int or not 0 < count == len(layers):
        return False
    return all(type(layer) is int for layer in layers) and sorted(layers) == list(range(count))


def _is_state_spaces(values: dict[str, Any]) -> bool:
    """Return whether these are the values of a config.json of this layout."""
    return "model_type" not in values and "d_model" in values and "n_layer" in values


def _parse(values: dict[str, Any]) -> _StateSpacesConfig:
    """Parse and check the values of a config.json.

    Raises:
        ValueError: naming a field that is unknown, malformed, or has a value that our models cannot express.
    """
    model = filled("", values, _MODEL, "state-spaces", ignored=_IGNORED)
    for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
        positive(name, model[name])
    require("rms_norm", model["rms_norm"], True, "the zoo has RMS norms only")
    layer, plain = _layer_kind(values)
    if layer not in _MIXERS:
        raise ValueError(f"config.json: `ssm_cfg.layer` must be {' or '.join(_MIXERS)}, got {layer!r}.")
    if layer == "Mamba1" and not plain:
        name = "attn_layer_idx" if model["attn_layer_idx"] else "d_intermediate"
        raise ValueError(f"config.json: `{name}` must be empty or 0 with Mamba1, got {model[name]!r}.")
    given = model["ssm_cfg"] or {}
    if _attends_everywhere(model):  # no block uses its fields, whichever kind they are for
        given = {}
    elif isinstance(given, dict):
        given = {key: value for key, value in given.items() if key != "layer"}
    mixer = filled("ssm_cfg.", given, _MIXERS[layer], "state-spaces")
    for name in ("d_state", "expand", "d_conv"):
        positive(f"ssm_cfg.{name}", mixer[name])
    if layer == "Mamba2":
        inner = mixer["expand"] * model["d_model"]
        require("ssm_cfg.d_ssm", mixer["d_ssm"] or inner, inner, "zoo_mamba2 has no MLP inside the mixer")
        require("ssm_cfg.D_has_hdim", mixer["D_has_hdim"], False, "zoo_mamba2's D has one value per head")
        require("ssm_cfg.rmsnorm", mixer["rmsnorm"], True, "zoo_mamba2's mixer has a gated norm")
        require("ssm_cfg.norm_before_gate", mixer["norm_before_gate"], False, "zoo_mamba2 gates before the norm")
        mixer["dt_limit"] = _limit(mixer["dt_limit"])
    vocab_size = -(-model["vocab_size"] // model["pad_vocab_size_multiple"]) * model["pad_vocab_size_multiple"]
    attention = _attention(model) if model["attn_layer_idx"] else {}
    return _StateSpacesConfig(layer, model, mixer, attention, vocab_size)


def _limit(value: Any) -> list[float]:
    """Return the range of step sizes; an upper end that no float32 exceeds becomes infinity."""
    if not isinstance(value, list) or len(value) != 2 or any(type(end) not in (int, float) for end in value):
        raise ValueError(f"config.json: `ssm_cfg.dt_limit` must be a list of two numbers, got {value!r}.")
    low, high = map(float, value)
    return [low, math.inf if high >= _LARGEST_STEP else high]


def _attention(model: dict[str, Any]) -> dict[str, Any]:
    layers = model["attn_layer_idx"]
    if not isinstance(layers, list) or not all(
        type(layer) is int and 0 <= layer < model["n_layer"] for layer in layers
    ):
        raise ValueError(
            f"config.json: `attn_layer_idx` must be a list of layer numbers below {model['n_layer']}, got {layers!r}."
        )
    attention = filled("attn_cfg.", model["attn_cfg"] or {}, _ATTENTION, "state-spaces")
    positive("attn_cfg.num_heads", attention["num_heads"])
    attention["num_heads_kv"] = attention["num_heads_kv"] or attention["num_heads"]
    attention["head_dim"] = attention["head_dim"] or model["d_model"] // attention["num_heads"]
    kernel = attention["d_conv"]
    if type(kernel) is not int or kernel < 0 or kernel == 1:
        raise ValueError(f"config.json: `attn_cfg.d_conv` must be 0 or an integer of at least 2, got {kernel!r}.")
    accepted = {"causal": True, "mlp_dim": 0, "rotary_emb_interleaved": False}
    reasons = {"mlp_dim": "zoo_hybrid has no MLP inside attention"}
    for name, value in accepted.items():
        require(f"attn_cfg.{name}", attention[name], value, reasons.get(name, "zoo_hybrid's attention has no other"))
    scale = attention["head_dim"] ** -0.5
    require("attn_cfg.softmax_scale", attention["softmax_scale"] or scale, scale, "head_dim to the power of -1/2")
    require("attn_cfg.out_proj_bias", attention["out_proj_bias"], attention["qkv_proj_bias"], "equal to qkv_proj_bias")
    return attention


def _shared(parsed: _StateSpacesConfig) -> dict[str, Any]:
    end = None if parsed.vocab_size == BYTES else 0  # GPT-NeoX's, whose tokenizer the released models have
    return {
        "vocab_size": parsed.vocab_size,
        "hidden_size": parsed.model["d_model"],
        "num_hidden_layers": parsed.model["n_layer"],
        "tie_word_embeddings": parsed.model["tie_embeddings"],
        "bos_token_id": end,
        "eos_token_id": end,
    }


def _mixer(parsed: _StateSpacesConfig) -> dict[str, Any]:
    """Return the settings that a mixer of either kind has."""
    return {
        "state_size": parsed.mixer["d_state"],
        "expand": parsed.mixer["expand"],
        "conv_kernel": parsed.mixer["d_conv"],
        "use_bias": parsed.mixer["bias"],
        "use_conv_bias": parsed.mixer["conv_bias"],
    }


def _mixer2(parsed: _StateSpacesConfig) -> dict[str, Any]:
    """Return the settings of a Mamba-2 mixer."""
    return {
        **_mixer(parsed),
        "head_dim": parsed.mixer["headdim"],
        "n_groups": parsed.mixer["ngroups"],
        "time_step_limit": parsed.mixer["dt_limit"],
    }


def _stack(parsed: _StateSpacesConfig) -> dict[str, Any]:
    """Return the other settings that `zoo_mamba` and `zoo_mamba2` share."""
    return {
        **_shared(parsed),
        "layer_norm_epsilon": _EPSILON,
        "residual_in_fp32": parsed.model["residual_in_fp32"],
        "time_step_min": parsed.mixer["dt_min"],
        "time_step_max": parsed.mixer["dt_max"],
        "time_step_floor": parsed.mixer["dt_init_floor"],
    }


def _mamba1(values: dict[str, Any]) -> ZooMambaConfig:
    parsed = _parse(values)
    return ZooMambaConfig(**_stack(parsed), **_mixer(parsed), time_step_rank=parsed.mixer["dt_rank"])


def _mamba2(values: dict[str, Any]) -> ZooMamba2Config:
    parsed = _parse(values)
    return ZooMamba2Config(
        **_stack(parsed),
        **_mixer2(parsed),
        A_init_bounds=[float(bound) for bound in parsed.mixer["A_init_range"]],
    )


def _hybrid(values: dict[str, Any]) -> ZooHybridConfig:
    parsed = _parse(values)
    layers, inner = parsed.model["n_layer"], parsed.model["d_intermediate"]
    at = set(parsed.model["attn_layer_idx"])
    # The configuration needs sizes of attention even if no layer has it.
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
        rms_norm_eps=_EPSILON,
    )


def _factor(turned: int, width: int) -> float:
    """Return the share of `width` channels that transformers rounds down to `turned` rotated ones."""
    factor = turned / width
    return factor if int(width * factor) == turned else math.nextafter(factor, 2.0)


def _written(config: Any, mixer: Any, layer: str, other: dict[str, Any], **model: Any) -> dict[str, Any]:
    """Return the values of a config.json, from the model's and the mixers' configurations, which may be the same."""
    epsilon = "rms_norm_eps" if isinstance(config, ZooHybridConfig) else "layer_norm_epsilon"
    require(epsilon, getattr(config, epsilon), _EPSILON, "state-spaces has no other")
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
    # The default is left out: it contains infinity, which JSON does not have.
    limit = {} if (low, high) == (0.0, math.inf) else {"dt_limit": [low, min(high, _LARGEST_STEP)]}
    return {"headdim": mixer.head_dim, "ngroups": mixer.n_groups, **limit}


def _hybrid_written(config: ZooHybridConfig) -> dict[str, Any]:
    mixers, mlps = config.mixer_types or [], config.mlp_types or []
    for layer, mixer in enumerate(mixers):
        require_one_of(f"mixer_types[{layer}]", mixer, ("mamba2", "full_attention"), "state-spaces has no other")
        require(f"mlp_types[{layer}]", mlps[layer], mlps[0], "that of the first block: state-spaces has one for all")
    inner = config.intermediate_size if mlps[0] == "gated" else 0
    if inner:
        if inner % _MLP_MULTIPLE:
            raise ValueError(
                f"config.json: `intermediate_size` must be a multiple of {_MLP_MULTIPLE}, to which state-spaces "
                f"rounds it up, got {inner}."
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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are the 256 bytes, with the byte's value as the id, as MambaByte needs one."""
    # The letters by which the tokenizers library writes bytes: a visible character of Latin-1 stands for itself, and
    # the other bytes are, in order, the characters from U+0100 on.
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [byte for byte in range(BYTES) if byte not in visible]
    letters = {chr(byte if byte in visible else 0x100 + others.index(byte)): byte for byte in range(BYTES)}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def _outer_rules(config: PreTrainedConfig) -> list[Rule]:
    """Return the rules for everything but the blocks."""
    return [
        Rule("backbone.embedding.weight", "backbone.embeddings.weight"),
        Rule("backbone.norm_f.weight", "backbone.norm_f.weight"),
        *head_rules(config),
    ]


def _stack_rules(config: PreTrainedConfig) -> list[Rule]:
    return [*_outer_rules(config), Rule(_LAYER + "{rest}", _LAYER + "{rest}")]


def _hybrid_rules(config: ZooHybridConfig) -> list[Rule]:
    mixers = config.mixer_types or []
    rules = [*_outer_rules(config), Rule(_LAYER + "norm.weight", _LAYER + "input_layernorm.weight")]
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


_format = partial(Format, library="state-spaces", read=read_config, keeps_tied_head=True)
MAMBA1 = _format(
    name="state-spaces Mamba-1",
    zoo_class=ZooMambaForCausalLM,
    # An unknown kind is parsed as this one, which refuses it by the name of its field.
    reads=lambda values: _is_state_spaces(values) and _layer_kind(values)[0] != "Mamba2",
    zoo_config=_mamba1,
    config=_mamba1_written,
    rules=_stack_rules,
)
MAMBA2 = _format(
    name="state-spaces Mamba-2",
    zoo_class=ZooMamba2ForCausalLM,
    reads=lambda values: _is_state_spaces(values) and _layer_kind(values) == ("Mamba2", True),
    zoo_config=_mamba2,
    config=_mamba2_written,
    rules=_stack_rules,
)
MAMBA2_HYBRID = _format(
    name="state-spaces Mamba-2 with attention or MLP",
    zoo_class=ZooHybridForCausalLM,
    reads=lambda values: _is_state_spaces(values) and _layer_kind(values) == ("Mamba2", False),
    zoo_config=_hybrid,
    config=_hybrid_written,
    rules=_hybrid_rules,
    writes=has_llama_blocks,
)
