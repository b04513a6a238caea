"""Sequential healing: exact where it can be, better than a single pass where it cannot, and the same in any batches."""

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from teachers import draw_ids, make_qwen2, make_teacher, save_teacher, small_text, text_windows, trained_teacher
from torch import Tensor, nn

from ssm_zoo.distill import healing
from ssm_zoo.distill.calibrate import calibrate, fit_output_projections
from ssm_zoo.distill.gates import fit_gates
from ssm_zoo.distill.healing import heal
from ssm_zoo.distill.least_squares import Moments, cross_validated_ridge
from ssm_zoo.distill.recipe import StudentSpec, parse_recipe
from ssm_zoo.distill.run import distill
from ssm_zoo.distill.student import build_student, student_mixer
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.evaluation.language_modeling import evaluate_language_model
from ssm_zoo.modeling import ZooHybridForCausalLM
from ssm_zoo.modeling.discrete_mamba2 import OPEN_GATE

MIXERS: dict[str, dict[str, Any]] = {
    "discrete": {},
    "discrete, normalised": {"feature_map": "softplus", "normalize": True, "rotary": True},
    "mamba2": {"mixer": "mamba2"},
    "masked mixing": {"mixer": "masked_mixing", "positions": 48},
    "sliding attention": {"mixer": "sliding_attention", "sliding_window": 6},
    "linear attention": {"mixer": "linear_attention", "sliding_window": 4},
    "bounded attention": {"mixer": "bounded_attention", "window": 8, "chunk_size": 4, "sinks": 1, "rows": 12},
    "retention": {"mixer": "retention"},
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(teacher: Any, layers: list[int], windows: Tensor, batch_size: int = 4, **options: Any) -> Any:
    spec = StudentSpec(**options)
    student = build_student(Teacher(teacher), spec, layers)
    calibrate(student, Teacher(teacher), spec, layers, windows, batch_size=batch_size, progress=False)
    return student


def stream_error(student: ZooHybridForCausalLM, teacher: Any, windows: Tensor) -> float:
    """Squared error of the last block's output relative to its square, over the tokens with the same weight each."""
    seen: list[Tensor] = []
    handle = student.backbone.layers[-1].register_forward_hook(lambda _module, _args, out: seen.append(out[0]))
    with torch.no_grad():
        student(input_ids=windows)
    handle.remove()
    last = len(student.backbone.layers) - 1
    Teacher(teacher).capture(
        windows, [last], ["block_output"], on_layer=lambda _, block_output: seen.append(block_output)
    )
    mine, theirs = seen
    return float(((mine - theirs).square().sum(-1) / theirs.square().sum(-1)).mean())


def test_a_ridge_with_held_out_rows_finds_an_exact_solution_and_never_does_worse_there() -> None:
    inputs, held, true, start = draw(80, 12, seed=0), draw(20, 12, seed=1), draw(5, 12, seed=2), draw(5, 12, seed=3)
    exact = cross_validated_ridge(start, Moments.of(inputs, inputs @ true.T), Moments.of(held, held @ true.T), 3)
    torch.testing.assert_close(exact.float(), true, rtol=1e-3, atol=1e-3)
    # Targets that have nothing to do with the inputs: what is learnt from few of them does not hold elsewhere.
    few, noise = draw(8, 12, seed=4), draw(8, 5, seed=5)
    fit, others = Moments.of(few, few @ start.T + noise), Moments.of(held, held @ start.T)
    assert torch.equal(cross_validated_ridge(start, fit, others), start.double())
    for scale in (0.1, 1.0, 10.0):
        fit = Moments.of(inputs, inputs @ true.T + scale * draw(80, 5, seed=6))
        others = Moments.of(held, held @ true.T + scale * draw(20, 5, seed=7))
        assert others.error(cross_validated_ridge(start, fit, others)) < others.error(start.double())


def test_moments_give_the_error_of_any_projection() -> None:
    inputs, targets, weight = draw(30, 7, seed=0), draw(30, 4, seed=1), draw(4, 7, seed=2)
    moments = Moments.of(inputs[:11], targets[:11]) + Moments.of(inputs[11:], targets[11:])
    assert moments.error(weight.double()) == pytest.approx(float((inputs @ weight.T - targets).square().sum()))


@pytest.mark.parametrize("make", [make_teacher, make_qwen2], ids=["llama", "qwen2"])
def test_a_student_that_can_compute_its_teacher_is_healed_to_it(make: Any) -> None:
    teacher, windows, layers = make(), draw_ids(24, 24), [1, 2]
    # The window holds every text, so that only the projections have to be found again.
    options: dict[str, Any] = {"mixer": "sliding_attention", "sliding_window": 24}
    whole = build_student(Teacher(teacher), StudentSpec(**options), layers)
    untouched = build_student(Teacher(teacher), StudentSpec(**options), layers).state_dict()
    heal(whole, Teacher(teacher), layers, windows, progress=False)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, untouched[name], rtol=1e-3, atol=1e-3, msg=name)
    damaged = build_student(Teacher(teacher), StudentSpec(**options), layers)
    with torch.no_grad():
        for layer in layers:
            for projection in ("mixer.o_proj", "mlp.down_proj"):
                weight = damaged.backbone.layers[layer].get_submodule(projection).get_parameter("weight")
                weight.copy_(weight @ (torch.eye(weight.shape[1]) + 0.1 * draw(*2 * weight.shape[1:], seed=layer)))
    other = draw_ids(6, 24, seed=1)
    before = evaluate_language_model(damaged, other, teacher=teacher, progress=False)["kl"]
    heal(damaged, Teacher(teacher), layers, windows, progress=False)
    after = evaluate_language_model(damaged, other, teacher=teacher, progress=False)["kl"]
    assert before > 0.05 and after < 1e-4 * before


