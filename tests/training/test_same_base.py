"""Adapters are merged into no weights but those that they were trained over, in every kind of finetuning."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from embedding_pairs import save_model, write_pairs
from families import make_model
from ranking_data import write_beir
from typer.testing import CliRunner, Result

from ssm_zoo.cli.main import app

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("ir_measures", reason="ir-measures is not installed")

# For each kind: its options, and the module and the name of the function that trains.
KINDS: dict[str, tuple[list[str], str, str]] = {
    "lm": (
        ["--train", "text.txt", "--heldout", "text.txt", "--row-tokens", "32", "--merge"],
        "language_model",
        "train",
    ),
    "embed": (["--train", "pairs.jsonl", "--heldout", "pairs.jsonl"], "embedder_trainer", "train_embedder"),
    "rerank": (["--train", "beir", "--depth", "5"], "reranker_trainer", "train_reranker"),
    "translate": (
        ["--train", "p.tsv", "--heldout", "p.tsv", "--no-packing"],
        "translation",
        "train_translation",
    ),
}


def finetune(kind: str) -> Result:
    options, _, _ = KINDS[kind]
    line = ["finetune", kind, "base", "out", *options, "--steps", "3", "--batch-size", "2", "--rank", "2"]
    return CliRunner().invoke(app, line)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_changes_during_the_training_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "base", "mamba2")
    shutil.copytree(tmp_path / "base", tmp_path / "kept")
    write_pairs(tmp_path / "pairs.jsonl", 9)
    write_beir(tmp_path / "beir")
    (tmp_path / "text.txt").write_text("abc def ghi " * 20)
    (tmp_path / "p.tsv").write_text("the cat\tle chat\na dog\tun chien\nno\tnon\n")
    monkeypatch.chdir(tmp_path)
    _, module, name = KINDS[kind]
    trainer: Any = importlib.import_module(f"ssm_zoo.training.{module}")
    trains = getattr(trainer, name)

    def train_while_the_base_changes(*arguments: Any, **options: Any) -> Any:
        make_model("mamba2", seed=1).save_pretrained("base")
        return trains(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, name, train_while_the_base_changes)
        result = finetune(kind)
    assert result.exit_code == 2, f"{result.stderr}\n{result.exception!r}"
    assert "ssm-zoo: model: weights of base changed since the run in out was started. Restore" in result.stderr
    assert not Path("out/model").exists() and not Path("out/report.json").exists()

    shutil.copytree("kept", "base", dirs_exist_ok=True)
    result = finetune(kind)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    assert Path("out/model/model.safetensors").is_file()
