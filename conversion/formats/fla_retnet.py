"""flash-linear-attention's `retnet` and `zoo_retnet`.

Source: flash-linear-attention 0.6.0, `fla/models/retnet` and `fla/layers/multiscale_retention.py`. Its retention has no
score normalisation, the frequencies of Llama's rotary embedding, and a weight in the norm of the heads.

Fields for speed and for the loss are ignored. Refused are other mixers in some layers (`attn`), feature maps, short
convolutions and residuals by attention (`attnres_block_size`), and `fuse_norm: false`, which renames one key.
"""

import math
from pathlib import Path
from typing import Any

from ...modeling import ZooRetNetConfig, ZooRetNetForCausalLM
from ..rules import Rule
from .format import Format, head_rules, positive, read_config, require

_MODEL: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "expand_k": 1.0,
    "expand_v": 2.0,
    "hidden_ratio": 2,
    "intermediate_size": None,
    "num_hidden_layers": 24,
    "num_heads": 8,
    "num_kv_heads": None,
    "hidden_act": "swish",
    "use_output_gate": True,
    "max_position_embeddings": 2048,
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
    "use_cache": True,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FIXED: dict[str, Any] = {
    "hidden_act": ("swish", "flash-linear-attention's gate and MLP with silu"),
    "feature_map": (None, "zoo_retnet has no feature maps"),
    "use_short_conv": (False, "zoo_retnet has no convolutions"),
    "attn": (None, "zoo_retnet has retention in every block"),
    "attnres_block_size": (None, "zoo_retnet has plain residuals"),
    "fuse_norm": (True, "otherwise `g_norm_swish_gate` is called `g_norm`: rename it and set the field"),
}
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "use_output_gate",
    "max_position_embeddings",
    "elementwise_affine",
    "initializer_range",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_THETA = 10000.0
_BLOCK, _OURS = "model.layers.{layer}.", "backbone.layers.{layer}."


def _read(folder: Path) -> dict[str, Any]:
    values = read_config(folder)
    if "decoder_embed_dim" in values:
        raise ValueError(
            "config.json: `model_type` must be left out beside the fields of torchscale's RetNetConfig "
            f"(`decoder_embed_dim`), got {values.get('model_type')!r}. flash-linear-attention's has `hidden_size`."
        )
    return values


def _width(model: dict[str, Any], name: str) -> int:
    """Return the width of a head from its expansion, `expand_k` or `expand_v`."""
    inner, heads = model["hidden_size"] * model[name], model["num_heads"]
    if not math.isclose(inner, round(inner), rel_tol=1e-9) or round(inner) % heads:
        raise ValueError(
            f"config.json: `{name}` must make hidden_size ({model['hidden_size']}) a multiple of num_heads ({heads}), "
            f"got {model[name]!r}."
        )
    return round(inner) // heads


def _zoo_config(values: dict[str, Any]) -> ZooRetNetConfig:
    model = {key: values.get(key, default) for key, default in _MODEL.items()}  # the other fields are transformers'
    for name, (accepted, why) in _FIXED.items():
        require(name, values.get(name, accepted), accepted, why)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads"):
        positive(name, model[name])
    inner = model["intermediate_size"]
    if inner is None:  # as fla.modules.GatedMLP has it
        inner = -(-int(model["hidden_size"] * (model["hidden_ratio"] or 4) * 2 / 3) // 256) * 256
    return ZooRetNetConfig(
        **{name: model[name] for name in _SAME},
        intermediate_size=inner,
        num_attention_heads=model["num_heads"],
        num_key_value_heads=model["num_kv_heads"],
        head_dim=_width(model, "expand_k"),
        v_head_dim=_width(model, "expand_v"),
        rms_norm_eps=model["norm_eps"],
        normalize_scores=False,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
    )


def _config(config: ZooRetNetConfig) -> dict[str, Any]:
    library = "flash-linear-attention"
    require("mlp_type", config.mlp_type, "gated", f"{library}'s RetNet has no other")
    require("hidden_act", config.hidden_act, "silu", f"{library}'s RetNet has no other")
    require("normalize_scores", config.normalize_scores, False, f"{library} does not normalise them")
    require("bidirectional", config.bidirectional, False, f"{library}'s RetNet is causal")
    require("embedding_multiplier", config.embedding_multiplier, 1, f"{library} does not scale embeddings")
    rotary = config.rope_parameters or {}
    require("rope_parameters.rope_type", rotary.get("rope_type"), "default", f"{library} has no other")
    require("rope_parameters.rope_theta", rotary.get("rope_theta"), _THETA, f"{library} has no other")
    heads, width = config.num_attention_heads, config.hidden_size
    return {
        "model_type": "retnet",
        "architectures": ["RetNetForCausalLM"],
        **{name: getattr(config, name) for name in _SAME},
        "expand_k": _expansion(heads * int(config.head_dim or 0), width),
        "expand_v": _expansion(heads * int(config.v_head_dim or 0), width),
        "intermediate_size": config.intermediate_size,
        "num_heads": heads,
        "num_kv_heads": None if config.num_key_value_heads == heads else config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        **{name: accepted for name, (accepted, _) in _FIXED.items()},
    }


def _expansion(inner: int, width: int) -> float:
    """Return a factor of the width whose product, rounded down as the library does, is `inner`."""
    factor = inner / width
    return factor if int(width * factor) == inner else math.nextafter(factor, math.inf)


def _rules(config: ZooRetNetConfig) -> list[Rule]:
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", *(["g_proj"] if config.use_output_gate else [])]
    norm = "attn.g_norm_swish_gate" if config.use_output_gate else "attn.g_norm"
    same = {
        "attn_norm": "input_layernorm",
        **{f"attn.{name}": f"mixer.{name}" for name in projections},
        **({norm: "mixer.group_norm"} if config.elementwise_affine else {}),
        "mlp_norm": "post_attention_layernorm",
        **{f"mlp.{name}": f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    }
    return [
        Rule("model.embeddings.weight", "backbone.embeddings.weight"),
        *(Rule(f"{_BLOCK}{theirs}.weight", f"{_OURS}{ours}.weight") for theirs, ours in same.items()),
        Rule("model.norm.weight", "backbone.norm_f.weight"),
        *head_rules(config),
    ]


FLA_RETNET = Format(
    name="fla retnet",
    library="fla",
    zoo_class=ZooRetNetForCausalLM,
    reads=lambda values: values.get("model_type") == "retnet",
    read=_read,
    zoo_config=_zoo_config,
    config=_config,
    rules=_rules,
)
