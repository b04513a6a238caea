"""The comparison of rerankers at a tiny size: corpora, a whole run that is resumed, and the table."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("ir_measures", reason="ir-measures is not installed")
pytest.importorskip("bm25s", reason="bm25s is not installed")

from ranking_data import write_beir
from reranking import BIDIRECTIONAL, main, table_of
from reranking_speed import RETNET, TRANSFORMER
from reranking_texts import documentation, pages, split_collection

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


def test_a_run_from_corpus_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_beir(tmp_path / "beir")
    arm = RETNET + BIDIRECTIONAL
    line = ["--corpora", "cranfield", "--cranfield", str(tmp_path / "beir"), "--arms", arm, "--seeds", "0"]
    line += ["--rates", "1e-3", "--steps", "1", "--pretrain-steps", "2", "--width", "32", "--layers", "2"]
    line += ["--vocabulary", "300", "--max-tokens", "64", "--row-tokens", "32", "--work", str(tmp_path / "work")]
    main([*line, "--output", str(tmp_path)])
    (path,) = tmp_path.glob("reranking-*.jsonl")
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(row["arm"], row["purpose"], row["queries"]) for row in rows] == [
        (arm, "tuning", 1),
        (arm, "comparison", 5),
    ]
    config = json.loads(next((tmp_path / "work").glob("*comparison*/model/config.json")).read_text())
    assert config["bidirectional"] and config["model_type"] == "zoo_retnet"
    for row in rows:
        values = row["by_query"]["ndcg@10"].values()
        assert row["ndcg@10"] == pytest.approx(sum(values) / len(values)) and row["bm25"]["map"] > 0
        assert str(tmp_path) not in json.dumps(row["by_query"])
    assert "cranfield: 5 test queries" in capsys.readouterr().out
    main([*line, "--resume", str(path)])
    assert len(path.read_text().splitlines()) == 2


def row(arm: str, seed: int, values: list[float]) -> dict[str, Any]:
    by_query = {f"q{index}": value for index, value in enumerate(values)}
    mean = sum(values) / len(values)
    bm25 = dict.fromkeys(by_query, 0.25)
    return {
        "arm": arm,
        "seed": seed,
        "queries": len(values),
        **dict.fromkeys(("ndcg@10", "mrr@10", "map"), mean),
        "bm25": dict.fromkeys(("ndcg@10", "mrr@10", "map"), 0.25),
        "by_query": {"ndcg@10": by_query},
        "bm25_by_query": {"ndcg@10": bm25},
    }


def test_the_table_has_ranges_and_tests_on_the_means_of_queries() -> None:
    """Over 4 queries, all better: 2 of 16 choices of the signs are as far from 0, twice corrected for 2 arms."""
    rows = [row(TRANSFORMER, seed, [0.5 + 0.1 * seed] * 4) for seed in (0, 1)]
    rows += [row(RETNET, seed, [0.5, 0.5, 0.6, 0.6]) for seed in (0, 1)]
    table = table_of("docs", rows)
    assert "| transformer | 0.550 (0.500 to 0.600) |" in table and "| BM25 | 0.250 | 0.250 | 0.250 |" in table
    assert "0.125 (0.250)" in table and "p against transformer" in table
    assert "1.000 (1.000)" in table