@functools.cache
def students_of(name: str) -> dict[str, Any]:
    windows = text_windows(400, 48, seed=3)
    return {
        method: calibrated(trained_teacher(), [0, 1, 2, 3], windows, calibration=method, **MIXERS[name])
        for method in ("ridge", "sequential")
    }


@pytest.mark.parametrize("name", MIXERS)
def test_a_healed_student_is_nearer_to_its_teacher_than_a_single_pass_makes_it(name: str) -> None:
    teacher, others = trained_teacher(), text_windows(120, 48, seed=9)[:12]
    ridge, sequential = students_of(name).values()
    assert stream_error(sequential, teacher, others) < 0.95 * stream_error(ridge, teacher, others)
    scores = [
        evaluate_language_model(student, others, teacher=teacher, progress=False)["kl"]
        for student in (ridge, sequential)
    ]
    assert scores[1] < 0.9 * scores[0]


def test_the_attention_that_tokens_receive_is_that_of_transformers() -> None:
    teacher, ids = make_teacher(), draw_ids(3, 10)
    found = healing._attention_received(Teacher(teacher), ids)
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        matrices = teacher(ids, output_attentions=True).attentions  # a (B, H, L, L) matrix for each layer
    torch.testing.assert_close(found, torch.stack(matrices).mean((0, 2)).sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.full((3,), 10.0))  # all the attention that 10 tokens pay


def test_attention_received_in_blocks_of_rows_is_that_of_whole_matrices() -> None:
    for make in (make_teacher, make_qwen2):
        view = Teacher(make()).attention(1)
        hidden = draw(2, 11, Teacher(make()).zoo_config.hidden_size, seed=4)
        for window in (None, 3):
            view = replace(view, window=window)
            whole = view.attention_matrix(hidden).sum(2).mean(1)
            for rows in (1, 4, 512):
                torch.testing.assert_close(view.attention_received(hidden, rows=rows), whole, rtol=1e-4, atol=1e-5)


