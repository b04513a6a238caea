"""Weight files: read tensor by tensor and written shard by shard, so that at most one shard is in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..harness.json_files import json_text, parse_json
from .pickle_weights import read_pickle
from .rules import LazyTensor, lazy
from .weight_choice import SAFETENSORS, SAFETENSORS_INDEX, choose_weights, configured_name, read_index

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
class Header:
    """The entry of one tensor in the header of a safetensors file.

    Attributes:
        file: name of the file.
        dtype: dtype as the format writes it, e.g. "F32".
        shape: shape of the tensor.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint.

    Attributes:
        tensors: the tensors by name, none of which is read yet.
        notes: lines for a report, on the choice of files and on what they were wrapped in.
        is_plain: whether transformers can read the files as they are.
    """

    tensors: dict[str, LazyTensor]
    notes: list[str] = field(default_factory=list)
    is_plain: bool = True


def read_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Weights:
    """Read the weights of a checkpoint from the files that `weight_choice` chooses.

    Args:
        folder: the folder with the weights.
        allow_pickle: read a file of `torch.save`, always with `weights_only=True`, which runs no code.

    Raises:
        ValueError: if there are no weights or only a pickle that is not allowed, if a file is damaged, or if an index
            does not fit its shards.
    """
    chosen = choose_weights(folder)
    if chosen.is_pickle and not allow_pickle:
        raise ValueError(
            f"{folder} has its weights in {chosen.name}, a pickle, which can hold code. Pass --allow-pickle "
            "(allow_pickle=True) to read it; only tensors are loaded from it."
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


def read_headers(folder: Path, field: str) -> dict[str, Header]:
    """Return the headers of a folder's tensors by name, from the files that transformers would read.

    Args:
        folder: the folder.
        field: what errors call it.

    Raises:
        ValueError: if there are no safetensors, if a file is damaged, or if an index does not fit its shards.
    """
    chosen = choose_weights(folder)
    if chosen.is_pickle:
        raise ValueError(f"{field}: the weights in {folder} must be safetensors, got a pickle ({chosen.name}).")
    files = {name: read_header(path, field) for name, path in chosen.paths.items()}
    try:
        chosen.check_shards(files)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    return {key: header for headers in files.values() for key, header in headers.items()}


def check_shards_differ(folder: Path, field: str) -> None:
    """Check that no tensor is in two of a model's shards: transformers reads both, and keeps the last.

    Args:
        folder: the folder of a model. One without an index, or without all shards, is left to transformers.
        field: what errors call it.

    Raises:
        ValueError: naming a tensor that is in two shards; or if the index or a shard is malformed.
    """
    name = configured_name(folder) or (SAFETENSORS if (folder / SAFETENSORS).is_file() else SAFETENSORS_INDEX)
    if not name.endswith(".index.json") or not (folder / name).is_file():
        return
    held: dict[str, str] = {}
    for shard in sorted(set(read_index(folder / name)[0].values())):
        for key in read_header(folder / shard, field) if (folder / shard).is_file() else ():
            if key in held:
                raise ValueError(
                    f"{field}: {folder / name}: {key} is in two shards, {held[key]} and {shard}. Save or download the "
                    "weights again."
                )
            held[key] = shard


def read_header(path: Path, field: str | None = None) -> dict[str, Header]:
    """Return the headers of a safetensors file's tensors by name, after checking that the file is whole.

    Args:
        path: the file.
        field: what errors call it, if it needs a name.

    Raises:
        ValueError: if the file is damaged, or its header names a tensor twice: the library would silently use the last.
    """
    try:
        safe_open(path, framework="pt")  # checks the length of the file and of every tensor
    except SafetensorError as error:
        prefix = f"{field}: " if field else ""
        raise ValueError(f"{prefix}{path.name} is damaged, or no safetensors file ({error}).") from None
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    header: Any = parse_json(text.rstrip(b" "), f"{path.name}: its header")
    header.pop("__metadata__", None)
    return {key: Header(path.name, entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    headers = read_header(path)
    file: Any = safe_open(path, framework="pt")
    tensors = {}
    for key, header in headers.items():
        if header.dtype not in _DTYPES:
            raise ValueError(
                f"{path.name}: {key} must have one of the dtypes {', '.join(_DTYPES)}, got {header.dtype}."
            )
        tensors[key] = LazyTensor(header.shape, _DTYPES[header.dtype], lambda key=key: file.get_tensor(key))
    return tensors


def write_weights(folder: Path, tensors: Mapping[str, LazyTensor], *, max_shard_size: int | str = "5GB") -> None:
    """Write tensors as `model.safetensors`, or as shards with an index, reading those of one file at a time.

    Args:
        folder: the folder to write into.
        tensors: the tensors by name.
        max_shard_size: largest size of a file in bytes, or a text such as "5GB".
    """
    empty = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    for name, keys in plan.filename_to_tensors.items():
        # Tensors from a pickle may share memory, which safetensors cannot express.
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
