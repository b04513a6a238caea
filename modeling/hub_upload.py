"""The upload of a folder to a model repository: which files are sent, and which files of the repository are removed.

Only files with known names are sent, no links and no hidden files. The repository holds a record of the files that our
uploads wrote, with digests; these are replaced without asking. Other files that might be loaded instead of the new ones
are removed only on request.
"""

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile

RECORD = ".ssm-zoo.json"
"""File of a repository that records what our uploads wrote."""

LICENCES = r"(LICEN[CS]E|NOTICE|COPYING)([-_.][\w-]+)*?(\.(txt|md|rst))?"
"""Names of licence files, as a regular expression."""

TOKENIZER = "|".join(
    (
        r"tokenizer(_config)?\.json",
        r"special_tokens_map\.json",
        r"added_tokens\.json",
        r"vocab\.(json|txt|bpe)",
        r"merges\.txt",
        r"encoder\.json",
        r"tokenizer\.model(\.v\d+)?",
        r"(sentencepiece(\.bpe)?|spiece|spm)\.model",
        r"[\w-]+\.tiktoken",
        r"tekken\.json",
        r"chat_template\.(jinja|json)",
        r"additional_chat_templates/[\w-]+\.jinja",
    )
)
"""Names of a tokenizer's files, as a regular expression. None of them is code."""

CARD = r"README\.md|plots/[\w-]+\.png"
"""Names of a card and its pictures, as a regular expression."""

SENTENCE_TRANSFORMERS = "|".join(
    (
        r"modules\.json",
        r"(config_sentence_transformers|sentence_bert_config)\.json",
        r"\d+_\w+/(config\.json|model\.safetensors)",
    )
)
"""Names of the files that make a model an embedder or reranker of sentence-transformers, as a regular expression."""

_MODEL = "|".join(
    (
        r"(generation_)?config\.json",
        r"model(-\d+-of-\d+)?\.safetensors",
        r"model\.safetensors\.index\.json",
        r"adapter_config\.json",
        r"adapter_model\.safetensors",
        SENTENCE_TRANSFORMERS,
    )
)
# Files that transformers or peft might load instead of the new ones: an old model.safetensors takes precedence over new
# shards, an adapter's configuration over that of the model beside it.
_LOADED = r"[^/]*\.safetensors|[^/]*\.safetensors\.index\.json|adapter_config\.json|adapter_model\.bin"
_CODE = re.compile(r".*\.(py|pyc|pyd|so|dll|sh|pkl|pickle|pt|pth|bin|ckpt)", re.IGNORECASE | re.DOTALL)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# The Hub's own file, a card that somebody may have edited, and the record.
_NEVER_REMOVED = {".gitattributes", "README.md", RECORD}


@dataclass(frozen=True)
class Plan:
    """The plan of an upload.

    Attributes:
        repo_id: target repository.
        commit: commit of the repository that the plan is based on.
        folder: source folder.
        sent: paths in the folder, with slashes.
        left_out: files of the folder that are not sent; folders that are left out as a whole end in a slash.
        removed: files of the repository that our earlier uploads wrote.
        not_ours: further files that would have to be removed, not written by us or of another kind of upload.
    """

    repo_id: str
    commit: str
    folder: Path
    sent: list[str]
    left_out: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    not_ours: list[str] = field(default_factory=list)


def is_named(name: str, *expressions: str) -> bool:
    """Return whether a path, with slashes, matches one of the regular expressions and is not code."""
    return any(re.fullmatch(each, name) for each in expressions) and not _CODE.fullmatch(name)


def files_to_send(folder: Path) -> tuple[list[str], list[str]]:
    """Return the paths in a folder that are sent, and those that are not.

    Weights, configurations, tokenizer, card, plots, licences and the code that the configurations name are sent.

    Raises:
        ValueError: if one of them is a link, or a file of the code is missing.
    """
    code = set(code_of(folder))
    sent, left_out = [], []
    for place, folders, files in os.walk(folder):
        here = Path(place).relative_to(folder)
        for name in sorted(folders):
            path = (here / name).as_posix()
            holds = any(is_named(f"{path}/{each}", CARD, TOKENIZER, _MODEL) for each in os.listdir(folder / path))
            if holds and (folder / path).is_symlink():
                raise ValueError(f"{path} of {folder.name} must be a folder, got a link to one")
            if not holds:
                left_out.append(f"{path}/")
                folders.remove(name)
        for name in sorted(files):
            path = (here / name).as_posix()
            if path not in code and not is_named(path, LICENCES, TOKENIZER, CARD, _MODEL):
                left_out.append(path)
            elif (folder / path).is_symlink() or not (folder / path).is_file():
                raise ValueError(f"{path} of {folder.name} must be a regular file, got a link or a special file")
            else:
                sent.append(path)
    return sorted(sent), sorted(left_out)


