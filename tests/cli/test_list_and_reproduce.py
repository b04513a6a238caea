"""`ssm-zoo list` and `ssm-zoo reproduce`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ssm_zoo.cli import reproduce
from ssm_zoo.cli.main import app
from ssm_zoo.conversion.catalogue import list_models
from ssm_zoo.conversion.formats import FORMATS
from ssm_zoo.harness.text_files import front_matter
from ssm_zoo.modeling.families import PRESETS

CARD = """\
---
reproduce:
  command: [train, model.yaml, OUTPUT, --tokenizer, bytes, --train, text.txt, --heldout, text.txt, --row-tokens, '16',
    --steps, '1', --dtype, float32]
  numbers:
    evaluations.-1.loss: {value: 1.0, tolerance: 0.001}
    steps: {value: 1, tolerance: 0}
---
"""
MODEL = "model_type: zoo_mamba2\nhidden_size: 16\nnum_hidden_layers: 1\nhead_dim: 8\nstate_size: 8\n"


def test_the_list_is_that_of_the_registries() -> None:
    found = {model.name: model for model in list_models()}
    assert list(found)[: len(PRESETS)] == list(PRESETS)
    families = {model.model_type for model in found.values()}
    assert families >= {kind.model_type for kind, _ in PRESETS.values()} | {"zoo_hybrid"}
    for kind in FORMATS:
        family = kind.zoo_class.config_class.model_type
        assert all(kind.library in model.sources for model in found.values() if model.model_type == family)
    assert all("AutoModel" in model.loaded_by for model in found.values())
    assert "AutoModelForCausalLM" in found["mamba2-130m"].loaded_by


def test_a_size_is_close_to_the_one_in_the_name() -> None:
    for model in list_models("*-1*m"):
        assert model.parameters is not None
        size = float(model.name.rpartition("-")[2].removesuffix("m")) * 1e6
        assert model.parameters == pytest.approx(size, rel=0.02), model.name


def test_the_list_is_printed_as_a_table_and_as_json() -> None:
    result = CliRunner().invoke(app, ["list", "mamba2-1*", "--json"])
    assert result.exit_code == 0
    assert [each["name"] for each in json.loads(result.stdout)["models"]] == ["mamba2-130m", "mamba2-1.3b"]
    assert json.loads(result.stdout)["models"][0]["parameters"] == list_models("mamba2-130m")[0].parameters
    text = CliRunner().invoke(app, ["list", "taipan-190m"]).stdout
    assert "taipan-190m" in text and "187,520,022" in text


def test_a_word_lists_the_names_that_contain_it() -> None:
    every, found = ([model.name for model in list_models(pattern)] for pattern in ("*", "mamba2"))
    assert found == [name for name in every if "mamba2" in name] and 5 < len(found) < len(every)
    result = CliRunner().invoke(app, ["list", "mamba2", "--json"])
    assert [each["name"] for each in json.loads(result.stdout)["models"]] == found
    assert [model.name for model in list_models("mamba2-130m")] == ["mamba2-130m"]
    nothing = CliRunner().invoke(app, ["list", "mamba9"])
    assert nothing.exit_code == 2 and "no model has a name like 'mamba9'" in nothing.stderr


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A card whose loss is not the run's, in the folder in which commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.md").write_text(CARD)
    (tmp_path / "model.yaml").write_text(MODEL)
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the log " * 4)
    monkeypatch.setattr(reproduce, "cards", lambda: {"tiny": tmp_path / "tiny.md"})
    return tmp_path / "tiny.md"


def test_reproduce_trains_and_compares(card: Path) -> None:
    differs = CliRunner().invoke(app, ["reproduce", "tiny", "--card", "new.md"])
    assert differs.exit_code == 1, f"{differs.stdout}\n{differs.stderr}"
    assert "differs" in differs.stdout and "same" in differs.stdout
    loss = json.loads(Path("runs/tiny/report.json").read_text())["evaluations"][-1]["loss"]
    recipe, values = reproduce.read_recipe(Path("new.md")), front_matter(Path("new.md"))
    assert recipe.command == reproduce.read_recipe(card).command
    assert recipe.numbers["evaluations.-1.loss"] == reproduce.Number(value=round(loss, 6), tolerance=0.001)
    assert values["library_name"] == "transformers"
    assert f"{loss:.4f}" in Path("new.md").read_text()
    card.write_text(Path("new.md").read_text())
    agrees = CliRunner().invoke(app, ["reproduce", "tiny"])
    assert agrees.exit_code == 0, f"{agrees.stdout}\n{agrees.stderr}"
    assert "differs" not in agrees.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("OUTPUT", "OUTPUT, --nope"), ""),
        (("value: 1.0", "value: many"), r"reproduce: `numbers\.evaluations\.-1\.loss\.value` must be a number"),
        (("tolerance: 0}", "tolerance: -1}"), r"`numbers\.steps\.tolerance` must be at least 0, got -1"),
        (("command: [", "line: ["), r"`command` is missing.*"),
    ],
)
def test_a_card_that_cannot_be_run_is_refused(card: Path, change: tuple[str, str], message: str) -> None:
    card.write_text(CARD.replace(*change))
    result = CliRunner().invoke(app, ["reproduce", "tiny"])
    assert result.exit_code == 2
    if message:
        with pytest.raises(ValueError, match=message):
            reproduce.read_recipe(card)
        assert "ssm-zoo: tiny.md: reproduce:" in result.stderr


def test_a_number_is_found_by_its_path() -> None:
    report = {"a": [{"b": 1}, {"b": 2.5}], "c": "text", "d": True}
    assert reproduce.number_at(report, "a.-1.b") == 2.5
    for path in ("a.2.b", "a.x", "e", "c", "d", "a"):
        with pytest.raises(ValueError, match=f"at '{path}'"):
            reproduce.number_at(report, path)


@pytest.mark.parametrize("name", reproduce.cards())
def test_the_numbers_of_a_card_are_in_its_text(name: str) -> None:
    path = reproduce.cards()[name]
    recipe, text = reproduce.read_recipe(path), path.read_text(encoding="utf-8")
    group: Any = typer.main.get_command(app)
    command, *arguments = recipe.command
    assert "OUTPUT" in arguments
    group.commands[command].make_context(command, list(arguments))
    body = text.split("---\n", 2)[2]
    assert all(math.isfinite(number.value) for number in recipe.numbers.values())
    assert f"{recipe.numbers['evaluations.-1.loss'].value:.4f}" in body
    for word in ("cores", "torch", "transformers", "Date"):
        assert word in body
    assert "![" not in body


def test_three_cards_can_be_reproduced() -> None:
    assert len(reproduce.cards()) >= 3
