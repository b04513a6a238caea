"""transformers' `gemma2` and `gemma3_text`: norms around attention and MLP, windows in some blocks, scaled embeddings.

Gemma-2 caps the scores of attention and the logits softly. Gemma-3 norms queries and keys instead, and blocks with a
window have a rotary embedding of their own; its class ignores `attn_logit_softcapping`. Models that read images
(`gemma3`) or that see later tokens are refused.
"""

from types import SimpleNamespace
from typing import Any

from transformers import Gemma2ForCausalLM, Gemma3ForCausalLM

from ...modeling import ZooHybridConfig
from ..rules import Rule
from .format import ROTARY_BUFFERS, require_one_of
from .transformer_blocks import rope_parameters, teacher_format
from .transformers_llama import decoder_rules, same_halves

_BLOCKS = {"norm_type": "unit_offset_rms_norm", "norm_placement": "both"}
_NAMES = {
    "hidden_act": "hidden_activation",
    "attention_bias": "attention_bias",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "final_logit_softcapping": "final_logit_softcapping",
}


def _rules(config: ZooHybridConfig) -> list[Rule]:
    norms = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "mixer_output_layernorm",
        "pre_feedforward_layernorm": "post_attention_layernorm",
        "post_feedforward_layernorm": "mlp_output_layernorm",
    }
    return [*decoder_rules(config, norms), *same_halves()]


def _check(config: Any) -> None:
    both_ways = config.use_bidirectional_attention
    require_one_of("use_bidirectional_attention", both_ways, (None, False), "zoo_hybrid sees earlier tokens only")


def _to_ours(config: Any) -> dict[str, Any]:
    return {"embedding_multiplier": config.hidden_size**0.5}


def _writes(config: ZooHybridConfig) -> bool:
    return config.embedding_multiplier == config.hidden_size**0.5 and config.query_pre_attn_scalar is not None


def _gemma3_to_ours(config: Any) -> dict[str, Any]:
    kinds = config.layer_types
    values = _to_ours(config) | {"rope_parameters": _rope(config, "full_attention")}
    if "sliding_attention" in kinds:
        values["local_rope_parameters"] = _rope(config, "sliding_attention")
    return values | {"position_types": ["local_rope" if kind == "sliding_attention" else "rope" for kind in kinds]}


def _rope(config: Any, kind: str) -> dict[str, Any]:
    """Return the rotary embedding of blocks of a kind as the class reads it."""
    positions = config.max_position_embeddings
    return rope_parameters(
        SimpleNamespace(rope_parameters=config.rope_parameters[kind], max_position_embeddings=positions), False
    )


def _gemma3_to_theirs(config: ZooHybridConfig) -> dict[str, Any]:
    ropes = {"full_attention": config.rope_parameters, "sliding_attention": config.local_rope_parameters}
    return {"rope_parameters": {kind: dict(rope) for kind, rope in ropes.items() if rope is not None}}


def _writes_gemma3(config: ZooHybridConfig) -> bool:
    kinds = config.mixer_types or []
    positions = ["local_rope" if kind == "sliding_attention" else "rope" for kind in kinds]
    return _writes(config) and (config.position_types or ["rope"] * len(kinds)) == positions


GEMMA2 = teacher_format(
    Gemma2ForCausalLM,
    rules=_rules,
    fixed=_BLOCKS,
    names=_NAMES | {"attn_logit_softcapping": "attn_logit_softcapping"},
    free=("embedding_multiplier",),
    to_ours=_to_ours,
    check=_check,
    writes=_writes,
    windows="some",
    has_head_dim=True,
    unread=ROTARY_BUFFERS,
)
GEMMA3 = teacher_format(
    Gemma3ForCausalLM,
    rules=_rules,
    fixed=_BLOCKS | {"qk_norm": "head"},
    names=_NAMES,
    free=("embedding_multiplier", "position_types", "local_rope_parameters"),
    to_ours=_gemma3_to_ours,
    to_theirs=_gemma3_to_theirs,
    check=_check,
    writes=_writes_gemma3,
    windows="some",
    rotary=False,
    has_head_dim=True,
)
