"""The Hub stand-in against the real client: what works there is what the rest of the tests may rely on."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

import hub_stand_in
from hub_stand_in import HubStandIn

TOKEN = "not-a-secret"
REPO = "tester/model"
# More than the server sends at a time, and different everywhere.
BIG = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(2**16 + 1))


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model folder with a nested file, an empty one and names that have to be quoted in an address."""
    folder = tmp_path / "folder"
    (folder / "sub folder").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "empty.txt").touch()
    (folder / "model.safetensors").write_bytes(BIG)
    (folder / "sub folder" / "ü#1%.txt").write_text("nested")
    return folder


UPLOADED = [".gitattributes", "config.json", "empty.txt", "model.safetensors", "sub folder/ü#1%.txt"]


def fetch(api: HfApi, cache: Path, filename: str, repo_id: str = REPO, **options: Any) -> bytes:
    return Path(api.hf_hub_download(repo_id, filename, cache_dir=cache, **options)).read_bytes()


def sent(hub: HubStandIn, method: str, part: str) -> int:
    """How many requests there were with a method and a part of the path."""
    return sum(request.method == method and part in request.path for request in hub.requests)


def test_whoami_names_the_user(api: HfApi) -> None:
    user = api.whoami()
    assert user["name"] == "tester"
    assert user["auth"]["accessToken"]["role"] == "write"


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_repository_is_created_read_and_deleted(api: HfApi, tmp_path: Path, repo_type: str) -> None:
    sdk = "gradio" if repo_type == "space" else None
    url = api.create_repo("thing", repo_type=repo_type, space_sdk=sdk)
    assert (url.repo_id, url.repo_type, url.endpoint) == ("tester/thing", repo_type, api.endpoint)
    assert api.create_repo("tester/thing", repo_type=repo_type, space_sdk=sdk, exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("tester/thing", repo_type=repo_type, space_sdk=sdk)

    commit = api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id="tester/thing", repo_type=repo_type)
    assert (commit.repo_url.repo_id, commit.repo_url.repo_type) == ("tester/thing", repo_type)
    info = api.repo_info("tester/thing", repo_type=repo_type)
    assert (info.id, info.author, info.sha, info.private) == ("tester/thing", "tester", commit.oid, False)
    assert fetch(api, tmp_path, "a.txt", "tester/thing", repo_type=repo_type) == b"x"
    other = "dataset" if repo_type == "model" else "model"
    assert not api.repo_exists("tester/thing", repo_type=other)

    api.delete_repo("tester/thing", repo_type=repo_type)
    assert not api.repo_exists("tester/thing", repo_type=repo_type)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("tester/thing", repo_type=repo_type)
    api.delete_repo("tester/thing", repo_type=repo_type, missing_ok=True)


@pytest.mark.parametrize(
    ("lfs", "xet_disabled"),
    [
        pytest.param(False, False, id="regular-default-client"),
        pytest.param(False, True, id="regular-without-xet"),
        pytest.param(True, True, id="lfs"),
    ],
)
def test_folder_is_uploaded_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lfs: bool, xet_disabled: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", xet_disabled)
    with HubStandIn(lfs=lfs) as hub:
        api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        api.create_repo(REPO)
        first = api.upload_folder(repo_id=REPO, folder_path=folder)
        assert api.list_repo_files(REPO) == UPLOADED
        for name in UPLOADED[1:]:
            assert fetch(api, tmp_path / "cache", name) == (folder / name).read_bytes()
        (weights,) = api.get_paths_info(REPO, ["model.safetensors"])
        assert isinstance(weights, RepoFile)
        assert weights.size == len(BIG)
        assert (weights.lfs.sha256 if weights.lfs else None) == (hashlib.sha256(BIG).hexdigest() if lfs else None)
        assert sent(hub, "PUT", "/lfs/") == int(lfs)

        again = api.upload_folder(repo_id=REPO, folder_path=folder)
        assert again.oid == first.oid == api.model_info(REPO).sha
        assert len(api.list_repo_commits(REPO)) == 2

        # What another repository has stored is not sent again, and a changed file alone makes a commit.
        api.create_repo("tester/copy")
        (folder / "config.json").write_text("{}")
        for repo_id in (REPO, "tester/copy"):
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        assert sent(hub, "PUT", "/lfs/") == int(lfs)
        assert fetch(api, tmp_path / "cache", "model.safetensors", "tester/copy") == BIG
        assert fetch(api, tmp_path / "cache", "config.json") == b"{}"
        assert fetch(api, tmp_path / "cache", "config.json", revision=first.oid) == b'{"model_type": "tiny"}'


