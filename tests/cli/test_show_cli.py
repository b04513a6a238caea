"""`ssm-zoo show`: what it prints and writes, beside a teacher, and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import matplotlib.image
import pytest
import torch
from families import make_encoder_decoder, make_model
from safetensors.torch import load_file
from tiny_checkpoints import save_llama, save_tokenizer, save_zoo_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from ssm_zoo.cli.main import app

TEXT = "the sea"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_zoo_checkpoint(folder / "zoo")
    save_llama(folder / "llama")
    make_model("mamba", hidden_size=24).save_pretrained(folder / "mamba")
    make_encoder_decoder("transformer").save_pretrained(folder / "translator")
    for name in ("mamba", "translator"):
        save_tokenizer(folder / name)
    return folder


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command in this process, in an empty folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return lambda *arguments: CliRunner().invoke(app, ["show", *map(str, arguments)])


def succeeds(result: Result) -> str:
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    return result.stdout


def fails(result: Result, message: str) -> None:
    assert result.exit_code == 2, f"{result.stdout}\n{result.exception!r}"
    assert re.fullmatch(rf"ssm-zoo: [^\n]*{message}[^\n]*\n", result.stderr), result.stderr


def report_of(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "attention.json").read_text())


def test_the_matrices_are_those_of_the_model(show: Callable[..., Result], models: Path) -> None:
    printed = succeeds(show(models / "zoo", TEXT, "--output", "out", "--rollout", "--max-tokens", 5))
    assert "zoo on the first 5 of 7 tokens (--max-tokens); means" in printed
    assert re.search(r"^ +0 +discrete_mamba2 +4 +\d", printed, re.MULTILINE)
    assert re.search(r"^Rollout of zoo to the last token 's' \(4\): \d", printed, re.MULTILINE)
    assert {path.name for path in Path("out").iterdir()} == {
        "attention.json",
        "attention.safetensors",
        "layers.png",
        "rollout.png",
    }
    tokenizer: Any = AutoTokenizer.from_pretrained(models / "zoo", trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(models / "zoo", trust_remote_code=False)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :5]
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    found = load_file("out/attention.safetensors")
    assert found.keys() == {"layers.0", "layers.1", "layers.2", "layers.3", "rollout"}
    for layer, matrix in enumerate(attentions):
        torch.testing.assert_close(found[f"layers.{layer}"], matrix[0])
    torch.testing.assert_close(found["rollout"].sum(-1), torch.ones(5))
    report = report_of("out")
    assert [token["id"] for token in report["tokens"]["source"]] == ids[0].tolist()
    assert report["text_tokens"] == 7 and report["settings"]["model"] == "zoo"
    assert report["rollout_of_the_last_token"]["model"] == pytest.approx(found["rollout"][-1].tolist())
    assert str(models) not in json.dumps(report["settings"])
    for name in ("layers", "rollout"):
        assert min(matplotlib.image.imread(f"out/{name}.png").shape[:2]) > 300


def test_the_same_model_as_teacher_has_no_distance(show: Callable[..., Result], models: Path) -> None:
    printed = succeeds(show(models / "zoo", TEXT, "--teacher", models / "zoo", "--output", "out"))
    assert printed.count(" 0.000      100%") == 4
    for row in report_of("out")["stacks"][0]["layers"]:
        assert row["to_teacher"]["of"] == "heads"
        assert row["to_teacher"]["js"]["heads"] == row["to_teacher"]["kl"]["heads"] == [0.0] * 4
        assert row["to_teacher"]["same_top"]["heads"] == [1.0] * 4
    found = load_file("out/attention.safetensors")
    assert torch.equal(found["layers.2"], found["teacher.layers.2"])
    assert (Path("out") / "distance.png").is_file()


def test_other_heads_are_compared_by_their_mean(show: Callable[..., Result], models: Path) -> None:
    """A layer of Mamba-1 with 48 channels, beside two heads of attention."""
    Path("text.txt").write_text(TEXT)
    line = (models / "mamba", "@text.txt", "--teacher", models / "llama", "--layers", "0-1", "--output", "out")
    printed = succeeds(show(*line))
    assert re.search(r"^ +1 +MambaMixer +48 .* min \d\.\d\d median", printed, re.MULTILINE)
    rows = report_of("out")["stacks"][0]["layers"]
    for row in rows:
        assert row["to_teacher"]["of"] == "mean" and 0 < row["to_teacher"]["js"]["mean"] < 1
        assert row["heads"] is None and row["teacher"]["heads"] == [0, 1]
    found = load_file("out/attention.safetensors")
    assert found["layers.0"].shape == (1, 7, 7) and found["teacher.layers.0"].shape == (2, 7, 7)


def test_an_encoder_decoder_shows_three_stacks(show: Callable[..., Result], models: Path) -> None:
    printed = succeeds(show(models / "translator", TEXT, "--target", "la", "--rollout", "--output", "out"))
    assert all(
        f"\n{title}\n" in printed for title in ("Encoder", "Decoder", "Cross-attention, from decoder to encoder")
    )
    assert {path.stem for path in Path("out").glob("*.png")} == {"encoder", "decoder", "cross", "rollout"}
    tokens = report_of("out")["tokens"]
    assert len(tokens["source"]) == 7 and "".join(token["text"] for token in tokens["target"][1:]) == "la"
    assert load_file("out/attention.safetensors")["cross.0"].shape[1:] == (3, 7)
    assert "Decoder" not in succeeds(show(models / "translator", TEXT))


def test_a_result_is_replaced_by_the_same_settings_only(show: Callable[..., Result], models: Path) -> None:
    line = (models / "llama", TEXT, "--output", "out")
    succeeds(show(*line))
    created = report_of("out")["created"]
    (Path("out") / "layers.png").unlink()
    succeeds(show(*line))
    assert (Path("out") / "layers.png").is_file() and report_of("out")["created"] >= created
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    fails(show(*line, "--layers", "1"), r"out holds the result of other settings \(layers\)\. Give another folder")
    fails(show(models / "llama", "other", "--output", "out"), r"other settings \(text_sha256\)")
    changed = shutil.copytree(models / "llama", Path("llama")) / "config.json"
    changed.write_text(json.dumps(json.loads(changed.read_text()) | {"rms_norm_eps": 0.5}))
    fails(show("llama", TEXT, "--output", "out"), r"other settings \(sources\)")
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    (Path("out") / "mine.txt").write_text("mine")
    fails(show(*line), "out is not empty and holds something other than an earlier result")


def test_a_failure_leaves_the_earlier_result(
    show: Callable[..., Result], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (models / "llama", TEXT, "--output", "out")
    succeeds(show(*line))
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssm_zoo.evaluation.attention_folder.draw_stack", fail)
    assert show(*line).exit_code == 2
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    assert [path.name for path in Path().iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param("{zoo} ab --layers 9", "layers: MODEL has the layers 0 to 3, got 9", id="layer"),
        pytest.param("{zoo} ab --layers 3-1", "--layers must be numbers and ranges like 0,4-7, got '3-1'", id="range"),
        pytest.param("{zoo} ab --heads x", "--heads must be numbers and ranges like 0,4-7, got 'x'", id="heads"),
        pytest.param("{zoo} ab --heads 4", "heads: layer 0 of MODEL has the heads 0 to 3, got 4", id="head"),
        pytest.param(
            "{zoo} ab --max-tokens 2000",
            "--max-tokens': Input should be less than or equal to 1024",
            id="too-many-tokens",
        ),
        pytest.param("{zoo} a", r"TEXT must have at least 2 tokens, got 1 from the tokenizer of", id="one-token"),
        pytest.param("{zoo} @nope.txt", "TEXT: there is no file 'nope.txt'", id="no-file"),
        pytest.param("{zoo} ab --target cd", "`target` must be left out for .*zoo, which is no enc", id="target"),
        pytest.param("./nope ab", "there is no folder './nope'", id="no-model"),
        pytest.param("{zoo} ab --teacher ./nope", "there is no folder './nope'", id="no-teacher"),
        pytest.param("{zoo} ab --teacher {llama}", r"as many layers as MODEL \(layers: 4\), got layers: 2", id="depth"),
        pytest.param("{llama} ab --teacher {other}", "--teacher: the models must have one tokenizer", id="tokenizer"),
    ],
)
def test_mistakes_end_in_one_line(
    show: Callable[..., Result], models: Path, tmp_path: Path, line: str, message: str
) -> None:
    places = {name: models / name for name in ("zoo", "llama")} | {"other": tmp_path / "other"}
    save_llama(places["other"])
    tokenizer = json.loads((places["other"] / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (places["other"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = show(*(part.format(**places) for part in line.split()), "--output", "out")
    fails(result, message)
    assert result.stdout == "" and list(Path().iterdir()) == []


def test_an_empty_text_is_refused(show: Callable[..., Result], models: Path) -> None:
    fails(show(models / "zoo", " "), "TEXT must not be empty")
