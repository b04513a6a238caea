"""The plan of a run counts what a stage trains, measures what a step needs, and changes nothing."""

import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from teachers import make_teacher, save_teacher, small_text, text_windows, trained_teacher
from torch.utils._python_dispatch import _get_current_dispatch_mode
from typer.testing import CliRunner

from ssm_zoo.cli.main import app
from ssm_zoo.distill import plan as planning
from ssm_zoo.distill import plan_fits
from ssm_zoo.distill.data import TokenWindows
from ssm_zoo.distill.measuring import peak_of
from ssm_zoo.distill.plan import RunPlan, make_plan, plan_table
from ssm_zoo.distill.recipe import as_mapping, parse_recipe
from ssm_zoo.distill.recipe_files import load_recipe
from ssm_zoo.distill.run import distill
from ssm_zoo.distill.student import build_student
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.training.trainer import computing

CPU = torch.device("cpu")
KEPT = planning.KeptStates.__init__
RECIPE = """\
teacher: teacher
student: {layers: odd, half_life: [1, 8]}
data: {train: train.txt, heldout: heldout.txt, sequence_length: 32}
stages:
- {name: align, objective: hidden_state_alignment, tokens: 512, batch_size: 4, learning_rate: 1.0e-3}
- {name: logits, objective: logit_distillation, train: all, tokens: 512, batch_size: 4, learning_rate: 1.0e-3}
evaluation: {tokens: 64, final: false}
"""


def parts(
    *,
    before: dict[str, Any] | None = None,
    evaluation: int = 64,
    student: dict[str, Any] | None = None,
    **stage: Any,
) -> tuple[Any, ...]:
    """The arguments of a plan of a run with one stage, and one before it if asked for."""
    teacher = Teacher(make_teacher())
    values = {"objective": "logit_distillation", "train": "all", "tokens": 512, "batch_size": 4, **stage}
    recipe = parse_recipe(
        {
            "teacher": "x",
            "student": {"layers": [1, 2], **({"half_life": [1, 8]} if student is None else student)},
            "data": {"train": "x", "heldout": "x", "sequence_length": 32},
            "stages": [
                *([] if before is None else [{"name": "before", "learning_rate": 1e-3, **values, **before}]),
                {"name": "one", "learning_rate": 1e-3, **values},
            ],
            "evaluation": {"tokens": evaluation},
        }
    )
    made = build_student(teacher, recipe.student, [1, 2])
    windows = TokenWindows(text_windows(60, 1)[:, 0])
    return recipe, teacher, made, [1, 2], windows, windows, lambda: computing("float32", CPU)


def plan_of(**stage: Any) -> tuple[RunPlan, Any]:
    """The plan of a run with one stage, and its student."""
    arguments = parts(**stage)
    return make_plan(*arguments), arguments[2]


def test_the_peak_is_the_largest_sum_of_living_tensors() -> None:
    weight = torch.ones(100, 100, requires_grad=True)

    def run() -> None:
        x = torch.ones(100, 100)
        y = x + 1  # x and y: 2
        del x
        y = y * 2  # the new and the old one: 2
        y.view(-1).t()  # nothing new
        torch.tanh(y * weight).sum().backward()  # y, the product and its tanh: 3; then gradients in their places

    assert peak_of(run, CPU) == pytest.approx(3 * 40_000, abs=16)
    assert peak_of(lambda: torch.ones(10_000).add_(1), CPU) == 40_000
    assert peak_of(lambda: [torch.ones(100) for _ in range(9)], CPU) == 3600
    assert peak_of(lambda: weight.detach().add_(1), CPU) == 0