def test_lfs_object_is_copied_without_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubStandIn(lfs=True) as hub:
        api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        api.create_repo(REPO)
        add = CommitOperationAdd("a.safetensors", BIG)
        api.create_commit(REPO, [add], commit_message="add")
        copy = CommitOperationCopy("a.safetensors", "b.safetensors")
        api.create_commit(REPO, [copy], commit_message="copy")
        assert fetch(api, tmp_path, "b.safetensors") == BIG
        assert sent(hub, "PUT", "/lfs/") == 1


def test_concurrent_commits_all_arrive(hub: HubStandIn, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    api.create_repo(REPO)
    names = [f"{number}.txt" for number in range(8)]
    store = hub.repositories.blobs.add

    def store_slowly(chunks: Iterable[bytes], expected: str) -> None:
        time.sleep(0.02)  # in the middle of a commit: the others are let in, if nothing holds them back
        store(chunks, expected)

    monkeypatch.setattr(hub.repositories.blobs, "add", store_slowly)

    def upload(name: str) -> str:
        return api.upload_file(path_or_fileobj=name.encode(), path_in_repo=name, repo_id=REPO).oid

    with ThreadPoolExecutor(len(names)) as pool:
        oids = set(pool.map(upload, names))
    assert api.list_repo_files(REPO) == [".gitattributes", *names]
    history = {commit.commit_id for commit in api.list_repo_commits(REPO)}
    assert oids < history
    assert len(history) == 1 + len(names)


def test_every_kind_of_revision_resolves(api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO)
    oids = []
    for text in ("one", "two"):
        made = api.upload_file(path_or_fileobj=text.encode(), path_in_repo="a.txt", repo_id=REPO, commit_message=text)
        oids.append(made.oid)
    api.create_tag(REPO, tag="v1.0", revision=oids[0])
    api.create_branch(REPO, branch="feature/x", revision=oids[0])
    branched = api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=REPO, revision="feature/x")
    proposed = api.upload_file(path_or_fileobj=b"pr", path_in_repo="a.txt", repo_id=REPO, create_pr=True)
    assert proposed.pr_revision == "refs/pr/1"

    expected = {
        "main": ("two", oids[1]),
        "refs/heads/main": ("two", oids[1]),
        oids[0]: ("one", oids[0]),
        oids[0][:7]: ("one", oids[0]),
        "v1.0": ("one", oids[0]),
        "feature/x": ("x", branched.oid),
        "refs/pr/1": ("pr", proposed.oid),
    }
    for revision, (text, oid) in expected.items():
        assert fetch(api, tmp_path, "a.txt", revision=revision) == text.encode()
        assert api.model_info(REPO, revision=revision).sha == oid
        assert api.list_repo_files(REPO, revision=revision) == [".gitattributes", "a.txt"]
    history = api.list_repo_commits(REPO)
    assert [commit.title for commit in history] == ["two", "one", "initial commit"]
    assert [commit.commit_id for commit in history][:2] == oids[::-1]
    assert history[0].created_at >= history[1].created_at

    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": oids[1], "feature/x": branched.oid}
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.tags] == [("v1.0", "refs/tags/v1.0", oids[0])]
    assert [ref.ref for ref in refs.pull_requests or []] == ["refs/pr/1"]

    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1.0")
    api.create_branch(REPO, branch="main", exist_ok=True)
    api.delete_tag(REPO, tag="v1.0")
    api.delete_branch(REPO, branch="feature/x")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_branch(REPO, branch="main")
    for revision in ("v1.0", "feature/x"):
        with pytest.raises(RevisionNotFoundError):
            api.model_info(REPO, revision=revision)
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"y", path_in_repo="a.txt", repo_id=REPO, revision=oids[0])


def test_listings_are_paged_and_nested(folder: Path) -> None:
    with HubStandIn(page_size=2) as hub:
        api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        api.create_repo(REPO)
        api.upload_folder(repo_id=REPO, folder_path=folder)
        assert api.list_repo_files(REPO) == UPLOADED
        assert sent(hub, "GET", "/tree/main") == 3
        top = [(type(entry).__name__, entry.path) for entry in api.list_repo_tree(REPO)]
        assert top == [("RepoFile", name) for name in UPLOADED[:4]] + [("RepoFolder", "sub folder")]
        assert [entry.path for entry in api.list_repo_tree(REPO, "sub folder")] == UPLOADED[4:]
        with pytest.raises(EntryNotFoundError):
            list(api.list_repo_tree(REPO, "additional_chat_templates"))

        for name in ("b", "c"):
            api.upload_file(path_or_fileobj=b"", path_in_repo=name, repo_id=REPO)
        assert len(api.list_repo_commits(REPO)) == 4
        siblings = api.model_info(REPO, files_metadata=True).siblings or []
        assert [(file.rfilename, file.size) for file in siblings if file.rfilename in ("b", "config.json")] == [
            ("b", 0),
            ("config.json", (folder / "config.json").stat().st_size),
        ]
        found = api.get_paths_info(REPO, ["config.json", "sub folder", "missing"])
        assert [entry.path for entry in found] == ["config.json", "sub folder"]


