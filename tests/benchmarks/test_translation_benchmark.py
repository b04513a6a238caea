"""`benchmarks/claims/translation.py`: equal arms, a language with unseen names, and a file that is resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import translation
from translation_arms import ARMS, EQUAL, MAMBA, Sizes, configuration, parameters
from translation_tasks import Language, ParallelText, segments

from ssm_zoo.evaluation.translation_scores import shared_entities


def test_all_arms_have_as_many_parameters() -> None:
    sizes = Sizes(width=128, layers=8)
    counts = {arm: parameters(configuration(arm, sizes, 4000), 4000) for arm in ARMS}
    assert all(abs(count - counts[MAMBA]) <= EQUAL * counts[MAMBA] for count in counts.values()), counts
    layout = configuration("mamba-mha", sizes, 4000)
    assert [kind for kind in layout["mixer_types"] if kind != "mamba"] == ["full_attention"] * 2
    assert layout["mixer_types"][3] == layout["mixer_types"][7] == "full_attention"
    with pytest.raises(ValueError, match="layers must be a multiple of 4"):
        configuration("retnet", Sizes(width=128, layers=6), 4000)


def test_names_are_copied_and_those_of_a_test_are_not_in_training() -> None:
    language = Language(words=30)
    assert len(set(language.lexicon) | set(language.lexicon.values())) == 60
    train, test = language.pairs(300, range(3, 21), range(2, 9), "train"), language.pairs(50, [15], [6], "test")
    assert test == language.pairs(50, [15], [6], "test") and len(test) == 50
    seen = set(" ".join(train.sources).split())
    for source, target in zip(test.sources, test.targets, strict=True):
        (name,) = shared_entities(source, target)
        assert len(name) == 6 and name not in seen
        assert len(source.split()) == 16
        back = {word: key for key, word in language.lexicon.items()}
        assert sorted(back.get(word, word) for word in target.split()) == sorted(source.split())
    exchanged = sum(
        [language.lexicon.get(word, word) for word in source.split()] != target.split()
        for source, target in zip(test.sources, test.targets, strict=True)
    )
    assert exchanged > 40


def test_segments_join_whole_groups_of_consecutive_pairs() -> None:
    pairs = ParallelText(list("abcde"), list("vwxyz"), [5])
    assert segments(pairs, 2) == ParallelText(["a b", "c d"], ["v w", "x y"], [2])


def test_a_file_is_resumed_without_running_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    monkeypatch.setattr(translation, "NAMES", (3,))
    monkeypatch.setattr(translation, "WORDS", (4,))
    line = [
        "--arms",
        "encdec-mamba",
        "--pairs",
        "40",
        "--test-texts",
        "4",
        "--vocabulary",
        "300",
        "--width",
        "32",
    ]
    line += ["--layers", "4", "--steps", "2", "--tuning-steps", "2", "--rates", "0.001", "0.01", "--seeds", "0"]
    line += ["--beams", "2", "--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    translation.main(line)
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("translation-*.jsonl")
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    assert [(row["arm"], row["purpose"]) for row in rows] == [
        ("encdec-mamba", purpose) for purpose in ("tuning", "tuning", "comparison")
    ]
    best = min(rows[:2], key=lambda row: row["heldout_loss"])
    assert rows[2]["learning_rate"] == best["learning_rate"]
    (scores,) = rows[2]["tests"].values()
    assert scores["entities"] == 4 and scores["copied"]["bleu"] >= 0 and scores["texts"] == 4
    assert str(tmp_path) not in path.read_text() and "copied source" in printed
    monkeypatch.setattr(translation, "measure", lambda *_: pytest.fail("a run was repeated"))
    translation.main([*line, "--resume", str(path)])
    assert path.read_text().count("\n") == len(rows)
    with pytest.raises(SystemExit, match="--data must be the folder of multi30k for the task en-de"):
        translation.main([*line, "--tasks", "en-de"])
    with pytest.raises(SystemExit, match=r"has rows with threads 1, got 2\. Give the same options"):
        translation.main([*line, "--threads", "2", "--resume", str(path)])


def test_a_table_counts_the_seeds_that_diverged() -> None:
    def row(arm: str, bleu: float | None) -> dict[str, Any]:
        tests = {"1 sentences": {"bleu": bleu, "copied": {"bleu": 3.0}}}
        measured = {"diverged": "nan"} if bleu is None else {"parameters": 1000, "tests": tests}
        return {"task": "en-de", "arm": arm, "concatenate": 1, **measured}

    rows = [row("mamba", None), row("mamba", 20.0), row("mamba", 30.0), row("retnet", None), row("mamba-mha", 10.0)]
    assert translation.table_of(rows).splitlines()[1:] == [
        "arm | parameters | seeds | 1 sentences",
        f"{ARMS['mamba']} | 1,000 | 3, 1 diverged | 25.00 (20.00-30.00)",
        f"{ARMS['retnet']} | - | 1, 1 diverged | -",
        f"{ARMS['mamba-mha']} | 1,000 | 1 | 10.00",
        "copied source | - | - | 3.00",
    ]
