"""The comparison of losses beyond the training length, at a tiny size: the same targets, tuning, what it writes."""

import json
import math
from pathlib import Path
from typing import Any

import length
import length_models
import pytest
import torch
from from_scratch_training import LENGTH, VOCABULARY, loss_of
from length import FACTORS, Run, main, split, training_loss
from length_evaluation import evaluate, losses_of, windows_of
from length_models import ARMS, HYBRID, MAMBA2, TAIPAN, TRANSFORMER, make, parameters

from tolerances import TOLERANCES

TINY = {"WIDTH": 32, "HEADS": 2, "STATE": 4, "GROUP": 1, "INNER": 16, "ALONE": 1, "BLOCKS": 1, "BLOCK_INNER": 16}
ARGUMENTS = (
    "--rate 1e-2 --trial-steps 1 --steps 2 --seeds 1 2 --batch 1 --window 8 --multiples 1 2 --judge 128 --windows 2"
)


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Tiny models (a Mamba-2 head has 64 channels, so the width is at least 32) and a text of random tokens."""
    for name, size in TINY.items():
        patch.setattr(length_models, name, size)
    ids = torch.randint(VOCABULARY, (2000,), generator=torch.Generator().manual_seed(0))
    patch.setattr(length, "tokens", lambda: (ids[:1200], ids[1200:]))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def run(*arguments: str) -> None:
    main([*ARGUMENTS.split(), *arguments])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a whole run of two arms."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        run("--arm", TAIPAN, TRANSFORMER, "--output", str(folder))
    (path,) = folder.glob("*.jsonl")
    return path


class Recorder(torch.nn.Module):
    """A model that records what it reads and expects each token to be one more than the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[torch.Tensor] = []

    def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
        self.read.append(ids)
        logits = torch.nn.functional.one_hot((ids + 1) % 50, 50).float()
        return type("Output", (), {"logits": logits})


def test_the_arms_are_equal_in_size():
    with torch.device("meta"):
        counts = {arm: parameters(make(arm, VOCABULARY, 64, 0)) for arm in ARMS}
    assert max(counts.values()) < 1.03 * min(counts.values())
    assert 1e6 < min(counts.values()) < max(counts.values()) < 3e6


def test_the_arms_mix_tokens_as_they_say():
    with torch.device("meta"):
        kinds = {arm: make(arm, VOCABULARY, 64, 0).config.layer_types for arm in ARMS}
        window = make(TAIPAN, VOCABULARY, 37, 0).config.sliding_window
    assert kinds[TAIPAN] == ["zoo_recurrent"] * 6 + ["zoo_window"]
    assert kinds[HYBRID] == ["zoo_recurrent"] * 6 + ["full_attention"]
    assert set(kinds[MAMBA2]) == {"zoo_recurrent"}
    assert set(kinds[TRANSFORMER]) == {"full_attention"}
    assert window == 37


def test_every_length_predicts_the_same_tokens_each_of_them_once():
    ids = torch.arange(3 * 24 + 5)
    windows = windows_of(ids, 24, 3)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 73))
    for size in (6, 12, 24):
        model = Recorder()
        # Targets are the tokens after the inputs, so their loss is least where the two are of one piece of text.
        losses, rate = losses_of(model, windows % 50, size, budget=30)  # pyright: ignore[reportArgumentType]
        assert rate is None
        assert losses.shape == (3, 24)
        torch.testing.assert_close(losses, torch.full((3, 24), math.log(math.e + 49) - 1))
        assert torch.cat(model.read).flatten().tolist() == [i % 50 for i in range(72)]
        assert all(part.shape[1] == size and part.numel() <= max(30, size) for part in model.read)


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="count must be at most 2, windows of 24 tokens in the text, got 3"):
        windows_of(torch.arange(72), 24, 3)


@pytest.mark.parametrize("arm", ARMS)
@torch.no_grad()
def test_losses_are_those_of_the_pieces_by_themselves(arm: str, tiny: None):
    model = make(arm, VOCABULARY, 8, 0)
    windows = windows_of(torch.randint(VOCABULARY, (81,), generator=torch.Generator().manual_seed(1)), 40, 2)
    losses, _ = losses_of(model, windows, 20, budget=50)
    rtol, atol = TOLERANCES[torch.float32]
    for row, window in enumerate(windows):
        for begin in (0, 20):
            expected = loss_of(model, window[None, begin : begin + 21])
            torch.testing.assert_close(losses[row, begin : begin + 20].mean(), expected, rtol=rtol, atol=atol)


