"""The safetensors files of a model's folder, by their names and headers: which are read, and whether they are whole.

No tensor is read here. A file that an index names has to be in the folder: transformers would follow `../` and
absolute paths to wherever they lead.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..harness.json_files import parse_json, typed
from .weight_choice import choose_weights

__all__ = ["Header", "read_header", "read_headers"]

_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_BITS |= {"U64": 64, "U32": 32, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "C64": 64}
_MOST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of one tensor.

    Attributes:
        file: name of the file.
        dtype: as the format writes it, "F32" say.
        shape: of the tensor.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: Path, field: str = "source") -> dict[str, Header]:
    """The tensors of a folder by name, from the files that transformers would read.

    Raises:
        ValueError: if there are no safetensors, a file is not whole, or the index and its files do not agree.
    """
    chosen = choose_weights(folder)
    if chosen.is_pickle:
        raise ValueError(f"{field}: {folder} holds no weights but a pickle ({chosen.name}); accepted: safetensors")
    files = {name: read_header(path, field) for name, path in chosen.paths.items()}
    try:
        chosen.check_shards(files)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    return {key: header for headers in files.values() for key, header in headers.items()}


def read_header(path: Path, field: str | None = None) -> dict[str, Header]:
    """Return the tensors of a safetensors file by name, after checking that the file is as long as they say.

    Args:
        path: the file.
        field: the argument that names it, for the error.

    Raises:
        ValueError: if it is damaged, or its header names a tensor twice: the library would use the last one silently.
    """
    size = path.stat().st_size
    broken = f"{f'{field}: ' if field else ''}{path.name} is damaged, or no safetensors file"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise ValueError(f"{broken} (it has {size:,} bytes, and its header does not fit into them).")
        text = file.read(length)
    header: Any = typed(parse_json(text.rstrip(b" "), f"{path.name}: its header"), dict, path.name, "header")
    header.pop("__metadata__", None)
    found, end = {}, 0
    for key, entry in header.items():
        try:
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            bits = _BITS[dtype] * prod(shape)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{broken} (its header does not describe {key}).") from None
        if bits != 8 * (last - first):
            raise ValueError(f"{broken} ({key} of {dtype} and shape {list(shape)} cannot have {last - first:,} bytes).")
        found[key], end = Header(path.name, dtype, shape), max(end, last)
    if size != 8 + length + end:
        raise ValueError(f"{broken} (it has {size:,} bytes, its header promises {8 + length + end:,}).")
    return found
