"""transformers' `mamba` and `falcon_mamba`, and `zoo_mamba`: the same keys, and nearly the same configuration."""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

from ...modeling import ZooMambaConfig, ZooMambaForCausalLM
from .format import CARRIED_IDS, Format, read_config, require
from .transformers_mamba2 import check_others, plain_rules

# What sizes and computes. The rest is initialisation, where the two differ, and how fast transformers scans.
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "state_size",
    "expand",
    "time_step_rank",
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
_FORMER_KEYS = {"backbone.embedding.weight": "backbone.embeddings.weight"}


def _read(folder: Path, config_class: type[MambaConfig] | type[FalconMambaConfig]) -> Any:
    config = config_class.from_pretrained(folder)
    check_others(read_config(folder), config.layer_norm_epsilon)
    return config


def _zoo_config(config: MambaConfig | FalconMambaConfig) -> ZooMambaConfig:
    require("hidden_act", config.hidden_act, "silu", "the only activation of zoo_mamba")
    # FalconMamba-7B gives it beside an `expand` that says another; it is the one that transformers reads.
    inner, width = config.intermediate_size, config.hidden_size
    if inner % width:
        raise ValueError(
            f"config.json: intermediate_size: got {inner!r}; accepted: a multiple of hidden_size ({width})"
        )
    values: dict[str, Any] = {key: getattr(config, key) for key in _SAME} | {"expand": inner // width}
    return ZooMambaConfig(**values, mixer_rms_eps=getattr(config, "mixer_rms_eps", None))


def _config(config: ZooMambaConfig) -> MambaConfig:
    return MambaConfig(**{key: getattr(config, key) for key in _SAME})


def _falcon_config(config: ZooMambaConfig) -> FalconMambaConfig:
    require("mixer_rms_weight", config.mixer_rms_weight, False, "FalconMamba's norms have no weights")
    return FalconMambaConfig(**{key: getattr(config, key) for key in (*_SAME, "mixer_rms_eps")})


MAMBA = Format(
    name="transformers mamba",
    library="transformers",
    zoo_class=ZooMambaForCausalLM,
    reads=lambda values: values.get("model_type") == "mamba",
    read=partial(_read, config_class=MambaConfig),
    zoo_config=_zoo_config,
    config=_config,
    rules=plain_rules,
    writes=lambda config: config.mixer_rms_eps is None,
    model_class=MambaForCausalLM,
    former_keys=_FORMER_KEYS,
)
FALCON_MAMBA = Format(
    name="transformers falcon_mamba",
    library="transformers",
    zoo_class=ZooMambaForCausalLM,
    reads=lambda values: values.get("model_type") == "falcon_mamba",
    read=partial(_read, config_class=FalconMambaConfig),
    zoo_config=_zoo_config,
    config=_falcon_config,
    rules=plain_rules,
    writes=lambda config: config.mixer_rms_eps is not None,
    model_class=FalconMambaForCausalLM,
    former_keys=_FORMER_KEYS,
)
