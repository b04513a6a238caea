"""The upload of a folder to a model repository: what of it is sent, and what of earlier uploads has to go.

Sent is what a list of names allows, without links and hidden files. A repository holds a record of what uploads of ours
wrote, by digest: what is left of it is replaced without a question. Anything else that loading the repository might
take instead of what is sent is removed on request only.
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
"""The file of a repository that says what uploads of ours wrote."""

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
"""Names of a tokenizer's files, as a regular expression. All of them are data."""

CARD = r"README\.md|plots/[\w-]+\.png"
"""Names of a card and its pictures, as a regular expression."""

_MODEL = "|".join(
    (
        r"(generation_)?config\.json",
        r"model(-\d+-of-\d+)?\.safetensors",
        r"model\.safetensors\.index\.json",
        r"adapter_config\.json",
        r"adapter_model\.safetensors",
        # of sentence-transformers
        r"modules\.json",
        r"(config_sentence_transformers|sentence_bert_config)\.json",
        r"\d+_\w+/(config\.json|model\.safetensors)",
    )
)
# What transformers or peft might load in place of what is sent: an old model.safetensors comes before new shards, an
# adapter's configuration before that of the model beside it.
_LOADED = r"[^/]*\.safetensors|[^/]*\.safetensors\.index\.json|adapter_config\.json|adapter_model\.bin"
_CODE = re.compile(r".*\.(py|pyc|pyd|so|dll|sh|pkl|pickle|pt|pth|bin|ckpt)", re.IGNORECASE | re.DOTALL)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Never removed: the Hub's own file, and a card that somebody may have gone on writing.
_STAYS = {".gitattributes", "README.md", RECORD}


@dataclass(frozen=True)
class Plan:
    """What an upload would do.

    Attributes:
        repo_id: where to.
        commit: of the repository that it starts from.
        folder: what is sent from.
        sent: paths in the folder, with slashes.
        left_out: what is in the folder and not sent; of a folder that is left out as a whole, its name and a slash.
        removed: what uploads of ours left in the repository.
        not_ours: what would have to be removed, too, and is not ours or is another kind of thing.
    """

    repo_id: str
    commit: str
    folder: Path
    sent: list[str]
    left_out: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    not_ours: list[str] = field(default_factory=list)


def is_named(name: str, *expressions: str) -> bool:
    """Whether a path in a folder, with slashes, is one of those that regular expressions name. Code never is."""
    return any(re.fullmatch(each, name) for each in expressions) and not _CODE.fullmatch(name)


def files_to_send(folder: Path) -> tuple[list[str], list[str]]:
    """The paths in a folder that are sent, and those that are not.

    Sent are weights, configurations, tokenizer, card, plots, licences, and the code that the configurations name.

    Raises:
        ValueError: if one of them is a link, or the code is not whole.
    """
    code = set(code_of(folder))
    sent, left_out = [], []
    for place, folders, files in os.walk(folder):
        here = Path(place).relative_to(folder)
        for name in sorted(folders):
            path = (here / name).as_posix()
            holds = any(is_named(f"{path}/{each}", CARD, TOKENIZER, _MODEL) for each in os.listdir(folder / path))
            if holds and (folder / path).is_symlink():
                raise ValueError(f"{path} of {folder.name} is a link; put the folder itself in its place")
            if not holds:
                left_out.append(f"{path}/")
                folders.remove(name)
        for name in sorted(files):
            path = (here / name).as_posix()
            if path not in code and not is_named(path, LICENCES, TOKENIZER, CARD, _MODEL):
                left_out.append(path)
            elif (folder / path).is_symlink() or not (folder / path).is_file():
                raise ValueError(f"{path} of {folder.name} is a link or no file; put the file itself in its place")
            else:
                sent.append(path)
    return sorted(sent), sorted(left_out)


def code_of(folder: Path) -> list[str]:
    """The files of the code that the configurations of a folder name, with what they import from beside themselves.

    Raises:
        ValueError: if one is missing or cannot be read, or the code is another repository's.
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
            raise ValueError(f"{why}, but there is no {name} in {folder.name}; write the folder with export")
        try:
            tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{name} of {folder.name} is not Python code ({error})") from None
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                dots = "." * (node.level - 1)
                modules = [dots + node.module] if node.module else [dots + alias.name for alias in node.names]
                pending += [(each, f"{name}, line {node.lineno}, imports .{each}") for each in modules]
    return sorted(found)


def _named_modules(folder: Path) -> Iterator[tuple[str, str]]:
    """The modules that `auto_map`s name, each with who says so."""
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
                        f"{file} of {folder.name} takes its code from another repository ({reference}), which may "
                        "change or go; write the folder with export"
                    )
                yield str(reference).rpartition(".")[0], f"{file} names {reference}"


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
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
                f"{base!r}, which others cannot load; push the base first, then name it here"
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
    """Find out what an upload to a repository that exists would do; nothing is written.

    Args:
        api: client of the Hub.
        folder: to be sent.
        repo_id: where to.
        revision: branch; the default one if not given.
        keep_card: leave a README.md that the repository has.
        token: of the user.

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
    old = there.keys() - {*sent, *_STAYS}
    ours = {name for name in old if _is_recorded(there[name], record.get("files", {}).get(name))}
    kind = _kind(sent)
    loaded = rf"{_LOADED}|config\.json" if kind == "adapter" else _LOADED
    not_ours = {name for name in old - ours if re.fullmatch(loaded, name)}
    if record.get("kind", kind) != kind:  # an adapter over a model, or the other way round, may well be a mistake
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
    """Send what is planned, and remove all that it says, in one commit.

    The Hub refuses if somebody has committed since the plan was made.
    """
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
    """The record of a repository. One that cannot be read tells of nothing, so that everything has to be asked for."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    known = isinstance(record, dict) and record.get("format") == 1 and isinstance(record.get("files"), dict)
    return record if known else {}


def _is_recorded(file: RepoFile, digests: Any) -> bool:
    """Whether a file of a repository is what the record says: nobody has put another one in its place since."""
    if not isinstance(digests, dict):
        return False
    return file.lfs.sha256 == digests.get("sha256") if file.lfs else file.blob_id == digests.get("git")


def _digests(path: Path) -> dict[str, str]:
    """How the Hub knows a file: by its SHA-256 in LFS, by git's own hash otherwise."""
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            sha256.update(chunk)
            git.update(chunk)
    return {"sha256": sha256.hexdigest(), "git": git.hexdigest()}
