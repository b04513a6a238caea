"""Files of a model's folder, checked before transformers reads them: strict JSON, and values that a model can have."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..harness.json_files import read_json_object, typed
from ..harness.machine import describe_machine

__all__ = ["check_config", "check_memory", "check_source_files"]

# What transformers reads of a folder, all of them JSON objects. Only the first has always been written with constants
# that JSON does not have.
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
# Each is at least 1 in every family that has it.
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "d_model", "n_layer", "n_layers")
MOST_LAYERS = 4096
"""Layers from which a configuration is refused: the deepest published models have a few hundred."""


def check_source_files(source: str | Path, field: str) -> None:
    """Check the JSON files of a folder that holds a model, an adapter or a tokenizer; nothing for a Hub id or a file.

    Args:
        source: the folder.
        field: what errors call it.

    Raises:
        ValueError: if a file is not strict JSON, is no object, or config.json has values that no model can have.
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
    """Check one file, once for each content: commands load a folder's tokenizer, configuration and model in turn."""
    values = read_json_object(path, allow_infinity=True)
    if path.name == _CONFIG:
        check_config(values, str(path))


def check_config(values: Mapping[str, Any], name: str) -> None:
    """Check what every model's configuration has in common, so that no absurd one is built.

    Args:
        values: keys and values, as JSON has them.
        name: what errors call the configuration.

    Raises:
        ValueError: naming the key, its value, and what is accepted.
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
    # Every family has the embedding, and in a layer one matrix of the width at least. Two bytes a number.
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
    # Some families have one number for each layer.
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
