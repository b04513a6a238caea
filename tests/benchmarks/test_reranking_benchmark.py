"""The comparison of rerankers at a tiny size: corpora, a whole run that is resumed, and the table."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("ir_measures", reason="ir-measures is not installed")
pytest.importorskip("bm25s", reason="bm25s is not installed")

from ranking_data import write_beir
from reranking import main
from reranking_speed import MAMBA, RETNET, TRANSFORMER
from reranking_table import BIDIRECTIONAL, MARGIN, table_of, verdict_of, verdicts_of
from reranking_texts import LONGEST, documentation, pages, split_collection

from ssm_zoo.evaluation.reranking_data import read_judged

BODY = "This sentence has more than enough words to count as the body of a page that a reader could look for, it seems."
SOURCE = f'''
def one():
    """Return the first of many.

    {BODY} first
    """

def _hidden():
    """Return what is not public.

    {BODY} hidden
    """

def short():
    """Return something short here.

    Few words.
    """

class Twice:
    """Share a summary line.

    {BODY} second
    """

    def method(self):
        """Share a summary line.

        {BODY} third
        """
'''


def test_pages_are_docstrings_without_their_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pages_of_a_test_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('never run')")
    # A name with "test" in it would be left out: tests are no documentation.
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "__init__.py").write_text("")
    (tmp_path / "manual" / "part.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    found = list(pages("manual"))
    assert [(name, summary) for name, summary, _ in found] == [
        ("manual.part.one", "Return the first of many."),
        ("manual.part.Twice", "Share a summary line."),
        ("manual.part.method", "Share a summary line."),
    ]
    assert all("Return" not in body and "Share" not in body for _, _, body in found)
    assert documentation(["manual"], tmp_path / "docs") == 3
    judged = read_judged(tmp_path / "docs")
    assert list(judged.queries.values()) == ["Return the first of many."] and len(judged.documents) == 3
    assert judged.documents["d0"].endswith("first") and judged.relevant("q0") == {"d0": 1}
    with pytest.raises(ValueError, match="`package` must be an installed package, got 'no_such_package'"):
        list(pages("no_such_package"))


def test_queries_are_in_one_part_each(tmp_path: Path) -> None:
    counts = split_collection(write_beir(tmp_path / "beir"), tmp_path / "split")
    parts = {name: read_judged(tmp_path / "split", name).queries for name in ("train", "dev", "test")}
    assert {name: len(part) for name, part in parts.items()} == counts == {"test": 5, "dev": 1, "train": 6}
    assert len({query for part in parts.values() for query in part}) == 12
    fewer = split_collection(tmp_path / "beir", tmp_path / "few", most={"test": 2, "dev": 1, "train": 3})
    assert fewer == {"test": 2, "dev": 1, "train": 3}
    assert set(read_judged(tmp_path / "few", "test").queries) <= set(parts["test"])


def test_long_pages_are_cut_behind_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide" / "__init__.py").write_text("")
    words = " ".join(f"word{index}" for index in range(LONGEST + 5))
    (tmp_path / "guide" / "part.py").write_text(
        f'def one():\n    """Return the first of many.\n\n    {words}\n    """\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert documentation(["guide"], tmp_path / "docs") == 1
    (text,) = read_judged(tmp_path / "docs").documents.values()
    assert len(text.split()) == LONGEST and text.endswith(f"word{LONGEST - 1}")


def test_a_run_from_corpus_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also a pretrained model with LoRA, which is the model that the arm's pretraining has left."""
    write_beir(tmp_path / "beir")
    arm = TRANSFORMER + BIDIRECTIONAL
    line = [
        "--corpora",
        "cranfield",
        "--cranfield",
        str(tmp_path / "beir"),
        "--arms",
        arm,
        "--seeds",
        "0",
        "--batch",
        "2",
    ]
    line += ["--rates", "1e-4", "1e-3", "--steps", "1", "--pretrain-steps", "2", "--width", "32", "--layers", "2"]
    line += ["--vocabulary", "300", "--max-tokens", "64", "--row-tokens", "32", "--work", str(tmp_path / "work")]
    line += ["--pretrained-seeds", "0", "--pretrained-steps", "1"]
    main([*line, "--output", str(tmp_path)])
    (path,) = tmp_path.glob("reranking-*.jsonl")
    (folder,) = (tmp_path / "work").glob("*-bidirectional")
    config = json.loads((folder / "config.json").read_text())
    assert config["bidirectional"] and config["model_type"] == "zoo_hybrid"
    assert set(config["mixer_types"]) == {"full_attention"}
    assert config["initializer_range"] == pytest.approx(96**-0.5)  # width 32
    (causal,) = (tmp_path / "work").glob("*-pretrained-0-2/model")
    line += ["--pretrained", f"large={causal}"]
    main([*line, "--resume", str(path)])
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(row["arm"], row["rate"], row["queries"]) for row in rows] == [
        (arm, 1e-4, 5),
        (arm, 1e-3, 5),
        ("large", 3e-4, 5),
    ]
    # With its adapters.
    assert rows[2]["pretrain_steps"] == 0 and rows[2]["parameters"] > rows[0]["parameters"]
    for row in rows:
        values = row["by_query"]["ndcg@10"].values()
        assert row["ndcg@10"] == pytest.approx(sum(values) / len(values)) and row["bm25"]["map"] > 0
        chance = row["random_by_query"]["ndcg@10"]
        assert chance.keys() == row["by_query"]["ndcg@10"].keys()
        assert row["random"]["ndcg@10"] == pytest.approx(sum(chance.values()) / len(chance))
        assert row["random"]["ndcg@10"] > 0
        assert str(tmp_path) not in json.dumps(row["by_query"])
    printed = capsys.readouterr().out
    assert "cranfield: 5 test queries" in printed and "random order of its list (chance)" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "work").glob("cranfield-*"))
    main([*line, "--resume", str(path)])
    assert len(path.read_text().splitlines()) == 3
    capsys.readouterr()
    main([*line, "--seeds", "0", "1", "--plan", "--resume", str(path)])
    assert capsys.readouterr().out.startswith("1 runs: 1 steps")
    with pytest.raises(SystemExit):
        main([*line, "--pretrained", "no-folder"])


