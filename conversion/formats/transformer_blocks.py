"""Formats of transformers' decoders with softmax attention, whose blocks are `zoo_hybrid`'s with other settings.

A format says which settings of a block its class fixes and which of them its configurations hold. From this follow both
conversions of configurations, and which models of ours can be written in it. Students are distilled from models of
these formats: `distill/teacher.py` and `distill/student.py` read a teacher through them.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ...modeling import ZooHybridConfig, ZooHybridForCausalLM
from ...modeling.layers import llama_rope_parameters
from ..rules import Rule
from .format import TRANSFORMER_FIELDS, Format, transformers_format

_PER_MODEL = {
    *("head_dim", "hidden_dropout", "mixer_types", "mlp_types", "rope_parameters", "native_model_type"),
    *TRANSFORMER_FIELDS,
}

BLOCK_SETTINGS: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(ZooHybridConfig)  # pyright: ignore[reportArgumentType]
    if field.name in ZooHybridConfig.__annotations__ and field.name not in _PER_MODEL
}
"""Settings of the blocks of `zoo_hybrid`, and of what surrounds them, with the values of a Llama."""

WINDOWS = ("none", "all", "some")
"""Blocks whose attention has a sliding window: none, all blocks or none by `sliding_window`, some by `layer_types`."""


def teacher_format(
    model_class: Any,
    *,
    rules: Callable[[ZooHybridConfig], list[Rule]],
    fixed: Mapping[str, Any] | None = None,
    names: Mapping[str, str | None] | None = None,
    free: Collection[str] = (),
    to_ours: Callable[[Any], dict[str, Any]] = lambda config: {},
    to_theirs: Callable[[ZooHybridConfig], dict[str, Any]] = lambda config: {},
    check: Callable[[Any], None] = lambda config: None,
    writes: Callable[[ZooHybridConfig], bool] = lambda config: True,
    mlp: str = "gated",
    windows: str = "none",
    rotary: bool = True,
    partial_rotary: bool = False,
    has_head_dim: bool = False,
    **options: Any,
) -> Format:
    """Build the format of a decoder of transformers.

    Args:
        model_class: its class with a language-modelling head.
        rules: as in :class:`Format`.
        fixed: settings of BLOCK_SETTINGS that every model of the class has, where they are not a Llama's.
        names: our keys -> theirs, for TRANSFORMER_FIELDS and BLOCK_SETTINGS that configurations hold; fields that are
            not listed have the same name; None: they lack the field.
        free: further settings of BLOCK_SETTINGS that `to_ours` and `to_theirs` convert.
        to_ours: returns further keys of ours for a configuration of theirs.
        to_theirs: returns further keys of theirs for a configuration of ours.
        check: raises a ValueError that names a field of theirs that we cannot express.
        writes: further condition on a configuration of ours that is written in the format.
        mlp: kind of the MLP in every block.
        windows: one of WINDOWS.
        rotary: whether the class has a rotary embedding, the same in all blocks.
        partial_rotary: whether the class reads `partial_rotary_factor` without a scaling.
        has_head_dim: whether `head_dim` is a field of its configurations. Others get it where it is not D / H.
        **options: further attributes of the format.
    """
    config_class = model_class.config_class
    model_type = config_class.model_type
    fixed = dict(fixed or {})
    keys = {ours: theirs for ours, theirs in ({n: n for n in TRANSFORMER_FIELDS} | dict(names or {})).items() if theirs}
    free = {*free, *(keys.keys() & BLOCK_SETTINGS.keys())}

    def zoo_config(config: Any) -> ZooHybridConfig:
        check(config)
        values = {ours: getattr(config, theirs) for ours, theirs in keys.items()} | fixed
        values |= {"head_dim": getattr(config, "head_dim", None), "native_model_type": model_type}
        values |= _windows_to_ours(config, windows)
        if rotary:
            values["rope_parameters"] = rope_parameters(config, partial_rotary)
        values |= {"mlp_types": [mlp] * values["num_hidden_layers"]} if mlp != "gated" else {}
        return ZooHybridConfig(**values | to_ours(config))

    def config(config: ZooHybridConfig) -> Any:
        values = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
        values |= _windows_to_theirs(config, windows)
        if rotary:
            whole = {"partial_rotary_factor": 1.0} if partial_rotary else {}
            values["rope_parameters"] = whole | dict(config.rope_parameters or {})
        if has_head_dim or int(config.head_dim or 0) * config.num_attention_heads != config.hidden_size:
            values["head_dim"] = config.head_dim
        return config_class(**values | to_theirs(config))

    def can_write(config: ZooHybridConfig) -> bool:
        given = config.rope_parameters or {}
        turns_part = given.get("rope_type") == "default" and given.get("partial_rotary_factor", 1.0) != 1.0
        return (
            _has_windows(config, windows)
            and set(config.mlp_types or []) == {mlp}
            and not config.settings_of("full_attention").conv_kernel
            and all(getattr(config, key) == fixed.get(key, BLOCK_SETTINGS[key]) for key in BLOCK_SETTINGS.keys() - free)
            and (partial_rotary or not turns_part)
            and "mamba2" not in vars(config)  # settings of Mamba-2 without such a block: it was a Bamba
            and writes(config)
        )

    return transformers_format(
        model_class,
        zoo_class=ZooHybridForCausalLM,
        zoo_config=zoo_config,
        config=config,
        rules=rules,
        writes=can_write,
        is_teacher=True,
        **options,
    )


def has_llama_blocks(config: ZooHybridConfig) -> bool:
    """Return whether a model has no setting that a Llama lacks, whatever its mixers are."""
    own = ("attention_bias", "mlp_bias")
    if "plain" in (config.mlp_types or []):
        return False
    return all(getattr(config, key) == value for key, value in BLOCK_SETTINGS.items() if key not in own)


def rope_parameters(config: Any, partial_rotary: bool) -> dict[str, Any]:
    """Return the rotary embedding of a configuration of theirs as their class reads it."""
    given = llama_rope_parameters(config)
    if partial_rotary and "partial_rotary_factor" in config.rope_parameters:
        given["partial_rotary_factor"] = config.rope_parameters["partial_rotary_factor"]
    return given


def _windows_to_ours(config: Any, windows: str) -> dict[str, Any]:
    """Return the mixers of ours, and the window of those that have one."""
    kinds = ["full_attention"] * config.num_hidden_layers
    if windows == "some":
        kinds = list(config.layer_types)
    elif windows == "all" and config.sliding_window is not None:
        kinds = ["sliding_attention"] * config.num_hidden_layers
    values: dict[str, Any] = {"mixer_types": kinds}
    if "sliding_attention" in kinds:
        values["sliding_attention"] = {"sliding_window": config.sliding_window}
    return values


def _windows_to_theirs(config: ZooHybridConfig, windows: str) -> dict[str, Any]:
    """Return the keys of theirs for the windows."""
    mixers = list(config.mixer_types or [])
    window = config.settings_of("sliding_attention").sliding_window
    if windows == "all":
        return {"sliding_window": window if "sliding_attention" in mixers else None}
    return {"layer_types": mixers, "sliding_window": window} if windows == "some" else {}


def _has_windows(config: ZooHybridConfig, windows: str) -> bool:
    """Return whether every block has attention, with windows where a format may have them."""
    kinds = set(config.mixer_types or [])
    accepted = {"full_attention"} if windows == "none" else {"full_attention", "sliding_attention"}
    return kinds <= accepted and (windows == "some" or len(kinds) == 1)