def test_the_evaluation_averages_what_it_says(tiny: None):
    model = make(TAIPAN, VOCABULARY, 8, 0)
    windows = windows_of(torch.randint(VOCABULARY, (121,), generator=torch.Generator().manual_seed(2)), 40, 3)
    found = evaluate(model, windows, [10, 40], 10, budget=100)
    short, long = (losses_of(model, windows, size, 100)[0] for size in (10, 40))
    assert found["held_out"]["10"] == pytest.approx(float(short.mean()))
    assert found["by_position"]["40"] == pytest.approx([float(long[:, i : i + 10].mean()) for i in (0, 10, 20, 30)])
    # The first piece of a window is the beginning of the window.
    assert found["by_position"]["10"][0] == pytest.approx(found["by_position"]["40"][0])
    change = (long - short).mean(1)
    assert found["change"]["10"] == {"mean": 0.0, "error": 0.0}
    assert found["change"]["40"]["mean"] == pytest.approx(found["held_out"]["40"] - found["held_out"]["10"], abs=1e-6)
    assert found["change"]["40"]["error"] == pytest.approx(float(change.std()) / math.sqrt(3), rel=1e-4)
    assert 0 < found["selection_rate"]["10"] < 1


def test_taipan_trains_on_the_capacity_loss_and_the_others_on_the_language_alone(tiny: None):
    windows = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    for arm in ARMS:
        model = make(arm, VOCABULARY, 8, 0).train()
        torch.manual_seed(5)
        loss = training_loss(model, windows)
        torch.manual_seed(5)
        output = model(windows[:, :-1], use_cache=False)
        torch.manual_seed(5)
        language = loss_of(model, windows)
        expected = language + output.aux_loss if arm == TAIPAN else language
        torch.testing.assert_close(loss, expected)
        assert arm != TAIPAN or output.aux_loss > 0


def test_rates_and_results_are_judged_by_different_text():
    data = split((torch.arange(10), torch.arange(1000)), 300, 2, [1, 2])
    assert (int(data.judged[0]), int(data.judged[-1])) == (0, 300)
    assert int(data.windows[0, 0]) == 300  # an input alone: no target of `judged` is one here
    assert data.windows[:, 1:].flatten().tolist() == list(range(301, 301 + 4 * LENGTH))
    assert data.lengths == [LENGTH, 2 * LENGTH]


def test_every_arm_is_searched_from_the_same_start_and_its_best_rate_run_again(finished: Path):
    rows = read(finished)
    for arm in (TAIPAN, TRANSFORMER):
        trials = [row for row in rows if row["purpose"] == "trial" and row["arm"] == arm]
        assert trials[0]["rate"] == 1e-2
        assert {(row["seed"], row["steps"], "held_out" in row) for row in trials} == {(0, 1, False)}
        judged = {row["rate"]: row["judged"] for row in trials}
        (summary,) = (row for row in rows if row["purpose"] == "summary" and row["arm"] == arm)
        best = summary["rate"]
        assert judged[best] == min(judged.values())
        assert {best * factor for (factor,) in FACTORS} <= set(judged)
        results = [row for row in rows if row["purpose"] == "result" and row["arm"] == arm]
        assert [(row["rate"], row["seed"], row["steps"]) for row in results] == [(best, 1, 2), (best, 2, 2)]
        ends = [row["held_out"]["256"] for row in results]
        assert [summary["held_out"]["256"][side] for side in ("low", "high")] == sorted(ends)
        assert summary["change"]["128"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        assert len(summary["by_position"]["256"]) == 4
        assert summary["lengths"] == [128, 256]
        assert ("selection_rate" in summary) == (arm == TAIPAN)
    assert all(row.keys() >= {"hardware", "versions", "date", "command"} for row in rows)
    assert finished.with_suffix(".png").exists()


def test_going_on_repeats_no_run_and_adds_what_is_missing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: None
):
    path = tmp_path / "cut-off.jsonl"
    path.write_bytes(finished.read_bytes())
    done: list[Run] = []
    execute = length.execute
    monkeypatch.setattr(length, "execute", lambda run, data: done.append(run) or execute(run, data))
    run("--arm", TAIPAN, TRANSFORMER, "--resume", str(path))
    assert done == []
    assert len(read(path)) == len(read(finished))
    run("--arm", TAIPAN, "--seeds", "1", "2", "5", "--resume", str(path))
    assert [(row.arm, row.seed) for row in done] == [(TAIPAN, 5)]
    summaries = [row for row in read(path) if row["purpose"] == "summary"]
    assert [(row["arm"], row["seeds"]) for row in summaries] == [(TRANSFORMER, [1, 2]), (TAIPAN, [1, 2, 5])]


def test_multiples_have_to_divide_the_longest(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--multiples", "1", "3", "8"])
    assert "--multiples must begin with 1 and each divide the last, got [1, 3, 8]" in capsys.readouterr().err
