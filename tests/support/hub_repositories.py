"""What the Hub stand-in keeps: contents by hash, and repositories with their commits and references.

The model is git's, cut down to what the Hub's API shows: a commit is a snapshot of all files by path and the hash
of one parent; a reference (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`) names a commit. No commit ever goes
away: every revision that somebody pinned can be read until the repository is deleted.
"""

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import yaml  # a dependency of huggingface_hub: without it there is no client to serve

CHUNK = 2**20
FRONT_MATTER = re.compile(r"\A---[ \t\r]*\n(.*?)^---[ \t\r]*$", re.DOTALL | re.MULTILINE)


class RefusedError(Exception):
    """A request to be answered with an error status; `code` is the X-Error-Code that clients map to exceptions."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        # A header is one line of plain characters; a message may quote a path or a YAML error.
        line = " ".join(message.split()).encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": line, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class File:
    """One file of one commit: `oid` is git's SHA-1 (in LFS that of the pointer), `sha256` is the content's."""

    oid: str
    sha256: str
    size: int
    pointer_size: int | None = None  # set for LFS files only

    @classmethod
    def regular(cls, content: bytes) -> "File":
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return cls(oid, hashlib.sha256(content).hexdigest(), len(content))

    @classmethod
    def lfs(cls, digest: str, size: int) -> "File":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
        return cls(cls.regular(pointer).oid, digest, size, len(pointer))

    @property
    def in_lfs(self) -> bool:
        return self.pointer_size is not None

    @property
    def etag(self) -> str:
        """The hash by which clients know the content: sha256 for LFS files, git's SHA-1 for the others."""
        return self.sha256 if self.in_lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """All files by path, and the hash of the parent ("" for the first commit)."""

    oid: str
    parent: str
    title: str
    message: str
    date: str
    files: dict[str, File]

    def entries(self) -> dict[str, dict[str, Any]]:
        """All files and folders by path, as listings of the Hub describe them."""
        found: dict[str, dict[str, Any]] = {}
        for path, file in self.files.items():
            found[path] = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
            if file.in_lfs:
                found[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            for folder in map(str, PurePosixPath(path).parents[:-1]):
                found.setdefault(folder, {"type": "directory", "path": folder, "size": 0})
        for folder, entry in found.items():
            if entry["type"] == "directory":  # any hash will do that changes with what lies below
                below = sorted((path, file.oid) for path, file in self.files.items() if path.startswith(f"{folder}/"))
                entry["oid"] = hashlib.sha1(json.dumps(below).encode()).hexdigest()
        return dict(sorted(found.items()))


@dataclass
class Repository:
    """Commits by hash, and the hashes of references by their full names.

    `kind` is "models", "datasets" or "spaces"; `id` is "namespace/name"; `sdk` is a space's.
    """

    kind: str
    id: str
    private: bool
    created: str
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Repository":
        commits = {}
        for oid, commit in stored["commits"].items():
            files = {path: File(**file) for path, file in commit["files"].items()}
            commits[oid] = Commit(**{**commit, "files": files})
        return cls(**{**stored, "commits": commits})

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full reference, or 7 to 40 digits of a hash."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            found = [commit for oid, commit in self.commits.items() if oid.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, ref: str, parent: str, files: dict[str, File], title: str, message: str = "") -> Commit:
        """Add a commit and move `ref` to it."""
        date = now()
        oids = {path: file.oid for path, file in sorted(files.items())}
        oid = hashlib.sha1(json.dumps([self.id, parent, title, message, date, oids]).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, message, date, files)
        self.refs[ref] = oid
        return self.commits[oid]

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        yield commit
        while commit.parent:
            commit = self.commits[commit.parent]
            yield commit


class BlobStore:
    """Contents by SHA-256, in memory or as the files of a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, bytes] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, chunks: Iterable[bytes], expected: str) -> None:
        """Store a content; refused, with nothing kept, unless its hash is `expected`."""
        content = verified(chunks, expected)
        if self._folder is None:
            self._memory[expected] = b"".join(content)
        else:
            write_atomically(self._folder / expected, content)

    def open(self, digest: str) -> BinaryIO:
        return io.BytesIO(self._memory[digest]) if self._folder is None else (self._folder / digest).open("rb")

    def size(self, digest: str) -> int | None:
        """Size in bytes, or None if there is no such content."""
        if self._folder is None:
            return len(self._memory[digest]) if digest in self._memory else None
        path = self._folder / digest
        return path.stat().st_size if re.fullmatch("[0-9a-f]{64}", digest) and path.is_file() else None


class Repositories:
    """All repositories by kind and id, and the contents that they share.

    Args:
        storage: folder that keeps everything between runs; None keeps it in memory.
    """

    def __init__(self, storage: Path | None) -> None:
        self._folder = None if storage is None else storage / "repositories"
        self.blobs = BlobStore(None if storage is None else storage / "blobs")
        self.all: dict[tuple[str, str], Repository] = {}
        if self._folder is not None:
            self._folder.mkdir(exist_ok=True)
            stored = (json.loads(path.read_text(encoding="utf-8")) for path in self._folder.glob("*.json"))
            for repository in sorted(map(Repository.from_json, stored), key=lambda repository: repository.created):
                self.all[repository.kind, repository.id] = repository

    def save(self, repository: Repository) -> None:
        self.all[repository.kind, repository.id] = repository
        if self._folder is not None:
            write_atomically(self._record(self._folder, repository), [json.dumps(asdict(repository)).encode()])

    def remove(self, repository: Repository) -> None:
        """Forget a repository. Its contents stay, since others may share them."""
        del self.all[repository.kind, repository.id]
        if self._folder is not None:
            self._record(self._folder, repository).unlink()

    @staticmethod
    def _record(folder: Path, repository: Repository) -> Path:
        # Names hold no "--" (the routes see to that), so that two repositories never share a record.
        return folder / f"{repository.kind}--{repository.id.replace('/', '--')}.json"

    def card(self, commit: Commit) -> dict[str, Any]:
        """The metadata of the commit's README.md, {} without a readable one."""
        readme = commit.files.get("README.md")
        if readme is None:
            return {}
        with self.blobs.open(readme.sha256) as stream:
            return parse_card(stream.read().decode("utf-8", "replace"))[0]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_card(text: str) -> tuple[dict[str, Any], str]:
    """The metadata in the YAML head of a card ({} without), and what is wrong with it ("" if nothing is)."""
    head = FRONT_MATTER.match(text)
    if head is None:
        return {}, "the YAML head has no closing ---" if re.match(r"---[ \t\r]*\n", text) else ""
    try:
        metadata = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        return {}, f"the head is not YAML: {error}"
    if not isinstance(metadata, dict):
        return {}, "" if metadata is None else f"the head must be a YAML mapping, got {metadata!r:.80}"
    return metadata, ""


def verified(chunks: Iterable[bytes], expected: str) -> Iterator[bytes]:
    """Pass chunks on; at their end, refuse them unless their SHA-256 is `expected`."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != expected:
        raise RefusedError(400, f"the content has the sha256 {digest.hexdigest()}, announced was {expected}")


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that is seen whole or not at all."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.writelines(chunks)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