def test_models_are_found_by_author_name_and_tag(api: HfApi) -> None:
    tagged = b"---\ntags: [ssm]\nlicense: mit\nlibrary_name: transformers\n---\n"
    for repo_id in ("tester/mamba-tiny", "tester/llama", "other/mamba"):
        api.create_repo(repo_id)
    api.create_repo("tester/mamba-data", repo_type="dataset")
    api.upload_file(path_or_fileobj=tagged, path_in_repo="README.md", repo_id="other/mamba")

    def ids(**query: Any) -> list[str]:
        return [model.id for model in api.list_models(**query)]

    assert ids() == ["tester/mamba-tiny", "tester/llama", "other/mamba"]
    assert ids(author="tester") == ["tester/mamba-tiny", "tester/llama"]
    assert ids(search="MAMBA") == ["tester/mamba-tiny", "other/mamba"]
    assert ids(filter="ssm") == ids(filter="license:mit") == ids(filter="transformers") == ["other/mamba"]
    assert [dataset.id for dataset in api.list_datasets()] == ["tester/mamba-data"]


def test_what_does_not_exist_raises_its_own_error(api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO)
    assert not api.file_exists(REPO, "nope.txt")
    assert api.file_exists(REPO, ".gitattributes")
    assert not api.revision_exists(REPO, "nope")
    with pytest.raises(EntryNotFoundError):
        fetch(api, tmp_path, "nope.txt")
    for revision in ("nope", "0" * 40, "日本"):
        with pytest.raises(RevisionNotFoundError):
            fetch(api, tmp_path, ".gitattributes", revision=revision)
    for repo_id in ("tester/nope", "gpt2"):
        with pytest.raises(RepositoryNotFoundError):
            fetch(api, tmp_path, "config.json", repo_id)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(repo_id)
    # The client remembers that a commit lacks a file, as from_pretrained needs for its optional files.
    missing = try_to_load_from_cache(REPO, "nope.txt", cache_dir=tmp_path)
    assert missing is not None and not isinstance(missing, str)


def test_broken_download_is_resumed(
    hub: HubStandIn, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # what the client loses at most when the line breaks
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=BIG, path_in_repo="big.bin", repo_id=REPO)
    hub.cut_next_download = 1_500_000
    assert fetch(api, tmp_path, "big.bin") == BIG
    ranges = [request.range for request in hub.requests if request.method == "GET" and "/resolve/" in request.path]
    whole, rest = ranges
    assert whole == ""
    assert 1_500_000 - 2**16 < int(rest.removeprefix("bytes=").removesuffix("-")) <= 1_500_000


