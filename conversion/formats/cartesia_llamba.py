"""Cartesia's `llamba` and `zoo_hybrid`: Llama's blocks with discrete Mamba-2 in place of attention.

Paper: Bick et al., "Llamba" (arXiv 2502.14458); official code: cartesia-ai/edge@95d8276,
`cartesia-pytorch/cartesia_pytorch/Llamba` (`llamba.py`, `configuration_llamba.py`, `mixers/discrete_mamba2.py`). The
rows of `in_proj` are x, B, C, z, a on both sides. `llamba` has no `dt_bias` and, if `in_proj` has a bias, no `z_bias`.
Both are zeros after reading, and must be zeros to be written.

Phi-Mamba (goombalab/phi-mamba@b2e405f) has the same mixer in Phi's block, with mixer and MLP in parallel after one
LayerNorm, and a head with a bias. It is not read.
"""

from pathlib import Path
from typing import Any

from ...modeling import ZooHybridConfig, ZooHybridForCausalLM
from ..rules import Rule
from .format import Format, filled, head_rules, positive, read_config, require
from .transformer_blocks import has_llama_blocks

_EPSILON = 1e-5  # of the blocks' norms; the configuration cannot change it
_MODEL = {
    "vocab_size": None,
    "d_model": None,
    "n_layer": 32,
    "tie_embeddings": False,
    "pad_vocab_size_multiple": 8,
    "lm_head_bias": False,
    "norm_epsilon": _EPSILON,
    "lm_head_prenorm": "rms",
    "mlp_cfg": None,
    "ssm_cfg": None,
}
_MLP = {"intermediate_size": 14336, "bias": False, "act_fn": "silu"}
_MIXER = {
    "d_state": 64,
    "n_v_heads": 32,
    "n_qk_heads": 32,
    "expand": 1,
    "d_conv": 4,
    "conv_bias": True,
    "bias": False,
    "activation": "identity",
    "chunk_size": 128,  # changes no result
}
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_LAYER = "backbone.layers.{layer}."


def _read(folder: Path) -> dict[str, Any]:
    values = read_config(folder)
    if "MixerModel" in values:
        block = next((key for key in values if key.startswith("Block")), "Block1")
        found = values.get(block)
        kind = found.get("BlockType") if isinstance(found, dict) else found
        raise ValueError(
            f"config.json: `{block}.BlockType` is {kind!r}, the block of Phi-Mamba: its mixer and MLP run in parallel "
            "after one LayerNorm. zoo_hybrid has only sequential blocks with an RMSNorm for each half."
        )
    return values


