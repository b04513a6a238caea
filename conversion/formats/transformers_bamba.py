"""transformers' `bamba` and `zoo_hybrid`: Mamba-2 and attention with partial rotary positions, each with an MLP."""

from collections.abc import Collection
from typing import Any

from transformers import BambaConfig, BambaForCausalLM

from ...modeling import ZooHybridConfig, ZooHybridForCausalLM
from ..rules import Rule
from .format import (
    ROTARY_BUFFERS,
    TRANSFORMER_FIELDS,
    fields,
    head_rules,
    require,
    require_one_of,
    transformers_format,
)
from .transformer_blocks import has_llama_blocks

_SAME = (*TRANSFORMER_FIELDS, "attention_bias", "mlp_bias", "rope_parameters")
_MIXER = {  # fields of a Mamba-2 mixer: theirs to ours
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_d_head": "head_dim",
    "mamba_n_groups": "n_groups",
    "mamba_proj_bias": "use_bias",
    "mamba_conv_bias": "use_conv_bias",
    "time_step_limit": "time_step_limit",
}


def _zoo_config(config: BambaConfig) -> ZooHybridConfig:
    attention = set(config.attn_layer_indices or [])
    mixers = ["full_attention" if layer in attention else "mamba2" for layer in range(config.num_hidden_layers)]
    if "mamba2" in mixers:
        require("hidden_act", config.hidden_act, "silu", "zoo_hybrid's Mamba-2, which shares it, has no other")
    settings: dict[str, Any] = {ours: getattr(config, theirs) for theirs, ours in _MIXER.items()}
    kinds: dict[str, Any] = {"mamba2": settings}
    return ZooHybridConfig(
        **fields(config, _SAME),
        **kinds,
        head_dim=getattr(config, "head_dim", None),
        mixer_types=mixers,
    )


def _config(config: ZooHybridConfig) -> BambaConfig:
    mixers = config.mixer_types or []
    for layer, mixer in enumerate(mixers):
        require_one_of(f"mixer_types[{layer}]", mixer, ("mamba2", "full_attention"), "bamba has no other")
        require(f"mlp_types[{layer}]", (config.mlp_types or [])[layer], "gated", "every block of bamba has an MLP")
        if mixer == "full_attention":
            require_no_convolution(config, "bamba")
    if "mamba2" in mixers:
        require("hidden_act", config.hidden_act, "silu", "bamba's Mamba-2 has the activation of the MLP")
    values = fields(config, _SAME)
    mixer = config.settings_of("mamba2")
    values |= {theirs: getattr(mixer, ours) for theirs, ours in _MIXER.items()}
    # By default, Bamba rotates half of each head.
    values["rope_parameters"] = {"partial_rotary_factor": 1.0} | dict(config.rope_parameters or {})
    if int(config.head_dim or 0) * config.num_attention_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    inner = mixer.expand * config.hidden_size
    heads = max(1, inner // mixer.head_dim)  # if no block has the mixer, its default heads may be wider than `inner`
    return BambaConfig(
        **values | {"mamba_d_head": inner // heads},
        mamba_n_heads=heads,
        attn_layer_indices=layers_of(config, {"full_attention"}),
    )


def require_no_convolution(config: ZooHybridConfig, theirs: str) -> None:
    """Raise a ValueError if attention has a convolution, which the other format lacks."""
    kernel = config.settings_of("full_attention").conv_kernel
    require("full_attention.conv_kernel", kernel, 0, f"{theirs}'s attention has no convolution")


def layers_of(config: ZooHybridConfig, kinds: Collection[str]) -> list[int]:
    """Return the numbers of the blocks whose token mixer is one of `kinds`."""
    return [layer for layer, mixer in enumerate(config.mixer_types or []) if mixer in kinds]


def block_rules(config: ZooHybridConfig) -> list[Rule]:
    """Return the rules for the keys of transformers' Bamba and Jamba."""
    theirs, ours = "model.layers.{layer}.", "backbone.layers.{layer}."
    rules = [
        Rule("model.embed_tokens.weight", "backbone.embeddings.weight"),
        Rule(theirs + "input_layernorm.weight", ours + "input_layernorm.weight"),
        Rule(theirs + "pre_ff_layernorm.weight", ours + "post_attention_layernorm.weight"),
        Rule(theirs + "feed_forward.{rest}", ours + "mlp.{rest}"),
        Rule("model.final_layernorm.weight", "backbone.norm_f.weight"),
        *head_rules(config),
    ]
    for name, kinds in (("mamba", {"mamba", "mamba2"}), ("self_attn", {"full_attention"})):
        if layers := layers_of(config, kinds):
            rules.append(Rule(f"{theirs}{name}.{{rest}}", ours + "mixer.{rest}", layers=layers))
    return rules


BAMBA = transformers_format(
    BambaForCausalLM,
    zoo_class=ZooHybridForCausalLM,
    zoo_config=_zoo_config,
    config=_config,
    rules=block_rules,
    writes=lambda config: "mamba" not in (config.mixer_types or []) and has_llama_blocks(config),
    unread=ROTARY_BUFFERS,
)