def row(arm: str, seed: int, values: list[float]) -> dict[str, Any]:
    by_query = {f"q{index}": value for index, value in enumerate(values)}
    mean = sum(values) / len(values)
    bm25 = dict.fromkeys(by_query, 0.25)
    chance = dict.fromkeys(by_query, 0.1)
    return {
        "arm": arm,
        "seed": seed,
        "rate": 1e-3,
        "parameters": 1000,
        "steps": 10,
        "batch": 4,
        "pretrain_steps": 100,
        "training_seconds": 8.0,
        "queries": len(values),
        **dict.fromkeys(("ndcg@10", "mrr@10", "map"), mean),
        "bm25": dict.fromkeys(("ndcg@10", "mrr@10", "map"), 0.25),
        "random": dict.fromkeys(("ndcg@10", "mrr@10", "map"), 0.1),
        "by_query": {"ndcg@10": by_query, "mrr@10": by_query},
        "bm25_by_query": {"ndcg@10": bm25, "mrr@10": bm25},
        "random_by_query": {"ndcg@10": chance, "mrr@10": chance},
    }


def test_the_table_has_ranges_and_tests_on_the_means_of_queries() -> None:
    """Over 4 queries, all better: 2 of 16 choices of the signs are as far from 0, twice corrected for 2 arms."""
    rows = [row(TRANSFORMER, seed, [0.5 + 0.1 * seed] * 4) for seed in (0, 1)]
    rows += [row(RETNET, seed, [0.5, 0.5, 0.6, 0.6]) for seed in (0, 1)]
    table = table_of("docs", rows)
    assert "| transformer | 1,000 | 0.001 | 0.550 (0.500 to 0.600) |" in table
    assert "| BM25 | | | 0.250 | 0.250 | 0.250 |" in table and "(chance) | | | 0.100 |" in table
    assert "| 0.250 / 0.250 |  | 40.0 |" in table and "| 0.250 / 0.250 | 1.000 / 1.000 | 40.0 |" in table


def test_competitive_needs_an_interval_and_a_reference_that_has_learnt() -> None:
    def test_of(p: float, difference: float, low: float) -> dict[str, float]:
        return {"p_holm": p, "difference": difference, "low": low}

    assert verdict_of(test_of(0.5, -0.01, -MARGIN / 2), learnt=True) == "confirmed"
    assert verdict_of(test_of(0.5, -0.01, -2 * MARGIN), learnt=True) == "undecided"
    assert verdict_of(test_of(0.01, -0.2, -0.3), learnt=True) == "refuted"
    assert verdict_of(test_of(0.01, 0.2, 0.1), learnt=True) == "confirmed"
    assert verdict_of(test_of(0.01, -0.2, -0.3), learnt=False) == "undecided"


def test_verdicts_name_chance_first_stage_and_reference() -> None:
    """Over 20 queries, all better, the randomisation test is far below the level."""
    rows = [
        row(TRANSFORMER, 0, [0.5] * 20),
        row(MAMBA, 0, [0.2] * 20),
        row("large", 0, [0.4] * 20),
        row("small", 0, [0.39] * 20),
    ]
    for own in rows[2:]:
        own["pretrain_steps"] = 0
    lines = verdicts_of("docs", rows, "large").splitlines()
    assert lines[0] == "docs, transformer: above random order; above BM25"
    assert "docs, mamba: above random order; below BM25; competitive with transformer: refuted" in lines[1]
    assert lines[2] == "docs, large: above random order; above BM25"
    assert "competitive with large: refuted, nDCG@10 -0.010" in lines[3]
    weak = [row(TRANSFORMER, 0, [0.1] * 20), row(MAMBA, 0, [0.2] * 20)]
    assert verdicts_of("docs", weak).startswith("docs, transformer: not apart from random order; below BM25")
    assert "transformer: undecided" in verdicts_of("docs", weak) and "itself is not above" in verdicts_of("docs", weak)
