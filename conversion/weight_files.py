"""Weights on the disk: read tensor by tensor, and written shard by shard, so that no more than a shard is in memory."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .rules import LazyTensor, lazy

_SINGLE, _INDEX, _PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
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


def read_weights(folder: Path, *, allow_pickle: bool = False) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint by name, none of them read yet.

    Args:
        folder: holds `model.safetensors`, an index and its shards, or, which is taken only where those are not,
            `pytorch_model.bin`.
        allow_pickle: take `pytorch_model.bin`. A pickle can hold code; it is read with `weights_only=True`.

    Raises:
        ValueError: if there are no weights, only a pickle that is not allowed, a file that is damaged, or an index
            that does not fit its shards.
    """
    if (folder / _INDEX).is_file():
        return _read_shards(folder)
    if (folder / _SINGLE).is_file():
        return _read_file(folder / _SINGLE)
    if not (folder / _PICKLE).is_file():
        raise ValueError(f"source: {folder} holds no weights; accepted: {_SINGLE}, {_INDEX} with its shards, {_PICKLE}")
    if not allow_pickle:
        raise ValueError(
            f"source: {folder} has its weights in {_PICKLE}, a pickle, which can hold code; accepted: safetensors, or "
            "with --allow-pickle (allow_pickle=True) a pickle of nothing but tensors"
        )
    return _read_pickle(folder / _PICKLE)


def _read_shards(folder: Path) -> dict[str, LazyTensor]:
    try:
        weight_map = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{_INDEX}: no weight_map of key to file can be read from it ({error})") from None
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{_INDEX}: {len(missing)} of {len(names)} shards are not there: {', '.join(missing[:3])}")
    shards = {name: _read_file(folder / name) for name in names}
    held = {key: name for name, tensors in shards.items() for key in tensors}
    wrong = sorted(key for key in held.keys() | weight_map.keys() if held.get(key) != weight_map.get(key))
    if wrong:
        raise ValueError(f"{_INDEX}: {len(wrong)} keys are not in the shards it says: {', '.join(wrong[:3])}")
    return {key: shards[name][key] for key, name in weight_map.items()}


def _read_file(path: Path) -> dict[str, LazyTensor]:
    try:
        file: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path.name}: no whole safetensors file ({error})") from None
    tensors = {}
    for key in file.keys():  # noqa: SIM118, it is no mapping
        header = file.get_slice(key)
        if header.get_dtype() not in _DTYPES:
            raise ValueError(f"{path.name}: {key} is of dtype {header.get_dtype()}; accepted: {', '.join(_DTYPES)}")
        shape, dtype = tuple(header.get_shape()), _DTYPES[header.get_dtype()]
        tensors[key] = LazyTensor(shape, dtype, lambda key=key: file.get_tensor(key))
    return tensors


def _read_pickle(path: Path) -> dict[str, LazyTensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path.name}: not a whole file of tensors alone ({type(error).__name__}: {first})") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path.name}: accepted: a dict of tensors, got {type(state).__name__}")
    return {str(key): lazy(tensor) for key, tensor in state.items()}


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
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
