"""The phone-book benchmark: its documents, its judge, equal models, and a whole run at a tiny size that is resumed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import birdie
import pytest
import torch
from birdie import Size, judged, main
from birdie_claims import verdicts
from birdie_plot import table
from birdie_task import ARMS, BANDIT, BLIND, CAUSAL, EQUAL, FIXED, NEXT, PREFIX, Model, PhoneBooks, answer, mixture
from torch import Tensor

TASK = PhoneBooks((4, 6), 3, 16, 5, sentinels=32, easier=(16,))
TINY = Size(TASK, Model(48, 1, 4, 8), row=80, batch=2, steps=6)
ARGUMENTS = ["--size", "tiny", "--seeds", "1", "2", "--documents", "20", "--evaluate-every", "3", "--validation", "2"]
ARGUMENTS += [
    "--fresh",
    "3",
    "--rates",
    "2e-3",
    "4e-3",
    "--tuning-steps",
    "4",
    "--arms",
    f"{NEXT}, {CAUSAL}",
    f"{BANDIT}, {PREFIX}",
]


def test_a_document_is_a_book_and_numbers_that_are_in_it() -> None:
    documents = TASK.draw(6, 20, torch.Generator().manual_seed(0))
    assert documents.shape == (20, TASK.length(6)) == (20, 2 * 9 + 2)
    for row in documents.tolist():
        assert row[12] == TASK.end_of_book == 21 and row[-1] == TASK.end_of_book + 1
        entries = [tuple(row[at : at + 2]) for at in range(0, 12, 2)]
        asked = [tuple(row[at : at + 2]) for at in range(13, 19, 2)]
        assert len({name for name, _ in entries}) == 6
        assert set(asked) <= set(entries) and len(set(asked)) == 3
        assert all(name < 16 <= number < 21 for name, number in entries)
    assert len({tuple(row) for row in documents.tolist()}) == 20


def test_tokens_are_apart_and_in_the_vocabulary() -> None:
    tokens = TASK.tokens
    special = [*tokens.control.values(), *tokens.sentinels, tokens.context, tokens.target, tokens.end]
    documents = [TASK.end_of_book, TASK.end_of_book + 1, *tokens.ordinary]
    assert len({*special, *documents}) == len(special) + len(documents) <= TASK.vocabulary


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_the_judge_counts_numbers(wrong: int) -> None:
    """A model that copies what is asked, except for the number of some of the lookups."""
    documents = TASK.draw(4, 5, torch.Generator().manual_seed(0))

    class Oracle:
        config = SimpleNamespace(prefix_bidirectional=True)

        def __call__(self, ids: Tensor, prefix_mask: Tensor, use_cache: bool) -> Any:
            assert prefix_mask.sum(-1).tolist() == [9] * len(ids)
            answers = ids.roll(-1, dims=1).clone()
            for lookup in range(wrong):
                answers[:, 9 + 2 * lookup] = 0
            return SimpleNamespace(logits=1e4 * torch.nn.functional.one_hot(answers, TASK.vocabulary).float())

        def eval(self) -> None: ...
        def train(self) -> None: ...

    found = answer(Oracle(), TASK, 4, documents)
    assert found.accuracy == pytest.approx(1 - wrong / 3)
    assert found.loss == pytest.approx(1e4 * wrong / 3), "a wrong number is 1e4 nats away"


def test_chance_is_the_best_answer_without_looking_up() -> None:
    """Of two numbers out of two, one in two pairs has both: 3/4 are right. One number is always right."""
    chance = PhoneBooks((2,), 1, 2, 2).chance(2)
    assert chance["any number"] == 1 / 2 and chance[BLIND] == pytest.approx(0.75, abs=0.02)
    assert PhoneBooks((2,), 1, 2, 1).chance(2)[BLIND] == 1


def test_both_directions_have_equally_many_parameters() -> None:
    counts = [sum(p.numel() for p in TINY.model.make(d, 100, 0.05, 0).parameters()) for d in (CAUSAL, PREFIX)]
    assert counts[0] < counts[1] <= (1 + EQUAL) * counts[0]
    with pytest.raises(ValueError, match="equal parameters within 5%"):
        Model(8, 1, 16, 4).make(CAUSAL, 8, 0.05, 0)
    with pytest.raises(ValueError, match=r"entries at most names \(16\), got \(2, 17\), 3 and 5"):
        PhoneBooks((2, 17), 3, 16, 5)


def test_training_has_easier_books_and_about_as_many_tokens_of_every_size() -> None:
    """A book of two entries is looked up twice at most."""
    task = PhoneBooks((12,), 3, 16, 5, easier=(2,))
    assert (task.asked(2), task.asked(12)) == (2, 3) and (task.length(2), task.length(12)) == (10, 32)
    documents = task.documents(84, torch.Generator().manual_seed(0))
    counts = {length: sum(len(one) == length for one in documents) for length in (10, 32)}
    assert counts == {10: 64, 32: 20}


def test_the_mixtures_are_those_of_the_arms() -> None:
    assert mixture(NEXT, 100).names == ["next_token"]
    assert mixture(FIXED, 100).bandit is None and mixture(FIXED, 100).names == mixture(BANDIT, 100).names
    assert mixture(BANDIT, 100).bandit.every == 5  # pyright: ignore[reportOptionalMemberAccess]
    assert set(ARMS.values()) == {(NEXT, CAUSAL), (FIXED, CAUSAL), (FIXED, PREFIX), (BANDIT, CAUSAL), (BANDIT, PREFIX)}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_is_tuned_judged_drawn_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(birdie.SIZES, "tiny", TINY)
    main([*ARGUMENTS, "--output", str(tmp_path)])
    (path,) = tmp_path.glob("birdie-*.jsonl")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    *rows, summary = read(path)
    assert summary["purpose"] == "summary" and len(rows) == 2 * (2 + 2)
    for arm, found in summary["arms"].items():
        tried = {row["rate"]: judged(row) for row in rows if row["purpose"] == "tuning" and row["arm"] == arm}
        assert len(tried) == 2 and found["rate"] == min(tried, key=lambda rate: tried[rate])
        assert {row["rate"] for row in rows if row["purpose"] == "result" and row["arm"] == arm} == {found["rate"]}
    for row in rows:
        steps = [3, 6] if row["purpose"] == "result" else [3, 4]
        assert [point["step"] for point in row["curve"]] == steps and row["tokens"] <= 6 * 2 * 80
        assert all(sum(point["rates"].values()) == pytest.approx(1) for point in row["curve"])
        assert row.keys() >= {"hardware", "versions", "date", "command"}
        assert ("fresh" in row) == (row["purpose"] == "result")
    result = next(row for row in rows if row["purpose"] == "result")
    assert judged(result) == sum(result["curve"][-1]["validation_loss"].values()) / 2
    text = table(summary)
    assert (
        "| chance: any number | | | 20.0% | 20.0% |" in text
        and f"| chance: {BLIND} | | |" in text
        and text.count("\n") == 5
    )
    assert {found["claim"]: found["verdict"] for found in summary["claims"]}["mix-4"] == "not run"
    monkeypatch.setattr(birdie, "execute", lambda *_: pytest.fail("a run was repeated"))
    main([*ARGUMENTS, "--resume", str(path)])
    assert len(read(path)) == len(rows) + 1
    capsys.readouterr()
    main([*ARGUMENTS[:3], "1", "2", "3", *ARGUMENTS[5:], "--plan", "--resume", str(path)])
    assert capsys.readouterr().out.startswith("2 runs: 12 steps, 0.0 CPU hours predicted")


def test_claims_follow_from_the_seeds() -> None:
    """One arm is above another with every seed, they overlap, or neither has learnt to look up."""
    mix, plain, bandit = f"{FIXED}, {CAUSAL}", f"{NEXT}, {CAUSAL}", f"{BANDIT}, {CAUSAL}"
    seeds = {mix: [0.9, 0.8], plain: [0.3, 0.7], bandit: [0.85, 0.6]}
    arms = {arm: {"4": {"seeds": found, "mean": sum(found) / 2}} for arm, found in seeds.items()}
    chance = {BLIND: 0.1}
    summary = {"chance": {"4": chance}, "arms": arms}

    def found() -> dict[str, str]:
        return {one["claim"]: one["verdict"] for one in verdicts(summary)}

    assert found() == {
        "mix-4": "confirmed",
        "bandit-4": "undecided",
        "birdie-4": "not run",
        "directions-4": "not run",
    }
    arms[bandit]["4"]["seeds"] = [0.7, 0.75]
    assert found()["bandit-4"] == "refuted"
    chance[BLIND] = 0.2
    assert found()["mix-4"] == "undecided"
