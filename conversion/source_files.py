"""Checks of a model's folder before transformers reads it: strict JSON, possible values, no links to other places."""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..harness.json_files import read_json_object, typed
from ..harness.machine import describe_machine

__all__ = ["check_config", "check_memory", "check_source_files", "file_inside", "names_local_place"]

# The JSON files that transformers reads from a folder, each of which holds an object.
_CONFIG = "config.json"
_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
    "adapter_config.json",
)
# Sizes that are at least 1 in every family that has them.
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "d_model", "n_layer", "n_layers")
MOST_LAYERS = 4096
"""Largest number of layers. The deepest published models have a few hundred."""

# Entries of configurations that name the place from which something was loaded.
_PLACES = (
    "_name_or_path",
    "name_or_path",
    "base_model_name_or_path",
    "tokenizer_name_or_path",
    # of tokenizers that earlier releases of transformers saved
    "tokenizer_file",
    "special_tokens_map_file",
    "added_tokens_file",
    "vocab_file",
    "merges_file",
)
_ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|file:")


def file_inside(folder: Path, name: str, field: str) -> Path:
    """Return the path of a file, after checking that it is not a link to something outside of the folder.

    The files of a snapshot in the Hub's cache may be links to its blobs.

    Args:
        folder: the folder.
        name: path of the file in it.
        field: what errors call the folder.

    Raises:
        ValueError: if there is no such file, or it is a link out of the folder.
    """
    root, target = folder.resolve(), (folder / name).resolve()
    roots = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(each) for each in roots):
        raise ValueError(f"{field}: {name} is a link to a file outside of {folder}. Put the file itself there.")
    if not target.is_file():
        raise ValueError(f"{field}: {name} of {folder} must be a file, got a broken link or something else.")
    return folder / name


def names_local_place(key: str, value: Any) -> bool:
    """Return whether an entry of a configuration names a place on the machine that wrote it."""
    return key in _PLACES and isinstance(value, str) and _ABSOLUTE.match(value) is not None


def check_source_files(source: str | Path, field: str) -> None:
    """Check the JSON files of a folder with a model, an adapter or a tokenizer; a Hub id or a file is not checked.

    Args:
        source: the folder.
        field: what errors call it.

    Raises:
        ValueError: if a file is not strict JSON or holds no object, or config.json has values that no model can have.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    for name in (_CONFIG, *_FILES):
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{field}: {path} is a link to nothing. Restore the file it points to.")
        if not path.exists():
            continue
        status = path.stat()
        try:
            _check_file(path, status.st_mtime_ns, status.st_size, status.st_ino)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None


@lru_cache(maxsize=64)
def _check_file(path: Path, _changed: int, _size: int, _inode: int) -> None:
    """Check one file, once per content, as commands load a folder's tokenizer, configuration and model in turn."""
    values = read_json_object(path, allow_infinity=True)
    if path.name == _CONFIG:
        check_config(values, str(path))


def check_config(values: Mapping[str, Any], name: str) -> None:
    """Check the keys that all models' configurations share, so that no absurd model is built.

    Args:
        values: the keys and values that were read.
        name: what errors call the configuration.

    Raises:
        ValueError: naming the key, its value, and the accepted values.
    """
    for key, kind in (("model_type", str), ("architectures", list), ("auto_map", dict), ("quantization_config", dict)):
        if values.get(key) is not None:
            typed(values[key], kind, name, key)
    for architecture in values.get("architectures") or ():
        typed(architecture, str, name, "architectures")
    for key in ("dtype", "torch_dtype"):
        if values.get(key) is not None:
            _check_dtype(values[key], name, key)
    counts = {key: _count(values[key], name, key) for key in _COUNTS if values.get(key) is not None}
    layers = max((counts.get(key, 1) for key in ("num_hidden_layers", "n_layer", "n_layers")), default=1)
    if layers > MOST_LAYERS:
        key = next(
            key for key in counts if counts[key] == layers and key not in ("vocab_size", "hidden_size", "d_model")
        )
        raise ValueError(f"{name}: `{key}` must be at most {MOST_LAYERS:,}, got {layers:,}.")
    width = max(counts.get(key, 0) for key in ("hidden_size", "d_model"))
    # Every family has the embedding, and at least one square matrix of the width per layer. Two bytes a number.
    check_memory(2 * (counts.get("vocab_size", 0) * width + layers * width * width), f"{name}: a model of {counts}")


def check_memory(needed: int, what: str) -> None:
    """Raise a ValueError if something needs more memory than this machine has, GPUs included."""
    there = int(describe_machine()["hardware"]["memory_bytes"] or 2**62)
    if torch.cuda.is_available():
        there += sum(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    if needed > there:
        raise ValueError(
            f"{what} needs at least {needed / 2**30:,.1f} GiB of memory, this machine has {there / 2**30:,.1f} GiB."
        )


def _count(value: Any, name: str, key: str) -> int:
    # Some families have a number for each layer.
    values = value if isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, int) or each < 1:
            raise ValueError(f"{name}: `{key}` must be an integer of at least 1, got {value!r}.")
    return max(values, default=1)


def _check_dtype(value: Any, name: str, key: str) -> None:
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    per_part = isinstance(value, dict)
    if value != "auto" and not per_part and not isinstance(found, torch.dtype):
        raise ValueError(f"{name}: `{key}` must be the name of a dtype such as float32 or bfloat16, got {value!r}.")
