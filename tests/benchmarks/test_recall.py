"""The recall benchmark: its sequences, the models that it holds equal, and a whole run at a tiny size."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import recall
import torch
import torch.nn.functional as F
from from_scratch_training import Trainer
from recall import Run, Size, judged, main
from recall_arms import ARMS, EQUAL, LARGE, MAMBA2, TAIPAN, TRANSFORMER, Sizes, make, parameters
from recall_task import UNASKED, Task, assess, draw, recall_loss
from torch import Tensor

MODELS = Sizes(vocabulary=40, width=32, state=4, large_state=8, capacity=0.25)
TINY = Size(16, [2, 3], MODELS, batch=4, steps=4)
ARGUMENTS = "--arms taipan mamba2 --seeds 1 2 --evaluate-every 2 --validation 3 --fresh 5"
TASKS = [Task(16, 2, 40), Task(24, 6, 21), Task(64, 16, 512), Task(30, 3, 50, fillers=20)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_every_query_has_its_answer_in_the_context_and_nowhere_another(task: Task):
    ids, labels = draw(task, 50, generator())
    assert ids.shape == labels.shape == (50, task.length)
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        keys, values = row[: 2 * task.pairs : 2], row[1 : 2 * task.pairs : 2]
        assert len(set(keys)) == len(set(values)) == task.pairs
        answers = dict(zip(keys, values, strict=True))
        places = [place for place, label in enumerate(asked) if label != UNASKED]
        assert sorted(row[place] for place in places) == sorted(keys)
        for place in places:
            assert place >= 2 * task.pairs
            assert place % 2 == 0
            assert answers[row[place]] == asked[place]
        others = {token for place, token in enumerate(row[2 * task.pairs :], 2 * task.pairs) if place not in places}
        assert not others & set(keys)


def test_keys_values_and_fillers_are_from_their_ranges_and_all_of_them_occur():
    task = Task(30, 3, 50, fillers=20)
    ids, labels = draw(task, 500, generator())
    asked = labels != UNASKED
    assert set(ids[:, 0:6:2].flatten().tolist()) == set(range(1, 15))
    assert set(ids[:, 1:6:2].flatten().tolist()) == set(range(15, 30))
    assert set(ids[:, 6:][~asked[:, 6:]].tolist()) == set(range(30, 50))
    ids, labels = draw(Task(30, 3, 50), 500, generator())
    asked = labels != UNASKED
    assert set(ids[:, 0:6:2].flatten().tolist()) == set(range(1, 25))
    assert set(ids[:, 1:6:2].flatten().tolist()) == set(range(25, 50))
    assert set(ids[:, 6:][~asked[:, 6:]].tolist()) == set(range(1, 50))


def test_most_queries_come_early_and_in_no_fixed_order():
    ids, labels = draw(Task(44, 2, 40), 2000, generator())
    places = (labels != UNASKED).float().mean(0)[4::2]
    weights = torch.arange(1, 21.0) ** -0.99
    # Of a draw of two without replacement the first place is in with p + sum_j p_j p / (1 - p_j).
    p = weights / weights.sum()
    expected = p + (p / (1 - p)).sum() * p - p * p / (1 - p)
    torch.testing.assert_close(places, expected, rtol=0, atol=0.03)
    first = torch.stack([row.nonzero()[0, 0] for row in labels != UNASKED])
    swapped = (ids.gather(1, first[:, None])[:, 0] == ids[:, 2]).float().mean()
    assert 0.1 < swapped < 0.5


def test_sequences_depend_on_the_seed_alone():
    one, again, other = (draw(TASKS[0], 8, generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((15, 2, 40), "length must be even and at least 4 . pairs.*got 15 and 2"),
        ((6, 2, 40), "length must be.*got 6 and 2"),
        ((16, 0, 40), "pairs at least 1, got 16 and 0"),
        ((16, 2, 5), "vocabulary must hold 6 tokens or more.*got 5 and fillers 0"),
        ((16, 2, 40, 35), "vocabulary must hold 6 tokens or more.*got 40 and fillers 35"),
        ((16, 2, 40, -1), "fillers, at least 0, got 40 and fillers -1"),
    ],
)
def test_tasks_that_cannot_be_are_refused(sizes: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        Task(*sizes)


@pytest.mark.parametrize("name", recall.SIZES)
def test_the_arms_have_as_many_parameters(name: str):
    sizes = recall.SIZES[name].models
    with torch.device("meta"):
        counts = {arm: parameters(make(arm, sizes, 0.02, 0)) for arm in ARMS}
    assert max(counts.values()) - min(counts.values()) <= EQUAL * counts[MAMBA2]
    assert counts[MAMBA2] > sizes.vocabulary * sizes.width


def test_the_arms_are_the_layers_that_they_are_called_after():
    made = {arm: make(arm, MODELS, 0.02, 0) for arm in ARMS}
    mixers = {arm: [type(block.mixer).__name__ for block in model.backbone.layers] for arm, model in made.items()}
    assert mixers[TAIPAN] == ["Mamba2Mixer", "SelectiveAttention"]
    assert mixers[MAMBA2] == mixers[LARGE] == ["Mamba2Mixer"] * 2
    assert len(set(mixers[TRANSFORMER])) == 1
    states = {arm: made[arm].backbone.layers[0].mixer.state_size for arm in (TAIPAN, MAMBA2, LARGE)}
    assert states == {TAIPAN: 4, MAMBA2: 4, LARGE: 8}
    assert made[TRANSFORMER].config.rope_parameters["rope_theta"] == 10000
    assert made[TAIPAN].config.attention_capacity == 0.25


def test_sizes_that_cannot_be_equal_are_refused():
    sizes = Sizes(vocabulary=40, width=32, state=4, large_state=512, capacity=0.25)
    with pytest.raises(ValueError, match=r"let mamba2-large have the parameters of mamba2 \(\d+\) within 2%, got \d+"):
        make(LARGE, sizes, 0.02, 0)


@pytest.mark.usefixtures("without_gate_noise")
def test_the_loss_is_the_cross_entropy_at_the_queries_and_the_capacity_loss():
    model: Any = make(TAIPAN, MODELS, 0.5, 0)
    ids, labels = draw(TASKS[0], 6, generator())
    model.train()
    outputs = model(ids)
    expected = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()) + outputs.aux_loss
    torch.testing.assert_close(recall_loss(model, (ids, labels)), expected)
    assert outputs.aux_loss > 0
    model.eval()
    # As the model's own loss, which shifts the labels: those of the next token.
    shifted = F.pad(labels[:, :-1], (1, 0), value=UNASKED)
    expected = model(ids, labels=shifted).loss + model(ids).aux_loss
    torch.testing.assert_close(recall_loss(model, (ids, labels)), expected)


def test_accuracy_and_shares_are_counted_over_all_sequences(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recall_task.PART", 4)
    model: Any = make(TAIPAN, MODELS, 0.5, 0)
    ids, labels = draw(TASKS[0], 10, generator())
    asked = labels != UNASKED
    model.eval()
    with torch.no_grad():
        outputs = model(ids)
    (scores,) = outputs.router_logits
    margin = scores[..., 1] - scores[..., 0]
    found = assess(model.train(), (ids, labels))
    assert model.training
    assert found["accuracy"] == pytest.approx(float((outputs.logits.argmax(-1) == labels)[asked].float().mean()))
    for name, where in (("queries", asked), ("rest", ~asked), ("all", asked | True)):
        assert found[f"selected {name}"] == pytest.approx(float((margin > 0)[where].float().mean()))
        assert found[f"drawn {name}"] == pytest.approx(float(margin[where].sigmoid().mean()))
    assert found["selected all"] == pytest.approx(float(outputs.selection_rate))
    assert assess(make(MAMBA2, MODELS, 0.5, 0), (ids, labels)).keys() == {"accuracy"}


def test_the_drawn_share_is_the_mean_of_what_training_selects():
    model: Any = make(TAIPAN, MODELS, 0.5, 0)
    batch = draw(TASKS[0], 200, generator())
    expected = assess(model, batch)["drawn all"]
    with torch.no_grad():
        found = torch.stack([model(batch[0]).selection_rate for _ in range(20)]).mean()
    assert float(found) == pytest.approx(expected, abs=0.01)  # 64000 draws: a standard deviation of 0.002 at most


def test_a_model_that_knows_answers_and_training_moves_towards_it():
    """A batch that is learnt by heart is answered."""
    batch = draw(Task(8, 2, 12), 2, generator())
    model = make(TRANSFORMER, Sizes(12, 16, 4, 8, 0.25), 0.2, 0)
    trainer = Trainer(model, 2e-2, 60, recall_loss)
    losses = [trainer.step(batch) for _ in range(60)]
    assert losses[-1] < 0.1 < losses[0]
    assert assess(model, batch) == {"accuracy": 1.0}


def test_solving_early_is_better_and_a_nearly_solved_task_is_better_than_none():
    def row(trained: int, *accuracy: float) -> dict[str, Any]:
        ends = {str(pairs): {"accuracy": share} for pairs, share in enumerate(accuracy)}
        return {"steps": 100, "trained": trained, "curve": [{"validation": {}}, {"validation": ends}]}

    rows = [row(20, 0.99, 1.0), row(100, 0.99, 1.0), row(100, 1.0, 0.8), row(100, 0.2, 0.0)]
    assert [judged(row) for row in rows] == pytest.approx([20, 100, 110, 190])


def run(*arguments: str) -> None:
    main([*ARGUMENTS.split(), *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a whole run."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recall.SIZES, "cpu", TINY)
        run("--output", str(folder))
    (path,) = folder.glob("*.jsonl")
    return path


def test_a_whole_run_tunes_both_arms_alike_and_runs_the_best_rate_with_every_seed(finished: Path):
    rows = read(finished)
    assert all(row.keys() >= {"hardware", "versions", "date", "command", "purpose"} for row in rows)
    assert {tuple(row["pairs"]) for row in rows} == {(2, 3)}
    (summary,) = (row for row in rows if row["purpose"] == "summary")
    for arm in (TAIPAN, MAMBA2):
        found = summary["arms"][arm]
        tuned = [row for row in rows if row["purpose"] == "tuning" and row["arm"] == arm]
        assert [row["rate"] for row in tuned[:2]] == [4e-3, 2e-3]
        assert {row["seed"] for row in tuned} == {0}
        assert found["rate"] == min(tuned, key=judged)["rate"]
        results = [row for row in rows if row["purpose"] == "result" and row["arm"] == arm]
        assert [(row["rate"], row["seed"]) for row in results] == [(found["rate"], 1), (found["rate"], 2)]
        assert all([point["step"] for point in row["curve"]] == [2, 4] for row in results)
        assert {row["parameters"] for row in results} == {found["parameters"]}
        for pairs in ("2", "3"):
            accuracy = [row["fresh"][pairs]["accuracy"] for row in results]
            assert (found[pairs]["low"], found[pairs]["high"]) == (min(accuracy), max(accuracy))
            assert found[pairs]["solved"] == [row["solved"][pairs] for row in results]
            assert ("drawn queries" in found[pairs]) == (arm == TAIPAN)
    assert finished.with_suffix(".png").exists()


def test_going_on_repeats_no_run_and_adds_what_is_missing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(recall.SIZES, "cpu", TINY)
    path = tmp_path / "cut-off.jsonl"
    path.write_bytes(finished.read_bytes())
    done: list[Run] = []
    execute = recall.execute
    monkeypatch.setattr(recall, "execute", lambda run, *others: done.append(run) or execute(run, *others))
    run("--resume", str(path))
    assert done == []
    assert len(read(path)) == len(read(finished))
    run("--seeds", "1", "2", "5", "--resume", str(path))
    assert [(row.purpose, row.arm, row.seed) for row in done] == [("result", TAIPAN, 5), ("result", MAMBA2, 5)]
    assert [row["seeds"] for row in read(path) if row["purpose"] == "summary"] == [[1, 2, 5]]


def test_other_states_are_another_comparison_with_a_file_of_its_own(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(recall.SIZES, "cpu", TINY)
    path = tmp_path / "states.jsonl"
    path.write_bytes(finished.read_bytes())
    made: list[int] = []
    monkeypatch.setattr(recall, "execute", lambda run, size, options: made.append(size.models.state) or sys.exit())
    with pytest.raises(SystemExit, match=r"states\.jsonl has rows with states None, got \[2, 3\]\. Give the same"):
        run("--states", "2", "3", "--resume", str(path))
    with pytest.raises(SystemExit):
        run("--states", "2", "3", "--output", str(tmp_path / "other"))
    assert made == [2]


def test_a_run_ends_where_everything_is_solved_and_is_judged_by_other_sequences(monkeypatch: pytest.MonkeyPatch):
    judges: list[Tensor] = []
    trained: list[int] = []
    accuracy = iter([0.995, 0.5, 0.6, 1.0, 0.99, 1.0, 0.97, 0.98])

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        trained.append(int((batch[1] != UNASKED).sum(1)[0]))
        return recall_loss(model, batch)

    monkeypatch.setattr(recall, "assess", lambda model, batch: judges.append(batch[0]) or {"accuracy": next(accuracy)})
    monkeypatch.setattr(recall, "recall_loss", loss)
    options = argparse.Namespace(device="cpu", validation=3, fresh=5, evaluate_every=1)
    row = recall.execute(Run("result", 16, [2, 3], 40, 4, MAMBA2, 1e-3, 0.05, 1, 4, 4), TINY, options)
    assert trained == [3, 2, 3]
    assert (row["trained"], row["solved"]) == (3, {"2": 1, "3": 2})
    assert row["fresh"] == {"2": {"accuracy": 0.97}, "3": {"accuracy": 0.98}}
    assert [point["step"] for point in row["curve"]] == [1, 2, 3]
    assert [len(ids) for ids in judges] == [3, 3, 3, 3, 3, 3, 5, 5]
    assert torch.equal(judges[0], judges[2])
    assert not torch.equal(judges[0], judges[6][:3])
