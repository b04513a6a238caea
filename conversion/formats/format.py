"""A checkpoint format: the layout in which another library saves one of our models, read and written."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...harness.json_files import read_json_object
from ...modeling.pretrained import ZooPreTrainedModel
from ..rules import Mapper, Rule
from ..source_files import check_config

CARRIED_IDS = ("use_cache", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
"""Keys of every configuration of transformers that have the same meaning on both sides."""

TRANSFORMER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    *CARRIED_IDS,
)
"""Keys with the same meaning in `zoo_hybrid` and in transformers' models that have attention."""

ROTARY_BUFFERS = r"rotary_emb\.inv_freq$"
"""Frequencies of the rotary embedding, which earlier releases of transformers saved and all of them compute."""

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Format:
    """The layout in which another library saves one of our models.

    Attributes:
        name: name in messages and reports.
        library: the library, "transformers", "state-spaces", "cartesia", "maskedmixers", "torchscale" or "fla".
        zoo_class: our model.
        reads: returns whether the values of a config.json are of this format.
        read: returns their configuration in a folder: for formats of transformers an object of its class, otherwise
            the values of config.json.
        zoo_config: converts their configuration to ours. Raises ValueError naming a field that we cannot express.
        writes: returns whether a configuration of `zoo_class` is written in this format.
        config: converts our configuration to theirs. Raises ValueError naming a field that they cannot express.
        rules: returns the rules from their keys to ours, for our configuration.
        model_class: their model, if transformers has it.
        former_keys: keys of earlier releases, with the present ones.
        keeps_tied_head: write a head that is tied to the embedding under its own key, for models that transformers
            does not have.
        bare: checkpoints are weights without a config.json.
        unread: regular expression of keys that a checkpoint may hold and no model reads; empty if there are none.
        is_teacher: its models have full attention in every block, so that students can be distilled from them.
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
    unread: str = ""
    is_teacher: bool = False

    @property
    def model_type(self) -> str | None:
        """Model type of its models, if transformers has them."""
        return self.model_class.config_class.model_type if self.model_class else None  # pyright: ignore[reportOptionalMemberAccess]

    def mapper(self, model: PreTrainedModel) -> Mapper:
        """Apply the rules to the keys of a model of `zoo_class`, which may be an empty one."""
        return Mapper(self.rules(model.config), own_tensors(model))


def transformers_format(model_class: Any, **options: Any) -> Format:
    """Build the format of a model of transformers, which reads the configurations of its model type."""
    config_class = model_class.config_class
    options = {"read": config_class.from_pretrained} | options
    return Format(
        name=f"transformers {config_class.model_type}",
        library="transformers",
        reads=lambda values: values.get("model_type") == config_class.model_type,
        model_class=model_class,
        **options,
    )


def fields(config: PreTrainedConfig, names: Collection[str]) -> dict[str, Any]:
    """Return the values of some fields of a configuration."""
    return {name: getattr(config, name) for name in names}


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """Build a model on the meta device, whose tensors have shapes and no values."""
    with torch.device("meta"):
        return model_class(config)


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model by their keys, without a head that is tied to the embedding."""
    state = model.state_dict()
    return {key: tensor for key, tensor in state.items() if key != HEAD or not model.config.tie_word_embeddings}


@contextmanager
def config_errors(where: str = "config.json") -> Iterator[None]:
    """Turn the error of a configuration's class, which has several lines, into a ValueError of one line."""
    try:
        yield
    except StrictDataclassError as error:  # the reason is in the last line
        raise ValueError(
            f"{where}: {str(error).strip().splitlines()[-1].strip().removeprefix('ValueError: ')}"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        ValueError: if there is none, if it is not a JSON object, or if it says that the weights are quantised.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no config.json, so it is no checkpoint. Only position mixers are read without one, from "
            "a folder that holds nothing but weights."
        )
    values = read_json_object(path, "config.json", allow_infinity=True)
    refuse_quantised(values)
    check_config(values, "config.json")
    return values


def refuse_quantised(values: Mapping[str, Any]) -> None:
    """Raise a ValueError if a config.json says that its weights are quantised."""
    quantisation = values.get("quantization_config")
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    raise ValueError(
        f"config.json: `quantization_config` says that the weights are quantised ({method or 'method not named'}). "
        "Quantised weights can neither be converted nor distilled. Dequantise the model and save it, or use the "
        "checkpoint that it was made from."
    )


def require(name: str, value: Any, accepted: Any, why: str) -> None:
    """Raise a ValueError that names a field if its value is not the only one that can be expressed."""
    if value != accepted:
        raise ValueError(f"config.json: `{name}` must be {accepted!r}, got {value!r} ({why}).")


def require_one_of(name: str, value: Any, accepted: Collection[Any], why: str) -> None:
    """Raise a ValueError that names a field if its value is not among those that can be expressed."""
    if value not in accepted:
        raise ValueError(f"config.json: `{name}` must be {' or '.join(map(repr, accepted))}, got {value!r} ({why}).")


def filled(
    prefix: str, values: Any, defaults: dict[str, Any], library: str, ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Return the values of an object of config.json, with defaults for the missing ones.

    Args:
        prefix: name of the object and a dot, for the message; empty for the whole file.
        values: the object that was read.
        defaults: all fields, with their defaults.
        library: name of the library that has these fields, for the message.
        ignored: fields that do not affect the model; they are left out.

    Raises:
        ValueError: if `values` is no object, or has another field.
    """
    if not isinstance(values, dict):
        raise ValueError(f"config.json: `{prefix.rstrip('.')}` must be an object, got {values!r}.")
    for key in values:
        if key not in defaults and key not in ignored:
            raise ValueError(
                f"config.json: `{prefix}{key}` is not a field of {library}: {', '.join(defaults)}. Remove it if it "
                "does not change what the model computes."
            )
    return {**defaults, **{key: value for key, value in values.items() if key in defaults}}


def positive(name: str, value: Any) -> None:
    """Raise a ValueError that names a field if its value is not a positive integer."""
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: `{name}` must be an integer of at least 1, got {value!r}.")


def head_rules(config: PreTrainedConfig) -> list[Rule]:
    """Return the rule for the LM head; none if the head is tied to the embedding."""
    return [] if config.tie_word_embeddings else [Rule("lm_head.weight", "lm_head.weight")]
