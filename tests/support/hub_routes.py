"""What the Hub stand-in answers: a function for each address of the Hub's HTTP API, and the table of addresses."""

import base64
import hmac
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode

from hub_repositories import Commit, File, RefusedError, Repositories, Repository, now, parse_card

KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}
REPO_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
# What the Hub sends to LFS: big files, and the suffixes in its .gitattributes, here those of models and data sets.
LFS_SUFFIXES = (
    ".arrow",
    ".bin",
    ".gguf",
    ".gz",
    ".npy",
    ".npz",
    ".onnx",
    ".parquet",
    ".pt",
    ".safetensors",
    ".zip",
)
LFS_THRESHOLD = 10 * 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How the stand-in was set up; see `HubStandIn`. `secret` signs the addresses of LFS uploads."""

    endpoint: str
    user: str
    lfs: bool
    page_size: int
    secret: bytes


@dataclass
class Reply:
    """A status with a JSON payload, or with `length` bytes from `start` on of the content `digest`."""

    payload: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    digest: str = ""
    start: int = 0
    length: int = 0


@dataclass
class Call:
    """One request and what is needed to answer it. `put_lfs` reads `stream`, all others `content`."""

    repositories: Repositories
    settings: Settings
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]  # by lower-case name
    stream: Iterator[bytes]
    content: bytes = b""

    @property
    def has_token(self) -> bool:
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return scheme == "Bearer" and bool(token.strip())

    def first(self, name: str, default: str = "") -> str:
        """The value of a query field."""
        return self.query.get(name, [default])[0]

    def repository(self, kind: str, repo_id: str) -> Repository:
        found = self.repositories.all.get((kind or "models", repo_id))
        if found is None or (found.private and not self.has_token):
            raise RefusedError(404 if found is None else 401, "Repository not found", "RepoNotFound")
        return found

    def url(self, repository: Repository) -> str:
        prefix = "" if repository.kind == "models" else f"{repository.kind}/"
        return f"{self.settings.endpoint}/{prefix}{repository.id}"

    def signature(self, digest: str) -> str:
        """What the address of an LFS upload carries: as on the Hub, clients send no token with the content."""
        return hmac.new(self.settings.secret, digest.encode(), "sha256").hexdigest()

    def page(self, entries: list[Any]) -> Reply:
        """The page of a listing that the query asks for, with the address of the next one."""
        cursor, limit = self.first("cursor", "0"), self.first("limit", "1000")
        if not cursor.isdecimal() or not limit.isdecimal():
            raise RefusedError(400, f"cursor and limit must be whole numbers, got {cursor!r:.40}, {limit!r:.40}")
        start = int(cursor)
        end = start + min(int(limit), self.settings.page_size)
        if end >= len(entries):
            return Reply(entries[start:])
        query = urlencode({**self.query, "cursor": end}, doseq=True)
        link = f'<{self.settings.endpoint}{self.path}?{query}>; rel="next"'
        return Reply(entries[start:end], headers={"Link": link})


def parse_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RefusedError(400, f"the body must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise RefusedError(400, f"expected a JSON object, got {value!r:.80}")
    return value


def take(payload: Any, name: str, kind: type[T]) -> T:
    """The field `name`, refused unless it is a `kind`."""
    value = payload.get(name) if isinstance(payload, dict) else None
    if not isinstance(value, kind):
        raise RefusedError(400, f"{name} must be a {kind.__name__}, got {value!r:.80}")
    return value


def whoami(call: Call) -> Reply:
    token = {"displayName": "hub-stand-in", "role": "write"}
    auth = {"type": "access_token", "accessToken": token}
    return Reply({"type": "user", "name": call.settings.user, "orgs": [], "auth": auth})


def named_repository(call: Call) -> tuple[dict[str, Any], str, str]:
    """The body of a create or delete request, with the kind and the id of the repository."""
    body = parse_object(call.content)
    kind = body.get("type") or "model"
    if not isinstance(kind, str) or kind not in KINDS:
        raise RefusedError(400, f"type must be one of {', '.join(KINDS)}, got {kind!r:.80}")
    names = (body.get("organization") or call.settings.user, take(body, "name", str))
    for name in names:
        if not isinstance(name, str) or not REPO_NAME.fullmatch(name):
            raise RefusedError(400, f"name must match {REPO_NAME.pattern}, got {name!r:.80}")
    return body, KINDS[kind], "/".join(names)


def create_repository(call: Call) -> Reply:
    body, kind, repo_id = named_repository(call)
    existing = call.repositories.all.get((kind, repo_id))
    if existing is not None:
        return Reply({"error": "You already created this repository", "url": call.url(existing)}, 409)
    private = body.get("visibility") == "private" or body.get("private") is True
    repository = Repository(kind, repo_id, private, now(), body.get("sdk"))
    # The Hub begins every repository with this file.
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
    file = File.regular(attributes)
    call.repositories.blobs.add([attributes], file.sha256)
    repository.commit("refs/heads/main", "", {".gitattributes": file}, "initial commit")
    call.repositories.save(repository)
    return Reply({"url": call.url(repository)})


def delete_repository(call: Call) -> Reply:
    _, kind, repo_id = named_repository(call)
    call.repositories.remove(call.repository(kind, repo_id))
    return Reply({})


def validate_card(call: Call) -> Reply:
    metadata, error = parse_card(take(parse_object(call.content), "content", str))
    if error:
        return Reply({"errors": [{"message": error}], "warnings": []}, 400)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return Reply({"errors": [], "warnings": warnings})


def describe(call: Call, repository: Repository, commit: Commit) -> dict[str, Any]:
    """What is known of a repository besides its files."""
    card = call.repositories.card(commit)
    tags = [*card["tags"]] if isinstance(card.get("tags"), list) else []
    tags += [card[name] for name in ("library_name", "pipeline_tag") if name in card]
    tags += [f"license:{card['license']}"] if "license" in card else []
    return {
        "id": repository.id,
        "author": repository.id.split("/")[0],
        "sha": commit.oid,
        "createdAt": repository.created,
        "lastModified": commit.date,
        "private": repository.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": list(dict.fromkeys(map(str, tags))),
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card or None,
        "sdk": repository.sdk,
    }


def list_repositories(call: Call, kind: str) -> Reply:
    author, search = call.first("author"), call.first("search")
    found = []
    for repository in call.repositories.all.values():
        if repository.kind != kind or (repository.private and not call.has_token):
            continue
        entry = describe(call, repository, repository.resolve("main"))
        named = author in ("", entry["author"]) and search.lower() in repository.id.lower()
        if named and set(call.query.get("filter", [])) <= set(entry["tags"]):
            found.append(entry)
    return call.page(found)


def repository_info(call: Call, kind: str, repo_id: str, revision: str = "main") -> Reply:
    repository = call.repository(kind, repo_id)
    commit = repository.resolve(revision)
    siblings: list[dict[str, Any]] = []
    for path, file in sorted(commit.files.items()):
        siblings.append({"rfilename": path})
        if call.first("blobs"):
            siblings[-1] |= {"size": file.size, "blobId": file.oid}
            if file.in_lfs:
                siblings[-1]["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return Reply({**describe(call, repository, commit), "siblings": siblings})


def tree(call: Call, kind: str, repo_id: str, revision: str, path: str = "") -> Reply:
    found = call.repository(kind, repo_id).resolve(revision).entries()
    if path and found.get(path, {}).get("type") != "directory":
        raise RefusedError(404, f"{path} does not exist on {revision}", "EntryNotFound")
    listed = [entry for name, entry in found.items() if not path or name.startswith(f"{path}/")]
    if call.first("recursive").lower() not in ("true", "1"):
        listed = [entry for entry in listed if str(PurePosixPath(entry["path"]).parent) == (path or ".")]
    return call.page(listed)


def paths_info(call: Call, kind: str, repo_id: str, revision: str) -> Reply:
    found = call.repository(kind, repo_id).resolve(revision).entries()
    if "json" in call.headers.get("content-type", ""):
        paths = take(parse_object(call.content), "paths", list)
    else:
        paths = parse_qs(call.content.decode()).get("paths", [])
    return Reply([found[path] for path in map(str, paths) if path in found])


def references(call: Call, kind: str, repo_id: str) -> Reply:
    groups = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
    listed: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for ref, oid in call.repository(kind, repo_id).refs.items():
        _, group, name = ref.split("/", 2)
        listed[groups[group]].append({"name": name, "ref": ref, "targetCommit": oid})
    return Reply(listed)


def commits(call: Call, kind: str, repo_id: str, revision: str) -> Reply:
    repository = call.repository(kind, repo_id)
    listed = []
    for commit in repository.history(repository.resolve(revision)):
        entry = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
        listed.append({**entry, "authors": [{"user": call.settings.user}]})
    return call.page(listed)


def create_reference(call: Call, kind: str, repo_id: str, group: str, name: str) -> Reply:
    """A branch's address ends in its name, a tag's in the revision to be tagged; the other one is in the body."""
    repository, body = call.repository(kind, repo_id), parse_object(call.content or b"{}")
    if group == "branch":
        ref, revision = f"refs/heads/{name}", str(body.get("startingPoint") or "main")
    else:
        ref, revision = f"refs/tags/{take(body, 'tag', str)}", name
    if ref in repository.refs:
        raise RefusedError(409, f"{ref} already exists")
    repository.refs[ref] = repository.resolve(revision).oid
    call.repositories.save(repository)
    return Reply({})


def delete_reference(call: Call, kind: str, repo_id: str, group: str, name: str) -> Reply:
    repository = call.repository(kind, repo_id)
    ref = f"refs/{'heads' if group == 'branch' else 'tags'}/{name}"
    if ref == "refs/heads/main":
        raise RefusedError(403, "the main branch cannot be deleted")
    if ref not in repository.refs:
        raise RefusedError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    del repository.refs[ref]
    call.repositories.save(repository)
    return Reply({})


def preupload(call: Call, kind: str, repo_id: str, revision: str) -> Reply:
    known = call.repository(kind, repo_id).resolve(revision).files
    answers = []
    for file in take(parse_object(call.content), "files", list):
        path, size = take(file, "path", str), take(file, "size", int)
        lfs = call.settings.lfs and (path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD)
        # The client leaves a file out of its commit if this hash is the one it computes for that mode.
        oid = known[path].etag if path in known else None
        mode = "lfs" if lfs else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Reply({"files": answers})


def lfs_batch(call: Call, kind: str, repo_id: str) -> Reply:
    call.repository(kind, repo_id)
    body = parse_object(call.content)
    if body.get("operation") != "upload":
        raise RefusedError(400, f"operation must be upload, got {body.get('operation')!r:.80}")
    answers = []
    for wanted in take(body, "objects", list):
        digest = take(wanted, "oid", str)
        answer: dict[str, Any] = {"oid": digest, "size": take(wanted, "size", int)}
        if call.repositories.blobs.size(digest) is None:
            address = f"{call.settings.endpoint}/lfs/{digest}"
            upload = {"href": f"{address}?signature={call.signature(digest)}"}
            answer["actions"] = {"upload": upload, "verify": {"href": f"{address}/verify"}}
        answers.append(answer)
    return Reply({"transfer": "basic", "objects": answers})


def put_lfs(call: Call, digest: str) -> Reply:
    if not hmac.compare_digest(call.first("signature"), call.signature(digest)):
        raise RefusedError(403, "this server did not give out the upload address")
    call.repositories.blobs.add(call.stream, digest)
    return Reply()


def verify_lfs(call: Call, digest: str) -> Reply:
    size = take(parse_object(call.content), "size", int)
    if call.repositories.blobs.size(digest) != size:
        raise RefusedError(404, f"no object {digest} of {size} bytes was uploaded")
    return Reply({})


def apply_operation(repositories: Repositories, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    """Change `files` by one line of a commit."""
    path = take(value, "path", str)
    if key in ("deletedFile", "deletedFolder"):
        prefix = f"{path.rstrip('/')}/"
        gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(prefix))]
        if not gone:
            raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
        return
    if any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise RefusedError(400, f"path must be relative and normalised, got {path!r:.80}")
    if not files.keys().isdisjoint(map(str, PurePosixPath(path).parents)):
        raise RefusedError(400, f"path must not lie below a file, got {path!r:.80}")
    if any(name.startswith(f"{path}/") for name in files):
        raise RefusedError(400, f"path must not be a folder's, got {path!r:.80}")
    if key == "file":
        try:
            content = base64.b64decode(take(value, "content", str), validate=True)
        except ValueError as error:
            raise RefusedError(400, f"content of {path!r:.80} must be base64: {error}") from error
        files[path] = File.regular(content)
        repositories.blobs.add([content], files[path].sha256)
    elif key == "lfsFile":
        digest = take(value, "oid", str)
        size = repositories.blobs.size(digest)
        if size is None:
            raise RefusedError(400, f"the LFS object {digest:.80} of {path!r:.80} was not uploaded")
        files[path] = File.lfs(digest, size)
    else:
        raise RefusedError(400, f"key must be file, lfsFile, deletedFile or deletedFolder, got {key!r:.80}")


def commit(call: Call, kind: str, repo_id: str, revision: str) -> Reply:
    repository = call.repository(kind, repo_id)
    head = repository.resolve(revision)
    ref = revision if revision in repository.refs else f"refs/heads/{revision}"
    if ref not in repository.refs:
        raise RefusedError(404, f"only a branch takes commits, got {revision}", "RevisionNotFound")
    lines = [parse_object(line) for line in call.content.splitlines() if line.strip()]
    operations = [(take(line, "key", str), take(line, "value", dict)) for line in lines]
    if not operations or operations[0][0] != "header":
        raise RefusedError(400, "the first line of a commit must be its header")
    header = operations[0][1]
    title = take(header, "summary", str)
    if not head.oid.startswith(str(header.get("parentCommit") or "")):
        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for key, value in operations[1:]:
        apply_operation(call.repositories, files, key, value)
    answer = {}
    if call.first("create_pr"):
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
        ref, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{call.url(repository)}/discussions/{number}"
    made = repository.commit(ref, head.oid, files, title, header.get("description") or "")
    call.repositories.save(repository)
    return Reply({"commitOid": made.oid, "commitUrl": f"{call.url(repository)}/commit/{made.oid}", **answer})


def resolve(call: Call, kind: str, repo_id: str, revision: str, path: str) -> Reply:
    """The content of a file; in LFS too, since clients would read the headers of a redirect's target instead."""
    found = call.repository(kind, repo_id).resolve(revision)
    headers = {"X-Repo-Commit": found.oid}
    file = found.files.get(path)
    if file is None:
        raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
    headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if file.in_lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    start, end, status = 0, file.size, 200
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    if asked is not None and (asked[1] or asked[2]):
        status = 206
        if asked[1]:
            start, end = int(asked[1]), min(int(asked[2] or file.size) + 1, file.size)
        else:  # that many from the end
            start = max(0, file.size - int(asked[2]))
        if start >= end:
            raise RefusedError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{file.size}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    headers["Content-Length"] = str(end - start)
    return Reply(None, status, headers, file.sha256, start, end - start)


