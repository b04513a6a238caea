"""The comparison of embedders, at a tiny size: its tasks, what is trained on, its searches and rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import retrieval
from mixer_arms import MAMBA2, MIXER
from retrieval import AFTER, BEFORE, CRANFIELD, PRETRAINING, RESULT, STORIES, TRIAL, Comparison, main
from retrieval_texts import beir_task, split_story, stories_task, write_pairs
from stories_example import WORDS, write_stories
from stories_text import Stories, read_stories
from sweeps import SWEEP

# A comparison of embedders at the tiniest size still takes minutes; the machinery is that of the other comparisons.
pytestmark = SWEEP

for package in ("sentence_transformers", "bm25s", "Stemmer"):
    pytest.importorskip(package, reason=f"{package} is not installed")

TWO = (MIXER, MAMBA2)
ARGUMENTS = "--width 8 --vocabulary 280 --length 6 --steps 2 --trial-steps 1 --batch 2 --held-out 60 --pairs 2"
ARGUMENTS += " --share 1 --trial-share 0.3 --seeds 1 --threads 1"


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Two arms, pools of four, and searches upwards."""
    patch.setattr(retrieval, "COMPARED", TWO)
    patch.setattr(retrieval, "POOL", 4)
    patch.setattr(retrieval, "FACTORS", ((2.0,),))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    write_stories(path, stories=40, words=8)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen queries of a word and a number, which two documents each have, in the layout of BEIR."""
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    queries, documents, judged = [], [], ["query-id\tcorpus-id\tscore"]
    for number in range(15):
        word = WORDS[number % len(WORDS)]
        queries.append({"_id": f"q{number}", "text": f"{word} {number}"})
        for part in range(2):
            documents.append({"_id": f"d{number}-{part}", "text": f"{part} the {word} of {number}"})
            judged.append(f"q{number}\td{number}-{part}\t1")
    for name, rows in (("queries", queries), ("corpus", documents)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("\n".join(judged), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(text: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a whole run."""
    output = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        main([str(text), str(folder), *ARGUMENTS.split(), "--output", str(output)])
    (path,) = output.glob("*.jsonl")
    return path


@pytest.mark.parametrize(
    ("story", "pair"),
    [
        ("A cat ran. It was red.\nIt slept.", ("A cat ran.", "It was red.\nIt slept.")),
        ('"Run!" said Tom. He ran.', ('"Run!"', "said Tom. He ran.")),
        ("Only one.", None),
        ("No mark at all", None),
    ],
)
def test_a_story_is_split_after_its_first_sentence(story: str, pair: tuple[str, str] | None):
    assert split_story(story) == pair


def test_stories_that_judge_are_no_pairs_and_a_sentence_that_begins_several_finds_all_of_them():
    stories = Stories(
        [f"Train {index}. Rest {index}." for index in range(30)], ["Same. One.", "Same. Two.", "Other. Three."]
    )
    task = stories_task(stories)
    assert (len(task.train), len(task.trials)) == (27, 3)
    assert not set(task.train) & set(task.trials)
    assert list(task.results.queries.values()) == ["Same.", "Other."]
    found = {
        task.results.queries[query]: {task.results.documents[document] for document in documents}
        for query, documents in task.results.relevant.items()
    }
    assert found == {"Same.": {"One.", "Two."}, "Other.": {"Three."}}


def test_the_queries_of_cranfield_are_split_and_every_document_can_be_found(folder: Path):
    task = beir_task(folder)
    judging = set(task.results.queries.values())
    train, trials = ({anchor for anchor, _ in pairs} for pairs in (task.train, task.trials))
    assert (len(judging), len(trials), len(train)) == (5, 2, 8)
    assert len(judging | trials | train) == 15
    assert len(task.results.documents) == 30
    assert len(task.train) == 16
    for anchor, document in task.train:
        word, number = anchor.split()
        assert document.endswith(f"the {word} of {number}")


def test_pairs_are_written_as_the_finetuning_reads_them(tmp_path: Path):
    from ssm_zoo.training.pairs import read_pairs

    write_pairs([("a\n“b”", "c"), ("d", "e")], tmp_path / "pairs.jsonl")
    found = read_pairs([str(tmp_path / "pairs.jsonl")], "train")
    assert (found.anchors, found.positives) == (["a\n“b”", "d"], ["c", "e"])


def test_what_judges_is_in_no_training_text(text: Path, folder: Path):
    data = retrieval.read_data(text, folder, 280)
    trained = data.tokenizer.decode(data.train.tolist())
    stories = read_stories(text)
    assert all(story not in trained for story in [*stories.held_out, *stories.train[-3:]])
    assert all(story in trained for story in stories.train[:-3])
    assert all(query not in trained for query in data.tasks[CRANFIELD].results.queries.values())
    assert data.tasks[STORIES].trials[0][0] == "Story 33."


@pytest.mark.slow
def test_every_arm_has_the_same_searches_and_seeds_and_bm25_and_chance_stand_beside(finished: Path):
    rows = read(finished)
    (summary,) = (row for row in rows if row["purpose"] == "summary")
    changed = []
    for task, found in summary["tasks"].items():
        assert found["chance"]["top1"] == 1 / 4
        assert found["bm25"]["top1"] == pytest.approx(1.0 if task == CRANFIELD else 0.25, abs=0.25)
        assert list(found["arms"]) == list(TWO)
        for arm, measured in found["arms"].items():
            trials = [row for row in rows if (row["purpose"], row.get("arm")) == (PRETRAINING, arm)]
            assert trials[0]["rate"] == 4e-3
            assert measured["rate"] == min(trials, key=lambda row: row["held_out"])["rate"]
            trials = [row for row in rows if (row["purpose"], row.get("arm"), row.get("task")) == (TRIAL, arm, task)]
            assert trials[0]["tuned"] == 1e-3
            best = max(trials, key=lambda row: row["trial"]["top1"])
            assert measured["tuned"] == best["tuned"]
            assert best["tuned"] * 2 in {row["tuned"] for row in trials}
            results = [row for row in rows if (row["purpose"], row.get("arm"), row.get("task")) == (RESULT, arm, task)]
            assert [row["seed"] for row in results] == [1]
            for state in (BEFORE, AFTER):
                assert measured[state]["ndcg"]["mean"] == results[0][state]["ndcg"]
            changed.append(results[0][BEFORE] != results[0][AFTER])
    assert any(changed), "three steps of so small a model may leave one ranking as it was, not all of them"
    assert summary["tasks"].keys() == {STORIES, CRANFIELD}
    assert all(row.keys() >= {"hardware", "versions", "date", "command"} for row in rows)
    assert finished.with_suffix(".png").exists()


@pytest.mark.slow
def test_going_on_repeats_no_run(
    finished: Path, text: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "cut-off.jsonl"
    path.write_bytes(finished.read_bytes())
    shrink(monkeypatch)
    monkeypatch.setattr(Comparison, "execute", lambda self, run: pytest.fail(f"{run} is in the file"))
    main([str(text), str(folder), *ARGUMENTS.split(), "--resume", str(path)])
    assert len(read(path)) == len(read(finished))
