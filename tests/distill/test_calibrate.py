"""Calibration: its least-squares solutions against numpy's, and what it makes of a student before any training."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from teachers import draw_ids, make_teacher, text_windows, trained_teacher
from torch import Tensor
from transformers import LlamaForCausalLM

from ssm_zoo.distill.calibrate import calibrate, calibration_windows, ridge, scale_heads
from ssm_zoo.distill.data import TokenWindows
from ssm_zoo.distill.recipe import StudentSpec, parse_recipe
from ssm_zoo.distill.student import build_student, student_mixer, zeroed_mixers
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.evaluation.language_modeling import evaluate_language_model
from ssm_zoo.modeling import ZooHybridForCausalLM

CANDIDATES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]
DISCRETE = [
    {"feature_map": feature_map, "normalize": normalize, "rotary": rotary}
    for (feature_map, normalize), rotary in itertools.product(
        [("identity", False), ("softplus", False), ("softplus", True)], [False, True]
    )
]
MIXERS = [*DISCRETE, {"mixer": "mamba2"}]


def name(options: Any) -> str:
    return "-".join(str(value) for value in options.values()) if isinstance(options, dict) else str(options)


def calibrated(
    teacher: LlamaForCausalLM, layers: list[int], windows: Tensor, batch_size: int = 4, **options: Any
) -> ZooHybridForCausalLM:
    spec = StudentSpec(**options)
    student = build_student(Teacher(teacher), spec, layers)
    calibrate(student, Teacher(teacher), spec, layers, windows, batch_size=batch_size, progress=False)
    return student


def output_errors(
    student: ZooHybridForCausalLM, teacher: LlamaForCausalLM, layers: list[int], windows: Tensor
) -> list[float]:
    """Squared error over squared target of each converted mixer's output, in all windows together."""
    errors: list[float] = []

    def on_layer(layer: int, normed_input: Tensor, attention_output: Tensor) -> None:
        with torch.no_grad():
            output, _ = student_mixer(student, layer)(normed_input, student.backbone.sequence_of(normed_input))
        target = attention_output.double()
        errors.append(float((output.double() - target).square().sum() / target.square().sum()))

    Teacher(teacher).capture(windows, layers, ("normed_input", "attention_output"), on_layer=on_layer)
    return errors


def test_no_window_is_fitted_and_held_out() -> None:
    """A text that is shorter than `calibration_tokens` is read once."""
    stage = {"name": "a", "objective": "logit_distillation", "tokens": 1, "batch_size": 1, "learning_rate": 1e-3}
    data = {"train": "x", "heldout": "x", "sequence_length": 16}
    recipe = parse_recipe({"teacher": "x", "data": data, "student": {}, "stages": [stage]})
    windows = calibration_windows(recipe, TokenWindows(torch.arange(100)))
    assert windows.shape == (6, 16) and len({int(window[0]) for window in windows}) == 6
    assert calibration_windows(recipe, TokenWindows(torch.arange(8192 + 16))).shape == (512, 16)


def synthetic(heads: int = 3, width: int = 4, out: int = 5, rows: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (D, E), inputs (N, E) and targets (N, D) that no projection explains wholly."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(out, heads * width), (rows, heads * width), (rows, out)]
    weight, inputs, noise = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)
    return (
        weight,
        inputs,
        inputs @ torch.randn(heads * width, out, generator=generator, dtype=torch.float64) + noise,
    )


