"""transformers' `mamba2` and `zoo_mamba2`: the same keys, and nearly the same configuration."""

from pathlib import Path
from typing import Any

from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedConfig

from ...modeling import ZooMamba2Config, ZooMamba2ForCausalLM
from ..rules import Rule
from .format import CARRIED_IDS, Format, head_rules, read_config, require

# What sizes and computes. The rest is initialisation, where the two differ, and of theirs chunk_size, which changes no
# result, and time_step_rank, which nothing reads.
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "state_size",
    "expand",
    "num_heads",
    "head_dim",
    "n_groups",
    "conv_kernel",
    "use_bias",
    "use_conv_bias",
    "layer_norm_epsilon",
    "residual_in_fp32",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "time_step_limit",
    *CARRIED_IDS,
)
# Of flash-linear-attention, which has a model type of the same name. Absent, or as transformers computes.
_OTHERS = {"rms_norm": True, "rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False}


def check_others(values: dict[str, Any], epsilon: float) -> None:
    """Raise a ValueError for a key of another library's configuration that would change what is computed."""
    for key, accepted in _OTHERS.items():
        require(key, values.get(key, accepted), accepted, "transformers computes nothing else")
    require("norm_eps", values.get("norm_eps", epsilon), epsilon, "that of layer_norm_epsilon")


def _read(folder: Path) -> Mamba2Config:
    config = Mamba2Config.from_pretrained(folder)
    check_others(read_config(folder), config.layer_norm_epsilon)
    return config


def _zoo_config(config: Mamba2Config) -> ZooMamba2Config:
    require("hidden_act", config.hidden_act, "silu", "the only activation of zoo_mamba2")
    return ZooMamba2Config(**{key: getattr(config, key) for key in _SAME})


def _config(config: ZooMamba2Config) -> Mamba2Config:
    require("bidirectional", config.bidirectional, False, "transformers' Mamba-2 is causal")
    return Mamba2Config(**{key: getattr(config, key) for key in _SAME})


def plain_rules(config: PreTrainedConfig) -> list[Rule]:
    """The keys of transformers' Mamba and Mamba-2, which are ours."""
    return [
        Rule("backbone.embeddings.weight", "backbone.embeddings.weight"),
        Rule("backbone.layers.{layer}.{rest}", "backbone.layers.{layer}.{rest}"),
        Rule("backbone.norm_f.weight", "backbone.norm_f.weight"),
        *head_rules(config),
    ]


MAMBA2 = Format(
    name="transformers mamba2",
    library="transformers",
    zoo_class=ZooMamba2ForCausalLM,
    reads=lambda values: values.get("model_type") == "mamba2",
    read=_read,
    zoo_config=_zoo_config,
    config=_config,
    rules=plain_rules,
    model_class=Mamba2ForCausalLM,
    former_keys={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