def test_the_sizes_of_a_stage_are_those_of_its_weights() -> None:
    found, student = plan_of()
    (stage,) = found.stages
    assert stage.parameters == student.num_parameters()
    assert stage.optimiser == 8 * stage.parameters
    assert (stage.steps, stage.tokens) == (4, 512)
    assert stage.logits == 4 * 320 * 4 * 32  # all tokens of a step fit into one chunk
    assert stage.activations > 4 * stage.parameters  # with the gradients
    kept = 2 * 4 * 64 * student.config.hidden_size  # states of teacher and control for 64 tokens
    assert stage.peak == found.resident + kept + stage.optimiser + stage.activations
    assert found.teacher == pytest.approx(4 * Teacher(make_teacher()).model.num_parameters(), rel=0.01)
    assert found.peak == max(stage.peak, found.comparison, found.evaluation)
    mixers, _ = plan_of(objective="hidden_state_alignment", train="mixers")
    names = ("backbone.layers.1.mixer.", "backbone.layers.2.mixer.")
    trained = sum(tensor.numel() for name, tensor in student.named_parameters() if name.startswith(names))
    assert mixers.stages[0].parameters == trained and mixers.stages[0].logits == 0


def test_blocks_that_are_recomputed_hold_no_activations() -> None:
    recipe, *others = parts(batch_size=8, before={"objective": "hidden_state_alignment", "train": "mixers"})
    student, found = others[1], []
    for less in (False, True):
        values = {**as_mapping(recipe), "gradient_checkpointing": less}
        found.append(make_plan(parse_recipe(values), *others).stages)
        assert not student.training and not any(block.gradient_checkpointing for block in student.backbone.layers)
    plain, recomputed = found
    assert recomputed[0].activations == plain[0].activations  # of a layer-wise stage
    assert recomputed[1].activations < 0.8 * plain[1].activations


