"""What a source brings is neither run nor copied: code, or a file behind a link. Hostile code would leave a marker."""

import json
import shutil
from pathlib import Path

import pytest
from families import make_model
from typer.testing import CliRunner, Result

from ssm_zoo.cli.main import app
from ssm_zoo.conversion.formats.state_spaces import byte_tokenizer
from ssm_zoo.conversion.remote_code import check_remote_code

HOSTILE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from .helper import MARKER

Path(MARKER).write_text("ran")


class Hostile(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    make_model("mamba2").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def hostile(model: Path, tmp_path: Path, marker: Path) -> Path:
    """A model whose tokenizer is code, which nothing else can take the place of."""
    folder = shutil.copytree(model, tmp_path / "hostile")
    name_tokenizer(folder, "tokenization_hostile.Hostile", "Hostile")
    (folder / "tokenization_hostile.py").write_text(HOSTILE)
    (folder / "helper.py").write_text(f"MARKER = {str(marker)!r}\n")
    (folder / "tokenizer_evil.py").write_text(HOSTILE)
    return folder


def name_tokenizer(folder: Path, reference: str, kind: str) -> None:
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"tokenizer_class": kind, "auto_map": {"AutoTokenizer": [None, reference]}}
    path.write_text(json.dumps(values))


def run(*arguments: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)


@pytest.mark.parametrize("command", ["export {} out", "convert {} out", "generate {} abc"])
def test_code_is_refused_without_the_flag_and_no_answer_runs_it(
    hostile: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*command.format(hostile).split(), answer="y\n" * 9)
    assert result.exit_code == 2, result.output
    assert "tokenizer_config.json names tokenization_hostile.Hostile" in result.stderr
    assert "--trust-remote-code" in result.stderr
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["export", "convert"])
def test_code_that_is_not_needed_is_neither_run_nor_copied_nor_named(
    hostile: Path, marker: Path, tmp_path: Path, command: str
) -> None:
    name_tokenizer(hostile, "tokenization_hostile.Hostile", "PreTrainedTokenizerFast")
    result = run(command, hostile, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert not marker.exists()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names
    assert not names & {"tokenization_hostile.py", "tokenizer_evil.py", "helper.py"}
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_trusted_code_goes_along_with_what_it_imports_and_nothing_else(
    hostile: Path, marker: Path, tmp_path: Path
) -> None:
    result = run("export", hostile, tmp_path / "out", "--trust-remote-code")
    assert result.exit_code == 0, result.output
    assert marker.read_text() == "ran"  # by the proof, which loads the tokenizer
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenization_hostile.py", "helper.py"} <= names and "tokenizer_evil.py" not in names


def test_code_of_another_repository_is_named_and_not_carried(hostile: Path, tmp_path: Path) -> None:
    name_tokenizer(hostile, "owner/repo--tok.Tok", "Tok")
    result = run("export", hostile, tmp_path / "out")
    assert result.exit_code == 2 and "names tok.Tok of owner/repo" in result.stderr
    result = run("export", hostile, tmp_path / "out", "--trust-remote-code")
    assert result.exit_code == 2 and "takes tok.Tok from the repository owner/repo" in result.stderr


def test_the_code_of_an_adapters_base_and_of_an_embedders_modules_is_found(hostile: Path, tmp_path: Path) -> None:
    config = json.loads((hostile / "config.json").read_text()) | {"model_type": "unknown"}
    (hostile / "config.json").write_text(json.dumps(config))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(hostile)}))
    names = r"\(config\.json names configuration_mamba2\.ZooMamba2Config for model_type 'unknown'\)"
    with pytest.raises(ValueError, match=f"brings code of its own {names}"):
        check_remote_code(adapter, trusted=False, tokenizer=False)
    (adapter / "modules.json").write_text(json.dumps([{"type": "evil.Module"}, {"type": "sentence_transformers.X"}]))
    with pytest.raises(ValueError, match=r"; modules\.json names evil\.Module"):
        check_remote_code(adapter, trusted=False)


def test_no_code_of_a_zoo_model_is_needed(model: Path) -> None:
    check_remote_code(model, trusted=False)


LINKS: list[str] = ["LICENSE", "NOTICE", "tokenizer.json", "tokenizer_config.json", "README.md", "plots/loss.png"]


@pytest.mark.parametrize("name", LINKS)
def test_a_file_behind_a_link_out_of_the_source_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    secret = tmp_path / "secret.json"
    secret.write_text('{"secret": 1}')
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    result = run("export", source, tmp_path / "out", "--no-verify")
    assert result.exit_code == 2 and f"{name} is a link to a file outside of" in result.stderr, result.output
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hubs_cache_may_be_exported_by_its_path(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    assert run("export", snapshot, tmp_path / "out", "--no-verify").exit_code == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("place", ["../outside.safetensors", "{}/outside.safetensors"])
@pytest.mark.parametrize("command", ["export {} {}/out --no-verify", "generate {} abc"])
def test_an_index_that_names_a_file_elsewhere_is_refused(model: Path, tmp_path: Path, command: str, place: str) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    (source / "model.safetensors").unlink()
    make_model("mamba2").save_pretrained(source, max_shard_size="5KB")
    shard = sorted(source.glob("model-*"))[0]
    shard.rename(tmp_path / "outside.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, place.format(tmp_path)))
    result = run(*command.format(source, tmp_path).split())
    assert result.exit_code == 2 and "must be the name of a file in the same folder" in result.stderr, result.output


def test_carried_configurations_lose_the_folder_that_they_came_from(model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    path = source / "tokenizer_config.json"
    places = {"name_or_path": str(tmp_path), "special_tokens_map_file": str(tmp_path / "special_tokens_map.json")}
    path.write_text(json.dumps(json.loads(path.read_text()) | places))
    assert run("export", source, tmp_path / "out", "--no-verify").exit_code == 0
    for written in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in written.read_bytes(), written.name


@pytest.mark.parametrize("size", ["5KB", "1GB"])
def test_saving_again_in_another_sharding_leaves_one_set_of_weights(tmp_path: Path, size: str) -> None:
    language_model = make_model("mamba2")
    language_model.save_pretrained(tmp_path, max_shard_size="5KB" if size == "1GB" else "1GB")
    language_model.save_pretrained(tmp_path, max_shard_size=size)
    single, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    assert single.exists() == (size == "1GB") and index.exists() == (size == "5KB")
