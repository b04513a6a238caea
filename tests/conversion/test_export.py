"""A saved or pushed model is complete: it loads, bit for bit, where ssm_zoo cannot be imported, and saves itself again.

The processes of the users are `read_checkpoint.py`; they run once for all tests of this file.
"""

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from tiny_checkpoints import save_tokenizer

from hub_stand_in import HubStandIn
from ssm_zoo.conversion.carried_files import downloads
from ssm_zoo.conversion.export import export, verify_export
from ssm_zoo.modeling.saved_folder import write_atomically, write_default_card

ROOT = Path(__file__).resolve().parents[2]
EXPORTED = ["mamba-options", "mamba2-groups", "all-four", "taipan-options", "mixer-options"]
SHARED = ["_triton.py", "causal_conv1d.py", "causal_conv1d_triton.py", "checks.py", "recurrence.py", "rms_norm.py"]
SHARED += ["rms_norm_triton.py", "ssd.py", "tracing.py", "triton_math.py", "zoo_model.py"]
SSD = ["ssd_decays_triton.py", "ssd_gradients_triton.py", "ssd_triton.py"]
MAMBA2 = [*SSD, "mamba2_step.py", "mamba2_step_triton.py"]
WINDOW = ["window_attention.py", "window_attention_triton.py"]
MIXING = ["position_mix.py", "position_mix_torch.py", "position_mix_triton.py"]
CODE = {
    "mamba-options": [*SHARED, "selective_scan.py", "selective_scan_triton.py"],
    "mamba2-groups": [*SHARED, *MAMBA2],
    "all-four": [*SHARED, *MAMBA2],  # full, sliding, Mamba-2 and discrete Mamba-2
    "taipan-options": [*SHARED, *MAMBA2, *WINDOW],
    "mixer-options": [*SHARED, *SSD, *MIXING],
}
ENTRY = {"mamba-options": "mamba", "mamba2-groups": "mamba2", "all-four": "hybrid", "taipan-options": "taipan"}
ENTRY["mixer-options"] = "masked_mixer"
CODE = {
    name: sorted([*files, f"configuration_{ENTRY[name]}.py", f"modeling_{ENTRY[name]}.py"])
    for name, files in CODE.items()
}
DATA = ["config.json", "generation_config.json", "model.safetensors", "README.md"]
AUTO_MAP = {
    "mamba-options": {
        "AutoConfig": "configuration_mamba.ZooMambaConfig",
        "AutoModel": "modeling_mamba.ZooMambaModel",
        "AutoModelForCausalLM": "modeling_mamba.ZooMambaForCausalLM",
        "AutoModelForMaskedLM": "modeling_mamba.ZooMambaForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_mamba.ZooMambaForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_mamba.ZooMambaForTokenClassification",
    },
    "mamba2-groups": {
        "AutoConfig": "configuration_mamba2.ZooMamba2Config",
        "AutoModel": "modeling_mamba2.ZooMamba2Model",
        "AutoModelForCausalLM": "modeling_mamba2.ZooMamba2ForCausalLM",
        "AutoModelForMaskedLM": "modeling_mamba2.ZooMamba2ForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_mamba2.ZooMamba2ForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_mamba2.ZooMamba2ForTokenClassification",
    },
    "all-four": {
        "AutoConfig": "configuration_hybrid.ZooHybridConfig",
        "AutoModel": "modeling_hybrid.ZooHybridModel",
        "AutoModelForCausalLM": "modeling_hybrid.ZooHybridForCausalLM",
        "AutoModelForMaskedLM": "modeling_hybrid.ZooHybridForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_hybrid.ZooHybridForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_hybrid.ZooHybridForTokenClassification",
    },
    "taipan-options": {
        "AutoConfig": "configuration_taipan.TaipanConfig",
        "AutoModel": "modeling_taipan.TaipanModel",
        "AutoModelForCausalLM": "modeling_taipan.TaipanForCausalLM",
        "AutoModelForSequenceClassification": "modeling_taipan.TaipanForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_taipan.TaipanForTokenClassification",
    },
    "mixer-options": {
        "AutoConfig": "configuration_masked_mixer.MaskedMixerConfig",
        "AutoModel": "modeling_masked_mixer.MaskedMixerModel",
        "AutoModelForCausalLM": "modeling_masked_mixer.MaskedMixerForCausalLM",
        "AutoModelForMaskedLM": "modeling_masked_mixer.MaskedMixerForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_masked_mixer.MaskedMixerForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_masked_mixer.MaskedMixerForTokenClassification",
    },
}
# What a user need not have. Without triton the torch paths are all there is.
NOT_NEEDED = ["ssm_zoo", "mamba_ssm", "causal_conv1d", "fla", "einops", "peft", "accelerate"]