def code_of(folder: Path) -> list[str]:
    """Return the code files that the configurations of a folder name, and the files that these import.

    Raises:
        ValueError: if one is missing or cannot be read, or the code belongs to another repository.
    """
    pending = list(_named_modules(folder))
    found: dict[str, None] = {}
    while pending:
        module, why = pending.pop(0)
        name = f"{module}.py"
        if name in found:
            continue
        found[name] = None
        if not re.fullmatch(r"\w+", module) or not (folder / name).is_file():
            raise ValueError(f"{why}, but there is no {name} in {folder.name}. Write the folder with `ssm-zoo export`")
        try:
            tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{name} of {folder.name} must be Python code: {error}") from None
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                dots = "." * (node.level - 1)
                modules = [dots + node.module] if node.module else [dots + alias.name for alias in node.names]
                pending += [(each, f"{name}, line {node.lineno}, imports .{each}") for each in modules]
    return sorted(found)


def _named_modules(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the modules that `auto_map`s name, each with the file and entry that name it."""
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        values = _object(folder / file) if (folder / file).is_file() else {}
        auto_map = values.get("auto_map")
        named = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
        for references in named:
            for reference in references if isinstance(references, list) else [references]:
                if reference is None:
                    continue
                if "--" in str(reference):
                    raise ValueError(
                        f"{file} of {folder.name} must not take its code from another repository, which may change, "
                        f"got {reference}. Write the folder with `ssm-zoo export`"
                    )
                yield str(reference).rpartition(".")[0], f"{file} names {reference}"


def _object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} of {path.parent.name} must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} of {path.parent.name} must be a JSON object, got {type(value).__name__}")
    return value


def check_base(folder: Path) -> None:
    """Raise a ValueError if a folder holds an adapter whose base model others cannot load."""
    path = folder / "adapter_config.json"
    if path.is_file():
        base = _object(path).get("base_model_name_or_path")
        if not isinstance(base, str) or not _HUB_ID.fullmatch(base) or Path(base).exists():
            raise ValueError(
                "adapter_config.json: `base_model_name_or_path` must be the Hub id OWNER/NAME of the base model, got "
                f"{base!r}, which others cannot load. Push the base model first, then name it here"
            )


def plan_upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    keep_card: bool = False,
    token: bool | str | None = None,
) -> Plan:
    """Plan an upload to an existing repository, without writing anything.

    Args:
        api: client of the Hub.
        folder: source folder.
        repo_id: target repository.
        revision: branch; the default branch if not given.
        keep_card: keep a README.md that the repository has.
        token: token of the user.

    Raises:
        ValueError: if the folder cannot be sent; see :func:`files_to_send` and :func:`check_base`.
    """
    check_base(folder)
    sent, left_out = files_to_send(folder)
    commit = str(api.model_info(repo_id, revision=revision, token=token).sha)
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit, token=token)
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    record: dict[str, Any] = {}
    if RECORD in there:
        record = _read_record(Path(api.hf_hub_download(repo_id, RECORD, revision=commit, token=token)))
    if keep_card and "README.md" in there:
        sent = [name for name in sent if name != "README.md"]
    old = there.keys() - {*sent, *_NEVER_REMOVED}
    ours = {name for name in old if _is_recorded(there[name], record.get("files", {}).get(name))}
    kind = _kind(sent)
    loaded = rf"{_LOADED}|config\.json" if kind == "adapter" else _LOADED
    not_ours = {name for name in old - ours if re.fullmatch(loaded, name)}
    if record.get("kind", kind) != kind:  # replacing a model by an adapter, or an adapter by a model, may be a mistake
        not_ours |= ours
        ours = set()
    first = sorted(not_ours, key=lambda name: (re.fullmatch(loaded, name) is None, name))
    return Plan(repo_id, commit, folder, sent, left_out, sorted(ours), first)


def carry_out(
    api: HfApi,
    plan: Plan,
    *,
    commit_message: str,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: bool | str | None = None,
) -> CommitInfo:
    """Carry out a plan in one commit. The Hub refuses it if there are newer commits than the plan's."""
    files = {name: _digests(plan.folder / name) for name in plan.sent}
    record = {"format": 1, "kind": _kind(plan.sent), "files": files}
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    return api.create_commit(
        plan.repo_id,
        [
            *(CommitOperationAdd(name, str(plan.folder / name)) for name in plan.sent),
            CommitOperationAdd(RECORD, text.encode()),
            *(CommitOperationDelete(name) for name in (*plan.removed, *plan.not_ours)),
        ],
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        parent_commit=plan.commit,
        token=token,
    )


def _kind(names: list[str]) -> str:
    return "adapter" if "adapter_config.json" in names else "model"


def _read_record(path: Path) -> dict[str, Any]:
    """Read the record of a repository; an unreadable record is empty, so that every removal needs consent."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    known = isinstance(record, dict) and record.get("format") == 1 and isinstance(record.get("files"), dict)
    return record if known else {}


def _is_recorded(file: RepoFile, digests: Any) -> bool:
    """Return whether a file of a repository is the recorded one, not replaced since."""
    if not isinstance(digests, dict):
        return False
    return file.lfs.sha256 == digests.get("sha256") if file.lfs else file.blob_id == digests.get("git")


def _digests(path: Path) -> dict[str, str]:
    """Return the hashes by which the Hub identifies a file: SHA-256 in LFS, git's own hash otherwise."""
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            sha256.update(chunk)
            git.update(chunk)
    return {"sha256": sha256.hexdigest(), "git": git.hexdigest()}
