"""transformers' `llama` and `qwen2`, and `zoo_hybrid` with full attention in every block.

Students are distilled from models of these formats: `distill/teacher.py` and `distill/student.py` read a teacher
through them. A `zoo_hybrid` with full attention in every block is written as a Llama, unless it came from a Bamba.

Qwen2 is a Llama with biases in the projections of queries, keys and values only. It is only read: the missing bias of
the output projection becomes zeros, and the model is written as a Llama with biases, which computes the same.
"""

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

from ...modeling import ZooHybridConfig, ZooHybridForCausalLM
from ...modeling.layers import llama_rope_parameters
from ..rules import Rule
from .format import ROTARY_BUFFERS, TRANSFORMER_FIELDS, fields, head_rules, require, transformers_format

_LLAMA = (*TRANSFORMER_FIELDS, "head_dim", "attention_bias", "mlp_bias")
_THEIRS, _OURS = "model.layers.{layer}.", "backbone.layers.{layer}."


def _zoo_config(config: LlamaConfig) -> ZooHybridConfig:
    return ZooHybridConfig(**fields(config, _LLAMA), rope_parameters=llama_rope_parameters(config))


def _config(config: ZooHybridConfig) -> LlamaConfig:
    return LlamaConfig(**fields(config, _LLAMA), rope_parameters=dict(config.rope_parameters or {}))


def _zoo_config_of_qwen2(config: Qwen2Config) -> ZooHybridConfig:
    kinds = sorted(set(config.layer_types or []))
    require("layer_types", kinds, ["full_attention"], "a qwen2 with a sliding window is not converted")
    return ZooHybridConfig(
        **fields(config, TRANSFORMER_FIELDS),
        head_dim=getattr(config, "head_dim", None),
        attention_bias=True,
        rope_parameters=llama_rope_parameters(config),
    )


def _no_qwen2(config: ZooHybridConfig) -> PreTrainedConfig:
    raise AssertionError("a qwen2 is only read")


def _is_llama(config: ZooHybridConfig) -> bool:
    """Return whether every block is a Llama's. Mamba-2 settings without such a block mean that it was a Bamba."""
    blocks = {*zip(config.mixer_types or [], config.mlp_types or [], strict=True)}
    rotary = config.rope_parameters or {}
    turns_part = rotary.get("rope_type") == "default" and rotary.get("partial_rotary_factor", 1.0) != 1.0
    convolved = config.settings_of("full_attention").conv_kernel > 0
    from_bamba = "mamba2" in vars(config)
    return blocks == {("full_attention", "gated")} and not (turns_part or convolved or from_bamba)


def _rules(config: ZooHybridConfig) -> list[Rule]:
    return [*_block_rules(config), Rule(_THEIRS + "self_attn.{rest}", _OURS + "mixer.{rest}")]


def _rules_of_qwen2(config: ZooHybridConfig) -> list[Rule]:
    same = [f"{name}_proj.{{rest}}" for name in "qkv"] + ["o_proj.weight"]
    rules = [Rule(f"{_THEIRS}self_attn.{key}", f"{_OURS}mixer.{key}") for key in same]
    return [*_block_rules(config), *rules, Rule(None, _OURS + "mixer.o_proj.bias")]


def _block_rules(config: ZooHybridConfig) -> list[Rule]:
    """Return the rules for everything but attention."""
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return [
        Rule("model.embed_tokens.weight", "backbone.embeddings.weight"),
        *(Rule(_THEIRS + norm, _OURS + norm) for norm in norms),
        Rule(_THEIRS + "mlp.{rest}", _OURS + "mlp.{rest}"),
        Rule("model.norm.weight", "backbone.norm_f.weight"),
        *head_rules(config),
    ]


LLAMA = transformers_format(
    LlamaForCausalLM,
    zoo_class=ZooHybridForCausalLM,
    zoo_config=_zoo_config,
    config=_config,
    rules=_rules,
    writes=_is_llama,
    unread=ROTARY_BUFFERS,
    is_teacher=True,
)
QWEN2 = transformers_format(
    Qwen2ForCausalLM,
    zoo_class=ZooHybridForCausalLM,
    zoo_config=_zoo_config_of_qwen2,
    config=_no_qwen2,
    rules=_rules_of_qwen2,
    writes=lambda config: False,
    unread=ROTARY_BUFFERS,
    is_teacher=True,
)
