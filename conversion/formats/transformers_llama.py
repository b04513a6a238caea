"""transformers' `llama`, `mistral`, `qwen2`, `qwen3`, `olmo2`, `smollm3` and `phi3`: decoders with Llama's modules.

| family | what differs from a Llama |
|---|---|
| mistral | a sliding window in every block, or none |
| qwen2 | biases of queries, keys and values only |
| qwen3 | norms over each head of queries and keys |
| olmo2 | norms over the width of queries and keys; the others are behind attention and MLP |
| smollm3 | blocks without rotary embedding |
| phi3 | one matrix for queries, keys and values, one for the two halves of the MLP; partial rotary; a window or none |
"""

from typing import Any

from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)

from ...modeling import ZooHybridConfig
from ..rules import Rule, SplitRows
from .format import ROTARY_BUFFERS, head_rules, require
from .transformer_blocks import teacher_format

_THEIRS, _OURS = "model.layers.{layer}.", "backbone.layers.{layer}."
_NORMS = ("input_layernorm", "post_attention_layernorm")


def decoder_rules(config: ZooHybridConfig, norms: dict[str, str]) -> list[Rule]:
    """Return the rules for everything outside of attention and MLP in a decoder with Llama's names.

    Args:
        config: of our model.
        norms: names of the norms of a block: theirs -> ours.
    """
    return [
        Rule("model.embed_tokens.weight", "backbone.embeddings.weight"),
        *(Rule(f"{_THEIRS}{theirs}.{{rest}}", f"{_OURS}{ours}.{{rest}}") for theirs, ours in norms.items()),
        Rule("model.norm.weight", "backbone.norm_f.weight"),
        *head_rules(config),
    ]


def llama_rules(config: ZooHybridConfig) -> list[Rule]:
    """Return the rules of a Llama, and of any decoder with its modules and their names."""
    return [*decoder_rules(config, dict(zip(_NORMS, _NORMS, strict=True))), *same_halves()]


def same_halves() -> list[Rule]:
    """Return the rules of attention and MLP with Llama's names."""
    return [
        Rule(_THEIRS + "self_attn.{rest}", _OURS + "mixer.{rest}"),
        Rule(_THEIRS + "mlp.{rest}", _OURS + "mlp.{rest}"),
    ]


def _olmo2_rules(config: ZooHybridConfig) -> list[Rule]:
    norms = {
        "post_attention_layernorm": "mixer_output_layernorm",
        "post_feedforward_layernorm": "mlp_output_layernorm",
    }
    return [*decoder_rules(config, norms), *same_halves()]


def _phi3_rules(config: ZooHybridConfig) -> list[Rule]:
    heads, kv_heads, width = config.num_attention_heads, int(config.num_key_value_heads or 0), int(config.head_dim or 0)
    qkv = SplitRows((heads * width, kv_heads * width, kv_heads * width))
    halves = SplitRows((config.intermediate_size, config.intermediate_size))
    return [
        *decoder_rules(config, dict(zip(_NORMS, _NORMS, strict=True))),
        Rule(_THEIRS + "self_attn.qkv_proj.weight", tuple(f"{_OURS}mixer.{n}_proj.weight" for n in "qkv"), qkv),
        Rule(_THEIRS + "self_attn.o_proj.weight", _OURS + "mixer.o_proj.weight"),
        Rule(
            _THEIRS + "mlp.gate_up_proj.weight",
            tuple(f"{_OURS}mlp.{name}_proj.weight" for name in ("gate", "up")),
            halves,
        ),
        Rule(_THEIRS + "mlp.down_proj.weight", _OURS + "mlp.down_proj.weight"),
    ]


def _refuse_windows(config: Any) -> None:
    kinds, theirs = sorted(set(config.layer_types or [])), config.model_type
    require("layer_types", kinds, ["full_attention"], f"a {theirs} with a sliding window is not converted")


def _changing_length(config: Any) -> int | None:
    """Return the length beyond which the rotary embedding of a Phi-3, ours or theirs, changes for all positions.

    Their `generate` computes the cache again there; ours does with this `recompute_length`. None: it does not change.
    """
    rotary = config.rope_parameters or {}
    return rotary["original_max_position_embeddings"] if rotary.get("rope_type") == "longrope" else None


def _phi3_to_theirs(config: ZooHybridConfig) -> dict[str, Any]:
    return {"original_max_position_embeddings": _changing_length(config) or config.max_position_embeddings}


def _positions_to_ours(config: Any) -> dict[str, Any]:
    return {"position_types": ["rope" if turned else "none" for turned in config.no_rope_layers]}


def _positions_to_theirs(config: ZooHybridConfig) -> dict[str, Any]:
    types = config.position_types or ["rope"] * config.num_hidden_layers
    return {"no_rope_layers": [int(kind == "rope") for kind in types]}


LLAMA = teacher_format(
    LlamaForCausalLM,
    rules=llama_rules,
    names={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    has_head_dim=True,
    unread=ROTARY_BUFFERS,
)
MISTRAL = teacher_format(MistralForCausalLM, rules=llama_rules, windows="all", has_head_dim=True, unread=ROTARY_BUFFERS)
QWEN2 = teacher_format(
    Qwen2ForCausalLM,
    rules=llama_rules,
    fixed={"attention_bias": True, "attention_output_bias": False},
    check=_refuse_windows,
    unread=ROTARY_BUFFERS,
)
QWEN3 = teacher_format(
    Qwen3ForCausalLM,
    rules=llama_rules,
    fixed={"qk_norm": "head"},
    names={"attention_bias": "attention_bias"},
    check=_refuse_windows,
    has_head_dim=True,
)
OLMO2 = teacher_format(
    Olmo2ForCausalLM,
    rules=_olmo2_rules,
    fixed={"qk_norm": "width", "norm_placement": "after"},
    names={"attention_bias": "attention_bias"},
)
SMOLLM3 = teacher_format(
    SmolLM3ForCausalLM,
    rules=llama_rules,
    names={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    free=("position_types",),
    to_ours=_positions_to_ours,
    to_theirs=_positions_to_theirs,
    check=_refuse_windows,
)
PHI3 = teacher_format(
    Phi3ForCausalLM,
    rules=_phi3_rules,
    free=("recompute_length",),
    to_ours=lambda config: {"recompute_length": _changing_length(config)},
    to_theirs=_phi3_to_theirs,
    writes=lambda config: config.recompute_length == _changing_length(config),
    windows="all",
    partial_rotary=True,
)
