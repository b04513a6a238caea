"""transformers' `llama` and `zoo_hybrid` with full attention in every block.

Students are distilled from models of this format: `distill/teacher.py` and `distill/student.py` read a teacher through
it. A `zoo_hybrid` with full attention in every block is written as a Llama, unless it came from a Bamba.
"""

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from ...modeling import ZooHybridConfig, ZooHybridForCausalLM
from ...modeling.layers import llama_rope_parameters
from ..rules import Rule
from .format import CARRIED_IDS, ROTARY_BUFFERS, Format, head_rules

_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    "max_position_embeddings",
    "initializer_range",
    *CARRIED_IDS,
)
_THEIRS, _OURS = "model.layers.{layer}.", "backbone.layers.{layer}."


def _zoo_config(config: LlamaConfig) -> ZooHybridConfig:
    values: dict[str, Any] = {key: getattr(config, key) for key in _SAME}
    return ZooHybridConfig(**values, rope_parameters=llama_rope_parameters(config))


def _config(config: ZooHybridConfig) -> LlamaConfig:
    values: dict[str, Any] = {key: getattr(config, key) for key in _SAME}
    return LlamaConfig(**values, rope_parameters=dict(config.rope_parameters or {}))


def _is_llama(config: ZooHybridConfig) -> bool:
    """Whether every block is a Llama's. Settings of a Mamba-2 that no block has are left by a Bamba."""
    blocks = {*zip(config.mixer_types or [], config.mlp_types or [], strict=True)}
    rotary = config.rope_parameters or {}
    turns_part = rotary.get("rope_type") == "default" and rotary.get("partial_rotary_factor", 1.0) != 1.0
    convolved = config.settings_of("full_attention").conv_kernel > 0
    from_bamba = "mamba2" in vars(config)
    return blocks == {("full_attention", "gated")} and not (turns_part or convolved or from_bamba)


def _rules(config: ZooHybridConfig) -> list[Rule]:
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return [
        Rule("model.embed_tokens.weight", "backbone.embeddings.weight"),
        *(Rule(_THEIRS + norm, _OURS + norm) for norm in norms),
        Rule(_THEIRS + "self_attn.{rest}", _OURS + "mixer.{rest}"),
        Rule(_THEIRS + "mlp.{rest}", _OURS + "mlp.{rest}"),
        Rule("model.norm.weight", "backbone.norm_f.weight"),
        *head_rules(config),
    ]


LLAMA = Format(
    name="transformers llama",
    library="transformers",
    zoo_class=ZooHybridForCausalLM,
    reads=lambda values: values.get("model_type") == "llama",
    read=LlamaConfig.from_pretrained,
    zoo_config=_zoo_config,
    config=_config,
    rules=_rules,
    writes=_is_llama,
    model_class=LlamaForCausalLM,
    unread=ROTARY_BUFFERS,
    is_teacher=True,
)
