"""Groups to learn ranking from: mining, splits, files, and every mistake."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bm25s", reason="bm25s is not installed")

from ranking_data import write_beir

from ssm_zoo.evaluation.reranking_data import JudgedCollection, bm25_run, read_judged
from ssm_zoo.training.ranking_groups import Group, mine_groups, read_ranking_data, split_queries
from ssm_zoo.training.reranker_settings import RerankerSettings, parse_reranker_settings


def settings_of(folder: Path, **changes: Any) -> RerankerSettings:
    return parse_reranker_settings({"model": "m", "train": [str(folder)], **changes})


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("groups") / "beir", graded=True)


def mined(beir: Path, **changes: Any) -> list[Group]:
    judged = read_judged(beir)
    return mine_groups(judged, bm25_run(judged, 100), settings_of(beir, **changes), Counter())


def test_every_relevant_document_has_its_own_negatives(beir: Path) -> None:
    groups = mined(beir, negatives=3)
    assert len(groups) == 24
    for group in groups:
        assert group.labels[0] > 0 and group.labels[1:] == (0.0, 0.0, 0.0)
        assert group.documents[0].endswith("yes") and all(text.endswith("no") for text in group.documents[1:])
        assert len(set(group.documents)) == 4
        assert all(text.split()[0] == group.query.split()[1] for text in group.documents)
    drawn = {group.documents[1:] for group in groups[:2]}
    assert len(drawn) == 2  # each positive draws its own
    assert mined(beir, negatives=3) == groups and mined(beir, negatives=3, seed=1) != groups


def test_lists_have_several_grades(beir: Path) -> None:
    groups = mined(beir, loss="listnet", negatives=4)
    assert [group.labels for group in groups] == [(2.0, 1.0, 0.0, 0.0, 0.0)] * 12
    # Half of a group at most is relevant; which of the two documents, the seed draws.
    assert {group.labels for group in mined(beir, loss="lambda", negatives=1)} == {(2.0, 0.0), (1.0, 0.0)}


def test_what_is_relevant_is_never_a_negative() -> None:
    """Relevant documents, ones with their text, ones without text and the top of the list are left out."""
    documents = {"a": "right", "b": "right", "c": "", "d": "top", "e": "below", "f": "zero"}
    judged = JudgedCollection({"q": "?"}, documents, {"q": {"a": 1, "c": 2, "f": 0}}, frozenset("q"))
    run = {"q": {"d": 9.0, "a": 8.0, "b": 7.0, "c": 6.0, "e": 5.0, "f": 4.0}}
    left_out: Counter[str] = Counter()
    settings = settings_of(Path("x"), negatives=5)
    (group,) = mine_groups(judged, run, settings, left_out)
    assert group.documents[0] == "right" and set(group.documents[1:]) == {"top", "below", "zero"}
    assert left_out["relevant documents without text"] == 1
    (group,) = mine_groups(judged, run, settings_of(Path("x"), negatives=5, skip=1), left_out)
    assert set(group.documents[1:]) == {"below", "zero"}
    (group,) = mine_groups(judged, run, settings_of(Path("x"), negatives=5, depth=5), left_out)
    assert set(group.documents[1:]) == {"top", "below"}
    assert mine_groups(judged, {"q": {"a": 1.0}}, settings, left_out) == []
    assert left_out["queries without negatives"] == 1 and left_out["relevant documents with the text of another"] == 0


def test_a_repeated_text_is_one_positive_with_its_highest_grade() -> None:
    documents = {"a": "right", "b": "right", "c": " ", "d": "wrong"}
    judged = JudgedCollection({"q": "?"}, documents, {"q": {"a": 2, "b": 1, "c": 1}}, frozenset("q"))
    left_out: Counter[str] = Counter()
    (group,) = mine_groups(judged, {"q": {"d": 1.0}}, settings_of(Path("x")), left_out)
    assert group.documents == ("right", "wrong") and group.labels == (2.0, 0.0)
    assert left_out == {"relevant documents without text": 1, "relevant documents with the text of another": 1}


def test_queries_are_split_by_the_seed(beir: Path) -> None:
    judged = read_judged(beir)
    train, held = split_queries(judged, 0.25, 0)
    assert len(held.queries) == 3 and not train.queries.keys() & held.queries.keys()
    assert train.queries.keys() | held.queries.keys() == judged.queries.keys()
    assert split_queries(judged, 0.25, 0)[1].queries == held.queries != split_queries(judged, 0.25, 1)[1].queries
    twice = {"a": "One  query", "b": "one query", "c": "other"}
    same = JudgedCollection(twice, {"d": "x"}, {one: {"d": 1} for one in twice}, frozenset(twice))
    for seed in range(4):
        parts = split_queries(same, 0.5, seed)
        assert {frozenset(part.queries) for part in parts} == {frozenset("ab"), frozenset("c")}
    with pytest.raises(ValueError, match="`train` must have at least two different queries to hold one out"):
        split_queries(judged.only(["q0"]), 0.5, 0)


def test_splits_of_a_folder_and_a_run_are_used(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "beir", split="train")
    (folder / "qrels" / "test.tsv").write_text("a\tb\tc\nq3\td3-0\t1\n")
    lines = (folder / "qrels" / "train.tsv").read_text().splitlines()
    (folder / "qrels" / "train.tsv").write_text("\n".join(line for line in lines if not line.startswith("q3\t")))
    run = tmp_path / "dense.trec"
    # The run has one candidate for each query, which shares no word with it.
    run.write_text("".join(f"q{number} Q0 d{(number + 1) % 12}-5 1 1.0 dense\n" for number in range(12)))
    settings = settings_of(folder, train=[f"{folder},train"], heldout=[f"{folder},test"], run=str(run))
    data = read_ranking_data(settings)
    assert len(data.groups) == 22 and all(len(group.documents) == 2 for group in data.groups)
    assert data.groups[0].documents[1] == "bbba x5 no"
    assert list(data.collection.queries) == ["q3"] and data.first_stage == "BM25"
    settings = settings.model_copy(update={"heldout_run": str(run)})
    data = read_ranking_data(settings)
    assert dict(data.run["q3"]) == {"d4-5": 1.0} and data.first_stage == "dense.trec"


def test_a_query_in_both_parts_is_refused(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "beir", split="train")
    (folder / "qrels" / "test.tsv").write_text("a\tb\tc\nq3\td3-0\t1\n")
    with pytest.raises(ValueError, match="`heldout` must have no query that is trained on, but both have 'find ddda'"):
        read_ranking_data(settings_of(folder, train=[f"{folder},train"], heldout=[f"{folder},test"]))


def rows(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return str(path)


HELD = {"query": "held", "documents": ["x", "y"], "labels": [2, 0]}


def test_files_of_groups_are_read(tmp_path: Path) -> None:
    train = rows(
        tmp_path / "train.jsonl",
        {"query": "a", "positive": "p", "negative": "n", "scores": [3.5, -1]},
        {"query": "b", "documents": ["u", "v", "w", "z"], "labels": [0, 2, 0, 1], "scores": [0, 3, 1, 2]},
        {"query": "c", "positive": "p", "negatives": ["n", "m", "o"], "scores": [4, 3, 2, 1]},
    )
    heldout = rows(tmp_path / "heldout.jsonl", HELD, {"query": "held", "positive": "z", "negatives": ["y", "w"]})
    files = {"train": [train], "heldout": [heldout]}
    data = read_ranking_data(settings_of(tmp_path, **files, loss="margin_mse", negatives=2))
    assert data.groups[0] == Group("a", ("p", "n"), (1.0, 0.0), (3.5, -1.0))
    assert [group.documents[0] for group in data.groups] == ["p", "v", "z", "p"]
    assert set(data.groups[1].documents[1:]) == {"u", "w"} and data.groups[1].labels == (2.0, 0.0, 0.0)
    scores = {"u": 0.0, "v": 3.0, "w": 1.0, "z": 2.0}
    assert all(group.teacher == tuple(scores[one] for one in group.documents) for group in data.groups[1:3])
    assert len(data.groups[3].documents) == 3
    assert dict(data.collection.grades["q0"]) == {"d0": 2, "d1": 0, "d2": 1, "d3": 0} and data.first_stage is None
    whole = read_ranking_data(settings_of(tmp_path, **files, loss="lambda")).groups
    assert whole[1].documents == ("u", "v", "w", "z") and whole[1].labels == (0.0, 2.0, 0.0, 1.0)
    fewer = read_ranking_data(settings_of(tmp_path, **files, loss="listnet", negatives=1)).groups
    assert fewer[1].labels in [(0.0, 2.0, 1.0), (2.0, 0.0, 1.0)] and fewer[1].documents[-1] == "z"
    assert fewer[2].documents[0] == "p" and len(fewer[2].documents) == 2 == len(fewer[2].teacher or ())
    changed = read_ranking_data(settings_of(tmp_path, **files, loss="lambda", seed=1))
    assert changed.fingerprints() == read_ranking_data(settings_of(tmp_path, **files, loss="lambda")).fingerprints()
    assert changed.fingerprints() != data.fingerprints()


MISTAKES = [
    ({"query": "", "positive": "p", "negative": "n"}, "`query` must be a text that is not empty, got nothing"),
    ({"query": "a", "positive": "p", "negative": " "}, "`negative` must be a text that is not empty, got ' '"),
    ({"query": "a", "positive": "p"}, "must have either `positive` with .*; it has 'query', 'positive'"),
    ({"query": "a", "positive": "p", "negative": "p"}, "must not have a document twice in one group"),
    ({"query": "a", "positive": "p", "negatives": []}, "must have a document with a label above 0 and one with 0"),
    ({"query": "a", "documents": ["x", "y"], "labels": [1]}, "`labels` must have a number for each of 2 .*, got 1"),
    (
        {"query": "a", "documents": ["x", "y"], "labels": [1, -1]},
        "`labels` must be a list of numbers of at least 0, got",
    ),
    (
        {"query": "a", "documents": ["x", "y"], "labels": [10**400, 0]},
        "`labels` must be a list of finite .* float32, got 1000",
    ),
    (
        {"query": "a", "documents": ["x", "y"], "labels": [1, 0], "negatives": ["z"]},
        "must have either `positive` with .*; it has 'query', 'documents', 'labels', 'negatives'",
    ),
    ({"query": "a", "positive": "p", "negative": "n", "labels": [2, 0]}, "must have either `positive` with"),
    ({"query": "a", "documents": ["x", "y"], "labels": [1, True]}, "`labels` must be a list of numbers of at least 0"),
    ({"query": "a", "documents": ["x", "y"], "labels": [0, 0]}, "must have a document with a label above 0"),
    ({"query": "a", "documents": "x", "labels": [1]}, "`documents` must be a list of texts, got 'x'"),
    ({"query": "a", "positive": "p", "negative": "n", "scores": [1]}, "`scores` must have a number for each of 2"),
    ({"query": "a", "positive": "p", "negative": "n", "scores": [1, "x"]}, "`scores` must be a list of numbers, got"),
    (
        {"query": "a", "positive": "p", "negative": "n"},
        "`scores` of a teacher are missing, which the loss 'margin_mse'",
    ),
]


@pytest.mark.parametrize(("row", "message"), MISTAKES)
def test_a_mistake_in_a_file_names_the_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"query": "a", "positive": "p", "negative": "n", "scores": [2, 1]}
    train = rows(tmp_path / "train.jsonl", good, row)
    heldout = rows(tmp_path / "heldout.jsonl", HELD)
    with pytest.raises(ValueError, match=rf"train: '.*train.jsonl', line 2:? {message}"):
        read_ranking_data(settings_of(tmp_path, train=[train], heldout=[heldout], loss="margin_mse"))


def test_grades_that_cannot_be_computed_with_are_refused(tmp_path: Path) -> None:
    """In float32 2^128 is infinite, and the loss would be NaN; trec_eval reads 2^32 as 0."""
    lists = rows(tmp_path / "train.jsonl", {"query": "a", "documents": ["x", "y"], "labels": [128, 0]})
    heldout = rows(tmp_path / "heldout.jsonl", HELD)
    with pytest.raises(ValueError, match=r"`loss` must be another than 'lambda' for grades above 100, .* got 128"):
        read_ranking_data(settings_of(tmp_path, train=[lists], heldout=[heldout], loss="lambda"))
    assert read_ranking_data(settings_of(tmp_path, train=[lists], heldout=[heldout], loss="listnet")).groups
    heldout = rows(tmp_path / "large.jsonl", {**HELD, "labels": [2**32, 0]})
    with pytest.raises(ValueError, match="line 1: a held-out label must be a whole number of at most 1,000"):
        read_ranking_data(settings_of(tmp_path, train=[lists], heldout=[heldout], loss="listnet"))


def test_held_out_labels_agree(tmp_path: Path) -> None:
    train = rows(tmp_path / "train.jsonl", {"query": "a", "positive": "p", "negative": "n"})
    for row in ({**HELD, "labels": [1, 0]}, {**HELD, "labels": [0.5, 0]}):
        heldout = rows(tmp_path / "heldout.jsonl", HELD, row)
        with pytest.raises(ValueError, match=r"line 2: a held-out label must be .*, and the same wherever"):
            read_ranking_data(settings_of(tmp_path, train=[train], heldout=[heldout]))
    heldout = rows(tmp_path / "heldout.jsonl", HELD)
    with pytest.raises(ValueError, match=r"train: '.*none.jsonl' has no groups"):
        read_ranking_data(settings_of(tmp_path, train=[rows(tmp_path / "none.jsonl")], heldout=[heldout]))


SETTINGS = [
    ({"train": ["a", "b"]}, r"`train` must be one folder, or one or several .jsonl files, got \['a', 'b'\]"),
    ({"train": ["a.jsonl"]}, r"`heldout` must be given where `train` is no folder, got \[\]"),
    ({"heldout": ["b"], "heldout_share": 0.5}, "`heldout_share` has no effect where `heldout` is given, got 0.5"),
    ({"train": ["a.jsonl"], "heldout": ["b"], "run": "r"}, "`run` has no effect where `train` is no folder, got 'r'"),
    ({"heldout_run": "r"}, "`heldout_run` has no effect where `heldout` is no folder, got 'r'"),
    ({"loss": "margin_mse"}, "`loss` 'margin_mse' needs a teacher's scores, which .jsonl files may have"),
    ({"skip": 100}, "`skip` must be less than `depth`, 100, got 100"),
    (
        {"train": ["a.jsonl"], "heldout": ["b.jsonl"], "depth": 9},
        "`depth` has no effect where `train` and",
    ),
    ({"train": ["a.jsonl"], "heldout": ["b"], "skip": 2}, "`skip` has no effect where `train` is no folder, got 2"),
    ({"stride": 64}, "`stride` has no effect with documents 'firstp', got 64"),
    ({"documents": "maxp", "stride": 300}, "`stride` must be at most `passage_tokens`, 256, got 300"),
    ({"documents": "maxp", "max_tokens": 200}, "`passage_tokens` must be less than `max_tokens`, 200, got 256"),
    ({"method": "full", "rank": 4}, "`rank` has no effect with method 'full'"),
    ({"losses": "lce"}, "`losses` is unknown .*did you mean 'loss'"),
]


@pytest.mark.parametrize(("changes", "message"), SETTINGS)
def test_settings_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_reranker_settings({"model": "m", "train": ["folder"], **changes})


def test_the_limit_depends_on_the_rule() -> None:
    assert settings_of(Path("x")).limit == 512
    assert settings_of(Path("x"), documents="longp").limit == 1536
    assert settings_of(Path("x"), documents="longp", max_tokens=99).limit == 99
