"""`ssm-zoo finetune embed` and `ssm-zoo evaluate`: every option arrives, results are printed, a mistake is one line."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import typer
from typer.testing import CliRunner, Result

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("ir_measures", reason="ir-measures is not installed")

from embedding_pairs import save_model, write_pairs

from ssm_zoo.cli.main import app
from ssm_zoo.training.embedder_settings import EmbedderSettings

needs_lm_eval = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")

CODE = {"revision": None, "trust_remote_code": False}
PAIRS = ["--train", "pairs.jsonl", "--heldout", "pairs.jsonl", "--batch-size", "3", "--steps", "1"]


@pytest.fixture
def ssm_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command line in this process, in a folder with a model, pairs, a BEIR folder and a text."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    save_model(tmp_path / "zoo", "mamba2")
    write_pairs(tmp_path / "pairs.jsonl", 9)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    for name, column in (("queries", "anchor"), ("corpus", "positive")):
        texts = [json.dumps({"_id": f"{name}{index}", "text": row[column]}) for index, row in enumerate(rows)]
        (tmp_path / "beir" / f"{name}.jsonl").write_text("\n".join(texts))
    judged = [f"queries{index}\tcorpus{index}\t1" for index in range(len(rows))]
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text("\n".join(["query\tcorpus\tscore", *judged]))
    (tmp_path / "text.txt").write_text("the cat sat on the mat and saw " * 3)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def commands() -> dict[tuple[str, str], Any]:
    group: Any = typer.main.get_command(app)
    names = [("finetune", "embed"), *(("evaluate", name) for name in ("retrieval", "lm-eval", "inversion", "length"))]
    return {name: group.commands[name[0]].commands[name[1]] for name in names}


@pytest.mark.parametrize("name", commands())
def test_help_explains_every_option(name: tuple[str, str]) -> None:
    text = " ".join(CliRunner().invoke(app, [*name, "--help"]).stdout.split())
    for parameter in commands()[name].params:
        assert parameter.help, parameter.name
        assert " ".join(parameter.help.split()) in text
    if name[1] == "embed":
        assert {parameter.name for parameter in commands()[name].params} >= EmbedderSettings.model_fields.keys()


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from ssm_zoo.cli.main import app;"
        "assert all(CliRunner().invoke(app, [*name, '--help']).exit_code == 0 for name in"
        "    [('finetune', 'embed'), ('evaluate', 'retrieval'), ('evaluate', 'lm-eval'), ('evaluate', 'inversion'),"
        "    ('evaluate', 'length')]);"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'sentence_transformers', 'lm_eval'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_option_arrives(ssm_zoo: Callable[..., Result], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "anchor": "positive",
        "positive": "anchor",
        "negatives": ["negative"],
        "pooling": "mean",
        "max_tokens": 6,
        "query_prompt": "q: ",
        "document_prompt": "d: ",
        "temperature": 0.3,
        "symmetric": True,
        "batch_size": 4,
        "mini_batch_size": 2,
        "rank": 3,
        "alpha": 5.5,
        "dropout": 0.25,
        "dora": True,
        "target_modules": ["in_proj", "out_proj"],
        "epochs": 0.5,
        "learning_rate": 0.002,
        "schedule": "linear",
        "warmup": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "dtype": "float32",
        "gradient_checkpointing": True,
        "seed": 7,
        "pool_size": 5,
        "checkpoint_every": 11,
    }
    line = ["zoo", "out", "--train", "pairs.jsonl", "--heldout", "pairs.jsonl"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            line.append(option)
        else:
            line += [option, ",".join(value) if isinstance(value, list) else str(value)]
    result = ssm_zoo("finetune", "embed", *line)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    recipe = json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]
    assert recipe.items() >= options.items()
    assert set(EmbedderSettings.model_fields) == options.keys() | {
        "report_to",
        "method",
        "trust_remote_code",
        "revision",
        "steps",
        "model",
        "train",
        "heldout",
    }
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = (f"{evaluation['ndcg@10']:.4f}" for evaluation in report["evaluations"])
    printed = f"held-out nDCG@10: {before} before, {after} after\nreport: out/report.json   model: out/model"
    assert printed in result.stdout
    # Another command takes the run's folder for its embedder.
    result = ssm_zoo("evaluate", "retrieval", "out", "beir", "--pools", "4")
    assert result.exit_code == 0 and "right among 4" in result.stdout, result.stderr


def test_retrieval_of_a_plain_model_is_printed_and_written(ssm_zoo: Callable[..., Result], tmp_path: Path) -> None:
    has_bm25 = all(importlib.util.find_spec(name) for name in ("bm25s", "Stemmer"))
    options = ["--pooling", "last", "--query-prompt", "q ", "--pools", "3,9", "--seed", "4", "--output", "deep/r.json"]
    result = ssm_zoo("evaluate", "retrieval", "zoo", "beir", *options, *(["--bm25"] if has_bm25 else []))
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    report = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert (report["queries"], report["documents"]) == (9, 9)
    assert list(report["systems"]) == ["zoo", *(["BM25"] if has_bm25 else []), "chance"]
    assert [pool["size"] for pool in report["systems"]["zoo"]["pools"]] == [3, 9]
    assert report["systems"]["chance"]["accuracy@1"] == pytest.approx(1 / 9)
    assert report["settings"]["prompts"] == {"query": "q ", "document": ""}
    assert report["settings"].items() >= ({"model": "zoo", "folder": "beir"} | CODE).items()
    assert str(tmp_path) not in json.dumps(report)
    pool = report["systems"]["zoo"]["pools"][0]
    assert f"{pool['accuracy']:.4f} [{pool['low']:.3f}, {pool['high']:.3f}]" in result.stdout
    assert "9 queries, 9 documents" in result.stdout and "report: deep/r.json" in result.stdout


@needs_lm_eval
def test_tasks_of_lm_eval_are_printed_and_written(
    ssm_zoo: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tasks").mkdir()
    task = {
        "task": "my_pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "pairs.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{anchor}}",
        "doc_to_target": " {{positive}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (tmp_path / "tasks" / "pairs.yaml").write_text(json.dumps(task))  # JSON is YAML
    options = ["--tasks", "my_*", "--include-path", "tasks", "--limit", "3", "--batch-size", "2", "--num-fewshot", "0"]
    result = ssm_zoo("evaluate", "lm-eval", "zoo", *options, "--max-length", "90", "--seed", "7", "--output", "l.json")
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    report = json.loads((tmp_path / "l.json").read_text())
    found = report["results"]["my_pairs"]
    assert found["perplexity,none"] > 1 and f"{found['perplexity,none']:.4f}" in result.stdout
    assert report["n-samples"]["my_pairs"]["effective"] == 3
    settings = {"model": "zoo", "tasks": ["my_*"], "include_path": "tasks", "dtype": "auto", "seed": 7, "limit": 3}
    assert report["settings"] == settings | CODE | {"num_fewshot": 0, "batch_size": 2, "max_length": 90}
    assert str(tmp_path) not in json.dumps(report["results"])


def test_inversion_is_printed_and_written(ssm_zoo: Callable[..., Result], tmp_path: Path) -> None:
    options = {"tokens": 6, "texts": 2, "steps": 3, "learning-rate": "0.1,0.01", "restarts": 2, "top-k": 5, "seed": 3}
    options |= {"initial-std": "embedding", "target": 1, "positions": "last", "reading": "cosine", "output": "i.json"}
    line = [part for name, value in options.items() for part in (f"--{name}", value)]
    result = ssm_zoo("evaluate", "inversion", "zoo", "text.txt", *line)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    report = json.loads((tmp_path / "i.json").read_text())
    assert f"accuracy {report['accuracy']:.4f} (modified Hamming metric {report['hamming']:.4f})" in result.stdout
    assert report["chance"] == pytest.approx(5 / 61)
    assert len(report["row_hamming"]) == 2 and max(report["attempt"]) < 4
    settings = {"tokens": 6, "texts": 2, "steps": 3, "learning_rate": [0.1, 0.01], "restarts": 2, "initial_std": None}
    settings |= {"target": 1, "positions": "last", "reading": "cosine", "top_k": 5, "seed": 3, "model": "zoo"}
    assert report["settings"] == settings | CODE | {"text": "text.txt"}


def test_length_is_printed_written_and_drawn(ssm_zoo: Callable[..., Result], tmp_path: Path) -> None:
    options = {"tokens": 20, "windows": 2, "chunk": 6, "first": 8, "output": "l.json"}
    line = [part for name, value in options.items() for part in (f"--{name}", value)]
    result = ssm_zoo("evaluate", "length", "zoo", "text.txt", *line)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    report = json.loads((tmp_path / "l.json").read_text())
    rows = report["by_position"]
    assert [(row["start"], row["end"], row["tokens"]) for row in rows] == [(0, 8, 14), (8, 16, 16), (16, 20, 8)]
    assert all(f"{row['loss']:.4f}" in result.stdout for row in rows)
    settings = {"model": "zoo", "text": "text.txt", "tokens": 20, "windows": 2, "chunk": 6, "first": 8, "dtype": "auto"}
    assert report["settings"] == settings | CODE
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["finetune", "embed", "zoo", "out", *PAIRS, "--batch-size", "1"],
            "`batch_size` must be at least 2, got 1",
            id="batch",
        ),
        pytest.param(["finetune", "embed", "zoo", "out", *PAIRS, "--anchor", "x"], "has no column 'x'", id="column"),
        pytest.param(["finetune", "embed", "zoo", "out", *PAIRS, "--private"], "--private has no effect", id="private"),
        pytest.param(
            ["finetune", "embed", "zoo", "out", *PAIRS, "--push-to-hub", "a/b"], "no Hugging Face", id="token"
        ),
        pytest.param(
            ["evaluate", "retrieval", "zoo", "beir"], "`pooling` must be last or mean, since zoo is", id="pooling"
        ),
        pytest.param(
            ["evaluate", "retrieval", "zoo", "x", "--pooling", "last"], "an existing folder, got 'x'", id="folder"
        ),
        pytest.param(
            ["evaluate", "lm-eval", "zoo", "--tasks", "no", "--include-path", "x"],
            "`include_path` must be an existing folder, got 'x'",
            id="include-path",
            marks=needs_lm_eval,
        ),
        pytest.param(
            ["evaluate", "lm-eval", "zoo", "--tasks", "a,"],
            "`tasks` must be one name or more, got 'a, '",
            id="tasks",
            marks=needs_lm_eval,
        ),
        pytest.param(
            ["evaluate", "retrieval", "zoo", "beir", "--pooling", "last", "--split", "dev"],
            "`split` must be one of 'beir/qrels', test, got 'dev'",
            id="split",
        ),
        pytest.param(
            ["evaluate", "retrieval", "zoo", "beir", "--pooling", "last", "--pools", "10"],
            "`pools` must be from 2 to 9 with these documents, got 10",
            id="pool",
        ),
        pytest.param(
            ["evaluate", "retrieval", "zoo", "beir", "--pools", "x"], "`pools` must be a number, got 'x'", id="pools"
        ),
        pytest.param(
            ["evaluate", "retrieval", "zoo", "beir", "--batch-size", "0"],
            "`batch_size` must be at least 1, got 0",
            id="texts-0",
        ),
        pytest.param(
            ["evaluate", "inversion", "zoo", "text.txt"],
            "text: .* must have at least 512 tokens, 8 times 64, got 93",
            id="long",
        ),
        pytest.param(
            ["evaluate", "length", "zoo", "text.txt", "--tokens", "9999"],
            "text: text.txt must have at least 9,999 tokens, 1 times 9,999, got",
            id="short-text",
        ),
        pytest.param(
            ["evaluate", "length", "zoo", "text.txt", "--output", "x.png"],
            "--output: the report must not end in .png, the name of its picture, got x.png",
            id="picture-name",
        ),
        pytest.param(["evaluate", "inversion", "zoo", "no.txt"], "text: there is no file 'no.txt'", id="no-text"),
        pytest.param(
            ["evaluate", "inversion", "zoo", "text.txt", "--target", "x"],
            "`target` must be a number, got 'x'",
            id="target",
        ),
        pytest.param(
            ["evaluate", "inversion", "zoo", "text.txt", "--texts", "0"],
            "`texts` must be at least 1, got 0",
            id="no-texts",
        ),
    ],
)
def test_a_mistake_ends_in_one_line(
    ssm_zoo: Callable[..., Result], tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = ssm_zoo(*arguments)
    assert result.exit_code == 2, result.stdout
    assert re.search(rf"^ssm-zoo: .*{message}[^\n]*\n\Z", result.stderr, re.MULTILINE), result.stderr
    assert not (tmp_path / "out").exists()