def test_scale_heads_is_least_squares_over_one_factor_per_head() -> None:
    weight, inputs, targets = synthetic()
    columns = [inputs[:, 4 * head : 4 * head + 4] @ weight[:, 4 * head : 4 * head + 4].T for head in range(3)]
    design = np.stack([column.flatten().numpy() for column in columns], axis=1)
    factors = np.linalg.lstsq(design, targets.flatten().numpy(), rcond=None)[0]
    assert np.abs(factors - 1).min() > 0.01
    expected = weight * torch.from_numpy(factors).repeat_interleave(4)
    scaled = scale_heads(weight, inputs.T @ inputs, inputs.T @ targets, 3)
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strength", [1e-8, 1e-2, 1.0, 1e8])
def test_ridge_is_least_squares_shrunk_towards_the_weight(strength: float) -> None:
    weight, inputs, targets = synthetic()
    penalty = strength * float(inputs.square().sum(0).mean())
    design = np.concatenate([inputs.numpy(), penalty**0.5 * np.eye(12)])
    wanted = np.concatenate([targets.numpy(), penalty**0.5 * weight.T.numpy()])
    expected = torch.from_numpy(np.linalg.lstsq(design, wanted, rcond=None)[0].T)
    fitted = ridge(weight, inputs.T @ inputs, inputs.T @ targets, strength)
    torch.testing.assert_close(fitted, expected, rtol=1e-8, atol=1e-8)
    if strength == 1e8:
        torch.testing.assert_close(fitted, weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_a_calibrated_mixer_is_better_than_none_and_than_before(mixer: dict[str, Any], bias: bool) -> None:
    teacher, layers, windows = make_teacher(attention_bias=bias), [0, 1, 3], draw_ids(6, 24)
    errors = {}
    for calibration in ("none", "head_scale", "ridge"):
        student = calibrated(teacher, layers, windows, half_life="calibrated", calibration=calibration, **mixer)
        errors[calibration] = output_errors(student, teacher, layers, windows)
    for none, scaled, fitted in zip(*errors.values(), strict=True):
        assert fitted < scaled < none
        assert scaled < 1.0
        assert fitted < 0.9


@pytest.mark.parametrize("method", ["head_scale", "ridge", "sequential"])
@pytest.mark.parametrize("silent", ["o_proj", "v_proj"])
def test_an_attention_that_adds_nothing_can_be_calibrated(silent: str, method: str) -> None:
    teacher = make_teacher()
    teacher.model.layers[1].self_attn.get_parameter(f"{silent}.weight").zero_()
    student = calibrated(teacher, [1, 2], draw_ids(6, 16), calibration=method)
    assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())
    out_proj = student_mixer(student, 1).get_parameter("out_proj.weight")
    assert bool((out_proj != 0).any()) == (silent == "v_proj")  # whose values may still be learnt


def test_windows_count_alike_whatever_the_batches() -> None:
    teacher, windows = make_teacher(), draw_ids(5, 16)
    options: dict[str, Any] = {"half_life": (2.0, 8.0), "calibration": "ridge"}
    one = calibrated(teacher, [1], windows, batch_size=1, **options).state_dict()
    all_ = calibrated(teacher, [1], windows, batch_size=5, **options).state_dict()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, all_[key], rtol=1e-4, atol=1e-5, msg=key)
    fewer = calibrated(teacher, [1], windows[:4], **options).state_dict()
    key = "backbone.layers.1.mixer.out_proj.weight"
    assert (fewer[key] - one[key]).abs().max() > 1e-3


