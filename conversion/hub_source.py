"""The folder of a checkpoint: the user's own, or the needed files of a Hub repository, downloaded from one commit."""

import re
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download

from .carried_files import downloads
from .weight_choice import ORDER, PICKLE_INDEX, SAFETENSORS_INDEX, configured_name, read_index

_SMALL = ("config.json", "generation_config.json", "adapter_config.json", SAFETENSORS_INDEX, PICKLE_INDEX)
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def source_folder(
    source: str | Path,
    *,
    revision: str | None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    check: Callable[[Path], object] | None = None,
) -> tuple[Path, str | None]:
    """Return the folder to read from and, for a Hub id, the commit.

    From a repository, only the weights that `weight_choice` would choose are downloaded; pickles and code only if
    allowed.

    Args:
        source: a folder, or a Hub id.
        revision: branch, tag or commit of the Hub id.
        allow_pickle: download pickles if there are no safetensors.
        trust_remote_code: download code.
        check: is called with the folder when it holds config.json, before anything else is downloaded.

    Raises:
        ValueError: if a revision is given for a folder, or the source is neither a folder nor a Hub id.
        OSError: if the Hub cannot be reached, or has no such repository or revision.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"--revision must be left out for a folder such as {source}, got {revision!r}.")
        if check is not None:
            check(Path(source))
        return Path(source), None
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise ValueError(f"source must be an existing folder or a Hub id OWNER/NAME, got {str(source)!r}.")
    if check is not None:
        config_only = Path(snapshot_download(source, revision=revision, allow_patterns=["config.json"]))
        check(config_only)
        revision = config_only.name
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
