"""Files of a checkpoint that stay as they are: its tokenizer, its licence, its card. What is copied, and what never is.

Only data is carried, by a list of names. Code goes along where the user trusts it and a carried file names it; nothing
is taken from outside the source, whatever a link in it points to.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ..harness.json_files import read_json_object
from ..modeling.hub_upload import CARD, LICENCES, TOKENIZER, is_named
from .remote_code import reference_of

__all__ = ["CARD", "LICENCES", "TOKENIZER", "carry_files", "downloads", "inside"]

# Patterns of the Hub's client that hold all names of `CARD`, `LICENCES` and `TOKENIZER`, and more.
_DOWNLOADS = (
    "README.md",
    "plots/*.png",
    "LICEN*",
    "NOTICE*",
    "COPYING*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "encoder.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
_TOKENIZER_CONFIG = "tokenizer_config.json"
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+)\s*$)", re.MULTILINE)
_PLACES = ("name_or_path", "_name_or_path")
_ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|file:")


def carry_files(source: Path, folder: Path, *expressions: str, trust_remote_code: bool = False) -> list[str]:
    """Copy the files whose names match a regular expression.

    Of the tokenizer's configuration, the code that it names goes along if it is trusted; otherwise it no longer names
    any, and what transformers itself has is taken. The folder that a tokenizer was once loaded from is left out.

    Args:
        source: a folder, or the snapshot of a Hub repository.
        folder: to copy into.
        *expressions: of the paths in the source, with slashes; see `TOKENIZER`, `LICENCES`, `CARD`.
        trust_remote_code: carry code, too.

    Returns:
        Paths in the folder, in order.

    Raises:
        ValueError: if a file is a link to something outside the source, or the code is not in the source.
    """
    names = {path.relative_to(source).as_posix() for pattern in ("*", "*/*") for path in source.glob(pattern)}
    copied = []
    for name in sorted(name for name in names if is_named(name, *expressions)):
        if name == _TOKENIZER_CONFIG and (source / name).is_file():
            copied += _carry_tokenizer_config(source, folder, trust_remote_code)
        elif (source / name).is_symlink() or (source / name).is_file():
            _copy(source, folder, name)
            copied.append(name)
    return copied


def inside(source: Path, name: str) -> Path:
    """The file of that name in a folder, without links.

    Raises:
        ValueError: if it is no file, or a link to something that is not in the folder. The files of a snapshot in the
            Hub's cache are links to its blobs, beside it.
    """
    path, root = (source / name).resolve(), source.resolve()
    blobs = [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else []
    if not any(path.is_relative_to(place) for place in (root, *blobs)):
        raise ValueError(f"source: {name} of {source.name} links to a file outside it; replace the link with the file")
    if not path.is_file():
        raise ValueError(f"source: {name} of {source.name} must be a file; it is a broken link or something else")
    return path


def _copy(source: Path, folder: Path, name: str) -> None:
    path = inside(source, name)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / name)


def _carry_tokenizer_config(source: Path, folder: Path, trusted: bool) -> list[str]:
    path = inside(source, _TOKENIZER_CONFIG)
    values = read_json_object(path, f"source: {_TOKENIZER_CONFIG} of {source.name}", allow_infinity=True)
    code = _code_of(source, values.get("auto_map")) if trusted else []
    kept = {key: value for key, value in values.items() if not _is_local(key, value)}
    if not trusted:
        kept.pop("auto_map", None)
    if kept == values:
        _copy(source, folder, _TOKENIZER_CONFIG)
    else:
        text = json.dumps(kept, indent=2, ensure_ascii=False)
        (folder / _TOKENIZER_CONFIG).write_text(f"{text}\n", encoding="utf-8")
    for name in code:
        _copy(source, folder, name)
    return [_TOKENIZER_CONFIG, *code]


def _is_local(key: str, value: Any) -> bool:
    """Whether an entry of a configuration names a place of the machine that wrote it."""
    return key in _PLACES and isinstance(value, str) and _ABSOLUTE.match(value) is not None


def _code_of(source: Path, auto_map: Any) -> list[str]:
    """The files of the code of a tokenizer, with what they import from beside themselves.

    Raises:
        ValueError: if the code is another repository's, or not in the source.
    """
    reference = reference_of(auto_map, "AutoTokenizer")
    if reference is None:
        return []
    if "--" in reference:
        repository, _, name = reference.partition("--")
        raise ValueError(
            f"source: {_TOKENIZER_CONFIG} of {source.name} takes {name} from the repository {repository}; the code has "
            "to be in the source to be carried along"
        )
    pending, found = [reference.partition(".")[0]], []
    while pending:
        name = f"{pending.pop()}.py"
        if name in found:
            continue
        found.append(name)
        text = inside(source, name).read_text(encoding="utf-8")
        pending += [first or second for first, second in _RELATIVE_IMPORT.findall(text)]
    return sorted(found)


def downloads(*names: str, trust_remote_code: bool = False) -> list[str]:
    """Patterns of a repository's files to download: `names`, and what may be carried, which is chosen afterwards.

    Args:
        *names: further patterns.
        trust_remote_code: download code, too.
    """
    return [*names, *_DOWNLOADS, *(["*.py"] if trust_remote_code else [])]