def relative_errors(teacher: LlamaForCausalLM, layer: int, windows: Tensor, options: dict[str, Any]) -> Tensor:
    """(H, candidates) squared error of what each candidate makes of the teacher's values, over the teacher's square.

    Each head's output is scaled as well as can be.
    """
    view = Teacher(teacher).attention(layer)
    seen: list[Tensor] = []
    Teacher(teacher).capture(
        windows, [layer], ["normed_input"], on_layer=lambda _, normed_input: seen.append(normed_input)
    )
    values, targets = view.values(seen[0]).double(), view.head_outputs(seen[0]).double()
    queries, keys = view.queries_keys(seen[0])
    if not options.get("rotary"):
        queries = F.linear(seen[0], view.q).unflatten(-1, (6, 8))
        keys = F.linear(seen[0], view.expand_heads(view.k)).unflatten(-1, (6, 8))
    if options.get("mixer") == "mamba2":
        queries, keys = F.silu(queries * view.scaling), F.silu(keys)
    elif options["feature_map"] == "softplus":
        queries, keys = F.softplus(queries), F.softplus(keys)
    scores = torch.einsum("bihn,bjhn->bhij", queries.double(), keys.double())
    length = windows.shape[1]
    age = torch.arange(length)[:, None] - torch.arange(length)
    columns = []
    for half_life in CANDIDATES:
        matrix = scores * torch.tril(0.5 ** (age.clamp(min=0).double() / half_life))
        if options.get("normalize"):
            matrix = matrix / matrix.sum(-1, keepdim=True)
        outputs = torch.einsum("bhij,bjhp->bihp", matrix, values)
        errors = []
        for head in range(6):
            design, target = outputs[:, :, head].flatten()[:, None].numpy(), targets[:, :, head].flatten().numpy()
            _, residual, _, _ = np.linalg.lstsq(design, target, rcond=None)
            errors.append(float(residual[0]) / float((target**2).sum()))
        columns.append(errors)
    return torch.tensor(columns, dtype=torch.float64).T


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_calibrated_half_lives_are_the_best_of_the_candidates(mixer: dict[str, Any]) -> None:
    teacher, layers = trained_teacher(), [0, 2]
    windows = text_windows(60, 48, seed=3)[:6]
    student = calibrated(teacher, layers, windows, half_life="calibrated", calibration="none", **mixer)
    chosen = set()
    for layer in layers:
        # Half-lives are read from two windows.
        errors = relative_errors(teacher, layer, windows[:2], mixer)
        decays: Any = student_mixer(student, layer)
        half_lives = -np.log(2) / decays.log_decay(torch.zeros(1, 1, 48))[0, 0].detach().double()
        for head in range(6):
            distances = [abs(float(half_lives[head]) / candidate - 1) for candidate in CANDIDATES]
            candidate = distances.index(min(distances))
            assert distances[candidate] < 1e-4
            chosen.add(candidate)
            assert errors[head, candidate] <= errors[head].min() + 1e-6, (layer, head)
            assert errors[head].max() - errors[head].min() > 1e-3
    assert len(chosen) > 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"half_life": (2.0, 16.0)}, id="discrete"),
        pytest.param({"half_life": (2.0, 16.0), "mixer": "mamba2"}, id="mamba2"),
        pytest.param({"mixer": "sliding_attention"}, id="sliding attention"),
    ],
)
def test_nothing_to_calibrate_changes_nothing(options: dict[str, Any]) -> None:
    teacher, windows = make_teacher(), draw_ids(4, 16)
    before = build_student(Teacher(teacher), StudentSpec(**options), [0, 2]).state_dict()
    after = calibrated(teacher, [0, 2], windows, **options).state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


def test_calibration_touches_converted_layers_alone() -> None:
    teacher, windows, layers = make_teacher(), draw_ids(4, 16), [1, 2]
    spec = StudentSpec(half_life="calibrated", calibration="ridge")
    before = build_student(Teacher(teacher), spec, layers).state_dict()
    after = calibrated(teacher, layers, windows, half_life="calibrated", calibration="ridge").state_dict()
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    parts = ("dt_bias", "out_proj.weight")
    assert changed == {f"backbone.layers.{layer}.mixer.{part}" for layer in layers for part in parts}


def loss(model: Any) -> float:
    return evaluate_language_model(model, text_windows(120, 48, seed=9), progress=False)["loss"]


@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_a_calibrated_student_starts_near_a_trained_teacher(mixer: dict[str, Any]) -> None:
    teacher, windows, layers = trained_teacher(), text_windows(400, 48, seed=3), [0, 1, 2, 3]
    students = {
        calibration: calibrated(teacher, layers, windows, half_life="calibrated", calibration=calibration, **mixer)
        for calibration in ("none", "head_scale", "ridge")
    }
    losses = {calibration: loss(student) for calibration, student in students.items()}
    with zeroed_mixers(students["none"], layers):
        silent = loss(students["none"])
    assert losses["ridge"] < losses["head_scale"] < losses["none"]
    assert losses["ridge"] < 1.3 * loss(teacher) < 0.7 * silent


@pytest.mark.parametrize("copy_projections", [True, False], ids=["copied", "random"])
@pytest.mark.parametrize("calibration", ["none", "head_scale", "ridge"])
@pytest.mark.parametrize("half_life", ["calibrated", (4.0, 64.0)], ids=name)
@pytest.mark.parametrize("mixer", MIXERS, ids=name)
def test_every_combination_runs(
    mixer: dict[str, Any], half_life: Any, calibration: str, copy_projections: bool
) -> None:
    teacher, windows = make_teacher(num_hidden_layers=2), draw_ids(2, 12)
    student = calibrated(
        teacher,
        [1],
        windows,
        half_life=half_life,
        calibration=calibration,
        copy_projections=copy_projections,
        **mixer,
    )
    with torch.no_grad():
        assert student(input_ids=windows).logits.isfinite().all()
    assert np.isfinite(output_errors(student, teacher, [1], windows)).all()
    if calibration != "none":
        assert output_errors(student, teacher, [1], windows)[0] <= 1.0