def test_snapshot_downloads_only_what_is_new(hub: HubStandIn, api: HfApi, folder: Path, tmp_path: Path) -> None:
    api.create_repo(REPO)
    (folder / "empty.txt").write_text("x")  # the client need not ask for an empty file
    first = api.upload_folder(repo_id=REPO, folder_path=folder)

    def snapshot(cache: str, revision: str | None = None) -> tuple[Path, int]:
        before = sent(hub, "GET", "/resolve/")
        path = Path(api.snapshot_download(REPO, revision=revision, cache_dir=tmp_path / cache, max_workers=4))
        return path, sent(hub, "GET", "/resolve/") - before

    cold, downloads = snapshot("cache")
    assert downloads == len(UPLOADED)
    assert cold.name == first.oid
    assert sorted(str(path.relative_to(cold)) for path in cold.rglob("*") if path.is_file()) == UPLOADED
    assert (cold / "model.safetensors").read_bytes() == BIG
    assert snapshot("cache") == (cold, 0)

    second = api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    warm, downloads = snapshot("cache")
    assert (warm.name, downloads, (warm / "config.json").read_text()) == (second.oid, 1, "{}")
    pinned, downloads = snapshot("other cache", first.oid)
    assert (pinned.name, downloads) == (first.oid, len(UPLOADED))
    assert (pinned / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_files_and_folders_are_deleted(api: HfApi, folder: Path, tmp_path: Path) -> None:
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    api.delete_file("config.json", REPO)
    api.delete_folder("sub folder", REPO)
    assert api.list_repo_files(REPO) == [".gitattributes", "empty.txt", "model.safetensors"]
    assert fetch(api, tmp_path, "config.json", revision=first.oid) == (folder / "config.json").read_bytes()
    with pytest.raises(EntryNotFoundError):
        api.delete_file("config.json", REPO)
    # upload_folder may replace what is there
    api.upload_folder(repo_id=REPO, folder_path=folder / "sub folder", delete_patterns="*.txt")
    assert api.list_repo_files(REPO) == [".gitattributes", "model.safetensors", "ü#1%.txt"]


def test_commit_on_an_outdated_parent_is_refused(api: HfApi) -> None:
    api.create_repo(REPO)
    parent = api.model_info(REPO).sha

    def upload(content: bytes) -> str:
        return api.upload_file(path_or_fileobj=content, path_in_repo="a", repo_id=REPO, parent_commit=parent).oid

    made = upload(b"1")
    with pytest.raises(HfHubHTTPError, match="412"):
        upload(b"2")
    assert api.model_info(REPO).sha == made


CARD = """
import pytest
from huggingface_hub import HfApi, ModelCard

api = HfApi()
api.create_repo("tester/model")
card = ModelCard("---\\nlicense: mit\\ntags: [ssm, tiny]\\nmodel_date: 2024-05-01\\n---\\n# Title\\n")
card.push_to_hub("tester/model")
assert ModelCard.load("tester/model").content == card.content
info = api.model_info("tester/model")
assert (info.card_data.license, info.card_data.tags) == ("mit", ["ssm", "tiny"])
assert info.tags == ["ssm", "tiny", "license:mit"]
for text in ("---\\n- a list\\n---\\n", "---\\na: [\\n---\\n", "---\\na: 1\\n"):
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="tester/model")
assert api.model_info("tester/model").sha == info.sha
with pytest.warns(UserWarning, match="empty or missing yaml"):
    api.upload_file(path_or_fileobj=b"# No metadata", path_in_repo="README.md", repo_id="tester/model")
assert api.model_info("tester/model").card_data is None
"""

ROUND_TRIP = """
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
ids = torch.arange(8)[None]
expected = [model(ids).logits]
model.push_to_hub("tester/llama")
first = HfApi().model_info("tester/llama").sha
with torch.no_grad():
    model.lm_head.weight += 1
expected.append(model(ids).logits)
model.push_to_hub("tester/llama")
assert not torch.equal(*expected)
for revision, logits in ((first, expected[0]), ("main", expected[1])):
    loaded = AutoModelForCausalLM.from_pretrained("tester/llama", revision=revision).eval()
    assert torch.equal(loaded(ids).logits, logits), revision
"""


@pytest.mark.parametrize(
    "script", [pytest.param(CARD, id="model-card"), pytest.param(ROUND_TRIP, id="transformers-round-trip")]
)
def test_process_finds_the_stand_in_by_its_environment(hub: HubStandIn, tmp_path: Path, script: str) -> None:
    environment = {**os.environ, **hub.environment(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["HF_HUB_DISABLE_XET"] = "0"  # regular uploads need no client without xet
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # A push asks for a repository that may exist (409), a load for files that may not (404), the card's script for
    # nonsense (400); nothing else went wrong.
    assert {request.status for request in hub.requests} <= {200, 206, 400, 404, 409}


def test_process_keeps_everything_in_its_folder(folder: Path, tmp_path: Path) -> None:
    ready, storage = tmp_path / "ready", tmp_path / "storage"
    command = [sys.executable, hub_stand_in.__file__, "--port", "0", "--ready-file", ready, "--storage", storage]
    made: list[str] = []
    for run in range(2):
        process = subprocess.Popen(command, cwd=tmp_path)
        try:
            deadline = time.monotonic() + 30
            while not ready.exists():
                assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
                time.sleep(0.02)
            api = HfApi(endpoint=ready.read_text(), token=TOKEN)
            if run == 0:
                api.create_repo(REPO)
                made.append(api.upload_folder(repo_id=REPO, folder_path=folder).oid)
                made.append(api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO).oid)
                api.create_tag(REPO, tag="v1", revision=made[0])
                api.create_repo("tester/gone")
                api.delete_repo("tester/gone")
            assert [commit.commit_id for commit in api.list_repo_commits(REPO)][:2] == made[::-1]
            cache = tmp_path / f"cache {run}"
            assert fetch(api, cache, "config.json") == b"{}"
            assert fetch(api, cache, "config.json", revision="v1") == (folder / "config.json").read_bytes()
            assert fetch(api, cache, "model.safetensors", revision=made[0]) == BIG
            assert [model.id for model in api.list_models()] == [REPO]
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(20)
        assert code == 0
        ready.unlink()
    assert not [path for path in storage.rglob("*") if "partial" in path.name]
