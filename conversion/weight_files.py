"""Weights on the disk: read tensor by tensor, and written shard by shard, so that no more than a shard is in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..harness.json_files import json_text
from .pickle_weights import read_pickle
from .rules import LazyTensor, lazy
from .weight_choice import SAFETENSORS_INDEX, choose_weights
from .weight_listing import read_header

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint.

    Attributes:
        tensors: the tensors by name, none of which is read yet.
        notes: lines for a report: which files were chosen, what they were wrapped in.
        is_plain: whether transformers, too, can read the files as they are.
    """

    tensors: dict[str, LazyTensor]
    notes: list[str] = field(default_factory=list)
    is_plain: bool = True


def read_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Weights:
    """Read the weights of a checkpoint, of the files that `weight_choice` chooses.

    Args:
        folder: holds the weights.
        allow_pickle: read a file of `torch.save`, always with `weights_only=True`, which runs no code.

    Raises:
        ValueError: if there are no weights, only a pickle that is not allowed, a file that is damaged, or an index
            that does not fit its shards.
    """
    chosen = choose_weights(folder)
    if chosen.is_pickle and not allow_pickle:
        raise ValueError(
            f"{folder} has its weights in {chosen.name}, a pickle, which can hold code. Pass --allow-pickle "
            "(allow_pickle=True) to read nothing but tensors from it."
        )
    notes, files = chosen.notes(), {}
    is_plain = chosen.has_metadata
    for name, path in chosen.paths.items():
        if chosen.is_pickle:
            tensors, wrapped = read_pickle(path)
            files[name] = {key: lazy(tensor) for key, tensor in tensors.items()}
            notes, is_plain = [*notes, *wrapped], is_plain and not wrapped
        else:
            files[name] = _read_safetensors(path)
    weight_map = chosen.weight_map
    if weight_map is None:
        return Weights(files[chosen.name], notes, is_plain)
    chosen.check_shards(files)
    if not chosen.has_metadata:
        notes = [*notes, f"{chosen.name}: `metadata` is missing; transformers does not read such an index"]
    return Weights({key: files[name][key] for key, name in weight_map.items()}, notes, is_plain)


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    headers = read_header(path)
    try:
        file: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged, or no safetensors file ({error}).") from None
    tensors = {}
    for key, header in headers.items():
        if header.dtype not in _DTYPES:
            raise ValueError(f"{path.name}: {key} must be of one of {', '.join(_DTYPES)}, got {header.dtype}.")
        tensors[key] = LazyTensor(header.shape, _DTYPES[header.dtype], lambda key=key: file.get_tensor(key))
    return tensors


def write_weights(folder: Path, tensors: Mapping[str, LazyTensor], *, max_shard_size: int | str = "5GB") -> None:
    """Write tensors as `model.safetensors`, or as shards with an index, reading those of one file at a time.

    Args:
        folder: where to.
        tensors: what to write.
        max_shard_size: bytes of a file, or a text such as "5GB".
    """
    empty = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    for name, keys in plan.filename_to_tensors.items():
        # Tensors of a pickle may share memory, which the format does not have.
        shard = {key: tensors[key].load().contiguous() for key in keys}
        places = [tensor.data_ptr() for tensor in shard.values()]
        if len(set(places)) < len(places):
            shard = {key: tensor.clone() for key, tensor in shard.items()}
        save_file(shard, folder / name, metadata={"format": "pt"})
        del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json_text(index, SAFETENSORS_INDEX, sort_keys=True)
        (folder / SAFETENSORS_INDEX).write_text(f"{text}\n", encoding="utf-8")
