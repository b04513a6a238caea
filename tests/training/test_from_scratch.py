"""The comparison of training runs from scratch, at a tiny size: what it starts from, judges, repeats and writes."""

import json
import math
from pathlib import Path
from typing import Any

import from_scratch
import pytest
import torch
from from_scratch import CLASS, FACTORS, OURS, PEER, main, make
from from_scratch_training import LENGTH, VOCABULARY, Trainer, batches, held_out_loss, loss_of, windows_of
from result_file import search

from tolerances import TOLERANCES

TINY = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "head_dim": 8,
        "num_heads": 8,
        "n_groups": 1,
    },
}
ARGUMENTS = "--family mamba2 --rate 1e-2 --trial-steps 1 --steps 4 --seeds 1 2 --batch 1 --held-out 256"
ARGUMENTS += " --evaluate-every 2 --time-steps 1 --confirm 2"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_scratch, "SIZES", TINY)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments: str) -> None:
    main([*ARGUMENTS.split(), *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a whole run."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_scratch, "SIZES", TINY)
        run("--output", str(folder))
    (path,) = folder.glob("*.jsonl")
    return path


@pytest.mark.parametrize("family", TINY)
def test_the_peers_start_in_our_class_computes_what_its_own_class_does(family: str):
    windows = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    losses = {arm: [] for arm in (OURS, PEER, CLASS)}
    for arm, found in losses.items():
        trainer = Trainer(make(family, arm, 3, initializer_range=0.05), rate=1e-2, steps=3)
        found += [trainer.step(windows) for _ in range(3)]
    assert losses[PEER] == pytest.approx(losses[CLASS], rel=1e-4)
    assert losses[OURS] != pytest.approx(losses[CLASS], rel=1e-4)
    assert losses[OURS][2] < losses[OURS][0]


def test_batches_are_epochs_of_overlapping_windows_and_depend_on_the_seed_alone():
    ids = torch.arange(6 * LENGTH + 50)
    first, second, again = (torch.cat(list(batches(ids, 2, 3, seed))) for seed in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert first.sort(0).values[:, 0].tolist() == list(range(0, 6 * LENGTH, LENGTH))
    assert first[0, -1] - first[0, 0] == LENGTH


def test_the_search_ends_where_no_neighbour_is_better_and_follows_a_valley():
    judged = []

    def judge(rate: float, std: float) -> float:
        judged.append((rate, std))
        return (math.log2(rate) - 3) ** 2 + (math.log2(std) + 2) ** 2 + 0.5 * (math.log2(rate) - math.log2(std) - 5)

    assert search(judge, (1.0, 1.0), FACTORS) == (8.0, 0.25)
    assert {(4.0, 0.25), (16.0, 0.25), (8.0, 0.125), (8.0, 0.5)} <= set(judged)


def test_both_sides_are_searched_from_the_same_start_and_the_best_of_each_is_run_again(finished: Path):
    rows = read(finished)
    trials = {arm: [row for row in rows if row["purpose"] == "trial" and row["arm"] == arm] for arm in (OURS, PEER)}
    for found in trials.values():
        assert (found[0]["rate"], found[0]["initializer_range"]) == (1e-2, 0.05)
    (summary,) = (row for row in rows if row["purpose"] == "summary")
    for arm in trials:
        side = summary[f"{arm}, equal tokens"]
        full = [row for row in rows if row["purpose"] == "equal tokens" and row["arm"] == arm]
        best = min((row for row in full if row["seed"] == 1), key=lambda row: row["train"][-1])
        setting = {"rate": best["rate"], "initializer_range": best["initializer_range"]}
        assert setting.items() <= side.items()
        ends = [row["held_out"] for row in full if setting.items() <= row.items()]
        assert [side["low"], side["high"]] == sorted(ends)
    seconds = summary["seconds_per_step"]
    assert summary[f"{PEER}, equal time"]["steps"] == max(int(4 * seconds[OURS] / seconds[CLASS]), 1)
    assert summary["confirmed"]["largest_difference"] < 1e-3
    assert summary["confirmed"]["steps"] == 2
    assert all(row.keys() >= {"hardware", "versions", "date", "command"} for row in rows)
    assert finished.with_suffix(".png").exists()


def test_going_on_repeats_no_run_and_adds_what_is_missing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "cut-off.jsonl"
    path.write_bytes(finished.read_bytes())
    done, execute = [], from_scratch.execute
    monkeypatch.setattr(from_scratch, "execute", lambda run, *others: done.append(run) or execute(run, *others))
    run("--resume", str(path))
    assert done == []
    assert len(read(path)) == len(read(finished))
    run("--seeds", "1", "2", "5", "--resume", str(path))
    added = [(row.purpose, row.arm, row.seed) for row in done]
    assert added == [("equal tokens", OURS, 5), ("equal tokens", PEER, 5), ("equal time", PEER, 5)]


def test_trials_and_results_are_judged_by_different_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    judged = []
    monkeypatch.setattr(from_scratch, "tokens", lambda: (torch.arange(1500), torch.arange(520) + 1500))
    monkeypatch.setattr(from_scratch, "held_out_loss", lambda model, ids, batch: judged.append(ids) or 1.0)
    run("--output", str(tmp_path))
    starts = {(int(ids[0]), int(ids[-1])) for ids in judged}
    assert starts == {(1500, 1756), (1756, 2012)}


@torch.no_grad()
def test_the_held_out_loss_is_the_mean_over_all_windows():
    model = make("mamba2", OURS, 0)
    ids = torch.randint(VOCABULARY, (5 * LENGTH + 7,), generator=torch.Generator().manual_seed(0))
    expected = loss_of(model, windows_of(ids))
    found = held_out_loss(model, ids, 2)
    rtol, atol = TOLERANCES[torch.float32]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=rtol, atol=atol)
