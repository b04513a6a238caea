"""transformers' `gpt2`, `gpt_neox` (Pythia) and `phi` (Phi-1, Phi-1.5, Phi-2): LayerNorms and MLPs without a gate.

| family | what differs from a Llama besides |
|---|---|
| gpt2 | learned positions; one transposed matrix for queries, keys and values; biases everywhere |
| gpt_neox | one matrix with queries, keys and values by head; partial rotary; attention and MLP side by side, or not |
| phi | partial rotary; attention and MLP side by side behind one norm; biases everywhere, in the head too |
"""

from typing import Any

from transformers import GPT2LMHeadModel, GPTNeoXForCausalLM, PhiForCausalLM

from ...modeling import ZooHybridConfig
from ..rules import Rule, SplitRows
from .format import head_rules, require
from .transformer_blocks import teacher_format

_LAYER_NORMS = {"norm_type": "layer_norm"}
_OURS = "backbone.layers.{layer}."


def _sizes(config: ZooHybridConfig) -> tuple[int, int]:
    """Return D and the width of the MLP."""
    return config.hidden_size, config.intermediate_size


def _heads_fill_the_width(config: ZooHybridConfig) -> bool:
    """Return whether each query head has keys of its own, and the heads are as wide together as the model."""
    whole = int(config.head_dim or 0) * config.num_attention_heads == config.hidden_size
    return whole and config.num_key_value_heads == config.num_attention_heads


def _attention(theirs: str, config: ZooHybridConfig, **options: Any) -> list[Rule]:
    """Return the rules of a fused matrix of queries, keys and values, with or without a bias."""
    width = config.hidden_size
    parts = ("weight", "bias") if config.attention_bias else ("weight",)
    transposed = options.pop("transposed", False)
    return [
        Rule(
            f"{theirs}.{part}",
            tuple(f"{_OURS}mixer.{name}_proj.{part}" for name in "qkv"),
            SplitRows((width, width, width), transposed=transposed and part == "weight", **options),
        )
        for part in parts
    ]


def _transposed(theirs: str, ours: str, rows: int) -> list[Rule]:
    """Return the rules of a layer with a bias whose weight is transposed."""
    weight = Rule(f"{theirs}.weight", f"{_OURS}{ours}.weight", SplitRows((rows,), transposed=True))
    return [weight, Rule(f"{theirs}.bias", f"{_OURS}{ours}.bias")]


def _gpt2_rules(config: ZooHybridConfig) -> list[Rule]:
    width, inner = _sizes(config)
    block = "transformer.h.{layer}."
    return [
        Rule("transformer.wte.weight", "backbone.embeddings.weight"),
        Rule("transformer.wpe.weight", "backbone.position_embeddings.weight"),
        Rule(block + "ln_1.{rest}", _OURS + "input_layernorm.{rest}"),
        *_attention(block + "attn.c_attn", config, transposed=True),
        *_transposed(block + "attn.c_proj", "mixer.o_proj", width),
        Rule(block + "ln_2.{rest}", _OURS + "post_attention_layernorm.{rest}"),
        *_transposed(block + "mlp.c_fc", "mlp.up_proj", inner),
        *_transposed(block + "mlp.c_proj", "mlp.down_proj", width),
        Rule("transformer.ln_f.{rest}", "backbone.norm_f.{rest}"),
        *head_rules(config),
    ]


def _gpt_neox_rules(config: ZooHybridConfig) -> list[Rule]:
    block = "gpt_neox.layers.{layer}."
    return [
        Rule("gpt_neox.embed_in.weight", "backbone.embeddings.weight"),
        Rule(block + "input_layernorm.{rest}", _OURS + "input_layernorm.{rest}"),
        *_attention(block + "attention.query_key_value", config, groups=config.num_attention_heads),
        Rule(block + "attention.dense.{rest}", _OURS + "mixer.o_proj.{rest}"),
        Rule(block + "post_attention_layernorm.{rest}", _OURS + "post_attention_layernorm.{rest}"),
        Rule(block + "mlp.dense_h_to_4h.{rest}", _OURS + "mlp.up_proj.{rest}"),
        Rule(block + "mlp.dense_4h_to_h.{rest}", _OURS + "mlp.down_proj.{rest}"),
        Rule("gpt_neox.final_layer_norm.{rest}", "backbone.norm_f.{rest}"),
        *head_rules(config),
    ]


