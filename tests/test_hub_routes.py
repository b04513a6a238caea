"""What the Hub stand-in answers to requests that a client would not send, or should not have sent."""

import hashlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from hub_stand_in import HubStandIn

TOKEN = "not-a-secret"
REPO = "tester/model"


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


def post(address: str, body: bytes, token: str = TOKEN) -> Any:
    """The JSON answer to a request that the client would not send."""
    request = urllib.request.Request(address, body, {"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_lfs_upload_must_be_announced_and_be_what_was_announced(tmp_path: Path) -> None:
    with HubStandIn(tmp_path, lfs=True) as hub:
        api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        api.create_repo(REPO)
        stored = list((tmp_path / "blobs").iterdir())
        digest = hashlib.sha256(b"announced").hexdigest()
        batch = post(
            f"{hub.endpoint}/{REPO}.git/info/lfs/objects/batch",
            b'{"operation": "upload", "objects": [{"oid": "%s", "size": 9}]}' % digest.encode(),
        )
        signed = batch["objects"][0]["actions"]["upload"]["href"]
        for address, status in ((signed.split("?")[0], 403), (signed, 400)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(address, b"something else", method="PUT"))
            assert refused.value.code == status
        assert list((tmp_path / "blobs").iterdir()) == stored


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        pytest.param(None, 200, slice(None), id="whole"),
        pytest.param("bytes=0-", 206, slice(None), id="from-start"),
        pytest.param("bytes=3-", 206, slice(3, None), id="from-middle"),
        pytest.param("bytes=3-3", 206, slice(3, 4), id="one-byte"),
        pytest.param("bytes=3-1000", 206, slice(3, None), id="beyond-end"),
        pytest.param("bytes=-4", 206, slice(-4, None), id="last"),
        pytest.param("bytes=10-", 416, None, id="behind-end"),
        pytest.param("lines=1-2", 200, slice(None), id="unknown-unit"),
    ],
)
def test_ranges(hub: HubStandIn, api: HfApi, asked: str | None, status: int, part: slice | None) -> None:
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="a", repo_id=REPO)
    request = urllib.request.Request(f"{hub.endpoint}/{REPO}/resolve/main/a")
    if asked is not None:
        request.add_header("Range", asked)
    if part is None:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert (refused.value.code, refused.value.headers["Content-Range"]) == (status, "bytes */10")
        return
    with urllib.request.urlopen(request) as answer:
        assert (answer.status, answer.read()) == (status, b"0123456789"[part])
        start, stop, _ = part.indices(10)
        assert answer.headers["Content-Range"] == (f"bytes {start}-{stop - 1}/10" if status == 206 else None)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        pytest.param(["[]"], "expected a JSON object", id="not-an-object"),
        pytest.param(["{"], "must be JSON", id="not-json"),
        pytest.param([], "header", id="empty"),
        pytest.param([{"key": "file", "value": {"path": "a", "content": ""}}], "header", id="no-header"),
        pytest.param([{"key": "header", "value": {}}], "summary must be a str", id="no-summary"),
        pytest.param([None, {"key": "move", "value": {"path": "a"}}], "key must be", id="unknown-key"),
        pytest.param([None, {"key": "file", "value": {"path": "a", "content": "?"}}], "base64", id="not-base64"),
        pytest.param([None, {"key": "file", "value": {"path": "../a", "content": ""}}], "relative", id="upwards"),
        pytest.param([None, {"key": "file", "value": {"path": "/a", "content": ""}}], "relative", id="absolute"),
        pytest.param([None, {"key": "file", "value": {"path": "d", "content": ""}}], "a folder's", id="is-folder"),
        pytest.param([None, {"key": "file", "value": {"path": "d/a/b", "content": ""}}], "below a file", id="in-file"),
        pytest.param([None, {"key": "lfsFile", "value": {"path": "b", "oid": "0"}}], "not uploaded", id="no-object"),
    ],
)
def test_malformed_commit_changes_nothing(hub: HubStandIn, api: HfApi, lines: list[Any], message: str) -> None:
    api.create_repo(REPO)
    made = api.upload_file(path_or_fileobj=b"", path_in_repo="d/a", repo_id=REPO)
    header = {"key": "header", "value": {"summary": "s"}}
    good = {"key": "file", "value": {"path": "good", "content": ""}}
    lines = [header, good, *lines[1:]] if lines[:1] == [None] else lines
    body = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(f"{hub.endpoint}/api/models/{REPO}/commit/main", body.encode())
    assert refused.value.code == 400
    assert message in json.load(refused.value)["error"]
    assert api.model_info(REPO).sha == made.oid


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda api: api.create_repo("tester/new"), id="create"),
        pytest.param(lambda api: api.delete_repo(REPO), id="delete"),
        pytest.param(lambda api: api.upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id=REPO), id="upload"),
        pytest.param(lambda api: api.delete_file(".gitattributes", REPO), id="delete-file"),
        pytest.param(lambda api: api.create_branch(REPO, branch="b"), id="branch"),
        pytest.param(lambda api: api.create_tag(REPO, tag="t"), id="tag"),
        pytest.param(lambda api: api.delete_tag(REPO, tag="kept"), id="delete-tag"),
    ],
)
def test_writing_needs_a_token(hub: HubStandIn, api: HfApi, write: Callable[[HfApi], object]) -> None:
    api.create_repo(REPO)
    api.create_tag(REPO, tag="kept")
    anonymous = HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(HfHubHTTPError) as refused:
        write(anonymous)
    assert refused.value.response.status_code == 401
    # Nothing has happened, and reading needs none.
    assert [model.id for model in anonymous.list_models()] == [REPO]
    assert anonymous.list_repo_files(REPO) == [".gitattributes"]
    refs = anonymous.list_repo_refs(REPO)
    assert [ref.name for ref in refs.branches + refs.tags] == ["main", "kept"]
    write(api)


