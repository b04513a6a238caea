"""Judged collections, runs, measures and tests of rerankers: trec_eval's order, its numbers, and every mistake."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("ir_measures", reason="ir-measures is not installed")
pytest.importorskip("bm25s", reason="bm25s is not installed")

import pytrec_eval
from ranking_data import write_beir
from sentence_transformers.cross_encoder import CrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from tiny_checkpoints import save_tokenizer
from transformers import AutoTokenizer

from ssm_zoo.evaluation.long_documents import LongDocuments, long_documents
from ssm_zoo.evaluation.reranking import means, measure_run, pair_lengths, rerank
from ssm_zoo.evaluation.reranking_data import (
    JudgedCollection,
    bm25_run,
    cut,
    read_judged,
    read_run,
    without_list,
    write_run,
)
from ssm_zoo.evaluation.significance import compare, holm, interval


class Letters(CrossEncoder):
    """A reranker that counts the letters "s" of the document, and adds a wave over its length and characters."""

    def __init__(self, truncation: bool | str = "only_second") -> None:
        nn.Module.__init__(self)
        self.__dict__["module"] = SimpleNamespace(processing_kwargs={"text": {"truncation": truncation}})
        self.__dict__["tokenizer_in_use"] = lambda queries, texts, **options: {
            "input_ids": [list(query) for query in queries]
        }

    def __getitem__(self, index: Any) -> Any:
        return self.__dict__["module"]

    tokenizer = property(lambda self: self.__dict__["tokenizer_in_use"])  # pyright: ignore[reportAssignmentType]
    max_seq_length = 100  # pyright: ignore[reportAssignmentType]

    def predict(self, inputs: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        scores = [document.count("s") + 0.9 * math.sin(sum(document.encode())) for _, document in inputs]
        return torch.tensor(scores) if options.get("convert_to_tensor") else np.array(scores)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "beir", graded=True)


# Order and measures


def test_measures_are_trec_eval_s_ties_included() -> None:
    """Scores of few values, so that most are equal; and two that are equal in float32 only."""
    generator = np.random.default_rng(0)
    documents = [f"d{number}" for number in range(40)]
    queries = [f"q{number}" for number in range(12)]
    run = {query: {one: float(generator.integers(4)) for one in documents} for query in queries}
    run["q0"]["d3"], run["q0"]["d4"] = 5.0, 5.0 + 1e-9
    grades = {query: {one: int(generator.integers(3)) for one in documents[::3]} for query in queries}
    collection = JudgedCollection(
        dict.fromkeys(queries, "a"), dict.fromkeys(documents, "b"), grades, frozenset(queries)
    )
    values = measure_run(collection, run, 100)
    theirs = {"ndcg@10": "ndcg_cut_10", "map": "map", "recall@10": "recall_10", "recall@100": "recall_100"}
    found: Any = pytrec_eval.RelevanceEvaluator(grades, {*theirs.values(), "recip_rank"}).evaluate(run)
    for ours, name in theirs.items():
        assert values[ours] == pytest.approx({query: found[query][name] for query in queries}, abs=1e-9)
    first = {query: found[query]["recip_rank"] for query in queries}
    assert values["mrr@10"] == pytest.approx({query: value if value >= 0.1 else 0 for query, value in first.items()})
    assert list(cut(run, 2)["q0"]) == ["d4", "d3"]


def test_a_query_without_a_list_counts_as_zero(beir: Path) -> None:
    judged = read_judged(beir)
    lists: dict[str, dict[str, float]] = {query: {} for query in judged.queries}
    lists["q0"] = {"d0-0": 1.0}
    values = measure_run(judged, lists, 10)
    assert values["mrr@10"]["q0"] == 1.0 and math.fsum(values["mrr@10"].values()) == 1.0
    assert means(values)["mrr@10"] == pytest.approx(1 / 12)
    assert values["ndcg@10"]["q0"] == pytest.approx(2 / (2 + 1 / math.log2(3)))


def test_numbers_are_those_of_sentence_transformers_where_it_measures_the_same(beir: Path) -> None:
    """Its ideal ranking knows the list alone: here the lists have all relevant documents, which are graded alike."""
    judged = read_judged(beir)
    alike = {query: dict.fromkeys(grades, 1) for query, grades in judged.grades.items()}
    judged = JudgedCollection(judged.queries, judged.documents, alike, judged.known)
    lists = bm25_run(judged, 100)
    assert all(len(documents) == 6 for documents in lists.values())
    ranked = rerank(Letters(), judged, lists, rule=LongDocuments())
    measured = means(measure_run(judged, ranked, 100))
    samples = [
        {
            "query": judged.queries[query],
            "positive": [judged.documents[one] for one in judged.relevant(query)],
            "documents": [judged.documents[one] for one in cut(lists, 100)[query]],
        }
        for query in judged.queries
    ]
    evaluator = CrossEncoderRerankingEvaluator(samples, always_rerank_positives=False, write_csv=False)
    evaluator.store_metrics_in_model_card_data = lambda *arguments: None
    found: Any = evaluator(Letters())
    for name in ("ndcg@10", "mrr@10", "map"):
        assert measured[name] == pytest.approx(float(found[name]))
    assert 0 < measured["map"] < 1


def test_bm25_lists_what_shares_a_word(beir: Path) -> None:
    lists = bm25_run(read_judged(beir), 4)
    assert all(
        list(documents) == [f"d{query[1:]}-{number}" for number in (5, 4, 3, 2)] for query, documents in lists.items()
    )


def test_bm25_of_documents_without_words_lists_nothing() -> None:
    """Stop words are no words."""
    judged = JudgedCollection(
        {"q": "cat", "r": "the"}, {"d": "the", "e": ""}, {"q": {"d": 1}, "r": {"d": 1}}, frozenset()
    )
    assert bm25_run(judged, 10) == {"q": {}, "r": {}}


def test_runs_are_written_as_they_are_read(beir: Path, tmp_path: Path) -> None:
    judged = read_judged(beir)
    lists = {
        query: {f"d{query[1:]}-{n}": math.sin(7 * n + int(query[1:])) for n in range(6)} for query in judged.queries
    }
    write_run(lists, tmp_path / "a.trec", "mine")
    lines = (tmp_path / "a.trec").read_text().splitlines()
    assert lines[0].split()[:4] == ["q0", "Q0", "d0-2", "1"] and lines[0].endswith(" mine") and len(lines) == 72
    again = read_run(tmp_path / "a.trec", "run", judged)
    assert {query: list(scores) for query, scores in again.items()} == {
        query: list(scores) for query, scores in cut(lists, 6).items()
    }
    write_run(again, tmp_path / "b.trec", "mine")
    assert (tmp_path / "b.trec").read_text() == (tmp_path / "a.trec").read_text()


# Long documents


def test_passages_cover_a_document(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rule = LongDocuments("maxp", passage_tokens=4, stride=3, max_passages=3)
    assert rule.parts(tokenizer, "abcdefgh") == ["abcd", "defg", "gh"]
    assert rule.parts(tokenizer, "abcdefghijklmno") == ["abcd", "defg", "ghij"]
    assert rule.parts(tokenizer, "abcd") == ["abcd"] and rule.parts(tokenizer, "") == [""]
    assert LongDocuments("longp").parts(tokenizer, "abcdefgh") == ["abcdefgh"]


def test_pairs_of_which_a_part_is_not_read_are_counted(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    pairs = [("xy", "abcdefghij"), ("xy", "abcdefghijk"), ("xyz", "ab"), ("xy", "")]
    passages = LongDocuments("maxp", passage_tokens=4, stride=3, max_passages=3)  # reach the tenth token
    found = pair_lengths(tokenizer, pairs, passages, 6)
    assert found["cut"] == 1 / 4 and found["tokens"] == (6 * 6 + 5 + 2) / 8
    assert found["largest"] == max(tokenizer("xyz")["input_ids"])
    assert pair_lengths(tokenizer, pairs, passages, 5)["cut"] == 2 / 4
    assert pair_lengths(tokenizer, pairs, LongDocuments(), 12)["cut"] == 1 / 4
    assert pair_lengths(tokenizer, pairs, LongDocuments(), None) == {**found, "cut": 0.0, "tokens": 32 / 4}


def test_a_document_scores_as_its_best_passage(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    reranker = Letters()
    reranker.__dict__["tokenizer_in_use"] = tokenizer
    documents = {"d0": "aaaassssaaaa", "d1": "saaasaaasaaa"}
    judged = JudgedCollection({"q": "a"}, documents, {"q": {"d0": 1}}, frozenset("q"))
    run = {"q": dict.fromkeys(documents, 0.0)}
    whole = rerank(reranker, judged, run, rule=LongDocuments())["q"]
    best = rerank(reranker, judged, run, rule=LongDocuments("maxp", passage_tokens=4, stride=4, max_passages=3))["q"]
    for name, text in documents.items():
        parts = [("a", text[start : start + 4]) for start in (0, 4, 8)]
        assert best[name] == pytest.approx(reranker.predict(parts).max())
        assert whole[name] == pytest.approx(reranker.predict([("a", text)])[0])
    assert best["d0"] > best["d1"] + 2


def test_the_rule_is_that_of_the_configuration() -> None:
    rule = LongDocuments("maxp", 20, 10, 3)
    assert long_documents(type("Config", (), {"reranking": rule.entry()})()) == rule
    assert long_documents(object()) == LongDocuments()
    for entry in ({"rule": "sum"}, ["maxp"], {"rule": "maxp", "stride": 0}, {"rule": "maxp", "length": 3}):
        with pytest.raises(ValueError, match=r"`reranking` in config.json must be written by"):
            long_documents(type("Config", (), {"reranking": entry})())
    with pytest.raises(ValueError, match=r"must have a stride of at most passage_tokens, 20, .*, got 21"):
        long_documents(type("Config", (), {"reranking": {**rule.entry(), "stride": 21}})())


# Significance


def test_the_randomisation_test_counts_all_signs_of_few_queries() -> None:
    first = {"a": 0.9, "b": 0.5, "c": 0.7, "d": 0.2}
    second = {"a": 0.4, "b": 0.6, "c": 0.3, "d": 0.2}
    differences = np.array([first[query] - second[query] for query in first])
    signs = np.array(list(itertools.product([1, -1], repeat=4)))
    expected = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean()
    found = compare(first, second)
    assert found["p_randomisation"] == pytest.approx(expected) and found["difference"] == pytest.approx(0.2)
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    swapped = compare(second, first)
    assert swapped["p_randomisation"] == found["p_randomisation"] and swapped["difference"] == -found["difference"]


def test_p_values_agree_with_the_t_test_of_many_queries() -> None:
    from scipy.stats import ttest_rel

    generator = np.random.default_rng(0)
    first = {str(number): float(value) for number, value in enumerate(generator.normal(0.03, 0.25, size=300))}
    second = dict.fromkeys(first, 0.0)
    expected = ttest_rel(list(first.values()), list(second.values())).pvalue  # pyright: ignore[reportAttributeAccessIssue]
    found = compare(first, second, seed=1)
    assert 0.01 < expected < 0.5
    assert found["p_randomisation"] == pytest.approx(expected, abs=0.02)
    assert found["p_bootstrap"] == pytest.approx(expected, abs=0.02)
    assert found["low"] < found["difference"] < found["high"]
    low, high = interval(list(first.values()))
    assert (low, high) == pytest.approx((found["low"], found["high"]), abs=5e-3)
    assert compare(first, first)["p_randomisation"] == 1.0


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="`second` must have finite values, got nan for the query 'b'"):
        compare({"a": 1.0, "b": 0.5}, {"a": 0.5, "b": math.nan})


def test_holm_corrects_for_the_number_of_comparisons() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


# Mistakes

CORPUS = '{"_id": "d0-0", "text": "x"}\n'
MISTAKES = [
    pytest.param(
        "qrels/test.tsv", "a\tb\tc\nq0\td0-0\n", r"test.tsv', line 2 must have three columns .*, got 2", id="columns"
    ),
    pytest.param("qrels/test.tsv", "a\tb\tc\nq0\td9-9\t1\n", r"line 2: corpus.jsonl has no id 'd9-9'", id="document"),
    pytest.param("qrels/test.tsv", "a\tb\tc\nq99\td0-0\t1\n", r"line 2: queries.jsonl has no id 'q99'", id="query"),
    pytest.param(
        "qrels/test.tsv", "a\tb\tc\nq0\td0-0\t-1\n", r"the grade must be .* 0 to 1,000, got '-1'", id="negative"
    ),
    pytest.param("qrels/test.tsv", "a\tb\tc\nq0\td0-0\tnan\n", r"the grade must be .* to 1,000, got 'nan'", id="nan"),
    # As 32 bits, 2^32 is 0: a relevant document would count as not relevant.
    pytest.param(
        "qrels/test.tsv",
        "a\tb\tc\nq0\td0-0\t4294967296\n",
        r"the grade must be .* to 1,000, got '4294967296'",
        id="large",
    ),
    pytest.param("qrels/test.tsv", "q0\td0-0\t1\n", r"line 1 must be a header", id="header"),
    pytest.param(
        "qrels/test.tsv", "a\tb\tc\nq0\td0-0\t1\nq0\td0-0\t0\n", r"line 3 judges document 'd0-0' .* again", id="twice"
    ),
    pytest.param("qrels/test.tsv", "a\tb\tc\nq0\td0-0\t0\n", r"has no query with a relevant document", id="none"),
    pytest.param("corpus.jsonl", CORPUS * 2, r"corpus.jsonl', line 2 repeats the id 'd0-0'", id="repeated"),
    pytest.param("corpus.jsonl", '{"id": "d", "text": "x"}', r"line 1 must be an object with texts under", id="keys"),
    pytest.param("corpus.jsonl", '{"_id": "a b", "text": "x"}', r"the id must be without spaces", id="spaces"),
    pytest.param("corpus.jsonl", "", r"corpus.jsonl' has no texts", id="empty"),
    pytest.param(
        "queries.jsonl", '{"_id": "q0", "text": " "}', r"line 1: the query 'q0' must have a text", id="no-text"
    ),
]


@pytest.mark.parametrize(("file", "content", "message"), MISTAKES)
def test_a_mistake_names_file_and_line(beir: Path, file: str, content: str, message: str) -> None:
    (beir / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_judged(beir)


def test_a_split_is_asked_for_where_there_are_several(beir: Path) -> None:
    write_beir(beir, split="train")
    with pytest.raises(ValueError, match=r"the judgements must be one of '.*qrels', test, train, got no split"):
        read_judged(beir)
    with pytest.raises(ValueError, match=r"test, train, got 'dev'"):
        read_judged(beir, "dev")
    assert len(read_judged(beir, "train").queries) == 12


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q0 Q0 d0-0 1 0.5", r"run: '.*a.trec', line 13 must have six columns .*, got 5"),
        ("q0 Q0 d9-9 1 0.5 a", r"line 13: corpus.jsonl has no id 'd9-9'"),
        ("q77 Q0 d0-0 1 0.5 a", r"line 13: queries.jsonl has no id 'q77'"),
        ("q0 Q0 d0-0 1 nan a", r"line 13: the score must be a finite number in float32, got 'nan'"),
        ("q0 Q0 d0-0 1 1e39 a", r"line 13: the score must be a finite number in float32, got '1e39'"),
        ("q0 Q0 d0-0 1 x a", r"line 13: the score must be a finite number in float32, got 'x'"),
        ("q0 Q0 d0-1 1 0.5 a", r"line 13 has document 'd0-1' again in the list of query 'q0'"),
        (None, r"must have a list for at least one of the 11 queries with judgements, and has none. Check the split."),
    ],
)
def test_a_mistake_in_a_run_names_the_line(beir: Path, tmp_path: Path, line: str | None, message: str) -> None:
    lines = [f"q{number} Q0 d{number}-1 1 0.5 a" for number in range(12)]
    lines = lines[:1] if line is None else [*lines, line]
    (tmp_path / "a.trec").write_text("\n".join(lines))
    judged = read_judged(beir)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "a.trec", "run", judged.only(list(judged.queries)[1:]) if line is None else judged)


def test_a_query_without_lines_has_an_empty_list(beir: Path, tmp_path: Path) -> None:
    """As BM25 gives it for a query that shares no word with a document; `write_run` writes no line for it."""
    queries = (beir / "queries.jsonl").read_text().replace("find llla", "zzz")
    (beir / "queries.jsonl").write_text(queries)
    judged = read_judged(beir)
    lists = bm25_run(judged, 3)
    write_run(lists, tmp_path / "a.trec", "BM25")
    again = read_run(tmp_path / "a.trec", "run", judged)
    assert list(again) == list(judged.queries) and again["q11"] == {} and without_list(again) == 1
    assert {query: list(scores) for query, scores in again.items()} == {q: list(of) for q, of in lists.items()}


def test_scores_and_queries_are_checked(beir: Path) -> None:
    judged = read_judged(beir)
    lists = bm25_run(judged, 3)
    reranker = Letters()
    reranker.predict = lambda inputs, **options: torch.full((len(inputs),), math.nan)
    with pytest.raises(ValueError, match=r"the scores must be finite, but that of the query 'find aaaa' is nan"):
        rerank(reranker, judged, lists, rule=LongDocuments())
    Letters.max_seq_length = 9  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with pytest.raises(ValueError, match=r"limit of tokens, 9, must leave room .* have 9 tokens. Shorten"):
            rerank(Letters(), judged, lists, rule=LongDocuments())
        # Other cross-encoders cut the query, too.
        assert rerank(Letters(truncation=True), judged, lists, rule=LongDocuments()).keys() == lists.keys()
    finally:
        Letters.max_seq_length = 100  # pyright: ignore[reportAttributeAccessIssue]


def test_a_title_is_put_before_its_text_once(beir: Path) -> None:
    rows = [{"_id": "d0-0", "title": "T", "text": "x"}, {"_id": "d0-1", "title": "T", "text": "T y"}]
    (beir / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (beir / "qrels" / "test.tsv").write_text("a\tb\tc\nq0\td0-0\t2\nq0\td0-1\t0\n")
    judged = read_judged(beir)
    assert judged.documents == {"d0-0": "T x", "d0-1": "T y"} and judged.relevant("q0") == {"d0-0": 2}
