"""Reading of tensors from a file of `torch.save`, without loading other objects or running code."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Entries that hold the state dict in files of PyTorch Lightning, the PyTorch tutorials, fairseq and DeepSpeed."""

_DEPTH = 3  # of nested wrappers
_REMEDY = "Save the state dict alone: torch.save(model.state_dict(), PATH)."


def read_pickle(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors of a file that `torch.save` wrote, in its present or its older format, which is no zip file.

    The present format is mapped into memory; the older one is read at once.

    Returns:
        The tensors by name, and a line for the report if they were under an entry such as "state_dict".

    Raises:
        ValueError: if the file is damaged, holds objects other than plain ones and tensors, or has no state dict.
    """
    name = path.name
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(_reason(name, error)) from None
    taken: list[str] = []
    left: list[str] = []
    while not _is_state_dict(content):
        _check_mapping(content, name, taken)
        found = [key for key in _WRAPPERS if _holds_tensors(content.get(key))]
        if len(found) != 1 or len(taken) == _DEPTH or any(isinstance(each, Tensor) for each in content.values()):
            raise ValueError(_no_state_dict(name, content, found))
        taken, left = [*taken, found[0]], [*left, *(str(key) for key in content if key != found[0])]
        content = content[found[0]]
    for key, tensor in content.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantised" if tensor.is_quantized else "without data" if tensor.is_meta else "sparse"
            raise ValueError(f"{name}: {key} must be a dense tensor, got one that is {kind}.")
    tensors = {key: tensor.detach() for key, tensor in content.items()}
    if not taken:
        return tensors, []
    others = f"; not read: {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}" if left else ""
    return tensors, [f"{name}: the state dict is its entry {'.'.join(taken)!r}{others}"]


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def _holds_tensors(content: Any) -> bool:
    """Return whether a mapping holds tensors, or has another mapping under one of the known names."""
    if not isinstance(content, Mapping):
        return False
    return any(isinstance(value, Tensor) for value in content.values()) or any(
        isinstance(content.get(key), Mapping) for key in _WRAPPERS
    )


def _check_mapping(content: Any, name: str, taken: list[str]) -> None:
    entry = f"{name}: `{'.'.join(taken)}`" if taken else name
    if not isinstance(content, Mapping):
        raise ValueError(f"{entry} must be a dict of tensors by name, got {type(content).__name__}. {_REMEDY}")
    if not content:
        raise ValueError(f"{entry} must be a dict of tensors by name, got an empty one. {_REMEDY}")


def _no_state_dict(name: str, content: Mapping[Any, Any], found: list[str]) -> str:
    if len(found) > 1:
        return f"{name} holds several state dicts: {', '.join(found)}. Save the one to convert by itself."
    tensors = [key for key, value in content.items() if isinstance(value, Tensor)]
    other, value = next((key, value) for key, value in content.items() if not isinstance(value, Tensor))
    beside = f" beside {len(tensors)} tensors" if tensors else ""
    kind = f"{type(value).__name__}{beside}"
    return f"{name} must hold nothing but tensors by name; its entry {other!r} is {kind}. {_REMEDY}"


def _reason(name: str, error: Exception) -> str:
    text = str(error)
    unwanted = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"global [`']?([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and unwanted:
        return f"{name} holds more than tensors: an object of {unwanted[1]}, which is not loaded. {_REMEDY}"
    first = "" if isinstance(error, pickle.UnpicklingError) else re.split(r"\n|\. ", text.strip())[0].rstrip(".")
    reason = f"{type(error).__name__}{f': {first}' if first else ''}"
    return f"{name} is damaged, or not a file of torch.save with tensors alone ({reason})."
