"""`ssm-zoo finetune translate` and `ssm-zoo evaluate translation`: every option arrives, results and mistakes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from families import make_model
from tiny_checkpoints import save_tokenizer
from typer.testing import CliRunner, Result

pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")

from ssm_zoo.cli.main import app
from ssm_zoo.conversion.publishable import check_publishable
from ssm_zoo.training.translation_settings import TranslationSettings

PAIRS = [("the cat saw 12 dogs", "le chat vit 12"), ("a dog", "un chien"), ("no", "non"), ("see tom", "voir tom")]
ENCDEC = """\
model_type: zoo_encdec
hidden_size: 16
intermediate_size: 24
num_hidden_layers: 1
num_attention_heads: 2
num_key_value_heads: 2
head_dim: 8
mixer_types: [mamba]
mamba: {state_size: 4}
encoder: {num_hidden_layers: 1, mixer_types: [mamba], mamba: {state_size: 4}}
"""


@pytest.fixture
def ssm_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command line in this process, in a folder with a model, a configuration and pairs."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    make_model("mamba2-full").save_pretrained(tmp_path / "zoo")
    save_tokenizer(tmp_path / "zoo")
    (tmp_path / "encdec.yaml").write_text(ENCDEC)
    for side, name in enumerate(("en", "fr")):
        (tmp_path / f"p.{name}").write_text("".join(f"{pair[side]}\n" for pair in PAIRS))
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"a": s, "b": t}) for s, t in PAIRS))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def test_help_explains_every_option_and_needs_no_torch() -> None:
    # Lines are also broken at hyphens.
    text = "".join(CliRunner().invoke(app, ["finetune", "translate", "--help"]).stdout.split())
    for name, field in TranslationSettings.model_fields.items():
        assert field.description and "".join(field.description.split()) in text, name
    program = (
        "import sys; from typer.testing import CliRunner; from ssm_zoo.cli.main import app;"
        "assert all(CliRunner().invoke(app, [*name, '--help']).exit_code == 0 for name in"
        "    [('finetune', 'translate'), ('evaluate', 'translation')]);"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'sacrebleu'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_option_arrives(ssm_zoo: Callable[..., Result], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "source_field": "b",
        "target_field": "a",
        "reverse": True,
        "separator": "|",
        "max_tokens": 18,
        "overlong": "truncate",
        "concatenate": 2,
        "row_tokens": 44,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "label_smoothing": 0.2,
        "residual_dropout": 0.1,
        "rank": 3,
        "alpha": 5.5,
        "dropout": 0.25,
        "dora": True,
        "target_modules": ["in_proj", "out_proj"],
        "steps": 3,
        "learning_rate": 0.002,
        "schedule": "cosine",
        "warmup": 1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "dtype": "float32",
        "gradient_checkpointing": True,
        "seed": 7,
        "checkpoint_every": 11,
        "evaluate_every": 2,
    }
    line = ["zoo", "out", "--train", "p.jsonl", "--heldout", "p.jsonl"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        line += [option] if value is True else [option, ",".join(value) if isinstance(value, list) else str(value)]
    result = ssm_zoo("finetune", "translate", *line)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    recipe = json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]
    assert recipe.items() >= options.items()
    other = {"method", "trust_remote_code", "revision", "epochs", "model", "train", "heldout", "report_to", "packing"}
    assert set(TranslationSettings.model_fields) == options.keys() | other | {"train_tokenizer", "overrides"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    losses = [evaluation["loss"] for evaluation in report["evaluations"]]
    assert len(losses) == 3
    printed = (
        f"held-out loss: {losses[0]:.4f} before, {losses[-1]:.4f} after\nreport: out/report.json   model: out/model"
    )
    assert printed in result.stdout and "heldout: 0 pairs left out and 1 cut as too long" in result.stdout
    assert re.search(r"train: 0 concatenated pairs left out and \d cut as too long", result.stdout)
    assert report["tokenizer"]["separator"] == "|"
    assert "4 pairs, joined at random to" in (tmp_path / "out" / "model" / "README.md").read_text()


def test_an_encoder_decoder_is_trained_and_evaluated(ssm_zoo: Callable[..., Result], tmp_path: Path) -> None:
    how = ["--train-tokenizer", 280, "--set", "hidden_size=24", "--steps", 120, "--learning-rate", 0.02]
    data = ["--train", "p.en,p.fr", "--heldout", "p.en,p.fr", "--max-tokens", 40, "--row-tokens", 90]
    result = ssm_zoo("finetune", "translate", "encdec.yaml", "out", *data, *how)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "heldout: 4 of 4 pairs are also in train, so the held-out loss is too low" in result.stdout
    assert report["model"]["encoder_decoder"] and report["settings"]["train"] == ["p.en,p.fr"]
    assert report["evaluations"][-1]["loss"] < report["evaluations"][0]["loss"] - 0.5
    searched = [
        "--beams",
        3,
        "--length-penalty",
        0.5,
        "--max-new-tokens",
        20,
        "--lengths",
        2,
        "--output",
        "deep/e.json",
    ]
    result = ssm_zoo("evaluate", "translation", "out", "p.en,p.fr", "--training-pairs", "p.en,p.fr", *searched)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    found = json.loads((tmp_path / "deep" / "e.json").read_text())
    assert (tmp_path / "deep" / "e.png").is_file() and "report: deep/e.json\npicture: deep/e.png" in result.stdout
    assert list(found["systems"]) == ["out", "copy"] and str(tmp_path) not in json.dumps(found)
    model, copied = found["systems"].values()
    assert [(row["from"], row["to"], row["texts"]) for row in model["by_length"]] == [(1, 1, 1), (2, None, 3)]
    assert copied["entities"]["regular"] == {"recall": 1.0, "entities": 1} and copied["entities"]["entities"] == 1
    assert found["translations"] == [target for _, target in PAIRS] and model["bleu"] > 99 > copied["bleu"]
    assert found["generation"]["texts"] == 4
    assert found["settings"]["length_penalty"] == 0.5 and found["settings"]["pairs"] == ["p.en,p.fr"]
    assert f"{model['bleu']:.2f}" in result.stdout and f"bleu: {model['bleu_signature']}" in result.stdout
    assert f"chrf: {model['chrf_signature']}" in result.stdout
    limit = found["generation"]["hit_the_limit"]
    assert f"{limit} of 4 translations hit the limit of 20 tokens" in result.stdout
    check_publishable(tmp_path / "out" / "model")
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    printed: list[str] = []
    exec(
        snippet.replace("<this repository>", "out/model").replace("A text to translate.", "a dog"),
        {"print": printed.append},
    )
    again = ssm_zoo("evaluate", "translation", "out", "p.en,p.fr", "--limit", 2, "--max-new-tokens", 41, *searched[-2:])
    assert again.exit_code == 0, again.stderr
    assert json.loads((tmp_path / "deep" / "e.json").read_text())["translations"][1] == printed[0].strip()
    # A model with the name of the baseline keeps its scores.
    (tmp_path / "out" / "model").rename(tmp_path / "copy")
    again = ssm_zoo("evaluate", "translation", "copy", "p.en,p.fr", "--beams", 1, "--output", "named.json")
    assert again.exit_code == 0, again.stderr
    systems = json.loads((tmp_path / "named.json").read_text())["systems"]
    assert list(systems) == ["copy (2)", "copy"] and systems["copy"]["bleu"] == copied["bleu"]
    assert systems["copy (2)"]["bleu"] > systems["copy"]["bleu"]


def test_a_tokenizer_that_is_not_installed_is_told_before_anything_is_read(
    ssm_zoo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sacrebleu.tokenizers import tokenizer_ja_mecab

    monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", None)
    result = ssm_zoo("evaluate", "translation", "missing", "missing.en,missing.fr", "--tokenize", "ja-mecab")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "`tokenize`: sacrebleu cannot use 'ja-mecab': Japanese tokenization requires" in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate translation zoo p.en,p.fr", "MODEL: the tokenizer must have a `sep_token`"),
        ("evaluate translation zoo p.en", "`pairs` must be SOURCE,TARGET"),
        ("evaluate translation zoo p.en,p.fr --beams 1 --length-penalty 1", "`length_penalty` has no effect with one"),
        ("evaluate translation zoo p.en,p.fr --beams 0", "`beams` must be at least 1, got 0"),
        ("evaluate translation zoo p.en,p.fr --lengths 4,x", "`lengths` must be numbers of words, e.g. 10,20, got 'x'"),
        ("evaluate translation zoo p.en,p.fr --lengths 4,3", "`lengths` must be ascending numbers"),
        ("evaluate translation zoo p.en,p.fr --limit 0", "`limit` must be at least 1, got 0"),
        ("evaluate translation zoo p.en,p.fr --tokenize no", "`tokenize` must be among 13a, .*got 'no'"),
        ("evaluate translation zoo p.en,p.fr --output q.png", "must not end in .png, the name of its picture"),
        ("evaluate translation zoo p.en,p.fr --output p.json", "p.png, the picture's name, exists"),
        ("evaluate translation zoo p.en,p.fr --output p.jsonl", "p.jsonl exists and is no earlier"),
        ("finetune translate zoo out --train p.en,q.fr --heldout p.en,p.fr", "there is no file 'q.fr'"),
        ("finetune translate zoo out --train p.jsonl --heldout p.jsonl", "p.jsonl', line 1: `source` is missing"),
        (
            "finetune translate zoo.yaml out --train p.en,p.fr --heldout p.en,p.fr",
            "got 'zoo.yaml'. Give --train-tokenizer",
        ),
        ("finetune translate mamba-130m out --train p.en,p.fr --heldout p.en,p.fr", "got 'mamba-130m'. Give --train-"),
        ("finetune translate zoo out --train p.en,p.fr --heldout p.en,p.fr --set a=1", "`overrides` has no effect"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    ssm_zoo: Callable[..., Result], tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "p.png").write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    result = ssm_zoo(*line.split())
    assert result.exit_code == 2 and re.search(message, result.stderr), result.stderr
    assert result.stderr.startswith("ssm-zoo: ") and result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
