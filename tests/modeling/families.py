"""The model families that the model tests run over, in tiny sizes: a family is tested by being registered here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ssm_zoo import modeling
from ssm_zoo.modeling import (
    MaskedMixerConfig,
    TaipanConfig,
    ZooEncDecConfig,
    ZooHybridConfig,
    ZooMamba2Config,
    ZooMambaConfig,
    ZooRetNetConfig,
)

VOCAB = 61


@dataclass(frozen=True)
class Family:
    """A way to make one tiny model.

    Attributes:
        config: makes the configuration; keyword arguments override.
        causal_lm: class with a language-modelling head.
        backbone: class without.
    """

    config: Callable[..., Any]
    causal_lm: type[PreTrainedModel]
    backbone: type[PreTrainedModel]


def family(kind: type[PreTrainedConfig], tiny: dict[str, Any]) -> Family:
    """The family of a configuration's class, in a tiny size."""
    classes: Any = modeling.FAMILIES[kind.model_type].classes
    return Family(lambda **changes: kind(**(tiny | changes)), classes["AutoModelForCausalLM"], classes["AutoModel"])


def _mamba(**sizes: Any) -> Family:
    tiny = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 8,
        "time_step_rank": 3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return family(ZooMambaConfig, tiny | sizes)


def _mamba2(**sizes: Any) -> Family:
    tiny = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "state_size": 8,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return family(ZooMamba2Config, tiny | sizes)


def _hybrid(*mixers: str, **sizes: Any) -> Family:
    tiny = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": len(mixers),
        "mixer_types": list(mixers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "sliding_window": 5,
        "mamba_head_dim": 8,
        "n_groups": 2,
    }
    return family(ZooHybridConfig, tiny | sizes)


def _taipan(**sizes: Any) -> Family:
    tiny = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "sal_every": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 24,
        "sliding_window": 5,
        "attention_capacity": 0.3,
        # Capacity loss and threshold depend on the other rows: packed documents would not train as they do alone. What
        # they do is tested in test_taipan.py.
        "sal_selection": "gumbel",
        "router_aux_loss_coef": 0.0,
        "mamba_head_dim": 8,
        "state_size": 8,
    }
    return family(TaipanConfig, tiny | sizes)


def _mixer(mixing: str, **sizes: Any) -> Family:
    tiny = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "max_position_embeddings": 160,
        "mixing": mixing,
        "intermediate_size": 24,
        "initializer_range": 0.02,
    }
    return family(MaskedMixerConfig, tiny | sizes)


def _retnet(**sizes: Any) -> Family:
    tiny = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 6,
        "v_head_dim": 9,
        # The norm of a head divides by its scores: rounding of a score near 0 grows by up to 1 / sqrt(epsilon).
        "rms_norm_eps": 1e-2,
    }
    return family(ZooRetNetConfig, tiny | sizes)


