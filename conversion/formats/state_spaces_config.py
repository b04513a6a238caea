"""The config.json of state-spaces/mamba (e9594ce, `models/config_mamba.py` and the modules' arguments), checked.

It has no model type. A field that is not known here, or has a value that our models cannot express, is refused by its
name; a field that only says how to initialise or how fast to compute is not used, and of what transformers and the Hub
write beside them, `IGNORED` is left out.
"""

import math
from dataclasses import dataclass
from typing import Any

from .format import filled, positive, require

EPSILON = 1e-5
"""Epsilon of every norm, which is no field."""

IGNORED = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_commit_hash")
"""Fields of transformers' that say nothing about what is computed."""

LARGEST_STEP = 3.4028234663852886e38
"""The largest float32. JSON has no infinity: a step size limit without an upper end is written as this, and no step
size in float32 is larger."""

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


@dataclass(frozen=True)
class StateSpacesConfig:
    """What a config.json says, with every default filled in.

    Attributes:
        layer: "Mamba1" or "Mamba2".
        model: fields of the model.
        mixer: fields of `ssm_cfg`.
        attention: fields of `attn_cfg`; empty where there are no attention layers.
        vocab_size: rows of the embedding, padding included.
    """

    layer: str
    model: dict[str, Any]
    mixer: dict[str, Any]
    attention: dict[str, Any]
    vocab_size: int


def layer_kind(values: dict[str, Any]) -> tuple[str, bool]:
    """Return the kind of the state-space layers as `ssm_cfg` gives it, and whether every block is such a mixer alone.

    Where every block has attention, `ssm_cfg` says nothing, and the kind is "Mamba2", which goes with attention.
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


def is_state_spaces(values: dict[str, Any]) -> bool:
    """Whether these are the values of such a config.json."""
    return "model_type" not in values and "d_model" in values and "n_layer" in values


def parse(values: dict[str, Any]) -> StateSpacesConfig:
    """Check the values of a config.json.

    Raises:
        ValueError: with the name of a field that is unknown, malformed, or says what cannot be expressed.
    """
    model = filled("", values, _MODEL, "state-spaces", ignored=IGNORED)
    for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
        positive(name, model[name])
    require("rms_norm", model["rms_norm"], True, "norms of the mean are not offered")
    layer, plain = layer_kind(values)
    if layer not in _MIXERS:
        raise ValueError(f"config.json: `ssm_cfg.layer` must be {' or '.join(_MIXERS)}, got {layer!r}.")
    if layer == "Mamba1" and not plain:
        name = "attn_layer_idx" if model["attn_layer_idx"] else "d_intermediate"
        raise ValueError(f"config.json: `{name}` must be empty or 0 with Mamba1, got {model[name]!r}.")
    given = model["ssm_cfg"] or {}
    if _attends_everywhere(model):  # its fields are of no use, whichever kind they are of
        given = {}
    elif isinstance(given, dict):
        given = {key: value for key, value in given.items() if key != "layer"}
    mixer = filled("ssm_cfg.", given, _MIXERS[layer], "state-spaces")
    for name in ("d_state", "expand", "d_conv"):
        positive(f"ssm_cfg.{name}", mixer[name])
    if layer == "Mamba2":
        inner = mixer["expand"] * model["d_model"]
        require("ssm_cfg.d_ssm", mixer["d_ssm"] or inner, inner, "an MLP inside of the mixer is not offered")
        require("ssm_cfg.D_has_hdim", mixer["D_has_hdim"], False, "D has one value for each head")
        require("ssm_cfg.rmsnorm", mixer["rmsnorm"], True, "the mixer has a gated norm")
        require("ssm_cfg.norm_before_gate", mixer["norm_before_gate"], False, "the gate comes before the norm")
        mixer["dt_limit"] = _limit(mixer["dt_limit"])
    vocab_size = -(-model["vocab_size"] // model["pad_vocab_size_multiple"]) * model["pad_vocab_size_multiple"]
    attention = _attention(model) if model["attn_layer_idx"] else {}
    return StateSpacesConfig(layer, model, mixer, attention, vocab_size)


def _limit(value: Any) -> list[float]:
    """Return the range of step sizes; an upper end that no float32 exceeds is none."""
    if not isinstance(value, list) or len(value) != 2 or any(type(end) not in (int, float) for end in value):
        raise ValueError(f"config.json: `ssm_cfg.dt_limit` must be a list of two numbers, got {value!r}.")
    low, high = map(float, value)
    return [low, math.inf if high >= LARGEST_STEP else high]


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
    reasons = {"mlp_dim": "zoo_hybrid has no attention with an MLP beside it"}
    for name, value in accepted.items():
        require(f"attn_cfg.{name}", attention[name], value, reasons.get(name, "what zoo_hybrid's attention does"))
    scale = attention["head_dim"] ** -0.5
    require("attn_cfg.softmax_scale", attention["softmax_scale"] or scale, scale, "one over the root of head_dim")
    require("attn_cfg.out_proj_bias", attention["out_proj_bias"], attention["qkv_proj_bias"], "that of qkv_proj_bias")
    return attention
