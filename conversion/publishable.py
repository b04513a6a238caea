"""The check of a folder before it is published: that it will load, as far as this is known without running its code."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open

from ..harness.json_files import read_json_object
from ..modeling.hub_upload import check_base, files_to_send
from ..modeling.pretrained import ZooPreTrainedModel
from .embedder_modules import embedder_modules
from .export import model_class_of
from .formats.format import config_errors, empty_model
from .load_model import check_finite
from .source_files import names_local_place
from .weight_files import Header, read_header, read_headers

__all__ = ["check_publishable"]

_ADAPTER = "adapter_model.safetensors"


def check_publishable(folder: Path) -> None:
    """Raise a ValueError unless a folder holds a whole model of the zoo with its code, or a whole adapter.

    It checks that the weight files are whole and have the keys and shapes that index and configuration promise; that
    all weights are finite; that the folder holds the code with everything that it imports, and an embedder's modules
    with all their files; and that the card and all JSON files can be read and hold no absolute path.

    Args:
        folder: the folder to publish.
    """
    field = "FOLDER"
    if not folder.is_dir():
        raise ValueError(f"{field} must be an existing folder, got {folder}.")
    adapter = (folder / "adapter_config.json").is_file()
    try:
        headers = _check_adapter(folder, field) if adapter else _check_model(folder, field)
        sent, _ = files_to_send(folder)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"{field}:") else f"{field}: {text}") from None
    unsent = sorted({header.file for header in headers.values()}.difference(sent))
    if unsent:
        raise ValueError(
            f"{field}: the weights in {', '.join(unsent[:3])} would not be uploaded: a file of weights must be named "
            "model.safetensors, or model-00001-of-00002.safetensors and so on. Write the folder with ssm-zoo export."
        )
    for name in sent:
        if name.endswith(".json") and name != "modules.json":
            values = read_json_object(folder / name, f"{field}: {name}", allow_infinity=True)
            for key, place in _local_places(values):
                raise ValueError(
                    f"{field}: {name}: `{key}` must not be a place of this machine, got {place!r}. Remove the entry."
                )
    _check_card(folder, field)
    weights = {header.file for header in headers.values()} | set(_module_weights(folder, sent, field))
    _check_finite(folder, weights, field)


def _local_places(value: Any) -> Iterator[tuple[str, str]]:
    """Yield the entries of a JSON value, at any depth, that name a place of this machine, each with its key."""
    if isinstance(value, list):
        for each in value:
            yield from _local_places(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if names_local_place(key, each):
                yield key, each
            yield from _local_places(each)


def _check_adapter(folder: Path, field: str) -> dict[str, Header]:
    if not (folder / _ADAPTER).is_file():
        raise ValueError(f"{field}: {folder} holds no weights ({_ADAPTER}).")
    check_base(folder)
    headers = read_header(folder / _ADAPTER, field)
    if not headers:
        raise ValueError(f"{field}: {_ADAPTER} of {folder.name} holds no weights.")
    return headers


def _check_model(folder: Path, field: str) -> dict[str, Header]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{field}: {folder} is no model, since it holds no config.json.")
    values = read_json_object(path, f"{field}: config.json", allow_infinity=True)
    if not isinstance(values.get("auto_map"), dict) or not values["auto_map"]:
        raise ValueError(f"{field}: {path} has no auto_map, so it does not load. Write the folder with ssm-zoo export.")
    headers = read_headers(folder, field)
    expected, tied = _expected(folder, model_class_of(folder))
    problems = {
        "lacks": sorted(expected.keys() - headers.keys()),
        "has too many": sorted(headers.keys() - expected.keys() - tied),
        "has other shapes for": sorted(
            key for key in expected.keys() & headers.keys() if expected[key] != headers[key].shape
        ),
    }
    for verb, keys in problems.items():
        if keys:
            raise ValueError(
                f"{field}: {folder} {verb} {len(keys)} weights, according to its config.json: {', '.join(keys[:3])}."
            )
    return headers


def _expected(folder: Path, kind: type[ZooPreTrainedModel]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return keys and shapes of the weights for the configuration in a folder, and the keys of tied weights."""
    assert kind.config_class is not None
    with config_errors():
        config = kind.config_class.from_pretrained(folder)
    model = empty_model(kind, config)
    state = model.state_dict()
    tied = set(model.all_tied_weights_keys)
    return {key: tuple(tensor.shape) for key, tensor in state.items() if key not in tied}, tied


def _module_weights(folder: Path, sent: list[str], field: str) -> Iterator[str]:
    """Yield the weight files of an embedder's modules, after checking that all files of a module are sent."""
    for path, kind in embedder_modules(folder, field).items():
        files = [each for each in (folder / path).rglob("*") if each.is_file() and not each.name.startswith(".")]
        there = [each.relative_to(folder).as_posix() for each in files]
        # Releases before 5 wrote nothing for a normalisation.
        missing = sorted({*there, *([] if kind.endswith(".Normalize") else [f"{path}/config.json"])}.difference(sent))
        if missing:
            raise ValueError(
                f"{field}: modules.json names {path}, of which {missing[0]} is missing or would not be uploaded. Save "
                "the embedder again with sentence-transformers."
            )
        yield from (name for name in there if name.endswith(".safetensors"))


def _check_finite(folder: Path, names: set[str], field: str) -> None:
    for name in sorted(names):
        with safe_open(folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no mapping
                check_finite({key: file.get_tensor(key)}, f"{field}: {name}")


def _check_card(folder: Path, field: str) -> None:
    path = folder / "README.md"
    if not path.is_file():
        return
    try:
        ModelCard.load(path)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{field}: README.md: its front matter must be YAML of a model card ({reason}).") from None
