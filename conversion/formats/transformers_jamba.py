"""transformers' `jamba` without experts and `zoo_hybrid`: Mamba-1 with norms, and attention without positions.

Paper: Lieber et al., "Jamba" (arXiv 2403.19887). Every block has an MLP; a model with a mixture of experts in some
blocks is refused.
"""

from typing import Any

from transformers import JambaConfig, JambaForCausalLM

from ...modeling import ZooHybridConfig, ZooHybridForCausalLM
from .format import TRANSFORMER_FIELDS, fields, require, require_one_of, transformers_format
from .transformer_blocks import has_llama_blocks
from .transformers_bamba import block_rules, layers_of, require_no_convolution

_MIXER = {  # fields of a Mamba mixer: theirs to ours
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_rank": "time_step_rank",
    "mamba_proj_bias": "use_bias",
    "mamba_conv_bias": "use_conv_bias",
}
_NO_POSITIONS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.0}


def _zoo_config(config: JambaConfig) -> ZooHybridConfig:
    require("num_experts", config.num_experts, 1, "zoo_hybrid has no mixture of experts")
    mixers = ["full_attention" if kind == "attention" else "mamba" for kind in config.layers_block_type]
    if "mamba" in mixers:
        require("hidden_act", config.hidden_act, "silu", "zoo_hybrid's Mamba, which shares it, has no other")
    settings: dict[str, Any] = {ours: getattr(config, theirs) for theirs, ours in _MIXER.items()}
    settings |= {"mixer_rms_eps": config.rms_norm_eps, "mixer_rms_weight": True}
    kinds: dict[str, Any] = {"mamba": settings}
    return ZooHybridConfig(
        **fields(config, TRANSFORMER_FIELDS),
        **kinds,
        head_dim=getattr(config, "head_dim", None),
        mixer_types=mixers,
        rope_parameters=dict(_NO_POSITIONS),
    )


def _config(config: ZooHybridConfig) -> JambaConfig:
    for layer, mixer in enumerate(config.mixer_types or []):
        require_one_of(f"mixer_types[{layer}]", mixer, ("mamba", "full_attention"), "jamba has no other")
        require(f"mlp_types[{layer}]", (config.mlp_types or [])[layer], "gated", "every block of jamba has an MLP")
        if mixer == "full_attention":
            require_no_convolution(config, "jamba")
    require("hidden_act", config.hidden_act, "silu", "jamba's Mamba has the activation of the MLP")
    require("attention_bias", config.attention_bias, False, "jamba has none")
    require("mlp_bias", config.mlp_bias, False, "jamba has none")
    mixer = config.settings_of("mamba")  # `writes` has made sure that there is one
    require("mamba.mixer_rms_eps", mixer.mixer_rms_eps, config.rms_norm_eps, "equal to rms_norm_eps")
    require("mamba.mixer_rms_weight", mixer.mixer_rms_weight, True, "jamba's norms have weights")
    attention = layers_of(config, {"full_attention"})
    if attention:
        part = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        require("rope_parameters.partial_rotary_factor", part, 0.0, "jamba's attention has no positions")
    period, offset = _period(attention, config.num_hidden_layers)
    values = fields(config, TRANSFORMER_FIELDS)
    values |= {theirs: getattr(mixer, ours) for theirs, ours in _MIXER.items()}
    if int(config.head_dim or 0) * config.num_attention_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    return JambaConfig(
        **values, attn_layer_period=period, attn_layer_offset=offset, num_experts=1, num_experts_per_tok=1
    )


def _period(layers: list[int], count: int) -> tuple[int, int]:
    """Return the period and the offset of the layers, out of `count`, that are attention."""
    offset = layers[0] if layers else count
    period = layers[1] - offset if len(layers) > 1 else count + 1
    if offset >= period or layers != list(range(offset, count, period)):
        raise ValueError(
            "config.json: `mixer_types` must have 'full_attention' in no layer, one, or every n-th from one of the "
            f"first n on, for jamba, got it in layers {layers}."
        )
    return period, offset


JAMBA = transformers_format(
    JambaForCausalLM,
    zoo_class=ZooHybridForCausalLM,
    zoo_config=_zoo_config,
    config=_config,
    rules=block_rules,
    writes=lambda config: "mamba" in (config.mixer_types or []) and has_llama_blocks(config),
)
