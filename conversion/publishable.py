"""Whether a folder can be published: it loads, as far as that can be told without running any code of it."""

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open

from ..harness.json_files import read_json_object
from ..modeling.hub_upload import check_base, code_of, files_to_send
from ..modeling.pretrained import ZooPreTrainedModel
from .export import model_class_of
from .weight_listing import Header, read_header, read_headers

__all__ = ["check_publishable"]

_ADAPTER = "adapter_model.safetensors"
# Entries of configurations that name where something was loaded from.
_PLACES = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_name_or_path")
_ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|file:")


def check_publishable(folder: Path) -> None:
    """Raise a ValueError if a folder is no whole model of the zoo with its code, or no whole adapter, or names a place
    of this machine.

    Checked are: the weights' files against their own headers, the index, and the keys and shapes that the configuration
    promises; that all weights are finite; that the code is there with all it imports, and is in the folder; that the
    card and every JSON file can be read, and hold no absolute path.

    Args:
        folder: to be published.
    """
    field = "FOLDER"
    if not folder.is_dir():
        raise ValueError(f"{field}: there is no folder {folder}")
    adapter = (folder / "adapter_config.json").is_file()
    try:
        headers = _check_adapter(folder, field) if adapter else _check_model(folder, field)
        sent, _ = files_to_send(folder)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"{field}:") else f"{field}: {text}") from None
    for name in sent:
        if name.endswith(".json") and name != "modules.json":
            _check_places(read_json_object(folder / name, f"{field}: {name}", allow_infinity=True), f"{field}: {name}")
    _check_card(folder, field)
    _check_finite(folder, headers, field)


def _check_adapter(folder: Path, field: str) -> dict[str, Header]:
    if not (folder / _ADAPTER).is_file():
        raise ValueError(f"{field}: {folder} holds no weights ({_ADAPTER})")
    check_base(folder)
    headers = read_header(folder / _ADAPTER, field)
    if not headers:
        raise ValueError(f"{field}: {_ADAPTER} of {folder.name} holds no weights")
    return headers


def _check_model(folder: Path, field: str) -> dict[str, Header]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{field}: {folder} is not a model's: it holds no config.json")
    values = read_json_object(path, f"{field}: config.json", allow_infinity=True)
    if not isinstance(values.get("auto_map"), dict) or not values["auto_map"]:
        raise ValueError(f"{field}: {path} has no auto_map, so it does not load; write the folder with export")
    code_of(folder)
    headers = read_headers(folder, field)
    expected, tied = _expected(folder, model_class_of(folder), field)
    problems = {
        "lacks": sorted(expected.keys() - headers.keys()),
        "has too many": sorted(headers.keys() - expected.keys() - tied),
        "has other shapes of": sorted(
            key for key in expected.keys() & headers.keys() if expected[key] != headers[key].shape
        ),
    }
    for verb, keys in problems.items():
        if keys:
            raise ValueError(f"{field}: {folder} {verb} {len(keys)} weights, by its config.json: {', '.join(keys[:3])}")
    return headers


def _expected(folder: Path, kind: type[ZooPreTrainedModel], field: str) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Keys and shapes of the weights for the configuration in a folder, and the keys of those that are others' too."""
    assert kind.config_class is not None
    try:
        config = kind.config_class.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"{field}: config.json: {str(error).strip().splitlines()[-1].strip()}") from None
    with torch.device("meta"):
        model = kind(config)
    state = model.state_dict()
    tied = set(model.all_tied_weights_keys)
    return {key: tuple(tensor.shape) for key, tensor in state.items() if key not in tied}, tied


def _check_finite(folder: Path, headers: dict[str, Header], field: str) -> None:
    for name in sorted({header.file for header in headers.values()}):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no mapping
                if not file.get_tensor(key).isfinite().all():
                    raise ValueError(f"{field}: {name}: the weight {key} is not finite")


def _check_places(value: Any, name: str) -> None:
    """Raise a ValueError if a configuration says in which folder of a machine something was."""
    for key, entry in value.items():
        if key in _PLACES and isinstance(entry, str) and _ABSOLUTE.match(entry):
            raise ValueError(f"{name}: `{key}` must not be a place of this machine, got {entry!r}; remove the entry")


def _check_card(folder: Path, field: str) -> None:
    path = folder / "README.md"
    if not path.is_file():
        return
    try:
        ModelCard.load(path)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{field}: README.md: its front matter must be YAML of a model card ({reason})") from None
