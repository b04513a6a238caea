"""What a checkpoint format is: a layout of another library's for one of our models, read and written."""

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
"""Keys of every configuration of transformers that say the same on both sides."""

ROTARY_BUFFERS = r"rotary_emb\.inv_freq$"
"""Frequencies of the rotary embedding, which earlier releases of transformers saved and all of them compute."""

HEAD = "lm_head.weight"


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
        unread: expression found in keys that a checkpoint may hold and nothing reads; empty: none.
        is_teacher: whether its models have full attention in every block, so that students are distilled from them.
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
        """Name of its models in transformers, where transformers has them."""
        return self.model_class.config_class.model_type if self.model_class else None  # pyright: ignore[reportOptionalMemberAccess]

    def mapper(self, model: PreTrainedModel) -> Mapper:
        """Apply the rules to the keys of a model of `zoo_class`, which may be an empty one."""
        return Mapper(self.rules(model.config), own_tensors(model))


def empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """Build a model whose tensors have shapes and no values."""
    with torch.device("meta"):
        return model_class(config)


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model by their keys, without a head that is the embedding."""
    state = model.state_dict()
    return {key: tensor for key, tensor in state.items() if key != HEAD or not model.config.tie_word_embeddings}


@contextmanager
def config_errors(where: str = "config.json") -> Iterator[None]:
    """Turn what a configuration's class raises for a field, several lines, into a ValueError of one line."""
    try:
        yield
    except StrictDataclassError as error:  # the reason is in the last line
        raise ValueError(
            f"{where}: {str(error).strip().splitlines()[-1].strip().removeprefix('ValueError: ')}"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        ValueError: if there is none, it is not a JSON object, or it says that the weights are quantised.
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
        "Quantised weights can neither be converted nor distilled. Dequantise the model and save it, or take the "
        "checkpoint that it was made from."
    )


def require(name: str, value: Any, accepted: Any, why: str) -> None:
    """Raise a ValueError that names a field which has another value than the only one that can be expressed."""
    if value != accepted:
        raise ValueError(f"config.json: `{name}` must be {accepted!r}, got {value!r} ({why}).")


def require_one_of(name: str, value: Any, accepted: Collection[str], why: str) -> None:
    """Raise a ValueError that names a field which has none of the values that can be expressed."""
    if value not in accepted:
        raise ValueError(f"config.json: `{name}` must be {' or '.join(map(repr, accepted))}, got {value!r} ({why}).")


def filled(
    prefix: str, values: Any, defaults: dict[str, Any], library: str, ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Return the values of an object of config.json, with defaults for those that are not given.

    Args:
        prefix: name of the object and a dot, for the message; empty for the whole file.
        values: what was read.
        defaults: every field that there is, with its default.
        library: whose fields they are, for the message.
        ignored: fields that say nothing about the model, which are left out.

    Raises:
        ValueError: if it is no object, or has another field.
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
    """Raise a ValueError that names a field which is no integer from 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: `{name}` must be an integer of at least 1, got {value!r}.")


def head_rules(config: PreTrainedConfig) -> list[Rule]:
    """Return the rule for the LM head; none if the head is tied to the embedding."""
    return [] if config.tie_word_embeddings else [Rule("lm_head.weight", "lm_head.weight")]
