"""What a checkpoint format is: a layout of another library's for one of our models, read and written."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling.causal_lm import ZooPreTrainedModel
from .rules import Rule

CARRIED_IDS = ("use_cache", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
"""Keys of every configuration of transformers that say the same on both sides."""


@dataclass(frozen=True)
class Format:
    """A layout of another library's for one of our models.

    Attributes:
        name: for messages and reports.
        library: whose it is, "transformers", "state-spaces", "cartesia" or "maskedmixers".
        zoo_class: our model.
        reads: whether the values of a config.json are of this format.
        read: their configuration, of a folder: of transformers' formats an object of its class, else the values of
            config.json.
        zoo_config: our configuration, of theirs. Raises ValueError with the field that we cannot express.
        writes: whether our configuration, of `zoo_class`, is written in this format.
        config: their configuration, of ours. Raises ValueError with the field that they cannot express.
        rules: from their keys to ours, for our configuration.
        model_class: their model, where transformers has it.
        former_keys: keys that earlier releases used, with the later ones.
        keeps_tied_head: whether a head that is the embedding is written as a key of its own, where transformers does
            not have the model.
        bare: whether its checkpoints are weights without a config.json.
    """

    name: str
    library: str
    zoo_class: type[ZooPreTrainedModel]
    reads: Callable[[dict[str, Any]], bool]
    read: Callable[[Path], Any]
    zoo_config: Callable[[Any], PreTrainedConfig]
    config: Callable[[Any], PreTrainedConfig | dict[str, Any]]
    rules: Callable[[Any], list[Rule]]
    writes: Callable[[Any], bool] = lambda config: True
    model_class: type[PreTrainedModel] | None = None
    former_keys: Mapping[str, str] = field(default_factory=dict)
    keeps_tied_head: bool = False
    bare: bool = False


def read_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's config.json.

    Raises:
        ValueError: if there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"source: {folder} is no checkpoint: it holds no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config.json: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"config.json: accepted: an object, got {type(values).__name__}")
    return values


def require(name: str, value: Any, accepted: Any, why: str) -> None:
    """Raise a ValueError that names a field which has another value than the only one that can be expressed."""
    if value != accepted:
        raise ValueError(f"config.json: {name}: got {value!r}; accepted: {accepted!r} ({why})")


def filled(prefix: str, values: Any, defaults: dict[str, Any], library: str) -> dict[str, Any]:
    """The values of an object of config.json, with defaults for those that are not given.

    Args:
        prefix: name of the object and a dot, for the message; empty for the whole file.
        values: what was read.
        defaults: every field that there is, with its default.
        library: whose fields they are, for the message.

    Raises:
        ValueError: if it is no object, or has another field.
    """
    if not isinstance(values, dict):
        raise ValueError(f"config.json: {prefix.rstrip('.')}: got {values!r}; accepted: an object")
    for key in values:
        if key not in defaults:
            raise ValueError(f"config.json: {prefix}{key}: not a field of {library}; accepted: {', '.join(defaults)}")
    return {**defaults, **values}


def positive(name: str, value: Any) -> None:
    """Raise a ValueError that names a field which is no integer from 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {name}: got {value!r}; accepted: an integer from 1")


def head_rules(config: PreTrainedConfig) -> list[Rule]:
    """The rule for the language-modelling head, which a tied model has not of its own."""
    return [] if config.tie_word_embeddings else [Rule("lm_head.weight", "lm_head.weight")]
