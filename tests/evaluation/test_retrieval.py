"""Retrieval measured: against the definitions written out, chance against many random orders, and BM25."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_model
from tiny_checkpoints import save_tokenizer
from torch import Tensor

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytest.importorskip("ir_measures", reason="ir-measures is not installed")

from ssm_zoo.evaluation.embedder import load_embedder, make_embedder
from ssm_zoo.evaluation.retrieval import (
    RetrievalData,
    bm25_scores,
    chance_levels,
    draw_pools,
    embedder_scores,
    evaluate_retrieval,
    read_beir,
)

MEASURES = ["ndcg@10", "mrr@10", "recall@10", "recall@100", "accuracy@1"]


def made(queries: int = 7, documents: int = 150, most: int = 14, seed: int = 0) -> RetrievalData:
    """Queries with one relevant document up to more than nDCG looks at."""
    generator = np.random.default_rng(seed)
    names = [f"d{index}" for index in range(documents)]
    counts = np.linspace(1, most, queries).astype(int)
    return RetrievalData(
        {f"q{index}": f"query {index}" for index in range(queries)},
        {name: f"text {name}" for name in names},
        {f"q{index}": frozenset(generator.choice(names, count, replace=False)) for index, count in enumerate(counts)},
    )


def measured_by_hand(data: RetrievalData, scores: Tensor) -> dict[str, float]:
    names, sums = list(data.documents), dict.fromkeys(MEASURES, 0.0)
    for row, relevant in zip(scores, data.relevant.values(), strict=True):
        right = [names[place] in relevant for place in row.argsort(descending=True).tolist()]
        gains = [1 / math.log2(rank + 1) for rank in range(1, 11)]
        gained = sum(gain for gain, hit in zip(gains, right[:10], strict=True) if hit)
        sums["ndcg@10"] += gained / sum(gains[: len(relevant)])
        first = right.index(True) + 1
        sums["mrr@10"] += 1 / first if first <= 10 else 0
        sums["recall@10"] += sum(right[:10]) / len(relevant)
        sums["recall@100"] += sum(right[:100]) / len(relevant)
        sums["accuracy@1"] += right[0]
    return {name: total / len(scores) for name, total in sums.items()}


def random_scores(data: RetrievalData, seed: int = 0) -> Tensor:
    shape = len(data.queries), len(data.documents)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Measures


def test_the_measures_are_their_definitions() -> None:
    data = made()
    scores = random_scores(data)
    for index, relevant in enumerate(data.relevant.values()):  # better than by chance
        for place, name in enumerate(data.documents):
            scores[index, place] += 2.0 * (name in relevant)
    measured = evaluate_retrieval(data, lambda part: scores[part])
    assert {name: measured[name] for name in MEASURES} == pytest.approx(measured_by_hand(data, scores))
    assert 0.2 < measured["ndcg@10"] < 0.9


def test_the_measures_are_those_of_sentence_transformers_with_ties_too() -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    data = made(documents=130)
    scores = (4 * random_scores(data)).round() / 4  # every score about ten times
    hits: Any = []
    for row in scores:
        places = row.argsort(descending=True, stable=True)[:100].tolist()
        hits.append([{"corpus_id": list(data.documents)[place], "score": row[place].item()} for place in places])
    evaluator = InformationRetrievalEvaluator(
        dict(data.queries),
        dict(data.documents),
        {query: set(relevant) for query, relevant in data.relevant.items()},
        ndcg_at_k=[10],
        mrr_at_k=[10],
        precision_recall_at_k=[10, 100],
        accuracy_at_k=[1],
        map_at_k=[100],
    )
    means = evaluator.compute_metrics(hits)
    measured = evaluate_retrieval(data, lambda part: scores[part])
    for name in MEASURES:
        kind, cutoff = name.split("@")
        assert measured[name] == pytest.approx(means[f"{kind}@k"][int(cutoff)], rel=0, abs=1e-12), name


def test_a_system_that_knows_finds_everything() -> None:
    data = made()
    scores = torch.tensor([[name in relevant for name in data.documents] for relevant in data.relevant.values()])
    measured = evaluate_retrieval(data, lambda part: scores[part].float(), pools=[2, 50])
    assert [measured[name] for name in ("ndcg@10", "mrr@10", "recall@100", "accuracy@1")] == pytest.approx([1] * 4)
    assert [(pool["accuracy"], pool["low"], pool["high"]) for pool in measured["pools"]] == [(1, 1, 1)] * 2


def test_chance_is_the_mean_over_many_random_orders() -> None:
    data = made(queries=4, documents=30, most=12)
    chance = chance_levels(data, [5])
    rounds = [measured_by_hand(data, random_scores(data, seed)) for seed in range(1500)]
    for name in MEASURES:
        values = np.array([one[name] for one in rounds])
        assert abs(values.mean() - chance[name]) < max(4 * values.std() / len(values) ** 0.5, 1e-12), name
    assert chance["pools"] == [{"size": 5, "accuracy": 0.2}]
    assert chance["recall@100"] == 1


def test_chance_among_all_documents_being_relevant_is_one() -> None:
    everything = RetrievalData({"q": "x"}, {"a": "1", "b": "2"}, {"q": frozenset("ab")})
    assert {chance_levels(everything)[name] for name in MEASURES} == {1.0}


def test_many_queries_are_measured_in_parts_as_they_are_together(monkeypatch: pytest.MonkeyPatch) -> None:
    data = made()
    scores, asked = random_scores(data), []

    def system(part: slice) -> Tensor:
        asked.append(part)
        return scores[part]

    whole = evaluate_retrieval(data, system)
    monkeypatch.setattr("ssm_zoo.evaluation.retrieval._SCORES_BYTES", 3 * 4 * len(data.documents))
    assert evaluate_retrieval(data, system) == whole
    assert len(asked) == 1 + 3


# Pools


def test_a_pool_has_one_relevant_document_and_others_that_are_not() -> None:
    data = made()
    names, pools = list(data.documents), draw_pools(data, data.largest_pool)
    assert data.largest_pool == 150 - 14 + 1
    for row, relevant in zip(pools.tolist(), data.relevant.values(), strict=True):
        assert [names[place] in relevant for place in row] == [True] + [False] * (data.largest_pool - 1)
        assert len(set(row)) == len(row)
    assert torch.equal(draw_pools(data, 9), pools[:, :9])
    assert not torch.equal(draw_pools(data, 9, seed=1), pools[:, :9])


def test_accuracy_in_a_pool_is_the_share_of_the_best_and_ties_share() -> None:
    data = made(queries=200, documents=40, most=3)
    scores = random_scores(data)
    pools = draw_pools(data, 4)
    measured = evaluate_retrieval(data, lambda part: scores[part], pools=[4, 2])
    for size, found in zip((4, 2), measured["pools"], strict=True):
        among = scores.gather(1, pools[:, :size])
        assert found["size"] == size
        assert found["accuracy"] == pytest.approx((among.argmax(1) == 0).double().mean().item())
        # The interval of a share, by its normal approximation.
        half = 1.96 * (found["accuracy"] * (1 - found["accuracy"]) / 200) ** 0.5
        assert found["low"] == pytest.approx(found["accuracy"] - half, abs=0.02)
        assert found["high"] == pytest.approx(found["accuracy"] + half, abs=0.02)
    tied = evaluate_retrieval(data, lambda part: torch.zeros_like(scores[part]), pools=[4])
    assert tied["pools"] == [{"size": 4, "accuracy": 0.25, "low": 0.25, "high": 0.25}]


@pytest.mark.parametrize("size", [1, 138])
def test_a_pool_that_cannot_be_is_refused(size: int) -> None:
    data = made()
    with pytest.raises(ValueError, match=f"`pools` must be from 2 to 137 with these documents, got {size}"):
        evaluate_retrieval(data, lambda part: random_scores(data)[part], pools=[2, size])


# Systems

WORDS = RetrievalData(
    {"q": "the sailing ships", "r": "Bread!"},
    {"a": "a ship sails on the sea", "b": "breads and ovens", "c": "", "d": "flour and yeast"},
    {"q": frozenset("a"), "r": frozenset("b")},
)
needs_bm25s = pytest.mark.skipif(
    not (importlib.util.find_spec("bm25s") and importlib.util.find_spec("Stemmer")), reason="bm25s is not installed"
)


@needs_bm25s
def test_bm25_is_its_formula_over_stems() -> None:
    scores = bm25_scores(WORDS, k1=1.5, b=0.6)(slice(0, 2))
    # Stems without stop words: ship sail sea | bread oven | nothing | flour yeast.
    lengths = [3, 2, 0, 2]
    norm = [1.5 * (1 - 0.6 + 0.6 * length / (7 / 4)) for length in lengths]
    rarity = math.log(1 + (4 - 1 + 0.5) / (1 + 0.5))
    expected = torch.zeros(2, 4)
    expected[0, 0] = 2 * rarity / (1 + norm[0])
    expected[1, 1] = rarity / (1 + norm[1])
    torch.testing.assert_close(scores.float(), expected)
    assert evaluate_retrieval(WORDS, bm25_scores(WORDS), pools=[2])["ndcg@10"] == 1


@needs_bm25s
@pytest.mark.parametrize("changes", [{"k1": -1.0}, {"b": 1.5}])
def test_bm25_refuses_numbers_out_of_range(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"`k1` must be at least 0 and `b` from 0 to 1, got .* and "):
        bm25_scores(WORDS, **changes)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"BM25 needs the package bm25s, which is not installed: pip install bm25s\[s"):
        bm25_scores(WORDS)
    with pytest.raises(
        ValueError, match=r"Ranking needs the package ir-measures, .* with pip install -e '\.\[metrics\]'"
    ):
        evaluate_retrieval(WORDS, Tensor)
    for call in (lambda: load_embedder("x"), lambda: make_embedder("x")):
        with pytest.raises(
            ValueError, match=r"the package sentence-transformers, which is not installed\. Install it .*'\.\[embed\]'"
        ):
            call()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    make_model("mamba2").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_an_embedder_scores_by_cosine_with_its_prompts(plain: Path) -> None:
    embedder = load_embedder(str(plain), pooling="mean", query_prompt="q ", document_prompt="d ", device="cpu")
    scores = embedder_scores(embedder, WORDS, batch_size=2)(slice(0, 2))
    tokenizer: Any = embedder.tokenizer
    backbone: Any = embedder[0]

    def embedded(text: str) -> Tensor:
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt").input_ids
            return backbone.model(input_ids=ids).last_hidden_state[0].mean(0)

    for row, query in enumerate(WORDS.queries.values()):
        for column, document in enumerate(WORDS.documents.values()):
            pair = embedded(f"q {query}"), embedded(f"d {document}") * bool(document)
            expected = torch.cosine_similarity(*pair, dim=0)
            torch.testing.assert_close(scores[row, column], expected, rtol=0, atol=1e-5)


def test_a_saved_embedder_has_its_own_pooling_and_a_plain_model_needs_one(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`pooling` must be last or mean, since .*model is a plain model"):
        load_embedder(str(plain))
    embedder = make_embedder(str(plain), pooling="last", max_tokens=6, query_prompt="q ", device="cpu")
    embedder.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    again = load_embedder(str(tmp_path / "saved"), device="cpu", query_prompt="", max_tokens=None)
    assert (again.max_seq_length, again.prompts["query"], again[1].pooling_mode) == (6, "q ", "lasttoken")
    assert np.array_equal(again.encode_query(["ab c"]), embedder.encode_query(["ab c"]))
    for changes in ({"pooling": "mean"}, {"max_tokens": 5}):
        ((name, value),) = changes.items()
        message = f"`{name}` must be left out with the embedder .*saved, which has its own; got {value!r}"
        with pytest.raises(ValueError, match=message):
            load_embedder(str(tmp_path / "saved"), **changes)
    with pytest.raises(ValueError, match="`pooling` must be last or mean, got 'first'"):
        make_embedder(str(plain), pooling="first")


# Folders


def write_beir(folder: Path, **changes: str) -> Path:
    files = {
        "corpus.jsonl": '{"_id": "a", "title": "Sea", "text": "A ship"}\n{"_id": "b", "title": "B", "text": "B c"}\n'
        '{"_id": "c", "text": ""}\n',
        "queries.jsonl": '{"_id": "1", "text": "sea?"}\n{"_id": "2", "text": "b?"}\n{"_id": "3", "text": "none"}\n',
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\n2\tb\t1\n2\ta\t0\n1\ta\t2\n1\tgone\t1\n3\tb\t0\n",
    } | changes
    (folder / "qrels").mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_a_folder_is_read(tmp_path: Path) -> None:
    assert read_beir(write_beir(tmp_path)) == RetrievalData(
        {"1": "sea?", "2": "b?"}, {"a": "Sea A ship", "b": "B c", "c": ""}, {"1": frozenset("a"), "2": frozenset("b")}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"corpus.jsonl": "{}"}, "corpus.jsonl', line 1 must be an object with texts under", id="corpus"),
        pytest.param({"queries.jsonl": '{"_id": "1", "text": " "}'}, "queries.jsonl', line 1 must be", id="empty"),
        pytest.param({"corpus.jsonl": '{"_id": "a", "text": ""}\n' * 2}, "line 2 repeats the id 'a'", id="twice"),
        pytest.param(
            {"qrels/test.tsv": "h\n1\ta\n"}, "test.tsv', line 2 must have a query id, a document id", id="cells"
        ),
        pytest.param({"qrels/test.tsv": "h\n1\ta\tx\n"}, "test.tsv', line 2 must have a query id", id="grade"),
        pytest.param(
            {"qrels/test.tsv": "h\n9\ta\t1\n"}, "test.tsv', line 2: queries.jsonl has no query '9'", id="query"
        ),
        pytest.param({"qrels/test.tsv": "h\n1\ta\t0\n"}, "test.tsv' has no query with a relevant doc", id="irrelevant"),
    ],
)
def test_a_mistake_in_a_folder_is_named(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_beir(write_beir(tmp_path, **changes))


def test_a_folder_or_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`folder` must be an existing folder, got 'nowhere'"):
        read_beir("nowhere")
    with pytest.raises(ValueError, match=r"`split` must be one of .*, test, got 'dev'"):
        read_beir(write_beir(tmp_path / "beir"), "dev")
    (tmp_path / "beir" / "queries.jsonl").unlink()
    with pytest.raises(ValueError, match=r"folder: there is no file .*queries.jsonl"):
        read_beir(tmp_path / "beir")
    assert json.loads(json.dumps(chance_levels(made())))["pools"][0]["size"] == 32
