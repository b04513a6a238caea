"""`ssm-zoo finetune rerank` and `evaluate rerank`: options arrive, results are printed and written, mistakes."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("ir_measures", reason="ir-measures is not installed")
pytest.importorskip("bm25s", reason="bm25s is not installed")

from embedding_pairs import save_model
from ranking_data import write_beir

from ssm_zoo.cli.evaluate_rerank import _run_files
from ssm_zoo.cli.main import app
from ssm_zoo.training.reranker_settings import RerankerSettings

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a judged collection and the finished run `out`, made by the command."""
    made = tmp_path_factory.mktemp("rerank-cli")
    save_model(made / "zoo", "mamba2")
    write_beir(made / "beir")
    options: dict[str, Any] = {
        "batch_size": 3,
        "gradient_accumulation": 2,
        "loss": "listnet",
        "negatives": 4,
        "depth": 20,
        "skip": 1,
        "heldout_share": 0.5,
        "documents": "maxp",
        "max_tokens": 48,
        "passage_tokens": 9,
        "stride": 5,
        "max_passages": 2,
        "method": "full",
        "steps": 2,
        "learning_rate": 0.01,
        "schedule": "linear",
        "warmup": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "dtype": "float32",
        "gradient_checkpointing": True,
        "seed": 7,
        "checkpoint_every": 11,
    }
    line = ["finetune", "rerank", str(made / "zoo"), str(made / "out"), "--train", str(made / "beir"), "--no-packing"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        line += [option] if isinstance(value, bool) else [option, str(value)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    (made / "printed").write_text(result.stdout)
    recipe = json.loads((made / "out" / "run.json").read_text())["recipe"]
    assert recipe.items() >= (options | {"packing": False}).items()
    others = {"model", "revision", "train", "heldout", "run", "heldout_run", "packing", "epochs", "trust_remote_code"}
    adapters = {"rank", "alpha", "dropout", "dora", "target_modules", "report_to"}
    assert set(RerankerSettings.model_fields) == options.keys() | others | adapters
    return made


@pytest.fixture
def ssm_zoo(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line in this process, in a folder with links to the module's folder."""
    for name in ("zoo", "beir", "out"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def test_results_of_a_training_are_printed(folder: Path) -> None:
    printed = (folder / "printed").read_text()
    report = json.loads((folder / "out" / "report.json").read_text())
    before, after = (f"{part['ndcg@10']:.4f}" for part in report["evaluations"])
    assert f"held-out nDCG@10: {before} before, {after} after" in printed and "in the order of BM25" in printed
    assert len((folder / "out" / "heldout.txt").read_text().split()) == 6


def test_systems_are_compared_on_the_held_out_queries(
    ssm_zoo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_plot(*arguments: Any) -> None:
        raise OSError("the disk is full")

    line = ("evaluate", "rerank", "out", "beir,test", "--queries", "out/heldout.txt", "--depth", 20, "--runs", "runs")
    with monkeypatch.context() as patch:
        patch.setattr("ssm_zoo.reports.reranking_plot.write_reranking_plot", no_plot)
        result = ssm_zoo(*line, "--output", "first.json", "--plot", "first.png")
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    assert "the plot: the disk is full; going on without it" in result.stderr
    settings = json.loads((tmp_path / "first.json").read_text())["settings"]
    assert settings["split"] == "test" and settings["folder"] == "beir" and settings["revision"] is None
    assert settings["trust_remote_code"] is False
    again = ssm_zoo(*line)
    assert again.exit_code == 2 and re.search(r"--runs: runs/out.trec exists. Choose another folder, or", again.stderr)
    assert "6 queries, 36 pairs" in result.stdout and "p (Holm)" in result.stdout.replace("\n", " ")
    result = ssm_zoo(
        *("evaluate", "rerank", "out", "beir", "--queries", "out/heldout.txt", "--depth", 20, "--split", "test"),
        *("--against", "runs/out.trec", "--run", "runs/BM25.trec", "--output", "o.json", "--plot", "o.png"),
    )
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    report = json.loads((tmp_path / "o.json").read_text())
    assert list(report["systems"]) == ["out", "out.trec", "BM25.trec"]
    ours, again, first = report["systems"].values()
    trained = json.loads((tmp_path / "out" / "report.json").read_text())
    for key in ("ndcg@10", "mrr@10", "map", "recall@10", "recall@20"):
        assert ours[key] == again[key] == pytest.approx(trained["evaluations"][1][key])
        assert first[key] == pytest.approx(trained["first_stage"][key])
    assert ours["rule"] == {"rule": "maxp", "passage_tokens": 9, "stride": 5, "max_passages": 2}
    assert ours["max_tokens"] == 48 and ours["by_query"]["ndcg@10"].keys() == first["by_query"]["ndcg@10"].keys()
    low, high = first["intervals"]["map"]
    assert low <= first["map"] <= high
    rows = {(row["first"], row["second"], row["measure"]): row for row in report["comparisons"]}
    assert len(rows) == 6 and rows["out", "out.trec", "mrr@10"]["p_randomisation"] == 1.0
    row = rows["out", "BM25.trec", "ndcg@10"]
    assert row["difference"] == pytest.approx(ours["ndcg@10"] - first["ndcg@10"]) and row["p_holm"] <= 1
    assert report["settings"]["only"] == "heldout.txt" and report["settings"]["against"] == ["out.trec"]
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (tmp_path / "o.json").read_text()


MISTAKES = [
    (("evaluate", "rerank", "zoo", "beir"), "model: .*zoo has 1 missing weights: score.weight"),
    (("evaluate", "rerank", "out", "nowhere"), "`folder` must be an existing folder, got 'nowhere'."),
    (("evaluate", "rerank", "out", "beir", "--split", "dev"), "the judgements must be one of .*, test, got 'dev'."),
    (("evaluate", "rerank", "out", "beir", "--queries", "ids"), "line 2: 'q99' must be the id of a query with a"),
    (("evaluate", "rerank", "out", "beir", "--run", "bad.trec"), "run: 'bad.trec', line 1 must have six columns"),
    (("evaluate", "rerank", "out", "beir", "--against", "bad.trec"), "against: 'bad.trec', line 1 must have six"),
    (("evaluate", "rerank", "out", "beir,dev"), "the judgements must be one of .*, test, got 'dev'."),
    (("evaluate", "rerank", "out", "beir,dev", "--split", "test"), "`folder` and --split must not both name the judg"),
    (
        ("evaluate", "rerank", "out", "beir", "--runs", "ids/lists"),
        "--runs: ids/lists cannot be made, because",
    ),
    (("evaluate", "rerank", "out", "beir", "--runs", "ids"), "--runs: ids must be a folder, and it is a file."),
    (("evaluate", "rerank", "out", "beir", "--output", "ids"), "--output: ids exists and is no earlier ssm-zoo eval"),
    (("finetune", "rerank", "zoo", "new", "--train", "beir", "--loss", "margin_mse"), "`loss` 'margin_mse' needs a"),
    (("finetune", "rerank", "zoo", "new", "--train", "beir", "--stride", "9"), "`stride` has no effect with documents"),
]


def test_what_is_not_read_or_measured_is_said(ssm_zoo: Command, tmp_path: Path) -> None:
    """Of six documents of a query two have 11 tokens, the others 10; two passages of 5 tokens reach the tenth."""
    (tmp_path / "beir").unlink()
    qrels = write_beir(tmp_path / "beir") / "qrels" / "test.tsv"
    qrels.write_text(re.sub(r"(?m)^(q11\t.*)\t1$", r"\1\t0", qrels.read_text()))
    shutil.copytree(tmp_path / "out" / "model", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    config["reranking"] |= {"passage_tokens": 5}
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    result = ssm_zoo("evaluate", "rerank", "short", "beir", "--output", "o.json")
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    assert "short: 33.3% of the pairs are longer than what it reads (maxp, 48 tokens)" in result.stdout
    assert "queries without a relevant document, left out: 1\n" in result.stdout
    report = json.loads((tmp_path / "o.json").read_text())
    assert (report["queries"], report["without_relevant"], report["pairs"]) == (11, 1, 66)
    assert report["systems"]["short"]["cut"] == pytest.approx(22 / 66) and "cut" not in report["systems"]["BM25"]


@pytest.mark.parametrize(("line", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    ssm_zoo: Command, tmp_path: Path, line: tuple[str, ...], message: str
) -> None:

    (tmp_path / "ids").write_text("q0\nq99\n")
    (tmp_path / "bad.trec").write_text("q0 d0-0 1\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = ssm_zoo(*line, *(("--plot", "o.png") if line[0] == "evaluate" else ()))
    assert result.exit_code == 2 and re.search(message, result.stderr), f"{result.stderr}\n{result.exception!r}"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plot", "ids"), r"--plot: the picture needs a name that ends in \.png, got ids"),
        (("--plot", "o.png", "--output", "./o.png"), r"--plot: o\.png is also the report of --output"),
        (("--plot", "photo.png", "--output", "o.json"), r"--plot: photo\.png exists\. Choose another name, or replace"),
    ],
)
def test_the_picture_replaces_no_other_file(
    ssm_zoo: Command, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    for name in ("ids", "photo.png"):
        (tmp_path / name).write_text("q0\n")
    result = ssm_zoo("evaluate", "rerank", "out", "beir", *options)
    assert result.exit_code == 2 and re.search(message, result.stderr), f"{result.stderr}\n{result.exception!r}"
    assert all((tmp_path / name).read_text() == "q0\n" for name in ("ids", "photo.png"))
    assert not (tmp_path / "o.png").exists()


def test_every_system_has_a_run_file_of_its_own(tmp_path: Path) -> None:
    files = _run_files(tmp_path / "runs", ["org/model", "org_model", "ORG_model", "a (2)"], overwrite=False)
    names = [path.stem for path in files.values()]
    assert names == ["org_model", "org_model-2", "ORG_model-3", "a_2_"]
    assert not (tmp_path / "runs").exists()


def test_help_explains_every_option_without_torch() -> None:
    group: Any = typer.main.get_command(app)
    for name in (("finetune", "rerank"), ("evaluate", "rerank")):
        text = " ".join(CliRunner().invoke(app, [*name, "--help"]).stdout.split())
        for parameter in group.commands[name[0]].commands[name[1]].params:
            assert parameter.help and " ".join(parameter.help.split()) in text, parameter.name
    program = (
        "import sys; from typer.testing import CliRunner; from ssm_zoo.cli.main import app;"
        "assert all(CliRunner().invoke(app, [*name, '--help']).exit_code == 0 for name in"
        "    [('finetune', 'rerank'), ('evaluate', 'rerank')]);"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'sentence_transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
