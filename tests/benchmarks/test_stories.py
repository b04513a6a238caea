"""The comparison on TinyStories, at a tiny size: its text, FLOPs, budgets and rows, and the rate after the warm-up."""

import json
from pathlib import Path
from typing import Any

import pytest
import stories
import torch
from from_scratch_training import LENGTH, VOCABULARY, Trainer, batches, loss_of
from mixer_arms import ARMS, GPT, HYBRID, LLAMA, MAMBA2, MIXER, Sizes, make
from stories import FACTORS, FLOPS, RESULT, TIME, TRIAL, Comparison, flops_per_step, main, plan
from stories_example import write_stories
from stories_text import END, ids_of, learn_tokenizer, read_stories

TINY = dict.fromkeys(ARMS, Sizes(16, 1, mlp=24, state=4))
ARGUMENTS = "--seconds 0.06 --trial-steps 1 --warmup 1 --seeds 1 2 --batch 1 --held-out 256 --evaluate-every 2"
ARGUMENTS += " --time-steps 1 --threads 1"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    write_stories(path)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a whole run."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stories, "SIZES", TINY)
        main([str(text), *ARGUMENTS.split(), "--output", str(folder)])
    (path,) = folder.glob("*.jsonl")
    return path


def test_the_last_tenth_of_the_stories_is_held_out_and_the_stream_marks_their_ends(text: Path):
    found = read_stories(text)
    assert (len(found.train), len(found.held_out)) == (18, 2)
    assert found.held_out[0].startswith("Story 18.")
    tokenizer = learn_tokenizer(found.train)
    ids = ids_of(tokenizer, found.held_out)
    ends = (ids == 0).nonzero().flatten().tolist()
    assert len(ends) == 2 and ends[1] == len(ids) - 1
    assert tokenizer.decode(ids[: ends[0]].tolist()) == found.held_out[0]


