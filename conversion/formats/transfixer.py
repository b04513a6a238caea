"""The transfixer: Llama with a masked convolution over positions beside attention (branch of blbadger/transformers).

It is a `LlamaForCausalLM` and has its config.json. Where that is lost, the number of heads has to be said.
"""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from ...modeling import MaskedMixerConfig, MaskedMixerForCausalLM
from ...modeling.layers import llama_rope_parameters
from ..rules import Rule
from .bare_checkpoint import MixerCheckpoint, MixerReading, Settings
from .maskedmixers import convolution_rules

_THEIRS, _OURS = "model.layers.{layer}.", "backbone.layers.{layer}."
_FIRST = "model.layers.0."


def read_transfixer(checkpoint: MixerCheckpoint, settings: Settings, folder: Path) -> MixerReading:
    """Of a folder with or without a configuration."""
    tied = checkpoint.tie("model.embed_tokens.weight", "lm_head.weight")
    vocabulary, width = checkpoint.shape("model.embed_tokens.weight", 2)
    positions, *_, taps = shape = checkpoint.square(f"{_FIRST}mixer_layer.conv.weight", 3)
    has_config = (folder / "config.json").is_file()
    fields = _of_config(folder) if has_config else _of_settings(checkpoint, settings)
    config = MaskedMixerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=checkpoint.count("model.layers"),
        max_position_embeddings=positions,
        kernel_size=taps,
        intermediate_size=checkpoint.shape(f"{_FIRST}mlp.gate_proj.weight", 2)[0],
        attention="parallel",
        attention_bias=checkpoint.has(rf"{_FIRST}self_attn\.q_proj\.bias"),
        mlp_bias=checkpoint.has(rf"{_FIRST}mlp\.gate_proj\.bias"),
        tie_word_embeddings=tied,
        **(fields | settings.common(None if has_config else "silu")),
    )
    rules = [
        Rule("model.embed_tokens.weight", "backbone.embeddings.weight"),
        Rule(f"{_THEIRS}input_layernorm.weight", f"{_OURS}token_norm.weight"),
        Rule(f"{_THEIRS}self_attn.{{rest}}", f"{_OURS}attention.{{rest}}"),
        Rule(f"{_THEIRS}post_attention_layernorm.weight", f"{_OURS}channel_norm.weight"),
        Rule(f"{_THEIRS}mlp.{{rest}}", f"{_OURS}mlp.{{rest}}"),
        Rule("model.norm.weight", "backbone.norm_f.weight"),
        *convolution_rules(f"{_THEIRS}mixer_layer.conv.", f"{_OURS}mixer.", shape),
        *([] if tied else [Rule("lm_head.weight", "lm_head.weight")]),
    ]
    return MixerReading("transfixer", MaskedMixerForCausalLM, config, rules)


def _of_config(folder: Path) -> dict[str, Any]:
    given: Any = LlamaConfig.from_pretrained(folder)
    same = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "use_cache")
    same += ("bos_token_id", "eos_token_id", "pad_token_id")
    rotary = {"rope_parameters": llama_rope_parameters(given), "norm_eps": given.rms_norm_eps}
    return {name: getattr(given, name) for name in same} | rotary


def _of_settings(checkpoint: MixerCheckpoint, settings: Settings) -> dict[str, Any]:
    heads = settings.positive("num_attention_heads", int)
    if heads is None:
        raise ValueError(
            "set: num_attention_heads: not given, and without a config.json nothing tells it; accepted: "
            "num_attention_heads=4, say"
        )
    queries, keys = (checkpoint.shape(f"{_FIRST}self_attn.{name}_proj.weight", 2)[0] for name in "qk")
    if queries % heads or keys % (queries // heads):
        raise ValueError(
            f"set: num_attention_heads: got {heads}; accepted: a number that divides the {queries} rows of q_proj into "
            f"heads whose width divides the {keys} of k_proj"
        )
    theta = settings.positive("rope_theta", float) or 10000.0
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": keys * heads // queries,
        "head_dim": queries // heads,
        "norm_eps": settings.positive("norm_eps", float) or 1e-6,  # LlamaConfig's
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