def _phi_rules(config: ZooHybridConfig) -> list[Rule]:
    block = "model.layers.{layer}."
    norms = "qk" if config.qk_norm else ""
    return [
        Rule("model.embed_tokens.weight", "backbone.embeddings.weight"),
        Rule(block + "input_layernorm.{rest}", _OURS + "input_layernorm.{rest}"),
        *(Rule(f"{block}self_attn.{n}_proj.{{rest}}", f"{_OURS}mixer.{n}_proj.{{rest}}") for n in "qkv"),
        *(Rule(f"{block}self_attn.{n}_layernorm.{{rest}}", f"{_OURS}mixer.{n}_norm.{{rest}}") for n in norms),
        Rule(block + "self_attn.dense.{rest}", _OURS + "mixer.o_proj.{rest}"),
        Rule(block + "mlp.fc1.{rest}", _OURS + "mlp.up_proj.{rest}"),
        Rule(block + "mlp.fc2.{rest}", _OURS + "mlp.down_proj.{rest}"),
        Rule("model.final_layernorm.{rest}", "backbone.norm_f.{rest}"),
        Rule("lm_head.bias", "lm_head.bias"),
        *head_rules(config),
    ]


def _check_gpt2(config: Any) -> None:
    require("add_cross_attention", config.add_cross_attention, False, "zoo_hybrid has no encoder")
    depth = config.scale_attn_by_inverse_layer_idx
    require("scale_attn_by_inverse_layer_idx", depth, False, "zoo_hybrid has one scaling of the scores in all blocks")


def _gpt2_to_ours(config: Any) -> dict[str, Any]:
    return {
        "intermediate_size": config.n_inner or 4 * config.n_embd,
        "num_key_value_heads": config.n_head,
        "query_pre_attn_scalar": None if config.scale_attn_weights else 1.0,
        "position_types": ["none"] * config.n_layer,
    }


def _gpt2_to_theirs(config: ZooHybridConfig) -> dict[str, Any]:
    return {"scale_attn_weights": config.query_pre_attn_scalar is None}


def _is_gpt2(config: ZooHybridConfig) -> bool:
    scalar, positions = config.query_pre_attn_scalar, set(config.position_types or ["rope"])
    return scalar in (None, 1.0) and positions == {"none"} and _heads_fill_the_width(config)


def _phi_to_ours(config: Any) -> dict[str, Any]:
    return {"qk_norm": "head" if config.qk_layernorm else None}


GPT2 = teacher_format(
    GPT2LMHeadModel,
    rules=_gpt2_rules,
    fixed=_LAYER_NORMS | {"attention_bias": True, "mlp_bias": True, "learned_positions": True},
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": None,
        "intermediate_size": "n_inner",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "n_positions",
    },
    free=("query_pre_attn_scalar", "position_types"),
    to_ours=_gpt2_to_ours,
    to_theirs=_gpt2_to_theirs,
    check=_check_gpt2,
    writes=_is_gpt2,
    mlp="plain",
    rotary=False,
    unread=r"\.attn\.(masked_)?bias$",
)
GPT_NEOX = teacher_format(
    GPTNeoXForCausalLM,
    rules=_gpt_neox_rules,
    fixed=_LAYER_NORMS | {"mlp_bias": True},
    names={
        "num_key_value_heads": None,
        "rms_norm_eps": "layer_norm_eps",
        "attention_bias": "attention_bias",
        "use_parallel_residual": "use_parallel_residual",
    },
    to_ours=lambda config: {"num_key_value_heads": config.num_attention_heads},
    writes=_heads_fill_the_width,
    mlp="plain",
    partial_rotary=True,
    former_keys={"embed_out.weight": "lm_head.weight"},
    unread=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
)
PHI = teacher_format(
    PhiForCausalLM,
    rules=_phi_rules,
    fixed=_LAYER_NORMS
    | {
        "attention_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
        "use_parallel_residual": True,
        "share_norm": True,
    },
    names={"rms_norm_eps": "layer_norm_eps"},
    free=("qk_norm",),
    to_ours=_phi_to_ours,
    to_theirs=lambda config: {"qk_layernorm": config.qk_norm is not None},
    writes=lambda config: config.qk_norm in (None, "head"),
    mlp="plain",
    partial_rotary=True,
)
