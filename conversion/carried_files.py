"""Files of a checkpoint that are copied unchanged: its tokenizer, its licence, its card.

Only data is carried, by a list of names. Code is carried if the user trusts it and a carried file names it. Nothing
comes from outside of the source, even if a link points there.
"""

import json
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..harness.json_files import read_json_object
from ..modeling.hub_upload import CARD, LICENCES, SENTENCE_TRANSFORMERS, TOKENIZER, code_of, is_named
from .remote_code import reference_of
from .source_files import file_inside, names_local_place

__all__ = ["CARD", "LICENCES", "SENTENCE_TRANSFORMERS", "TOKENIZER", "carry_files", "check_replaceable", "downloads"]

# Patterns of the Hub's client that match all names of `CARD`, `LICENCES` and `TOKENIZER`, and some others.
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
# The same for `SENTENCE_TRANSFORMERS`.
_MODULES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "[0-9]*_*/config.json",
    "[0-9]*_*/model.safetensors",
)
_CHECKPOINT = (
    *_DOWNLOADS,
    "*config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "USE_POLICY*",
    ".gitattributes",
)
_SHOWN = 5
_TOKENIZER_CONFIG = "tokenizer_config.json"
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+)\s*$)", re.MULTILINE)


def carry_files(source: Path, folder: Path, *expressions: str, trust_remote_code: bool = False) -> list[str]:
    """Copy the files whose names match a regular expression.

    The code that a tokenizer's configuration names is copied if it is trusted. Otherwise, the copied configuration does
    not name it, and transformers uses its own class. The folder that a tokenizer was once loaded from is left out.

    Args:
        source: a folder, or the snapshot of a Hub repository.
        folder: the folder to copy into.
        *expressions: regular expressions of paths in the source, with slashes; see `TOKENIZER`, `LICENCES`, `CARD`.
        trust_remote_code: carry code as well.

    Returns:
        The paths in the folder, sorted.

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


def check_replaceable(folder: Path) -> None:
    """Raise a ValueError with the first names if a folder holds files that are not part of a checkpoint.

    Python files are part of it if its configurations name them, or such a file imports them.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_real_folder(path))
    try:
        code = set(code_of(folder))
    except ValueError:  # incomplete, or that of another repository: it is not known which files belong to it
        code = set()
    foreign = [name for name in names if name not in code and not any(_matches(name, each) for each in _CHECKPOINT)]
    if foreign:
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise ValueError(
            f"{folder} is not replaced: it also holds {', '.join(foreign[:_SHOWN])}{more}, which would be deleted. "
            "Move them, or write to another folder."
        )


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _matches(name: str, pattern: str) -> bool:
    # A star matches no slash: a file in a folder is not one beside the weights.
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _copy(source: Path, folder: Path, name: str) -> None:
    path = file_inside(source, name, "source")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / name)


def _carry_tokenizer_config(source: Path, folder: Path, trusted: bool) -> list[str]:
    path = file_inside(source, _TOKENIZER_CONFIG, "source")
    values = read_json_object(path, f"source: {_TOKENIZER_CONFIG} of {source.name}", allow_infinity=True)
    code = _code_of(source, values.get("auto_map")) if trusted else []
    kept = {key: value for key, value in values.items() if not names_local_place(key, value)}
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


def _code_of(source: Path, auto_map: Any) -> list[str]:
    """Return the files of a tokenizer's code, including the modules that they import from the same folder.

    Raises:
        ValueError: if the code is in another repository, or not in the source.
    """
    reference = reference_of(auto_map, "AutoTokenizer")
    if reference is None:
        return []
    if "--" in reference:
        repository, _, name = reference.partition("--")
        raise ValueError(
            f"source: {_TOKENIZER_CONFIG} of {source.name} takes {name} from the repository {repository}. Copy the "
            "code into the source, so that it can be carried."
        )
    pending, found = [reference.partition(".")[0]], []
    while pending:
        name = f"{pending.pop()}.py"
        if name in found:
            continue
        found.append(name)
        text = file_inside(source, name, "source").read_text(encoding="utf-8")
        pending += [first or second for first, second in _RELATIVE_IMPORT.findall(text)]
    return sorted(found)


def downloads(*names: str, trust_remote_code: bool = False) -> list[str]:
    """Return patterns of a repository's files to download: `names` and all that may have to be carried.

    Args:
        *names: further patterns.
        trust_remote_code: download code as well.
    """
    return [*names, *_DOWNLOADS, *_MODULES, *(["*.py"] if trust_remote_code else [])]
