"""The papers' synthetic tests: answers by slow definitions, equal arms, time-invariant controls, runs."""

import argparse
import dataclasses
import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import synthetic
import synthetic_table
import torch
import torch.nn.functional as F
from synthetic import RESULT, Run, by_number, judged, loss_of, main, score_of, table
from synthetic_arms import (
    ARMS,
    EQUAL,
    GRU,
    MAMBA,
    MAMBA2,
    S4D,
    S4D_REAL,
    TRANSFORMER,
    Sizes,
    TimeInvariantMixer,
    convolve,
    make,
    parameters,
)
from synthetic_claims import NOT_RUN
from synthetic_functions import DecisionTree, LinearRegression, SparseParity, VectorRetrieval
from synthetic_table import SETTINGS, Assessment, Setting
from synthetic_tasks import Batch, Copying, InductionHeads, Needle, RunningSum

from ssm_zoo.kernels.selective_scan import selective_scan
from ssm_zoo.modeling import ZooMambaConfig

TOKENS = Sizes(inputs=6, outputs=6, vectors=False, width=32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(batch: Batch) -> list[tuple[list[int], dict[int, int]]]:
    """The inputs of each row, and its answers by position."""
    found = []
    for ids, targets, asked in zip(*(part.tolist() for part in batch), strict=True):
        found.append((ids, {place: targets[place] for place, is_asked in enumerate(asked) if is_asked}))
    return found


@pytest.mark.parametrize(("spaced", "context"), [(False, None), (False, 20), (True, None), (True, 20)])
def test_copying_asks_for_the_symbols_in_their_order(spaced: bool, context: int | None):
    task, length = Copying(3, 9, 7, spaced), context or 9
    firsts = set()
    for ids, answers in rows_of(task.draw(200, generator(), context)):
        assert len(ids) == length + 3
        symbols = [token for token in ids if token >= 2]
        assert ids[length:] == [1, 1, 1]
        assert answers == dict(zip(range(length, length + 3), symbols, strict=True))
        firsts.add(next(place for place, token in enumerate(ids) if token >= 2))
        assert not spaced or symbols == [ids[place - length] for place in answers]
    assert firsts == {0} if spaced else len(firsts) > 4


@pytest.mark.parametrize("length", [None, 4, 30])
def test_induction_heads_ask_for_the_symbol_behind_the_trigger(length: int | None):
    places = set()
    for ids, answers in rows_of(InductionHeads(12, 5).draw(300, generator(), length)):
        place = ids.index(0)
        places.add(place)
        assert [i for i, token in enumerate(ids) if token == 0] == [place, len(ids) - 1]
        assert answers == {len(ids) - 1: ids[place + 1]}
        assert ids[place + 1] in range(1, 5)
    assert places == set(range((length or 12) - 2))


@pytest.mark.parametrize(("length", "depth"), [(None, None), (14, 0.0), (20, 1.0), (21, 0.5), (8, None)])
def test_a_needle_is_at_its_depth_and_its_value_the_answer(length: int | None, depth: float | None):
    task, size = Needle(16, pairs=3, keys=5, fillers=4), length or 16
    for ids, answers in rows_of(task.draw(200, generator(), length, depth)):
        assert len(ids) == size
        places = [i for i, token in enumerate(ids[:-1]) if token < 5]
        values = [ids[i + 1] for i in places]
        assert len({ids[i] for i in places}) == len(set(values)) == 3
        assert all(5 <= value < 10 for value in values)
        assert sum(token >= 10 for token in ids) == size - 7
        asked = next(i for i in places if ids[i] == ids[-1])
        assert answers == {size - 1: ids[asked + 1]}
        if depth in (0.0, 1.0):
            assert asked == (0 if depth == 0 else size - 3)
        if depth == 0.5:  # two places less for every other pair before it
            assert abs(asked - sum(i < asked for i in places) - (size - 5) / 2) <= 1


@pytest.mark.parametrize("modulus", [2, 3])
def test_a_running_sum_is_that_of_the_digits_so_far(modulus: int):
    for ids, answers in rows_of(RunningSum(modulus, 6).draw(50, generator(), 9, first=4)):
        assert answers == {place: sum(ids[: place + 1]) % modulus for place in range(4, 9)}
    targets = RunningSum(modulus, 50).draw(400, generator()).targets
    assert float((targets == 0).float().mean()) == pytest.approx(1 / modulus, abs=0.02)


@pytest.mark.parametrize("name", SETTINGS)
def test_chance_is_the_score_of_answers_that_ignore_what_is_asked(name: str):
    task = SETTINGS[name].task
    batch = task.draw(2000, generator())
    targets = batch.targets[batch.asked]
    if targets.is_floating_point():
        assert score_of(torch.zeros_like(targets), targets) == pytest.approx(task.chance)
        return
    if isinstance(task, Needle):  # the value of a random pair of the context
        values = [[token for token in ids if task.keys <= token < 2 * task.keys] for ids in batch.inputs.tolist()]
        draw = random.Random(0)
        answers = torch.tensor([draw.choice(found) for found in values])
    else:
        lowest = {"selective_copying": 2, "copying": 2, "induction_heads": 1}.get(name, 0)
        answers = torch.randint(lowest, task.outputs, targets.shape, generator=generator(1))
    share = score_of(F.one_hot(answers, task.outputs).float(), targets)
    assert share == pytest.approx(task.chance, abs=0.03)


@pytest.mark.parametrize(("dimension", "relevant"), [(5, 2), (4, 1), (6, 3)])
def test_no_answer_without_the_examples_is_better_than_blind(dimension: int, relevant: int):
    task = SparseParity(dimension=dimension, points=40, relevant=relevant)
    x, y = task.sample(4000, {"generator": generator()})
    negative = (x < 0).sum(-1)
    found = sum(
        max(float(((negative == k) & (y > 0)).sum()), float(((negative == k) & (y < 0)).sum()))
        for k in range(dimension + 1)
    )
    assert found / y.numel() == pytest.approx(task.blind, abs=0.01)


def examples(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and values of a batch of examples: the vectors in turn."""
    assert torch.equal(batch.inputs[:, 1::2, 1:], torch.zeros_like(batch.inputs[:, 1::2, 1:]))
    assert batch.asked[0].tolist() == [i % 2 == 0 for i in range(batch.inputs.shape[1])]
    return batch.inputs[:, ::2], batch.inputs[:, 1::2, 0]


def test_values_are_read_after_the_points_at_which_they_are_asked_for():
    for task in (LinearRegression(3, 6, 3, 0.5), DecisionTree(3, 6, 2), SparseParity(3, 6, 2)):
        batch = task.draw(5, generator())
        _, values = examples(batch)
        answers = batch.targets[:, :-1:2]
        assert torch.equal(answers[..., 0] if task.numbers else 2.0 * answers - 1, values)
        assert task.draw(5, generator(), first=4).asked[0].nonzero()[:, 0].tolist() == [8, 10]


def test_regression_is_linear_in_the_components_with_a_weight():
    x, y = examples(LinearRegression(4, 9, 2, 0.0).draw(20, generator()))
    w = torch.linalg.lstsq(x[:, :8], y[..., None]).solution[..., 0]
    torch.testing.assert_close((x[:, :8] @ w[..., None])[..., 0], y, rtol=1e-3, atol=1e-3)
    assert ((w.abs() > 1e-3).sum(1) == 2).all()
    noisy = LinearRegression(1, 400, 1, 0.5)
    x, y = noisy.sample(100, {"generator": generator()})
    w = (x[..., 0] * y).sum(1) / (x[..., 0] ** 2).sum(1)
    assert float((y - w[:, None] * x[..., 0]).std()) == pytest.approx(0.5, abs=0.02)


def test_a_tree_has_as_many_values_as_leaves_and_depends_on_signs_of_two_components():
    task = DecisionTree(3, 60, 2)
    x, y = task.sample(30, {"generator": generator()})
    for row in range(30):
        leaves: dict[float, set[tuple[bool, ...]]] = {}
        for point, value in zip(x[row], y[row].tolist(), strict=True):
            leaves.setdefault(value, set()).add(tuple((point > 0).tolist()))
        assert len(leaves) <= 4
        assert sum(map(len, leaves.values())) == len(set.union(*leaves.values()))  # a leaf for every combination


def test_parity_is_the_product_of_components_that_stay_the_same():
    x, y = SparseParity(4, 40, 2).sample(30, {"generator": generator()})
    for row in range(30):
        right = [pair for pair in combinations(range(4), 2) if torch.equal(x[row][:, list(pair)].prod(-1), y[row])]
        assert len(right) == 1


def test_estimators_answer_from_the_examples_before():
    regression = LinearRegression(2, 6, 2, 0.0)
    batch = regression.draw(40, generator())
    scores = by_number(regression.baseline(batch), batch)
    assert scores[0] == 0.0
    assert scores[1] < 0.9
    assert min(scores[2:]) > 0.99
    parity = SparseParity(4, 30, 2)
    batch = parity.draw(100, generator())
    scores = by_number(parity.baseline(batch), batch)
    assert scores[0] < 0.7
    assert scores[-1] == 1.0
    x, y = DecisionTree(3, 6, 2).sample(4, {"generator": generator()})
    found = DecisionTree(3, 6, 2).estimate(x, y)
    for row in range(4):
        nearest = sorted(range(5), key=lambda i, row=row: float((x[row, i] - x[row, 5]).norm()))[:3]
        assert float(found[row, 5]) == pytest.approx(sum(float(y[row, i]) for i in nearest) / 3, abs=1e-5)
        assert float(found[row, 1]) == pytest.approx(float(y[row, 0]), abs=1e-5)


def test_retrieval_asks_every_key_once_more():
    task = VectorRetrieval(4, 5)
    batch = task.draw(20, generator(), first=2)
    assert batch.asked[0].nonzero()[:, 0].tolist() == [12, 13, 14]
    torch.testing.assert_close(batch.inputs.norm(dim=-1), torch.ones(20, 15))
    for ids, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        values = {tuple(key): value for key, value in zip(ids[:10:2], ids[1:10:2], strict=True)}
        assert [values[tuple(query)] for query in ids[10:]] == targets[10:]
        assert len({tuple(query) for query in ids[10:]}) == 5
    assert torch.equal(task.baseline(batch)[batch.asked], batch.targets[batch.asked])


@pytest.mark.parametrize(
    ("make_task", "message"),
    [
        (lambda: Copying(0, 4, 8), "symbols must be from 1 to context.*got 0, 4 and 8"),
        (lambda: Copying(2, 4, 3), "vocabulary at least 4, got 2, 4 and 3"),
        (lambda: InductionHeads(3, 8), "length must be at least 4.*got 3 and 8"),
        (lambda: Needle(9, 4, 8, 2), "length at least 2 . pairs . 2, got 4, 8, 2 and 9"),
        (lambda: Needle(90, 9, 8, 2), "pairs must be from 1 to keys.*got 9, 8, 2 and 90"),
        (lambda: RunningSum(1, 8), "modulus must be at least 2.*got 1 and 8"),
        (lambda: SparseParity(3, 1, 2), "points at least 2, got 3, 1"),
        (lambda: VectorRetrieval(4, 0), "dimension and pairs must be at least 1, got 4 and 0"),
        (lambda: LinearRegression(3, 5, 4, 0.5), "weights must be from 1 to dimension.*got 4 and 0.5"),
    ],
)
def test_tasks_that_cannot_be_are_refused(make_task: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make_task()


SIZES = {setting.sizes(): setting.arms for setting in SETTINGS.values()}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_arms_of_a_task_have_as_many_parameters(sizes: Sizes):
    with torch.device("meta"):
        counts = {arm: parameters(make(arm, sizes, 0)) for arm in SIZES[sizes]}
    assert MAMBA in counts
    assert max(abs(count - counts[MAMBA]) for count in counts.values()) <= EQUAL * counts[MAMBA]


def test_sizes_that_cannot_be_equal_are_refused():
    with pytest.raises(ValueError, match=r"let s4d have the parameters of mamba \(843\) within 5%, got 1011 with"):
        make(S4D, Sizes(inputs=6, outputs=6, vectors=False, width=3), 0)


def test_arms_are_the_layers_that_they_are_called_after_and_depend_on_the_seed_alone():
    expected = {MAMBA: "MambaMixer", MAMBA2: "Mamba2Mixer", S4D: "TimeInvariantMixer", S4D_REAL: "TimeInvariantMixer"}
    for arm in ARMS:
        models = [make(arm, TOKENS, seed) for seed in (0, 0, 1)]
        ids = torch.arange(6)[None]
        one, again, other = (model(ids) for model in models)
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        if arm in expected:
            mixers = [block.mixer for block in models[0].backbone.layers]
            assert [type(mixer).__name__ for mixer in mixers] == [expected[arm]] * 2
            first, second = (mixer.in_proj.weight for mixer in mixers)
            assert not torch.equal(first, second)


@pytest.mark.parametrize("arm", [MAMBA, MAMBA2, TRANSFORMER, GRU])
def test_reading_in_chunks_ends_as_reading_at_once(arm: str):
    model = make(arm, TOKENS, 0).eval()
    ids = torch.randint(6, (3, 23), generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(model.last(ids, 5), model(ids)[:, -1], rtol=1e-4, atol=1e-5)


def mixer_of(rotating: bool) -> TimeInvariantMixer:
    torch.manual_seed(0)
    mixer = TimeInvariantMixer(ZooMambaConfig(hidden_size=4, num_hidden_layers=2, state_size=3), 0, rotating)
    with torch.no_grad():
        mixer.dt_bias.uniform_(-2, 0)
    return mixer


@pytest.mark.parametrize("rotating", [False, True])
def test_a_time_invariant_mixer_is_the_recurrence_with_constant_parameters(rotating: bool):
    mixer = mixer_of(rotating)
    x = torch.randn(2, 7, 8, generator=generator())
    dt = F.softplus(mixer.dt_bias)[:, None]
    A, C = -mixer.A_log.exp(), mixer.C[0]
    if mixer.angles is not None:
        A, C = A + 1j * mixer.angles, C + 1j * mixer.C[1]
    state, expected = torch.zeros(2, 8, 3, dtype=C.dtype), []
    for t in range(7):
        state = (dt * A).exp() * state + dt * x[:, t, :, None]
        expected.append((C * state).sum(-1).real)
    torch.testing.assert_close(convolve(x, mixer.kernel(7)), torch.stack(expected, 1), rtol=1e-4, atol=1e-5)
    if not rotating:  # and the scan of Mamba with the same numbers at every token
        steps, ones = mixer.dt_bias.expand(2, 7, 8), torch.ones(2, 7, 8, 3)
        found = selective_scan(x, steps, -mixer.A_log.exp(), ones, mixer.C[0].expand(2, 7, 8, 3), dt_softplus=True)
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(convolve(x, mixer.kernel(7)), found, rtol=1e-4, atol=1e-5)


def test_the_controls_answer_is_linear_and_shifts_with_its_input_unlike_mambas():
    """The recurrence of the control is linear in its input and the same at every time; that of Mamba is neither."""
    x = torch.randn(1, 6, 8, generator=generator())
    late = F.pad(x, (0, 0, 3, 0))
    mixer = mixer_of(rotating=True)
    assert not hasattr(mixer, "x_proj")
    torch.testing.assert_close(convolve(2 * x, mixer.kernel(6)), 2 * convolve(x, mixer.kernel(6)))
    torch.testing.assert_close(
        convolve(late, mixer.kernel(9))[:, 3:], convolve(x, mixer.kernel(6)), atol=1e-5, rtol=1e-4
    )
    selective = make(MAMBA, TOKENS, 0).backbone.layers[0].mixer
    dt, B, _ = selective.recurrence_inputs(torch.randn(1, 2, selective.config.intermediate_size))
    assert not torch.equal(dt[:, 0], dt[:, 1])
    assert not torch.equal(B[:, 0], B[:, 1])
    model = make(S4D, TOKENS, 0)
    with pytest.raises(ValueError, match="a time-invariant mixer has no cache"):
        model.last(torch.zeros(1, 4, dtype=torch.long), 2)


def test_the_loss_and_the_score_are_those_of_what_is_asked():
    batch = RunningSum(3, 6).draw(4, generator(), first=2)
    answers = torch.randn(4, 6, 3, generator=generator())
    expected = [
        (-answers[row, place].log_softmax(-1)[digit], answers[row, place].argmax() == digit)
        for row, (_, found) in enumerate(rows_of(batch))
        for place, digit in found.items()
    ]
    losses, right = (torch.stack(part) for part in zip(*expected, strict=True))
    torch.testing.assert_close(loss_of(lambda _: answers, batch), losses.mean())
    assert score_of(answers[batch.asked], batch.targets[batch.asked]) == pytest.approx(float(right.float().mean()))
    targets = torch.tensor([[1.0], [3.0]])
    assert score_of(torch.tensor([[2.0], [1.0]]), targets) == pytest.approx(1 - 5 / 10)
    numbers = Batch(torch.zeros(1, 2), targets[None], torch.tensor([[False, True]]))
    assert float(loss_of(lambda _: torch.tensor([[[9.0], [1.0]]]), numbers)) == pytest.approx(4)


def test_solving_early_is_better_and_a_nearly_solved_task_is_better_than_none():
    def row(trained: int, score: float, solved: bool) -> dict[str, Any]:
        return {"steps": 100, "trained": trained, "solved": solved, "curve": [{"score": 0.5}, {"score": score}]}

    rows = [row(20, 0.99, True), row(100, 0.99, True), row(100, 0.9, False), row(100, 0.2, False), row(100, -3, False)]
    assert [judged(row) for row in rows] == pytest.approx([20, 100, 110, 180, 200])


COPY_TESTS = {"4": Assessment({}, 8), "9": Assessment({"context": 9}, 8)}
PARITY_TESTS = {"second half": Assessment({"first": 1}, 8)}
TINY = {
    "copying": Setting(Copying(2, 4, 6, spaced=True), (MAMBA, S4D), COPY_TESTS, steps=4, width=32),
    "sparse_parity": Setting(SparseParity(3, 3, 2), (TRANSFORMER,), PARITY_TESTS, steps=4, width=32),
}
ARGUMENTS = "--tasks copying sparse_parity --seeds 1 2 --evaluate-every 2 --validation 4 --batch 2"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result file of a whole run."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        for name, setting in TINY.items():
            patch.setitem(synthetic_table.SETTINGS, name, setting)
        main([*ARGUMENTS.split(), "--output", str(folder)])
    (path,) = folder.glob("*.jsonl")
    return path


def test_a_whole_run_tunes_all_arms_alike_and_runs_the_best_rate_with_every_seed(finished: Path):
    rows = read(finished)
    assert all(row.keys() >= {"hardware", "versions", "date", "command", "purpose"} for row in rows)
    (summary,) = (row for row in rows if row["purpose"] == "summary")
    for task, arm in (("copying", MAMBA), ("copying", S4D), ("sparse_parity", TRANSFORMER)):
        found = summary["tasks"][task]["arms"][arm]
        runs = [row for row in rows if (row.get("task"), row.get("arm")) == (task, arm)]
        tuned = [row for row in runs if row["purpose"] == "tuning"]
        assert [row["rate"] for row in tuned[:2]] == [8e-3, 4e-3]
        assert {row["seed"] for row in tuned} == {0}
        assert found["rate"] == min(tuned, key=judged)["rate"]
        results = [row for row in runs if row["purpose"] == RESULT]
        assert [(row["rate"], row["seed"]) for row in results] == [(found["rate"], 1), (found["rate"], 2)]
        for test, scores in found["tests"].items():
            assert scores == [row["tests"][test] for row in results]
        assert found["tests"].keys() == TINY[task].tests.keys()
    parity = next(row for row in rows if row["purpose"] == RESULT and row["task"] == "sparse_parity")
    assert len(parity["by_examples"]) == len(parity["baseline_by_examples"]) == 3
    assert summary["tasks"]["sparse_parity"]["baseline"] == parity["baseline"]
    assert {verdict["verdict"] for verdict in summary["verdicts"]} == {NOT_RUN}
    assert finished.with_suffix(".png").exists()
    printed = table(summary)
    assert "copying             s4d           9" in printed
    assert "(estimator)" in printed


def test_going_on_repeats_no_run_and_adds_what_is_missing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, setting in TINY.items():
        monkeypatch.setitem(synthetic_table.SETTINGS, name, setting)
    path = tmp_path / "cut-off.jsonl"
    path.write_bytes(finished.read_bytes())
    done: list[Run] = []
    execute = synthetic.execute
    monkeypatch.setattr(synthetic, "execute", lambda run, options: done.append(run) or execute(run, options))
    main([*ARGUMENTS.split(), "--resume", str(path)])
    assert done == []
    assert len(read(path)) == len(read(finished))
    main([*ARGUMENTS.replace("1 2", "1 5").split(), "--arms", "s4d", "--resume", str(path)])
    assert [(run.purpose, run.task, run.arm, run.seed) for run in done] == [(RESULT, "copying", S4D, 5)]
    with pytest.raises(SystemExit, match="the minutes are over"):
        main([*ARGUMENTS.replace("1 2", "1 2 6").split(), "--minutes", "0", "--resume", str(path)])
    (summary,) = (row for row in read(path) if row["purpose"] == "summary")
    assert summary["tasks"] == {}  # no arm has all of these seeds
    assert len(done) == 1


def test_a_run_ends_where_it_is_solved(monkeypatch: pytest.MonkeyPatch):
    scores = iter([0.5, 0.98, 0.99, 0.4, 0.3])
    monkeypatch.setitem(synthetic_table.SETTINGS, "copying", TINY["copying"])
    monkeypatch.setattr(synthetic, "assess", lambda *_: next(scores))
    options = argparse.Namespace(device="cpu", validation=4, evaluate_every=1)
    setting = TINY["copying"]
    run = Run(RESULT, "copying", dataclasses.asdict(setting.task), S4D, 16, 1e-3, 1, 5, 2)
    row = synthetic.execute(run, options)
    assert (row["trained"], row["solved"]) == (3, True)
    assert [point["step"] for point in row["curve"]] == [1, 2, 3]
    assert row["tests"] == {"4": 0.4, "9": 0.3}


def test_long_sequences_are_read_in_chunks_and_assessed_alike(monkeypatch: pytest.MonkeyPatch):
    task, model = InductionHeads(20, 6), make(MAMBA, TOKENS, 0)
    batch = task.draw(7, generator())
    expected = model.eval()(batch.inputs)[:, -1:]
    monkeypatch.setattr(synthetic, "CHUNK", 6)
    monkeypatch.setattr(synthetic, "PART", 40)
    found = synthetic.answers_of(model.train(), task, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.training
    assert synthetic.assess(model, task, batch) == score_of(expected[:, 0], batch.targets[:, -1])