@pytest.mark.parametrize("objective", ["hidden_state_alignment", "logit_distillation"])
def test_the_memory_of_a_large_batch_follows_from_that_of_a_small_one(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = "all" if objective == "logit_distillation" else "mixers"
    # One chunk of logits holds one sequence and a half.
    monkeypatch.setattr("ssm_zoo.distill.logit_losses._LOGITS_BYTES", 4 * 320 * 48)
    found, _ = plan_of(objective=objective, train=train, batch_size=12)
    monkeypatch.setattr(
        planning, "_extrapolated", lambda step, batch, _, device: (peak_of(lambda: step(batch), device), 0)
    )
    whole, _ = plan_of(objective=objective, train=train, batch_size=12)
    assert found.stages[0].activations == pytest.approx(whole.stages[0].activations, rel=0.03)


def test_layers_that_wait_are_held_beside_the_attention_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_extrapolated", lambda *_: (10**9, 0.0))
    arguments = parts(before={"layers": [1]})
    first, second = make_plan(*arguments).stages
    attention = arguments[1].model.model.layers[2].self_attn
    held = first.peak - first.optimiser - (second.peak - second.optimiser)
    assert held == 4 * sum(parameter.numel() for parameter in attention.parameters())
    # Without activations, the largest sum is that in which a checkpoint is written: also of the mixer that waits.
    monkeypatch.setattr(planning, "_extrapolated", lambda *_: (0, 0.0))
    mixers: dict[str, Any] = {"objective": "hidden_state_alignment", "train": "mixers", "stream": "student"}
    arguments = parts(before={"layers": [1]}, **mixers)
    first, second = make_plan(*arguments).stages
    assert first.parameters == second.parameters / 2
    sizes = [parameter.numel() for parameter in arguments[2].backbone.layers[1].mixer.parameters()]
    assert second.peak - second.optimiser - 4 * (
        2 * sum(sizes) + max(sizes)
    ) == first.peak - first.optimiser - held - 8 * sum(sizes)


def test_the_hidden_states_that_evaluations_keep_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_extrapolated", lambda *_: (10**9, 0.0))
    monkeypatch.setattr(planning, "peak_of", lambda *_: 0)
    resident, width = 10**9, make_teacher().config.hidden_size
    monkeypatch.setattr(planning, "_resident", lambda *_: resident)
    for tokens, kept in ((64, 64 * width * 4), (512, 512 * width * 4)):
        found = make_plan(*parts(evaluation=tokens))
        (stage,) = found.stages
        assert stage.peak == resident + stage.optimiser + 10**9 + 2 * kept  # of teacher and control
        assert found.evaluation == resident + max(found.teacher + 2 * kept, 3 * kept)
    monkeypatch.setattr(planning.KeptStates, "__init__", lambda self: KEPT(self, 30_000))
    found = make_plan(*parts(evaluation=512))
    assert found.stages[0].peak == resident + found.stages[0].optimiser + 10**9 + 30_000


STUDENTS: dict[str, dict[str, Any]] = {
    "neither": {"half_life": [1, 8]},
    "ridge": {"half_life": "calibrated", "calibration": "ridge", "calibration_tokens": 512},
    "sequential": {"half_life": "calibrated", "calibration": "sequential", "calibration_tokens": 512},
    "averages": {"mixer": "masked_mixing", "positions": 32, "calibration": "head_scale"},
    "slots": {"mixer": "bounded_attention", "window": 4, "chunk_size": 2, "sinks": 1, "rows": 12},
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_plan_changes_neither_weights_nor_random_numbers(name: str) -> None:
    fitted: dict[str, Any] = {"objective": "hidden_state_alignment", "train": "mixers", "refit": "ridge"}
    arguments = parts(student=STUDENTS[name], **(fitted if name == "ridge" else {}))
    student = arguments[2]
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    config = student.config.to_dict()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    found = make_plan(*arguments)
    assert torch.rand(4).equal(expected)
    for key, parameter in student.named_parameters():
        assert parameter.equal(before[key]) and parameter.grad is None and parameter.requires_grad, key
    assert student.config.to_dict() == config
    shown = plan_table(found)
    assert "| one | 4 | 512 | 0." in shown
    seconds = {"calibration": found.calibration_seconds, "division of slots": found.slots_seconds}
    measured = {"neither": set(), "slots": {"division of slots"}}.get(name, {"calibration"})
    assert {part for part, each in seconds.items() if each > 0} == measured
    assert {part for part in seconds if f"| {part} |" in shown} == measured
    before_training = found.slots_seconds + found.calibration_seconds
    assert found.seconds == before_training + found.evaluation_seconds + found.stages[0].seconds


def test_a_plan_says_what_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = parts()
    make_plan(*arguments)
    silent = capsys.readouterr()
    assert "plan" not in silent.out + silent.err
    make_plan(*arguments, progress=True)
    shown = capsys.readouterr()
    assert "plan: measuring memory and time of a training step of each stage" in shown.out
    assert "/7 [" in shown.err and "calibration]" in shown.err  # a stage and six other parts


def test_fits_are_extrapolated_to_all_windows_and_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of their own: seconds of each part are a number and one per window."""
    clock = [0.0]
    monkeypatch.setattr(plan_fits, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def heal_steps(_student: Any, _teacher: Any, layers: Any, windows: torch.Tensor, **_options: Any) -> Iterator[None]:
        clock[0] += 0.5 * len(windows)
        yield
        for layer in range(max(layers) + 1):
            clock[0] += 3 + 0.25 * len(windows) if layer in layers else 0.125 * len(windows)
            yield

    monkeypatch.setattr(plan_fits, "heal_steps", heal_steps)
    _, teacher, student, *_ = parts()
    for layers, count in ([1, 3], 7), ([1, 3], 40), ([0, 1], 40), ([0, 3], 40):
        seconds = plan_fits.fit_seconds(student, teacher, layers, torch.zeros(count, 8), "sequential")
        others = max(layers) + 1 - len(layers)
        assert seconds == pytest.approx(0.5 * count + len(layers) * (3 + 0.25 * count) + others * 0.125 * count)

    def seconds_of(run: Any, _device: Any) -> float:
        run()
        return clock.pop()

    def fit(_student: Any, _teacher: Any, layers: list[int], windows: torch.Tensor, *_: Any, progress: bool) -> None:
        assert layers == [1] and not progress
        clock.append(3 + 0.25 * len(windows) + 0.125 * len(windows))  # with a block before the layer

    monkeypatch.setattr(plan_fits, "seconds_of", seconds_of)
    monkeypatch.setattr(plan_fits, "fit_output_projections", fit)
    monkeypatch.setattr(plan_fits, "_forward_seconds", lambda _, last, windows: 0.125 * last * len(windows))
    for layers, count in ([1, 3], 7), ([1, 2, 3], 40):
        seconds = plan_fits.fit_seconds(student, teacher, layers, torch.zeros(count, 8), "ridge")
        assert seconds == pytest.approx(len(layers) * (3 + 0.25 * count) + 0.125 * 3 * count)


def test_times_are_those_of_steps_whose_tensors_are_not_counted() -> None:
    modes: list[bool] = []

    def step(sequences: int) -> None:
        modes.append(_get_current_dispatch_mode() is not None)
        time.sleep(0.2 if modes[-1] else 0.01 * sequences)

    _, seconds = planning._extrapolated(step, 12, 2, CPU)
    assert modes == [True, True, False, False, False]
    assert seconds == pytest.approx(0.12, rel=0.5)


def test_the_time_of_the_evaluations_is_that_of_the_held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    # A step, an update, the scores of four windows of 32 tokens, and of one of two; recall; errors of layers.
    seconds = cycle([1.0, 1.0, 1.0, 0.25, 1.0, 1.0])
    monkeypatch.setattr(planning, "seconds_of", lambda *_: next(seconds))
    recipe, *others = parts()
    found = []
    for tokens in (64, 10**9):
        values = {**as_mapping(recipe), "evaluation": {"tokens": tokens}}
        found.append(make_plan(parse_recipe(values), *others).evaluation_seconds)
    heldout = len(others[4]) // 32 * 32
    # Teacher, zeroed mixers, control, step 0 and a stage; recall of four of them, the errors of layers twice.
    assert found == pytest.approx([5 * (0.25 + 0.75 * tokens / 128) + 6 for tokens in (64, heldout)])


def test_the_matrices_of_a_layer_are_part_of_an_evaluation() -> None:
    """Attention, and what attends to a bounded memory, have whole matrices in the errors of layers."""
    recipe, *others = parts(evaluation=512, student={"mixer": "bounded_attention", "slots": "equal"})
    values = {**as_mapping(recipe), "evaluation": {"tokens": 512, "sequence_length": 256, "batch_size": 2}}
    found = make_plan(parse_recipe(values), *others)
    assert found.evaluation - found.resident > 2 * 4 * (2 * 6 * 256**2)  # of student and teacher, for two windows


def test_the_training_text_may_be_shorter_than_a_window_of_the_evaluation() -> None:
    recipe, teacher, student, layers, windows, heldout, compute = parts()
    values = {**as_mapping(recipe), "evaluation": {"tokens": 128, "sequence_length": 128}}
    short = TokenWindows(windows.windows(1)[:64, 0])
    assert make_plan(parse_recipe(values), teacher, student, layers, short, heldout, compute).evaluation > 0


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_teacher(tmp_path / "teacher", trained_teacher())
    for name, sentences in (("train", 300), ("heldout", 40)):
        (tmp_path / f"{name}.txt").write_text(small_text(sentences, seed=sentences), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_the_option_prints_the_plan_and_writes_nothing(inputs: Path) -> None:
    before = set(inputs.rglob("*"))
    result = CliRunner().invoke(app, ["distill", "recipe.yaml", "out", "--plan"])
    assert result.exit_code == 0, f"{result.stderr}\n{result.exception!r}"
    assert "| align | 4 | 512 | " in result.stdout and "| logits | 4 | 512 | " in result.stdout
    assert set(inputs.rglob("*")) == before


def test_a_run_with_a_plan_gives_the_bits_of_one_without(inputs: Path) -> None:
    recipe, plans = load_recipe("recipe.yaml"), []

    def on_plan(plan: RunPlan) -> bool:
        plans.append(plan)
        return True

    reports = [distill(recipe, name, on_plan=chosen) for name, chosen in (("a", None), ("b", on_plan))]
    a, b = ([[row["loss"], row["kl"]] for row in report["evaluations"]] for report in reports)
    assert a == b
    # A tiny run takes little beside the program itself.
    assert plans[0].peak == pytest.approx(reports[1]["peak_memory_bytes"], rel=0.4)
    # No plan is made for a folder that the run would refuse.
    before = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"a holds a run of another recipe \(seed: 0 there, 1 here\)"):
        distill(load_recipe("recipe.yaml", ["seed=1"]), "a", on_plan=on_plan)
    assert len(plans) == 1
    assert {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()} == before