def test_token_must_not_be_empty(hub: HubStandIn) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        post(f"{hub.endpoint}/api/repos/create", b'{"name": "a"}', token=" ")


def test_private_repository_is_hidden_without_a_token(hub: HubStandIn, api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO, private=True)
    assert api.model_info(REPO).private
    anonymous = HfApi(endpoint=hub.endpoint, token=False)
    assert not anonymous.repo_exists(REPO)
    assert list(anonymous.list_models()) == []
    with pytest.raises(RepositoryNotFoundError):
        anonymous.hf_hub_download(REPO, ".gitattributes", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"name": "../x"}, id="path"),
        pytest.param({"name": "a--b"}, id="double-dash"),
        pytest.param({"name": "a", "organization": "b/c"}, id="slash"),
        pytest.param({"name": 1}, id="number"),
        pytest.param({"name": "a", "type": "kernel"}, id="type"),
        pytest.param({"name": "a", "type": ["model"]}, id="list-of-types"),
    ],
)
def test_bad_repository_names_are_refused(hub: HubStandIn, api: HfApi, body: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(f"{hub.endpoint}/api/repos/create", json.dumps(body).encode())
    assert list(api.list_models()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"port": 65536}, "port must be in 0..65535, got 65536", id="port"),
        pytest.param({"page_size": 0}, "page_size must be at least 1, got 0", id="page-size"),
        pytest.param({"storage": __file__}, "storage must be a folder, got the file", id="storage"),
    ],
)
def test_bad_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HubStandIn(**options)


def test_stopped_server_answers_no_more() -> None:
    with HubStandIn() as hub:
        kept_open = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=5)
        kept_open.request("GET", "/api/models")
        assert json.load(kept_open.getresponse()) == []
    with pytest.raises(ConnectionError):
        kept_open.request("GET", "/api/models")
        kept_open.getresponse()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(hub.endpoint, timeout=5)
    assert len(hub.requests) == 1
    kept_open.close()
