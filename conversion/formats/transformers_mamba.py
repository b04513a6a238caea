"""transformers' `mamba`, `falcon_mamba` and `mamba2`, which are `zoo_mamba` and `zoo_mamba2` here.

The keys are the same, and most fields of the configuration. Not carried over are fields for initialisation in which the
two sides differ, and fields that change no result (`chunk_size`) or that nothing reads.
"""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
)

from ...modeling import ZooMamba2Config, ZooMamba2ForCausalLM, ZooMambaConfig, ZooMambaForCausalLM
from ..rules import Rule
from .format import CARRIED_IDS, fields, head_rules, read_config, require, transformers_format

_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "state_size",
    "expand",
    "conv_kernel",
    "use_bias",
    "use_conv_bias",
    "layer_norm_epsilon",
    "residual_in_fp32",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    *CARRIED_IDS,
)
_MAMBA = (*_SHARED, "time_step_rank")
_MAMBA2 = (*_SHARED, "num_heads", "head_dim", "n_groups", "time_step_limit")
_FORMER_KEYS = {"backbone.embedding.weight": "backbone.embeddings.weight"}
# Fields of flash-linear-attention, which also has a model type `mamba2`, with the values that transformers computes by.
_OTHERS = {"rms_norm": True, "rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False}


def _check_others(values: dict[str, Any], epsilon: float) -> None:
    """Raise a ValueError for a key of another library that would change what is computed."""
    for key, accepted in _OTHERS.items():
        require(key, values.get(key, accepted), accepted, "transformers computes nothing else")
    require("norm_eps", values.get("norm_eps", epsilon), epsilon, "equal to layer_norm_epsilon")


def _read(folder: Path, config_class: Any) -> Any:
    config = config_class.from_pretrained(folder)
    _check_others(read_config(folder), config.layer_norm_epsilon)
    return config


def _zoo_config(config: MambaConfig | FalconMambaConfig) -> ZooMambaConfig:
    require("hidden_act", config.hidden_act, "silu", "the only activation of zoo_mamba")
    # FalconMamba-7B also has an `expand` that contradicts `intermediate_size`; transformers reads the latter.
    inner, width = config.intermediate_size, config.hidden_size
    if inner % width:
        raise ValueError(
            f"config.json: `intermediate_size` must be a multiple of hidden_size ({width}), got {inner!r}."
        )
    values: dict[str, Any] = fields(config, _MAMBA) | {"expand": inner // width}
    return ZooMambaConfig(**values, mixer_rms_eps=getattr(config, "mixer_rms_eps", None))


def _config(config: ZooMambaConfig) -> MambaConfig:
    return MambaConfig(**fields(config, _MAMBA))


def _falcon_config(config: ZooMambaConfig) -> FalconMambaConfig:
    require("mixer_rms_weight", config.mixer_rms_weight, False, "FalconMamba's norms have no weights")
    return FalconMambaConfig(**fields(config, (*_MAMBA, "mixer_rms_eps")))


def _zoo_config2(config: Mamba2Config) -> ZooMamba2Config:
    require("hidden_act", config.hidden_act, "silu", "the only activation of zoo_mamba2")
    return ZooMamba2Config(**fields(config, _MAMBA2))


def _config2(config: ZooMamba2Config) -> Mamba2Config:
    require("bidirectional", config.bidirectional, False, "transformers' Mamba-2 is causal")
    return Mamba2Config(**fields(config, _MAMBA2))


def _rules(config: PreTrainedConfig) -> list[Rule]:
    """Return the rules for the keys of transformers' Mamba and Mamba-2, which are the same as ours."""
    return [
        Rule("backbone.embeddings.weight", "backbone.embeddings.weight"),
        Rule("backbone.layers.{layer}.{rest}", "backbone.layers.{layer}.{rest}"),
        Rule("backbone.norm_f.weight", "backbone.norm_f.weight"),
        *head_rules(config),
    ]


_format = partial(transformers_format, rules=_rules, former_keys=_FORMER_KEYS)
MAMBA = _format(
    MambaForCausalLM,
    zoo_class=ZooMambaForCausalLM,
    read=partial(_read, config_class=MambaConfig),
    zoo_config=_zoo_config,
    config=_config,
    writes=lambda config: config.mixer_rms_eps is None,
)
FALCON_MAMBA = _format(
    FalconMambaForCausalLM,
    zoo_class=ZooMambaForCausalLM,
    read=partial(_read, config_class=FalconMambaConfig),
    zoo_config=_zoo_config,
    config=_falcon_config,
    writes=lambda config: config.mixer_rms_eps is not None,
)
MAMBA2 = _format(
    Mamba2ForCausalLM,
    zoo_class=ZooMamba2ForCausalLM,
    read=partial(_read, config_class=Mamba2Config),
    zoo_config=_zoo_config2,
    config=_config2,
)
