"""A checkpoint's folder: the user's own, or what is needed of a Hub repository, downloaded at one commit."""

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from .export import CARRIED, hub_id
from .weight_choice import ORDER, PICKLE, PICKLE_INDEX, SAFETENSORS, SAFETENSORS_INDEX, read_index

CARRIED_FILES = ("generation_config.json", *CARRIED)
"""Files of a checkpoint that a conversion carries over."""

_SMALL = ("config.json", "adapter_config.json", SAFETENSORS_INDEX, PICKLE_INDEX)


def source_folder(source: str | Path, *, revision: str | None, allow_pickle: bool) -> tuple[Path, str | None]:
    """Return the folder to read from and, of a Hub id, the commit.

    Of a repository only the weights that `weight_choice` would choose are downloaded; pickles only if allowed.

    Raises:
        ValueError: if a folder comes with a revision, or the source is neither a folder nor a Hub id.
        OSError: if the Hub cannot be reached, or has no such repository or revision.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"--revision must be left out for a folder such as {source}, got {revision!r}.")
        return Path(source), None
    source = hub_id(source)
    folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*_SMALL, *CARRIED_FILES]))
    commit = folder.name  # all files come from one commit, even if the branch moves meanwhile
    for name in ORDER if allow_pickle else (SAFETENSORS, SAFETENSORS_INDEX):
        if name in (SAFETENSORS, PICKLE):
            snapshot_download(source, revision=commit, allow_patterns=[name])
        elif (folder / name).is_file():
            snapshot_download(
                source, revision=commit, allow_patterns=sorted(set(read_index(folder / name)[0].values()))
            )
        if (folder / name).is_file():
            break
    return folder, commit


def pinned_revision(source: str | Path, revision: str | None) -> str | None:
    """Return the commit that a Hub id's revision stands for now; None for a folder or a file.

    Raises:
        ValueError: if a folder or a file comes with a revision.
        OSError: if the Hub cannot be reached, or has no such repository or revision.
    """
    if Path(source).exists():
        if revision is not None:
            raise ValueError(f"revision must be left out for the folder or file {source}, got {revision!r}.")
        return None
    return Path(hf_hub_download(str(source), "config.json", revision=revision)).parent.name
