"""What leaves the machine: which files a push sends, which folders it refuses, what it removes, what it never names."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from families import make_model
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from hub_stand_in import HubStandIn
from ssm_zoo.cli.errors import without_tokens
from ssm_zoo.cli.main import app
from ssm_zoo.conversion.formats.state_spaces import byte_tokenizer
from ssm_zoo.harness.published import public_argument, public_command

TOKEN = "hf_" + "x" * 20
REPO = "tester/model"
RECORD = ".ssm-zoo.json"
_RESOLVE = "{repo_id}/resolve/{revision}/{filename}"
HOME = "/" + "home"  # in two parts: no file of this repository names a path of a machine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    make_model("mamba2").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    adapted = get_peft_model(make_model("mamba2"), LoraConfig(target_modules=["in_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = "tester/base"
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{_RESOLVE}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


def push(folder: Path, *options: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, ["push", str(folder), REPO, *options], input=answer)


def upload(api: HfApi, name: str, content: bytes = b"theirs") -> None:
    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=REPO)


# What is sent


def test_nothing_but_listed_files_is_sent_and_the_rest_is_named_in_one_line(
    model: Path, tmp_path: Path, api: HfApi
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    secret = tmp_path / "passwd"
    secret.write_text("root")
    for name in (".env", ".netrc", "id_rsa", "optimizer.pt", "train.py", "trainer_state.json", "wandb/run.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "notes.txt").symlink_to(secret)
    result = push(folder)
    assert result.exit_code == 0, result.stderr
    names = ".env, .netrc, id_rsa, notes.txt, optimizer.pt, train.py, trainer_state.json, wandb/"
    assert f"not uploaded: {names}\n" in result.stdout
    expected = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert set(api.list_repo_files(REPO)) == expected | {".gitattributes", RECORD}


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "plots/loss.png", "plots", "modeling_mamba2.py"])
def test_a_link_is_refused(model: Path, tmp_path: Path, hub: HubStandIn, name: str) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "loss.png").write_bytes(b"private")
    target = outside if name == "plots" else outside / "loss.png"
    if name.endswith(".py"):
        target = model / name
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(target)
    result = push(folder)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search(rf"FOLDER: {re.escape(name)} of model must be a (folder|regular file), got a link", result.stderr)
    assert not any(request.method == "POST" for request in hub.requests)


# What is refused


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return edited


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])


def shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    make_model("mamba2").save_pretrained(folder, max_shard_size="5KB")


def without_a_shard(folder: Path) -> None:
    shards(folder)
    sorted(folder.glob("model-*"))[0].unlink()


def with_shards_of_other_names(folder: Path) -> None:
    shards(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"part-'))
    for shard in folder.glob("model-*"):
        shard.rename(shard.with_name(shard.name.replace("model-", "part-")))


def with_weights_of_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    edit("config.json", lambda v: v.update(transformers_weights="mine.safetensors"))(folder)


def with_a_shard_elsewhere(folder: Path) -> None:
    shards(folder)
    shard = sorted(folder.glob("model-*"))[0]
    shard.rename(folder.parent / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, "../outside.safetensors"))


NORM = "backbone.norm_f.weight"
BROKEN: list[Any] = [
    pytest.param(cut, "model.safetensors is damaged, or no safetensors file", id="truncated"),
    pytest.param(
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "model.safetensors is damaged, or no safetensors file",
        id="empty",
    ),
    pytest.param(weights(lambda w: w.pop(NORM)), f"lacks 1 weights.*{NORM}", id="missing-weight"),
    pytest.param(weights(lambda w: w.update(more=torch.ones(1))), "has too many 1 weights.*more", id="extra-weight"),
    pytest.param(weights(lambda w: w.update({NORM: torch.ones(3)})), "has other shapes for 1", id="wrong-shape"),
    pytest.param(weights(lambda w: w[NORM].fill_(float("nan"))), f"16 of the .* not finite, first: {NORM}", id="nan"),
    pytest.param(without_a_shard, "of which 1 are not in", id="missing-shard"),
    pytest.param(
        with_shards_of_other_names,
        r"weights in part-00001-of-0\d+\.safetensors, .* would not be uploaded",
        id="shards-not-sent",
    ),
    pytest.param(
        with_weights_of_another_name, r"weights in mine\.safetensors would not be uploaded", id="weights-not-sent"
    ),
    pytest.param(with_a_shard_elsewhere, r"got '\.\./outside\.safetensors'", id="shard-elsewhere"),
    pytest.param(
        lambda f: (f / "zoo_model.py").unlink(), r"imports \.zoo_model, but there is no zoo_model.py", id="no-import"
    ),
    pytest.param(lambda f: (f / "ssd.py").write_text("def"), "ssd.py of model must be Python code", id="not-python"),
    pytest.param(
        edit("config.json", lambda v: v["auto_map"].update(AutoModel="a/b--modeling_mamba2.ZooMamba2Model")),
        "must not take its code from another repository",
        id="code-elsewhere",
    ),
    pytest.param(
        edit("tokenizer_config.json", lambda v: v.update(auto_map={"AutoTokenizer": ["t.T", None]})),
        "names t.T, but there is no t.py",
        id="tokenizer-without-code",
    ),
    pytest.param(
        edit("tokenizer_config.json", lambda v: v.update(name_or_path=f"{HOME}/me/tokenizer")),
        "`name_or_path` must not be a place of this machine",
        id="tokenizer-path",
    ),
    pytest.param(
        edit("tokenizer_config.json", lambda v: v.update(special_tokens_map_file=f"{HOME}/me/special_tokens_map.json")),
        "`special_tokens_map_file` must not be a place of this machine",
        id="tokenizer-file",
    ),
    pytest.param(
        edit("config.json", lambda v: v.update(extra={"_name_or_path": f"{HOME}/me/model"})),
        "`_name_or_path` must not be a place of this machine",
        id="place",
    ),
    pytest.param(
        lambda f: (f / "README.md").write_text("---\nlicense: [\n---\nx"), "README.md: its front matter", id="card"
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BROKEN)
def test_a_folder_that_does_not_load_is_refused_before_anything_is_asked_of_the_hub(
    model: Path, tmp_path: Path, hub: HubStandIn, spoil: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    spoil(folder)
    result = push(folder)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("ssm-zoo: FOLDER: ") or "index.json" in result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert hub.requests == []


@pytest.mark.parametrize("base", [f"{HOME}/me/base", "base", None, ".."])
def test_an_adapter_whose_base_others_do_not_have_is_refused(
    adapter: Path, tmp_path: Path, hub: HubStandIn, base: str | None
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    edit("adapter_config.json", lambda values: values.update(base_model_name_or_path=base))(folder)
    result = push(folder)
    assert result.exit_code == 2
    assert "`base_model_name_or_path` must be the Hub id OWNER/NAME" in result.stderr
    assert hub.requests == []


def test_an_adapter_with_cut_weights_is_refused(adapter: Path, tmp_path: Path, hub: HubStandIn) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = push(folder)
    assert result.exit_code == 2 and "model.safetensors is damaged, or no safetensors file" in result.stderr
    assert hub.requests == []


# What is removed


def test_an_adapter_does_not_delete_a_model_unless_told_to(model: Path, adapter: Path, api: HfApi) -> None:
    assert push(model).exit_code == 0
    before = api.list_repo_files(REPO)
    for answer in (None, "y\n"):  # no terminal: a line that comes in is no answer
        result = push(adapter, answer=answer)
        assert result.exit_code == 2 and "model.safetensors" in result.stderr and "--yes" in result.stderr
        assert api.list_repo_files(REPO) == before
    assert push(adapter, "--yes").exit_code == 0
    files = api.list_repo_files(REPO)
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files and "config.json" not in files


def test_a_model_over_an_adapter_is_asked_for_too(model: Path, adapter: Path, api: HfApi) -> None:
    assert push(adapter).exit_code == 0
    result = push(model)
    assert result.exit_code == 2 and "adapter_config.json, adapter_model.safetensors" in result.stderr
    assert push(model, "--yes").exit_code == 0
    assert "adapter_config.json" not in api.list_repo_files(REPO)


def test_what_others_wrote_is_removed_on_request_only_and_only_what_would_be_loaded(
    model: Path, tmp_path: Path, api: HfApi
) -> None:
    api.create_repo(REPO)
    for name in ("model.safetensors", "handler.py", "notes.txt", "onnx/model.safetensors"):
        upload(api, name)
    folder = shutil.copytree(model, tmp_path / "model")
    shards(folder)
    result = push(folder)
    assert result.exit_code == 2 and "would have to go: model.safetensors. " in result.stderr
    assert push(folder, "--yes").exit_code == 0
    files = set(api.list_repo_files(REPO))
    assert {"handler.py", "notes.txt", "onnx/model.safetensors", "model.safetensors.index.json"} <= files
    assert "model.safetensors" not in files


def test_code_of_another_family_is_replaced_without_a_question(model: Path, tmp_path: Path, api: HfApi) -> None:
    make_model("mamba").save_pretrained(tmp_path / "other")
    assert push(tmp_path / "other").exit_code == 0
    assert push(model).exit_code == 0
    files = set(api.list_repo_files(REPO))
    assert "modeling_mamba2.py" in files and not files & {"modeling_mamba.py", "selective_scan.py"}


def test_a_file_of_ours_that_somebody_has_replaced_is_theirs(model: Path, tmp_path: Path, api: HfApi) -> None:
    assert push(model).exit_code == 0
    upload(api, "model.safetensors", b"another model")
    folder = shutil.copytree(model, tmp_path / "model")
    shards(folder)
    result = push(folder)
    assert result.exit_code == 2 and "model.safetensors" in result.stderr


@pytest.mark.parametrize("how", ["method", "save_pretrained", "command"])
def test_a_second_push_in_shards_leaves_no_old_weights(tmp_path: Path, api: HfApi, hub: HubStandIn, how: str) -> None:
    def send(size: str) -> None:
        folder = tmp_path / "folder"
        if how == "method":
            language_model.push_to_hub(REPO, max_shard_size=size)
        elif how == "save_pretrained":
            language_model.save_pretrained(folder, push_to_hub=True, repo_id=REPO, max_shard_size=size)
        else:
            language_model.save_pretrained(folder, max_shard_size=size)
            result = push(folder)
            assert result.exit_code == 0, result.stderr

    language_model: Any = make_model("mamba2")
    send("1GB")
    language_model.backbone.norm_f.weight.data.fill_(7.0)
    send("5KB")
    names = [name for name in api.list_repo_files(REPO) if name.endswith(".safetensors")]
    assert len(names) > 1 and "model.safetensors" not in names
    snapshot = api.snapshot_download(REPO, cache_dir=tmp_path / "read")
    again = type(language_model).from_pretrained(snapshot)
    assert again.backbone.norm_f.weight.tolist() == [7.0] * again.config.hidden_size
    send("1GB")
    names = [name for name in api.list_repo_files(REPO) if "safetensors" in name]
    assert names == ["model.safetensors"]


def test_the_method_refuses_what_the_command_refuses(tmp_path: Path, api: HfApi, hub: HubStandIn) -> None:
    api.create_repo(REPO)
    upload(api, "adapter_config.json", b"{}")
    language_model: Any = make_model("mamba2")
    with pytest.raises(ValueError, match=r"adapter_config\.json\. Remove them, or pass replace=True"):
        language_model.push_to_hub(REPO)
    language_model.push_to_hub(REPO, replace=True)
    assert "adapter_config.json" not in api.list_repo_files(REPO)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".env").write_text("SECRET=1")
    language_model.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id=REPO)
    assert ".env" not in api.list_repo_files(REPO)


# What is never named


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (f"{HOME}/me/My Models/base", "base"),
        (f"teacher={HOME}/me/My Models/a b", "teacher=a b"),
        (f"data.train=[{HOME}/a x/b c.txt, d/e.txt]", "data.train=[b c.txt,d/e.txt]"),
        (f"datasets:{HOME}/me/my data,train", "datasets:my data,train"),
        ("../../me/x y", "x y"),
        ("~/runs/x y", "x y"),
        (r"C:\Users\me\a b", "a b"),
        ("runs/out", "runs/out"),
        (f"{HOME}/me/a.en,b/c.de", "a.en,b/c.de"),
        (f"b/c.en.gz,{HOME}/me/my data/a.de.gz", "b/c.en.gz,a.de.gz"),
        (f"{HOME}/me, her/a.txt", "a.txt"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        (r"\n\n", r"\n\n"),
    ],
)
def test_an_argument_names_no_folder_of_the_machine(argument: str, expected: str) -> None:
    assert public_argument(argument).replace(", ", ",") == expected


def test_a_command_line_stays_quoted() -> None:
    assert (
        public_command(f"ssm-zoo train '{HOME}/me/my run' --set 'a={HOME}/b c'")
        == "ssm-zoo train 'my run' --set 'a=b c'"
    )


@pytest.mark.parametrize(
    "form", ["a/b+secret-token", "a%2Fb%2Bsecret-token", "a%2fb%2bsecret-token", "YS9iK3NlY3JldC10b2tlbg=="]
)
def test_a_token_is_blotted_out_in_every_form(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "a/b+secret-token")
    assert without_tokens(f"400 for {form}!") == "400 for ***!"