def _zoo_config(values: dict[str, Any]) -> ZooHybridConfig:
    model = {key: values.get(key, default) for key, default in _MODEL.items()}  # the other fields are transformers'
    for name in ("vocab_size", "d_model", "n_layer", "pad_vocab_size_multiple"):
        positive(name, model[name])
    require("lm_head_bias", model["lm_head_bias"], False, "zoo_hybrid's head has none")
    require("norm_epsilon", model["norm_epsilon"], _EPSILON, "the fixed epsilon of the norms in the blocks")
    require("lm_head_prenorm", model["lm_head_prenorm"], "rms", "the zoo has RMS norms only")
    mlp = filled("mlp_cfg.", model["mlp_cfg"] or {}, _MLP, "llamba")
    mixer = filled("ssm_cfg.", model["ssm_cfg"] or {}, _MIXER, "llamba")
    positive("mlp_cfg.intermediate_size", mlp["intermediate_size"])
    for name in ("d_state", "n_v_heads", "expand", "d_conv"):
        positive(f"ssm_cfg.{name}", mixer[name])
    heads, inner = mixer["n_v_heads"], mixer["expand"] * model["d_model"]
    require("ssm_cfg.n_qk_heads", mixer["n_qk_heads"], heads, "equal to n_v_heads: every head has its own B and C")
    require("ssm_cfg.activation", mixer["activation"], "identity", "zoo_hybrid's convolution has none")
    require("ssm_cfg.conv_bias", mixer["conv_bias"], True, "zoo_hybrid's convolution has one")
    if inner % heads:
        raise ValueError(f"config.json: `ssm_cfg.n_v_heads` must divide expand * d_model ({inner}), got {heads}.")
    multiple = model["pad_vocab_size_multiple"]
    ids: dict[str, Any] = {key: values.get(key) for key in _IDS}
    settings: dict[str, Any] = {"discrete_mamba2": {"state_size": mixer["d_state"], "conv_kernel": mixer["d_conv"]}}
    return ZooHybridConfig(
        vocab_size=-(-model["vocab_size"] // multiple) * multiple,
        hidden_size=model["d_model"],
        intermediate_size=mlp["intermediate_size"],
        num_hidden_layers=model["n_layer"],
        mixer_types=["discrete_mamba2"] * model["n_layer"],
        num_attention_heads=heads,
        head_dim=inner // heads,
        hidden_act=mlp["act_fn"],
        rms_norm_eps=_EPSILON,
        attention_bias=mixer["bias"],
        mlp_bias=mlp["bias"],
        tie_word_embeddings=model["tie_embeddings"],
        **ids,
        **settings,
    )


def _config(config: ZooHybridConfig) -> dict[str, Any]:
    for layer, kinds in enumerate(zip(config.mixer_types or [], config.mlp_types or [], strict=True)):
        require(f"mixer_types[{layer}]", kinds[0], "discrete_mamba2", "llamba has no other mixer")
        require(f"mlp_types[{layer}]", kinds[1], "gated", "every block of llamba has an MLP")
    mixer = config.settings_of("discrete_mamba2")
    require("discrete_mamba2.feature_map", mixer.feature_map, "identity", "llamba has no other")
    require("discrete_mamba2.normalize", mixer.normalize, False, "llamba does not divide by row sums")
    require("discrete_mamba2.rotary", mixer.rotary, False, "llamba has no rotary positions")
    require("rms_norm_eps", config.rms_norm_eps, _EPSILON, "llamba has no other in its blocks")
    heads, inner = config.num_attention_heads, config.num_attention_heads * int(config.head_dim or 0)
    if inner % config.hidden_size:
        raise ValueError(
            f"config.json: `head_dim` must make {heads} heads as wide as a multiple of hidden_size "
            f"({config.hidden_size}) for llamba, got {config.head_dim}."
        )
    return {
        "model_type": "llamba",
        "architectures": ["LlambaLMHeadModel"],
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "tie_embeddings": config.tie_word_embeddings,
        "pad_vocab_size_multiple": 1,
        "lm_head_bias": False,
        "norm_epsilon": config.rms_norm_eps,
        "resid_dropout": 0.0,
        "mlp_cfg": {
            "intermediate_size": config.intermediate_size,
            "bias": config.mlp_bias,
            "act_fn": config.hidden_act,
        },
        "ssm_cfg": _MIXER
        | {
            "d_state": mixer.state_size,
            "n_v_heads": heads,
            "n_qk_heads": heads,
            "expand": inner // config.hidden_size,
            "d_conv": mixer.conv_kernel,
            "bias": config.attention_bias,
        },
        **{key: getattr(config, key) for key in _IDS},
    }


def _rules(config: ZooHybridConfig) -> list[Rule]:
    same = ["input_layernorm.weight", "post_attention_layernorm.weight", "mlp.{rest}", "mixer.in_proj.{rest}"]
    same += ["mixer.conv1d.{rest}", "mixer.D", "mixer.out_proj.{rest}"]
    return [
        Rule("backbone.embedding.weight", "backbone.embeddings.weight"),
        *(Rule(_LAYER + key, _LAYER + key) for key in same),
        Rule(None if config.attention_bias else _LAYER + "mixer.z_bias", _LAYER + "mixer.z_bias"),
        Rule(None, _LAYER + "mixer.dt_bias"),
        Rule("backbone.final_layernorm.weight", "backbone.norm_f.weight"),
        *head_rules(config),
    ]


LLAMBA = Format(
    name="cartesia llamba",
    library="cartesia",
    zoo_class=ZooHybridForCausalLM,
    # A configuration of Phi-Mamba is taken for this format, whose `read` refuses it.
    reads=lambda values: values.get("model_type") == "llamba" or "MixerModel" in values,
    read=_read,
    zoo_config=_zoo_config,
    config=_config,
    rules=_rules,
    writes=has_llama_blocks,
)