def test_a_text_without_stories_is_refused(tmp_path: Path):
    path = tmp_path / "few.txt"
    path.write_text(END.join("abc"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"text must hold at least 10 stories .* got 3 in few\.txt"):
        read_stories(path)


def test_flops_are_those_counted_by_hand():
    windows = torch.zeros(2, LENGTH + 1, dtype=torch.long)
    tokens, width = 2 * LENGTH, 16
    head = 6 * tokens * VOCABULARY * width
    # Four projections and scores and values of attention; gated MLP, plain MLP.
    attention = 6 * tokens * (4 * width * width + 2 * LENGTH * width)
    gated, plain = 6 * tokens * 3 * width * 24, 6 * tokens * 8 * width * width
    found = {arm: flops_per_step(make(arm, TINY[arm], VOCABULARY, LENGTH, 0), windows) for arm in ARMS}
    assert found[LLAMA] == head + attention + gated
    assert found[GPT] == head + attention + plain
    # The mixing itself: at least the lower triangle, at most the whole matrix.
    square = 6 * tokens * LENGTH * width
    assert square / 2 <= found[MIXER] - head - plain <= square
    assert square / 2 <= found[HYBRID] - found[LLAMA] <= square
    # in_proj to z, x, B, C and dt, out_proj; what is left is the scan.
    projections = 6 * tokens * width * (4 * width + 2 * 4 + 8 + 2 * width)
    assert 0 < found[MAMBA2] - head - projections < found[MAMBA2] / 2


def test_equal_flops_are_what_the_transformer_does_in_the_time_and_a_run_goes_on_to_the_later_end():
    measured = {LLAMA: {"seconds": 0.2, "flops": 10}, MIXER: {"seconds": 0.1, "flops": 10}}
    measured[MAMBA2] = {"seconds": 0.5, "flops": 8}
    costs = plan(measured, seconds=10.0)
    found = {arm: (cost.fitting, cost.equal, cost.steps) for arm, cost in costs.items()}
    assert found == {LLAMA: (50, 50, 50), MIXER: (100, 50, 100), MAMBA2: (20, 62, 62)}


def test_the_rate_is_constant_after_the_warm_up():
    trainer = Trainer(make(MIXER, TINY[MIXER], VOCABULARY, LENGTH, 0), 1e-2, 8, warmup=2, floor=1.0)
    rates = []
    for windows in batches(torch.arange(9 * LENGTH) % VOCABULARY, 1, 8, 0):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.step(windows)
    assert rates == pytest.approx([5e-3] + [1e-2] * 7)


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_causal_and_learns_and_starts_as_the_others_do(arm: str):
    model = make(arm, TINY[arm], VOCABULARY, LENGTH, seed=1, embedding=2.0)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert float(embedding.get_parameter("weight").detach().std()) == pytest.approx(2.0, rel=0.02)
    weight = head.get_parameter("weight").detach()
    assert float(weight.abs().max()) == pytest.approx(16**-0.5, rel=0.01)
    assert float(weight.std()) == pytest.approx((3 * 16) ** -0.5, rel=0.02)
    windows = torch.randint(VOCABULARY, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    other = windows.clone()
    other[0, 40:] = 7
    first, second = (model(ids[:, :-1]).logits for ids in (windows, other))
    torch.testing.assert_close(first[:, :40], second[:, :40])
    trainer = Trainer(model, 1e-2, 4)
    losses = [trainer.step(windows) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert float(loss_of(model, windows).detach()) < losses[0]


def test_all_arms_are_searched_from_the_same_start_and_the_best_of_each_is_run_with_every_seed(finished: Path):
    rows = read(finished)
    (costs,) = (row["arms"] for row in rows if row["purpose"] == "costs")
    (summary,) = (row for row in rows if row["purpose"] == "summary")
    planned = plan(costs, 0.06)
    for arm in ARMS:
        trials = [row for row in rows if row["purpose"] == TRIAL and row["arm"] == arm]
        assert (trials[0]["rate"], trials[0]["embedding"]) == (2e-3, 1.0)
        best = min(trials, key=lambda row: row["held_out"])
        setting = {"rate": best["rate"], "embedding": best["embedding"]}
        assert setting.items() <= summary["settings"][arm].items()
        tried = {(row["rate"], row["embedding"]) for row in trials}
        assert {(best["rate"] * rate, best["embedding"] * size) for rate, size in FACTORS} <= tried
        results = [row for row in rows if row["purpose"] == RESULT and row["arm"] == arm]
        assert [row["seed"] for row in results] == [1, 2]
        for sense, step in ((TIME, planned[arm].fitting), (FLOPS, planned[arm].equal)):
            ends = [next(p["held_out"] for p in row["curve"] if p["step"] == step) for row in results]
            assert [summary[sense][arm]["low"], summary[sense][arm]["high"]] == sorted(ends)
    for sense in (TIME, FLOPS):
        assert sorted(summary[sense]["order"]) == sorted(ARMS)
    assert all(row.keys() >= {"hardware", "versions", "date", "command"} for row in rows)
    assert finished.with_suffix(".png").exists()


def test_a_claim_says_how_many_seeds_agree():
    found = Comparison.claim({"a": [1.0, 2.0, 3.0], "b": [1.5, 2.5, 2.75]}, "a", "b")
    assert found == {"lower": "a", "higher": "b", "gap": 0.25, "seeds_that_agree": 2}


def test_going_on_repeats_no_run_and_stops_when_the_minutes_are_over(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "cut-off.jsonl"
    path.write_bytes(finished.read_bytes())
    done, execute = [], stories.execute
    monkeypatch.setattr(stories, "SIZES", TINY)
    monkeypatch.setattr(stories, "execute", lambda run, *others: done.append(run) or execute(run, *others))
    arguments = [str(text), *ARGUMENTS.split(), "--resume", str(path)]
    main([*arguments, "--minutes", "0"])
    assert done == []
    assert len(read(path)) == len(read(finished))
    with pytest.raises(SystemExit, match="the minutes are over"):
        main([*arguments, "--seeds", "1", "2", "5", "--minutes", "0"])
    assert done == []
    main([*arguments, "--seeds", "1", "2", "5"])
    assert [(row.purpose, row.arm, row.seed) for row in done] == [(RESULT, arm, 5) for arm in ARMS]


def test_trials_and_results_are_judged_by_different_text(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    judged = []
    monkeypatch.setattr(stories, "SIZES", TINY)
    streams = iter([torch.arange(1500), torch.arange(520) + 1500])
    monkeypatch.setattr(stories, "ids_of", lambda tokenizer, texts: next(streams))
    monkeypatch.setattr(stories, "held_out_loss", lambda model, ids, batch: judged.append(ids) or 1.0)
    main([str(text), *ARGUMENTS.split(), "--output", str(tmp_path)])
    starts = {(int(ids[0]), int(ids[-1])) for ids in judged}
    assert starts == {(1500, 1756), (1756, 2012)}