@dataclass
class Run:
    """What one process found: a report and tensors for every job."""

    report: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]


def execute(folder: Path, *command: str, **variables: str) -> str:
    """Output of a Python process whose caches are in `folder`."""
    home = {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment | home | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def read(folder: Path, sources: list[tuple[str, str | None]], blocked: list[str], **variables: str) -> Run:
    folder.mkdir()
    jobs = [
        {"source": source, "revision": revision, "save": str(folder / f"saved-{index}")}
        for index, (source, revision) in enumerate(sources)
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    report = folder / "report.json"
    script = str(Path(__file__).with_name("read_checkpoint.py"))
    execute(folder, "-I", script, str(folder / "jobs.json"), str(report), *blocked, **variables)
    return Run(json.loads(report.read_text()), load_file(f"{report}.safetensors"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Saved models, one for every entry of EXPORTED."""
    folder = tmp_path_factory.mktemp("exported")
    for name in EXPORTED:
        make_model(name).save_pretrained(folder / name)
    return [folder / name for name in EXPORTED]


@pytest.fixture(scope="module")
def in_package(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folders read with ssm_zoo's own classes."""
    return read(tmp_path_factory.mktemp("users") / "package", [(str(folder), None) for folder in folders], [])


PUSH = """
import json, sys
from transformers import AutoModelForCausalLM
import ssm_zoo.modeling

results = {}
for name, folder in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder)
    results[name] = model.push_to_hub(f"tester/{name}", commit_message="first", tags=["tiny"])
    model.backbone.norm_f.weight.data.mul_(2)
    model.push_to_hub(f"tester/{name}", revision="doubled", private=False)
    model.push_to_hub(f"tester/{name}", commit_message="second")
    model.push_to_hub("with-card")
    model.save_pretrained(f"saved-{name}", push_to_hub=True, commit_message="saved", private=True)
    model.save_pretrained("elsewhere", push_to_hub=True, repo_id=f"tester/{name}-pr", create_pr=True)
print(json.dumps(results))
"""


@dataclass
class Pushed:
    hub: HubStandIn
    api: HfApi
    commits: dict[str, str]


@pytest.fixture(scope="module")
def pushed(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Hub with the models, pushed by another process in all the ways that there are."""
    home = tmp_path_factory.mktemp("pusher")
    with HubStandIn() as hub:
        api = HfApi(endpoint=hub.endpoint, token="hub-stand-in")
        api.create_repo("tester/with-card")
        card = b"---\nlicense: mit\n---\nwritten by hand\n"
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="tester/with-card")
        sources = json.dumps({name: str(folder) for name, folder in zip(EXPORTED, folders, strict=True)})
        output = execute(home, "-c", PUSH, sources, **hub.environment(home / "home"))
        commits = json.loads(output.splitlines()[-1])
        yield Pushed(hub, api, {name: url.rpartition("/")[2] for name, url in commits.items()})


@pytest.fixture(scope="module")
def without_package(pushed: Pushed, folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The folders, and then the repositories at their first commit, read where ssm_zoo cannot be imported."""
    folder = tmp_path_factory.mktemp("users") / "bare"
    sources = [(str(path), None) for path in folders]
    sources += [(f"tester/{name}", pushed.commits[name]) for name in EXPORTED]
    return read(folder, sources, NOT_NEEDED, **pushed.hub.environment(folder / "home"))


@pytest.fixture(scope="module")
def without_triton(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("users") / "no-triton"
    return read(folder, [(str(path), None) for path in folders], [*NOT_NEEDED, "triton"])


# The folder


@pytest.mark.parametrize("index", range(len(EXPORTED)), ids=EXPORTED)
def test_the_folder_holds_what_is_needed_and_nothing_else(folders: list[Path], index: int) -> None:
    folder, name = folders[index], EXPORTED[index]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*DATA, "LICENSE", *CODE[name]])
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP[name]
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert {"ssm-zoo", "custom_code", json.loads((folder / "config.json").read_text())["model_type"]} <= set(
        card.data.tags
    )
    assert f"# {name}" in card.text and "trust_remote_code=True" in card.text


def without_docstrings(node: ast.AST) -> str:
    """A statement, written out without docstrings and marked methods, and with the imports inside of it flattened."""
    node = ast.parse(ast.unparse(node)).body[0]
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if isinstance(body, list):
            texts = [each for each in body if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)]
            kept = [each for each in body if each not in texts and "@distillation" not in ast.unparse(each)]
            inner.body = kept  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(inner, ast.ImportFrom) and inner.level == 2:
            inner.level, inner.module = 1, (inner.module or "").removeprefix("kernels.")
    return ast.unparse(node)


@pytest.mark.parametrize("index", range(len(EXPORTED)), ids=EXPORTED)
def test_every_exported_statement_is_the_packages(folders: list[Path], index: int) -> None:
    originals = {
        without_docstrings(node)
        for folder in ("modeling", "kernels")
        for path in (ROOT / folder).glob("*.py")
        for node in ast.parse(path.read_text()).body
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)
    }
    for name in CODE[EXPORTED[index]]:
        for node in ast.parse((folders[index] / name).read_text()).body:
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("ssm_zoo") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1 and not (node.module or "").startswith("ssm_zoo")
                assert node.level == 0 or f"{node.module}.py" in CODE[EXPORTED[index]]
            elif not (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TOKEN_MIXERS"):
                assert isinstance(node, ast.Expr) or without_docstrings(node) in originals, ast.unparse(node)[:200]


@pytest.mark.parametrize(
    ("name", "files", "lines"),
    [
        ("mamba2", 18, 5500),
        ("discrete", 18, 5650),
        ("full-discrete", 18, 5950),
        ("sliding-discrete", 18, 5950),
        ("half-blocks", 18, 6400),
        ("exact-heads", 15, 4900),
    ],
)
def test_a_checkpoint_carries_little_code(tmp_path: Path, name: str, files: int, lines: int) -> None:
    make_model(name).save_pretrained(tmp_path)
    code = list(tmp_path.glob("*.py"))
    assert len(code) <= files
    assert sum(len(path.read_text().splitlines()) for path in code) <= lines


@pytest.mark.parametrize(
    "name", ["discrete", "mamba2-full", "jamba", "exact-heads", "selective-mamba2", "hybrid-mixers"]
)
def test_a_hybrid_without_the_other_mixers_code_computes_the_same(tmp_path: Path, name: str) -> None:
    make_model(name).save_pretrained(tmp_path)
    assert verify_export(tmp_path)["bit_equal"]


def test_saving_keeps_a_card_and_a_licence_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "LICENSE").write_text("another")
    make_model("mamba2").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "LICENSE").read_text() == "another"


def test_the_backbone_is_exported_too(tmp_path: Path) -> None:
    make_model("mamba2-groups").backbone.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["ZooMamba2Model"] and config["auto_map"] == AUTO_MAP["mamba2-groups"]
    assert set(CODE["mamba2-groups"]) < {path.name for path in tmp_path.iterdir()}


def test_another_rank_writes_nothing_but_its_weights(tmp_path: Path) -> None:
    make_model("mamba2").save_pretrained(tmp_path, is_main_process=False)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors"}


# Loading without the package


@pytest.mark.parametrize("user", ["in_package", "without_package", "without_triton"])
def test_the_right_code_was_run(user: str, request: pytest.FixtureRequest) -> None:
    package = "ssm_zoo.modeling." if user == "in_package" else "transformers_modules."
    for job in request.getfixturevalue(user).report:
        assert all(module.startswith(package) for module in job["modules"]), job["modules"]


@pytest.mark.parametrize("index", range(len(EXPORTED)), ids=EXPORTED)
@pytest.mark.parametrize("user", ["without_package", "without_triton"])
def test_bit_equal_to_the_package(in_package: Run, user: str, index: int, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(user)
    for name in ("logits", "hidden", "tokens", "beams"):
        expected = in_package.tensors[f"{index}/{name}"]
        assert torch.equal(run.tensors[f"{index}/{name}"], expected), name
        assert expected.float().std() > 0.1
    assert run.report[index]["config"].items() >= json_of_config(index).items()


def json_of_config(index: int) -> dict[str, Any]:
    return {
        "mamba-options": {"model_type": "zoo_mamba", "time_step_rank": 7, "mixer_rms_eps": 1e-3},
        "mamba2-groups": {"model_type": "zoo_mamba2", "n_groups": 4, "conv_kernel": 3},
        "all-four": {"model_type": "zoo_hybrid", "head_dim": 6, "full_attention": {"conv_kernel": 0}},
        "taipan-options": {"model_type": "taipan", "sal_layer_idx": [0, 2], "sal_fusion": "residual"},
        "mixer-options": {"model_type": "masked_mixer", "kernel_size": 4, "mlp_first": True, "hidden_act": "gelu"},
    }[EXPORTED[index]]


@pytest.mark.parametrize("user", ["in_package", "without_package", "without_triton"])
def test_saved_again_and_loaded_again(user: str, request: pytest.FixtureRequest) -> None:
    """By a process that knows the code from the checkpoint alone; and not by a reference to where it came from."""
    for index, job in enumerate(request.getfixturevalue(user).report):
        name = EXPORTED[index % len(EXPORTED)]
        assert job["same_again"]
        assert job["saved_auto_map"] == AUTO_MAP[name]
        # The licence does not travel with code that transformers loaded.
        licence = ["LICENSE"] if user == "in_package" else []
        assert job["saved_files"] == sorted([*DATA, *licence, *CODE[name]])


# The Hub


@pytest.mark.parametrize("index", range(len(EXPORTED)), ids=EXPORTED)
def test_pushed_and_loaded_at_a_revision(in_package: Run, without_package: Run, index: int) -> None:
    """The first commit, although the weights were changed since."""
    from_hub = index + len(EXPORTED)
    for name in ("logits", "hidden", "tokens", "beams"):
        expected = in_package.tensors[f"{index}/{name}"]
        assert torch.equal(without_package.tensors[f"{from_hub}/{name}"], expected), name


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_on_the_hub(pushed: Pushed, name: str) -> None:
    api, repository = pushed.api, f"tester/{name}"
    info = api.model_info(repository)
    files = {file.rfilename for file in info.siblings or []} - {".gitattributes", ".ssm-zoo.json"}
    assert files == {*DATA, "LICENSE", *CODE[name]}
    assert {"tiny", "ssm-zoo", "custom_code"} <= set(info.tags or [])
    titles = [commit.title for commit in api.list_repo_commits(repository)]
    assert titles[0] == "second" and "first" in titles
    assert any(commit.commit_id == pushed.commits[name] for commit in api.list_repo_commits(repository))
    assert "doubled" in [branch.name for branch in api.list_repo_refs(repository).branches]
    assert api.file_exists(repository, "model.safetensors", revision="doubled")


@pytest.mark.parametrize("name", EXPORTED)
def test_save_pretrained_pushes_too(pushed: Pushed, name: str) -> None:
    api, repository = pushed.api, f"tester/saved-{name}"
    info = api.model_info(repository)
    assert info.private
    files = {file.rfilename for file in info.siblings or []} - {".gitattributes", ".ssm-zoo.json"}
    assert files == {*DATA, "LICENSE", *CODE[name]}
    assert api.list_repo_commits(repository)[0].title == "saved"
    assert api.file_exists(f"tester/{name}-pr", "config.json", revision="refs/pr/1")
    assert not api.file_exists(f"tester/{name}-pr", "config.json")


def test_a_card_that_the_repository_has_is_kept(pushed: Pushed, tmp_path: Path) -> None:
    path = pushed.api.hf_hub_download("tester/with-card", "README.md", local_dir=tmp_path)
    assert Path(path).read_text().endswith("written by hand\n")
    assert pushed.api.file_exists("tester/with-card", "model.safetensors")


def test_writing_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    write_atomically(target, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_the_default_card_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_default_card(Path("."), model_type="zoo_x", class_name="X", auto_class="AutoModel", parameters=12345)
    text = (tmp_path / "README.md").read_text()
    assert f"# {tmp_path.name}\n" in text and "12,345 parameters" in text and "`zoo_x`" in text
    assert "model = AutoModel.from_pretrained(" in text


def test_an_embedder_keeps_its_pooling_and_its_prompts(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from ssm_zoo.evaluation.embedder import load_embedder, make_embedder

    make_model("mamba2").save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    options: dict[str, Any] = {"pooling": "mean", "max_tokens": 9, "query_prompt": "q ", "document_prompt": "d "}
    make_embedder(str(tmp_path / "base"), device="cpu", **options).save(str(tmp_path / "embedder"))
    export(tmp_path / "embedder", tmp_path / "out")
    before, after = (load_embedder(str(tmp_path / name), device="cpu") for name in ("embedder", "out"))
    assert after.prompts == {"query": "q ", "document": "d "} and after.max_seq_length == 9
    texts = ["the cat sat on the mat", "a ship"]
    assert (after.encode_query(texts) == before.encode_query(texts)).all()

    there = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    downloaded = set(filter_repo_objects(there, allow_patterns=downloads("config.json")))
    assert {name for name in there if not name.endswith(".py")} - downloaded == {"model.safetensors"}

    modules = json.loads((tmp_path / "embedder" / "modules.json").read_text())
    modules[1]["type"] = "pooling.Mine"
    (tmp_path / "embedder" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"source: modules\.json must name modules of .* alone, got 'pooling\.Mine'"):
        export(tmp_path / "embedder", tmp_path / "again")
    assert not (tmp_path / "again").exists()
