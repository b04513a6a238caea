"""The gate benchmark: a whole run at a tiny size, and that the gate learns what it is there for."""

import json
from pathlib import Path
from typing import Any

import gate_learning
import pytest
from gate_learning import TASK, main, make, summary_of
from huggingface_hub.errors import StrictDataclassError

ARGUMENTS = "--capacities 0.2 0.5 --seeds 1 2 --steps 4 --batch 2 --evaluate-every 2 --validation 3"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments: str) -> None:
    main([*ARGUMENTS.split(), *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a whole run."""
    folder = tmp_path_factory.mktemp("results")
    run("--output", str(folder))
    (path,) = folder.glob("*.jsonl")
    return path


def test_a_whole_run_measures_every_capacity_with_every_seed(finished: Path):
    rows = read(finished)
    assert [(row["capacity"], row["seed"]) for row in rows[:4]] == [(0.2, 1), (0.2, 2), (0.5, 1), (0.5, 2)]
    assert [row["summary"] for row in rows[4:]] == [0.2, 0.5]
    shares = {f"{kind} {tokens}" for kind in ("drawn", "selected") for tokens in ("queries", "rest", "all")}
    for row in rows[:4]:
        assert [point["step"] for point in row["curve"]] == [0, 2, 4]
        for point in row["curve"]:
            assert point.keys() == {"step", "accuracy", *shares}
            assert 0 <= min(point[key] for key in shares) <= max(point[key] for key in shares) <= 1
            queries = TASK.pairs / TASK.length
            mixed = queries * point["drawn queries"] + (1 - queries) * point["drawn rest"]
            assert point["drawn all"] == pytest.approx(mixed)
    assert all(row.keys() >= {"hardware", "versions", "date", "command"} for row in rows)
    assert finished.with_suffix(".png").exists()


def test_going_on_repeats_no_run_and_adds_what_is_missing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "cut-off.jsonl"
    path.write_bytes(finished.read_bytes())
    done: list[gate_learning.Run] = []
    execute = gate_learning.execute
    monkeypatch.setattr(gate_learning, "execute", lambda run, *others: done.append(run) or execute(run, *others))
    run("--resume", str(path))
    assert done == []
    assert len(read(path)) == len(read(finished))
    run("--capacities", "0.5", "--seeds", "1", "5", "--resume", str(path))
    assert [(row.capacity, row.seed) for row in done] == [(0.5, 5)]


def test_a_summary_is_the_mean_of_the_ends():
    ends = [{"step": 9, "accuracy": 0.5, "drawn all": 0.2}, {"step": 9, "accuracy": 1.0, "drawn all": 0.4}]
    rows = [
        {"seed": seed, "curve": [{"step": 0, "accuracy": 0.0, "drawn all": 0.5}, end]} for seed, end in enumerate(ends)
    ]
    found = summary_of(0.3, rows)
    assert found == {
        "summary": 0.3,
        "seeds": [0, 1],
        "accuracy": 0.75,
        "drawn all": pytest.approx(0.3),
        "drawn all, range": [0.2, 0.4],
    }


def test_what_a_configuration_refuses_is_an_error_before_anything_is_written(tmp_path: Path):
    with pytest.raises(StrictDataclassError, match=r"attention_capacity must be above 0 and at most 1, got 1\.5"):
        run("--capacities", "0.2", "1.5", "--output", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_model_has_the_capacity_and_the_weight_that_it_is_asked_for():
    config = make(0.3, 2.0, 0).config
    assert (config.attention_capacity, config.router_aux_loss_coef) == (0.3, 2.0)
    assert config.layer_types == ["zoo_recurrent", "zoo_window"]
    assert config.sliding_window >= TASK.length
