"""Tiny configurations of transformers' own models with Mamba layers, by model type."""

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 61
_PLAIN = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48}
_MAMBA1 = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3, "expand": 2}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8}

SIZES: dict[str, dict[str, Any]] = {
    "mamba": _MAMBA1,
    "falcon_mamba": _MAMBA1,
    "mamba2": {
        **{"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 2},
        **{"expand": 2, "chunk_size": 8},
    },
    "jamba": {
        **_ATTENTION,
        **{"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
        **{"expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 3},
    },
    "zamba": {
        **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
        **{"n_mamba_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 3, "attention_hidden_size": 64},
    },
    "zamba2": {
        **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
        **{"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2, "chunk_size": 8},
        **{"num_mem_blocks": 1, "use_mem_rope": True, "use_long_context": False},
    },
    "bamba": {**_ATTENTION, **_MAMBA2, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "falcon_h1": {**_ATTENTION, **_MAMBA2, "num_hidden_layers": 2, "mamba_d_ssm": 64, "ssm_multipliers": [0.5] * 5},
    "granitemoehybrid": {
        **{**_ATTENTION, **_MAMBA2},
        **{"num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "num_local_experts": 0},
        **{"shared_intermediate_size": 48, "position_embedding_type": "rope"},
    },
    "nemotron_h": {
        **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 8, "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8},
        **{"mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8},
    },
}


def tiny_native(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a model with random weights, all of them, also biases, skips and scales, so that each has an effect."""
    torch.manual_seed(seed)
    configuration = AutoConfig.for_model(model_type, **{**_PLAIN, **SIZES[model_type], **changes})
    model = AutoModelForCausalLM.from_config(configuration, trust_remote_code=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def cache_name(model: PreTrainedModel) -> str:
    """Return the name of a model's cache, as an argument and in its output; `cache` from transformers 5.23 on."""
    taken = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "cache_params", "past_key_values") if name in taken)