_KIND = "/api/(?P<kind>models|datasets|spaces)"
_ID = "(?P<repo_id>[^/]+(?:/[^/]+)?)"
_REPO = f"{_KIND}/{_ID}"
_REVISION = "(?P<revision>[^/]+)"  # one segment: clients quote the slashes in a revision
_PAGE = f"/(?:(?P<kind>datasets|spaces)/)?{_ID}"  # outside of /api a model's address names no kind
_REFERENCE = f"{_REPO}/(?P<group>branch|tag)/(?P<name>[^/]+)"
_LFS = "/lfs/(?P<digest>[0-9a-f]{64})"

# Methods, path, whether a token is needed, what answers. The first match counts.
ROUTES: list[tuple[tuple[str, ...], str, bool, Callable[..., Reply]]] = [
    (("GET",), "/api/whoami-v2", True, whoami),
    (("POST",), "/api/repos/create", True, create_repository),
    (("DELETE",), "/api/repos/delete", True, delete_repository),
    (("POST",), "/api/validate-yaml", False, validate_card),
    (("GET",), _KIND, False, list_repositories),
    (("GET",), f"{_REPO}/tree/{_REVISION}(?:/(?P<path>.+))?", False, tree),
    (("GET",), f"{_REPO}/revision/{_REVISION}", False, repository_info),
    (("GET",), f"{_REPO}/commits/{_REVISION}", False, commits),
    (("GET",), f"{_REPO}/refs", False, references),
    (("GET",), _REPO, False, repository_info),
    (("POST",), f"{_REPO}/paths-info/{_REVISION}", False, paths_info),
    (("POST",), f"{_REPO}/preupload/{_REVISION}", True, preupload),
    (("POST",), f"{_REPO}/commit/{_REVISION}", True, commit),
    (("POST",), _REFERENCE, True, create_reference),
    (("DELETE",), _REFERENCE, True, delete_reference),
    (("POST",), rf"{_PAGE}\.git/info/lfs/objects/batch", True, lfs_batch),
    (("PUT",), _LFS, False, put_lfs),
    (("POST",), f"{_LFS}/verify", True, verify_lfs),
    (("GET", "HEAD"), f"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)", False, resolve),
]
