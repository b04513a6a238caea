"""The choice of a model's weight files in a folder, all of which must be in that folder.

The choice is that of transformers' `from_pretrained`, so that conversion, export and checks use the weights that
transformers loads: the file that `transformers_weights` in config.json names, else `model.safetensors`, else
`model.safetensors.index.json` with its shards, else `pytorch_model.bin`, else `pytorch_model.bin.index.json` with its
shards.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..harness.json_files import read_json_object, typed
from .source_files import file_inside

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ORDER = (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX)

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "random_states", "scaler")  # files of a trainer


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights.

    Attributes:
        name: the chosen file, which holds weights or is an index.
        paths: the files with weights, by their names.
        weight_map: the file of each key by the index; None without an index.
        is_pickle: whether the files are pickles.
        unread: other weight files in the folder, by their names.
        has_metadata: whether the index has the object `metadata`, without which transformers does not read it.
    """

    name: str
    paths: dict[str, Path]
    weight_map: dict[str, str] | None
    is_pickle: bool
    unread: list[str] = field(default_factory=list)
    has_metadata: bool = True

    def notes(self) -> list[str]:
        """Return lines for a report; empty if there was nothing to choose."""
        if not self.unread:
            return []
        return [f"weights: {self.name}, the file that transformers loads; not read: {', '.join(self.unread)}"]

    def check_shards(self, keys: Mapping[str, Iterable[str]]) -> None:
        """Check that each key is in the one shard that the index names.

        Args:
            keys: the keys in each file, by its name.

        Raises:
            ValueError: naming the index and a key that is in two shards, or not in that one.
        """
        if self.weight_map is None:
            return
        held: dict[str, str] = {}
        for name, found in keys.items():
            for key in found:
                if key in held:
                    raise ValueError(f"{self.name}: {key} is in two shards, {held[key]} and {name}.")
                held[key] = name
        wrong = sorted(key for key in held.keys() | self.weight_map if held.get(key) != self.weight_map.get(key))
        if wrong:
            key = wrong[0]
            raise ValueError(
                f"{self.name} does not fit its shards for {len(wrong)} keys: {key} is in {held.get(key, 'no shard')}, "
                f"`weight_map` names {self.weight_map.get(key, 'none')}. Save the checkpoint again, or repair the "
                "index."
            )


def choose_weights(folder: Path) -> WeightFiles:
    """Find the weight files that transformers would load from a folder. No file but an index is read.

    Raises:
        ValueError: if there are none; if there is an adapter, which transformers would apply to them; or if an index
            is malformed, or names a file that does not exist or is not in the folder.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which transformers would apply to the model. Merge it "
            "(merge_and_unload) and save the result, or remove the adapter's files."
        )
    name = configured_name(folder)
    if name is not None and not (folder / name).is_file():
        raise ValueError(f"config.json: `transformers_weights` names {name}, which is not in {folder}.")
    name = name or next((each for each in ORDER if (folder / each).is_file()), None)
    there = sorted(path.name for path in folder.iterdir() if _may_hold_weights(path.name))
    if name is None:
        others = f", only {', '.join(there[:3])}" if there else ""
        raise ValueError(
            f"{folder} holds no weights: none of {', '.join(ORDER)} is there{others}. Pickles of a Hub repository "
            "are downloaded only with --allow-pickle (allow_pickle=True)."
        )
    if not name.endswith(".index.json"):
        paths, weight_map, has_metadata = {name: file_inside(folder, name, "source")}, None, True
    else:
        weight_map, has_metadata = read_index(folder / name)
        names = sorted(set(weight_map.values()))
        missing = [shard for shard in names if not (folder / shard).is_file()]
        if missing:
            raise ValueError(
                f"{name} names {len(names)} shards, of which {len(missing)} are not in {folder}: "
                f"{', '.join(missing[:3])}. Copy or download all of them."
            )
        paths = {shard: file_inside(folder, shard, name) for shard in names}
    unread = [each for each in there if each != name and each not in paths]
    return WeightFiles(name, paths, weight_map, name in (PICKLE, PICKLE_INDEX), unread, has_metadata)


def check_names(folder: Path) -> None:
    """Check that the weight files which an index or config.json of a folder names are in that folder.

    transformers would also read those of other folders, which it follows by `../` and absolute paths.

    Raises:
        ValueError: if a name is not that of a file in the folder.
    """
    configured_name(folder)
    for name in (SAFETENSORS_INDEX, PICKLE_INDEX):
        if (folder / name).is_file():
            read_index(folder / name)


def read_index(path: Path) -> tuple[dict[str, str], bool]:
    """Read an index of shards.

    Returns:
        The file of each key, and whether the index has the object `metadata`.

    Raises:
        ValueError: if it is malformed, or names a file in another folder.
    """
    name = path.name
    index = read_json_object(path, name)
    if "weight_map" not in index:
        raise ValueError(f"{name}: `weight_map` is missing. An index maps each key to the file that holds it.")
    weight_map: dict[str, Any] = typed(index["weight_map"], dict, name, "weight_map")
    if not weight_map:
        raise ValueError(f"{name}: `weight_map` must name at least one key, got none.")
    for key, shard in weight_map.items():
        typed(shard, str, name, f"weight_map.{key}")
        if not _is_plain(shard):
            raise ValueError(
                f"{name}: `weight_map.{key}` must be the name of a file in the same folder, got {shard!r}."
            )
    return weight_map, isinstance(index.get("metadata"), dict)


def configured_name(folder: Path) -> str | None:
    """Return the file of weights, or the index, that config.json names, whether or not it exists."""
    if not (folder / "config.json").is_file():
        return None
    name = read_json_object(folder / "config.json", "config.json", allow_infinity=True).get("transformers_weights")
    if name is None:
        return None
    typed(name, str, "config.json", "transformers_weights")
    if not _is_plain(name) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            "config.json: `transformers_weights` must be the name of a .safetensors file or its index in the same "
            f"folder, got {name!r}."
        )
    return name


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not any(letter in name for letter in "/\\\0")


def _may_hold_weights(name: str) -> bool:
    return name.endswith(_SUFFIXES) and not name.startswith(_NO_WEIGHTS)
