"""A checkpoint's folder: the user's own, or what is needed of a Hub repository, downloaded at one commit."""

from pathlib import Path

from huggingface_hub import snapshot_download

from .carried_files import downloads
from .export import hub_id
from .weight_choice import ORDER, PICKLE_INDEX, SAFETENSORS_INDEX, configured_name, read_index

_SMALL = ("config.json", "generation_config.json", "adapter_config.json", SAFETENSORS_INDEX, PICKLE_INDEX)


def source_folder(
    source: str | Path, *, revision: str | None, allow_pickle: bool, trust_remote_code: bool = False
) -> tuple[Path, str | None]:
    """Return the folder to read from and, of a Hub id, the commit.

    Of a repository only the weights that `weight_choice` would choose are downloaded; pickles and code only if allowed.

    Raises:
        ValueError: if a folder comes with a revision, or the source is neither a folder nor a Hub id.
        OSError: if the Hub cannot be reached, or has no such repository or revision.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"--revision must be left out for a folder such as {source}, got {revision!r}.")
        return Path(source), None
    source = hub_id(source)
    small = downloads(*_SMALL, trust_remote_code=trust_remote_code)
    folder = Path(snapshot_download(source, revision=revision, allow_patterns=small))
    commit = folder.name  # all files come from one commit, even if the branch moves meanwhile
    configured = configured_name(folder)
    for name in (configured,) if configured else ORDER if allow_pickle else ORDER[:2]:
        if not (folder / name).is_file():
            snapshot_download(source, revision=commit, allow_patterns=[name])
        if (folder / name).is_file():
            if name.endswith(".index.json"):
                shards = sorted(set(read_index(folder / name)[0].values()))
                snapshot_download(source, revision=commit, allow_patterns=shards)
            break
    return folder, commit