FAMILIES: dict[str, Family] = {
    "mamba": _mamba(),
    "mamba-options": _mamba(
        state_size=5,
        time_step_rank=7,
        conv_kernel=3,
        use_bias=True,
        use_conv_bias=False,
        mixer_rms_eps=1e-3,
        residual_in_fp32=False,
        tie_word_embeddings=False,
    ),
    "mamba2": _mamba2(),
    "mamba2-groups": _mamba2(
        n_groups=4, conv_kernel=3, use_bias=True, use_conv_bias=False, time_step_limit=(0.02, 0.6)
    ),
    "full-discrete": _hybrid("full_attention", "discrete_mamba2", state_size=7, attention_bias=True, mlp_bias=True),
    "sliding-discrete": _hybrid(
        "sliding_attention",
        "discrete_mamba2",
        feature_map="softplus",
        normalize=True,
        ssm_rotary=True,
        tie_word_embeddings=True,
    ),
    "bounded-attention": _hybrid(
        "bounded_attention",
        "discrete_mamba2",
        "bounded_attention",
        bounded_attention={
            "window": 5,
            "sinks": 1,
            "slots": [[3, 0], [], [2, 2]],
            "chunk_size": 3,
            "score_decay": [[1.0, 0.5], [], [0.9, 0.7]],
        },
    ),
    "linear-attention": _hybrid(
        "linear_attention",
        "mamba2",
        "linear_attention",
        linear_attention={"sliding_window": 5, "feature_size": 3},
        attention_bias=True,
        state_size=8,
    ),
    "exact-heads": _hybrid(
        "bounded_attention",
        "bounded_attention",
        bounded_attention={
            "window": 5,
            "sinks": 1,
            "slots": [[3, 0], [0, 0]],
            "chunk_size": 3,
            "exact": [[1], [0, 1]],
        },
    ),
    "int8-memory": _hybrid(
        "bounded_attention",
        "bounded_attention",
        bounded_attention={
            "window": 5,
            "sinks": 1,
            "slots": [[3, 2], [4, 0]],
            "chunk_size": 3,
            "exact": [[], [1]],
            "kv_dtype": "int8",
        },
    ),
    "jamba": _hybrid(
        "mamba",
        "full_attention",
        state_size=5,
        time_step_rank=3,
        conv_kernel=3,
        mixer_rms_eps=1e-3,
        mixer_rms_weight=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.0},
    ),
    "mamba2-full": _hybrid("mamba2", "full_attention", state_size=8),
    "convolved-attention": _hybrid(
        "full_attention", "mamba2", attention_conv_kernel=3, attention_bias=True, state_size=8
    ),
    "all-four": _hybrid("discrete_mamba2", "sliding_attention", "mamba2", "full_attention", ssm_rotary=True),
    "discrete": _hybrid("discrete_mamba2", "discrete_mamba2", feature_map="softplus", conv_kernel=2),
    "half-blocks": _hybrid(
        "mamba2",
        "full_attention",
        "sliding_attention",
        mlp_types=["none", "gated", "none"],
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.34},
        mamba_proj_bias=True,
        mamba_conv_bias=False,
        time_step_limit=(0.02, 0.6),
    ),
    "selective-mamba2": _hybrid(
        "selective_attention",
        "mamba2",
        "selective_attention",
        state_size=8,
        sal_selection="gumbel",
        router_aux_loss_coef=0.0,
    ),
    "taipan": _taipan(),
    "taipan-options": _taipan(
        num_hidden_layers=4,
        sal_layer_idx=[0, 2],
        num_key_value_heads=4,
        sal_key_source="selected",
        sal_fusion="residual",
        residual_in_fp32=False,
        tie_word_embeddings=False,
    ),
    "mixer": _mixer("dense"),
    "mixer-options": _mixer("dense", num_heads=2, kernel_size=4, mlp_first=True, norm_type="rms_norm", final_norm=True),
    "mixer-toeplitz": _mixer("toeplitz", num_heads=2, mlp_type="gated", mlp_bias=False, mlp_first=False),
    "mixer-rows": _mixer("row_repeat", num_heads=2, use_projections=False, use_decay=False),
    "mixer-columns": _mixer("column_repeat", kernel_size=3, use_projections=True),
    "mixer-combined": _mixer("combined_repeat", num_heads=2, kernel_size=2),
    "mixer-series": _mixer(
        "dense", attention="series", attention_bias=True, num_attention_heads=4, num_key_value_heads=2, head_dim=6
    ),
    "mixer-parallel": _mixer("mixed_repeat", num_heads=2, attention="parallel", num_attention_heads=4),
    "parallel-blocks": _hybrid(
        "full_attention",
        "bounded_attention",
        mlp_types=["plain", "gated"],
        norm_type="layer_norm",
        use_parallel_residual=True,
        share_norm=True,
        qk_norm="head",
        learned_positions=True,
        max_position_embeddings=160,
        position_types=["none", "rope"],
        attention_bias=True,
        lm_head_bias=True,
        hidden_act="gelu",
    ),
    "normed-blocks": _hybrid(
        "discrete_mamba2",
        "sliding_attention",
        norm_placement="both",
        norm_type="unit_offset_rms_norm",
        qk_norm="width",
        query_pre_attn_scalar=24,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=20.0,
        embedding_multiplier=4.0,
        local_rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        attention_bias=True,
        attention_output_bias=False,
        position_types=["rope", "local_rope"],
        ssm_rotary=True,
        feature_map="hedgehog",
        normalize=True,
    ),
    "hybrid-mixers": _hybrid(
        "masked_mixing", "full_attention", "mamba2", state_size=8, max_position_embeddings=160, mixing_heads=2
    ),
    "retnet": _retnet(),
    "retention-full": _hybrid(
        "retention",
        "full_attention",
        retention={"v_head_dim": 5, "use_output_gate": False},
        attention_bias=True,
        rms_norm_eps=1e-3,
    ),
}

# They read prefixes in both directions, if they are given a mask; one is among the families, which are given none.
PREFIXED: dict[str, Family] = {
    "prefix-hybrid": _hybrid(
        "discrete_mamba2",
        "full_attention",
        "retention",
        "sliding_attention",
        prefix_bidirectional=True,
        feature_map="softplus",
        normalize=True,
        retention={"v_head_dim": 5},
        rms_norm_eps=1e-3,
    ),
    "prefix-mamba": _mamba(prefix_bidirectional=True),
    "prefix-mamba2": _mamba2(prefix_bidirectional=True, n_groups=4, conv_kernel=3, time_step_limit=(0.004, 0.5)),
    "prefix-retnet": _retnet(prefix_bidirectional=True),
    "prefix-mambas": _hybrid("mamba", "mamba2", prefix_bidirectional=True, state_size=5, time_step_rank=3),
}
FAMILIES["prefix-retnet"] = PREFIXED["prefix-retnet"]