def test_healing_in_inference_mode_and_with_a_token_of_zeros() -> None:
    teacher, windows = make_teacher(), draw_ids(6, 16)
    with torch.no_grad():
        teacher.get_input_embeddings().weight[windows[0, 0]] = 0
    spec = StudentSpec(half_life=(2.0, 8.0))
    students = [build_student(Teacher(teacher), spec, [1, 2]) for _ in range(2)]
    before = {name: tensor.clone() for name, tensor in students[0].state_dict().items()}
    heal(students[0], Teacher(teacher), [1, 2], windows, progress=False)
    with torch.inference_mode():
        heal(students[1], Teacher(teacher), [1, 2], windows, progress=False)
    after, inferred = (student.state_dict() for student in students)
    assert all(torch.equal(tensor, inferred[name]) for name, tensor in after.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_a_fit_of_activations_that_are_not_finite_stops() -> None:
    rows, weight = draw(9, 4, seed=0), draw(3, 4, seed=1)
    fit, bad = Moments.of(rows, rows @ weight.T), Moments.of(rows * torch.nan, rows @ weight.T)
    for moments in ((fit, bad), (bad, fit)):
        with pytest.raises(ValueError, match="the activations of a closed-form fit are not finite"):
            cross_validated_ridge(weight, *moments)


def test_a_token_that_receives_much_attention_is_fitted_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of a text often does, and others are recognised by its large activation."""
    teacher, windows, others = trained_teacher(), text_windows(60, 48, seed=3), text_windows(120, 48, seed=9)[:12]
    errors = []
    for weight in (0.0, 1000.0):

        def received(_teacher: Teacher, ids: Tensor, weight: float = weight) -> Tensor:
            return weight * F.one_hot(torch.zeros(len(ids), dtype=torch.int64), ids.shape[1])

        monkeypatch.setattr(healing, "_attention_received", received)
        options = MIXERS["discrete, normalised"]
        student = calibrated(teacher, [0, 1, 2, 3], windows, calibration="sequential", **options)
        errors.append(stream_error(student, teacher, others[:, :1]))
    assert errors[1] < 0.5 * errors[0]


def test_healing_is_deterministic_and_counts_windows_alike_whatever_the_batches() -> None:
    teacher, windows = make_teacher(), draw_ids(9, 16)
    options: dict[str, Any] = {"half_life": (2.0, 8.0), "calibration": "sequential"}
    four = calibrated(teacher, [1, 3], windows, **options).state_dict()
    again = calibrated(teacher, [1, 3], windows, **options).state_dict()
    one = calibrated(teacher, [1, 3], windows, batch_size=1, **options).state_dict()
    for name, tensor in four.items():
        assert torch.equal(tensor, again[name]), name
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-4, msg=name)


def test_healing_changes_converted_layers_alone_and_not_the_teacher() -> None:
    teacher, windows, layers = make_teacher(), draw_ids(6, 16), [1, 2]
    weights = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    spec = StudentSpec(half_life=(2.0, 8.0))
    before = build_student(Teacher(teacher), spec, layers).state_dict()
    after = calibrated(teacher, layers, windows, half_life=(2.0, 8.0), calibration="sequential").state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    blocks = [f"backbone.layers.{layer}." for layer in layers]
    always, gates = ("mixer.out_proj.weight", "mlp.down_proj.weight"), ("mixer.in_proj.weight", "mixer.z_bias")
    assert {block + always[0] for block in blocks} <= changed
    assert changed <= {block + part for block in blocks for part in (*always, *gates)}
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_what_cannot_be_healed_is_refused_and_left_alone() -> None:
    teacher, spec = make_teacher(), StudentSpec(mixer="masked_mixing", positions=12)
    student = build_student(Teacher(teacher), spec, [1, 2])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ValueError, match=r"`windows` must be at least 2, of which one is held out, got 1"):
        heal(student, Teacher(teacher), [1, 2], draw_ids(1, 12), progress=False)
    student_mixer(student, 2).out_proj = None  # pyright: ignore[reportArgumentType]
    before = {
        name: tensor for name, tensor in before.items() if not name.startswith("backbone.layers.2.mixer.out_proj")
    }
    for method in ("head_scale", "ridge", "sequential"):
        with pytest.raises(
            ValueError, match=r"calibration must be 'none' for layer 2: its mixer, a DenseMixer, has no out"
        ):
            fit_output_projections(student, Teacher(teacher), [1, 2], draw_ids(4, 12), method, progress=False)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_biases_stay_as_they_are() -> None:
    teacher, windows = make_teacher(attention_bias=True, mlp_bias=True), draw_ids(6, 16)
    student = calibrated(teacher, [1], windows, half_life=(2.0, 8.0), calibration="sequential")
    block: nn.Module = student.backbone.layers[1]
    original = teacher.model.layers[1]
    assert torch.equal(block.get_parameter("mixer.out_proj.bias"), original.self_attn.get_parameter("o_proj.bias"))
    assert torch.equal(block.get_parameter("mlp.down_proj.bias"), original.mlp.get_parameter("down_proj.bias"))
    ridge = calibrated(teacher, [1], windows, half_life=(2.0, 8.0), calibration="ridge")
    others = draw_ids(6, 16, seed=1)
    assert stream_error(student, teacher, others) < stream_error(ridge, teacher, others)


def test_a_gate_turns_heads_off_where_the_teacher_does() -> None:
    heads, width = 6, 8
    student = build_student(Teacher(make_teacher()), StudentSpec(half_life=(2.0, 8.0)), [1])
    mixer: Any = student_mixer(student, 1)
    normed = [draw(2, 30, 48, seed=seed) for seed in range(8)]
    outputs = [draw(2, 30, heads * width, seed=10 + seed) for seed in range(8)]
    weight, scales = 0.02 * draw(heads, 48, seed=20), torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])
    gates = [(1 + hidden @ weight.T) * scales for hidden in normed]
    targets = [
        (output.unflatten(-1, (heads, width)) * gate[..., None]).flatten(-2)
        for output, gate in zip(outputs, gates, strict=True)
    ]
    # The last head would have to turn its sign round, which a gate cannot do.
    targets = [torch.cat([target[..., :-width], -target[..., -width:]], -1) for target in targets]
    before = {name: tensor.clone() for name, tensor in mixer.state_dict().items()}
    fit_gates(mixer, normed, outputs, targets, 6)
    start, inner = mixer.split[0], heads * width
    rows = mixer.in_proj.weight[start : start + inner].detach().unflatten(0, (heads, width))
    for head in range(heads - 1):
        torch.testing.assert_close(rows[head], weight[head].expand(width, -1), rtol=0.05, atol=2e-3)
    torch.testing.assert_close(
        mixer.z_bias[:-width].detach(), torch.full((inner - width,), OPEN_GATE), atol=0.05, rtol=0
    )
    assert torch.equal(rows[-1], torch.zeros(width, 48))
    # The gate itself, and nothing else in the mixer, has changed.
    gate = F.silu(normed[0] @ rows[:, 0].T + mixer.z_bias.detach()[::width])
    wanted = 1 + normed[0] @ weight.T
    assert (gate - wanted)[..., :-1].abs().max() < 0.1
    for name, tensor in mixer.state_dict().items():
        if name == "in_proj.weight":
            assert torch.equal(tensor[:start], before[name][:start])
            assert torch.equal(tensor[start + inner :], before[name][start + inner :])
        elif name != "z_bias":
            assert torch.equal(tensor, before[name]), name


def test_a_healed_student_resumes_with_its_mlps(tmp_path: Path) -> None:
    teacher = trained_teacher()
    (tmp_path / "train.txt").write_text(small_text(300, seed=1), encoding="utf-8")
    stage = {"name": "outputs", "objective": "hidden_state_alignment", "refit": "sequential"}
    values = {
        "teacher": str(save_teacher(tmp_path / "teacher", teacher)),
        "student": {"layers": "odd", "calibration": "sequential", "calibration_tokens": 512},
        "data": {"train": str(tmp_path / "train.txt"), "heldout": str(tmp_path / "train.txt"), "sequence_length": 32},
        "stages": [{**stage, "tokens": 256, "batch_size": 4, "learning_rate": 1e-3}],
        "evaluation": {"tokens": 320},
    }
    (tmp_path / "one.txt").write_text(small_text(4, seed=1), encoding="utf-8")
    short = {**values, "data": {**values["data"], "train": str(tmp_path / "one.txt")}}
    with pytest.raises(
        ValueError, match=r"data\.train: must have two windows of 32 tokens for a sequential calibration"
    ):
        distill(parse_recipe(short), tmp_path / "short")
    assert not (tmp_path / "short").exists()
    distill(parse_recipe(values), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "student")
    distill(parse_recipe(values), tmp_path / "resumed")
    whole, resumed = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("whole", "resumed"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    for layer in range(4):
        before = teacher.model.layers[layer].mlp.get_parameter("down_proj.weight")
        same = torch.equal(whole[f"backbone.layers.{layer}.mlp.down_proj.weight"], before)
        assert same == (layer % 2 == 0), layer