# They see the tokens ahead, too: no causal language models, but every other head.
ENCODERS: dict[str, Family] = {
    "mamba-encoder": _mamba(bidirectional=True),
    "mamba-options-encoder": _mamba(
        state_size=5,
        time_step_rank=7,
        conv_kernel=3,
        use_bias=True,
        use_conv_bias=False,
        mixer_rms_eps=1e-3,
        residual_in_fp32=False,
        bidirectional=True,
    ),
    "mamba2-encoder": _mamba2(bidirectional=True),
    "mamba2-groups-encoder": _mamba2(
        n_groups=4, conv_kernel=3, use_bias=True, use_conv_bias=False, time_step_limit=(0.004, 0.5), bidirectional=True
    ),
    "retnet-encoder": _retnet(bidirectional=True),
    "hybrid-encoder": _hybrid("full_attention", "mamba2", "mamba", "retention", bidirectional=True, state_size=8),
    "mixer-encoder": _mixer("dense", num_heads=2, bidirectional=True),
    "mixer-toeplitz-encoder": _mixer("toeplitz", kernel_size=2, final_norm=True, bidirectional=True),
}


ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "mamba": {
        "mixer_types": ["mamba", "mamba2"],
        "mamba2": {"head_dim": 8},
        "encoder": {"mixer_types": ["mamba", "mamba"], "mlp_types": ["none", "none"], "bidirectional": False},
    },
    "transformer": {
        "mixer_types": ["full_attention", "full_attention"],
        "mlp_types": ["plain", "plain"],
        "norm_type": "layer_norm",
        "hidden_act": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "position_types": ["none", "none"],
        "learned_positions": True,
        "max_position_embeddings": 40,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "encoder": {"mlp_types": ["plain", "plain"], "position_types": ["none", "none"]},
    },
    "mixed": {
        "num_hidden_layers": 3,
        "mixer_types": ["retention", "sliding_attention", "none"],
        "sliding_attention": {"sliding_window": 4},
        "norm_placement": "both",
        "qk_norm": "head",
        "lm_head_bias": True,
        "final_logit_softcapping": 20.0,
        "attn_logit_softcapping": 5.0,
        "encoder": {
            "num_hidden_layers": 4,
            "mixer_types": ["full_attention", "mamba2", "retention", "mamba"],
            "num_attention_heads": 2,
            "mamba2": {"head_dim": 8},
        },
    },
}
"""Keys of encoder-decoders, which no causal language model is made of."""


def make_encoder_decoder(name: str, *, seed: int = 0, head: bool = True, **changes: Any) -> Any:
    """As :func:`make_model`, of a row of `ENCODER_DECODERS`, with or without the head."""
    tiny = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "mamba": {"state_size": 8},
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    torch.manual_seed(seed)
    classes: Any = modeling.FAMILIES["zoo_encdec"].classes
    kind = classes["AutoModelForSeq2SeqLM" if head else "AutoModel"]
    model = kind(ZooEncDecConfig(**(tiny | ENCODER_DECODERS[name] | changes)))
    perturb(model, seed)
    return model.eval()


def make_config(name: str, **changes: Any) -> PreTrainedConfig:
    """Tiny configuration of a registered family, encoder or model with prefixes, with `changes`."""
    return (FAMILIES | PREFIXED | ENCODERS)[name].config(**changes)


def make_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """Tiny causal LM of a registered family in evaluation mode, with seeded weights of which none is trivial.

    An initialised model has identity convolutions, open gates, unit norms and zero biases: whatever goes wrong
    there would not show. Here noise is added to every parameter, but little enough for logits of order 1.
    """
    torch.manual_seed(seed)
    model = (FAMILIES | PREFIXED)[name].causal_lm(make_config(name, **changes))
    perturb(model, seed)
    return model.eval()


def make_head(auto_class: Any, name: str, *, seed: int = 0, **changes: Any) -> Any:
    """As :func:`make_model`, but of the class that `auto_class`, one of transformers', has for a family or encoder."""
    torch.manual_seed(seed)
    model = auto_class.from_config(make_config(name, **changes))
    perturb(model, seed)
    return model.eval()


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Add seeded noise to every parameter: half over the root of its fan-in to a matrix, a quarter to others.

    The Mambas' first step sizes, 0.001 to 0.1, let little into the state: they become seven times as large, and the
    decay rates smaller, so that what is wrong with the state shows in the logits. Masked mixers start with
    larger matrices than others, and some have no norm before the head: they are made smaller, for logits of order 1.
    """
    generator = torch.Generator().manual_seed(seed)
    large = (
        getattr(getattr(model, "config", None), "model_type", "") == "masked_mixer" and model.config.mixing != "dense"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if large and parameter.dim() > 1:
                parameter.mul_(0.4)
            matrix = parameter.dim() > 1 and parameter.shape[1] > 1  # no convolution
            scale = 0.5 * parameter.shape[-1] ** -0.5 if matrix else 0.25
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
        for module in model.modules():
            if hasattr(module, "A_log"):
                (module.dt_proj.bias if hasattr(module, "dt_proj") else module.dt_bias).add_(2.0)
                module.A_log.sub_(1.0)
            if getattr(module, "decay_value", None) is not None:  # beyond the bounds of a decay there is no gradient
                module.decay_value.copy_(0.91 + 0.08 * torch.rand(module.decay_value.shape, generator=generator))


def draw_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded token ids; 0 is left for padding, which `generate` looks for in a prompt without a mask."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
