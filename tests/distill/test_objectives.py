"""The objectives against straightforward versions that keep everything; what a stage trains."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from teachers import draw_ids, make_teacher
from torch import Tensor
from transformers import LlamaForCausalLM

from ssm_zoo.distill.distiller import make_optimizer, trained_parameters
from ssm_zoo.distill.layer_errors import layer_errors, layer_windows
from ssm_zoo.distill.objectives import loss_name, objective
from ssm_zoo.distill.recipe import StageSpec, StudentSpec
from ssm_zoo.distill.student import build_student, student_mixer
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.modeling import ZooHybridForCausalLM
from ssm_zoo.modeling.modeling_hybrid import HybridBlock

LAYERS = [0, 1, 3]
MIXERS = [
    pytest.param({}, id="discrete"),
    pytest.param({"rotary": True, "feature_map": "softplus", "normalize": True}, id="softplus"),
    pytest.param({"mixer": "mamba2"}, id="mamba2"),
]


def stage(objective: str = "logit_distillation", **changes: Any) -> StageSpec:
    values = {"name": "a", "objective": objective, "tokens": 640, "sequence_length": 16, "batch_size": 4}
    return StageSpec(**{**values, "learning_rate": 1e-3, **changes})


def make_student(teacher: LlamaForCausalLM, layers: Sequence[int] = LAYERS, **spec: Any) -> ZooHybridForCausalLM:
    """A student in which everything that training changes has moved a little, so that no gradient is 0 by chance."""
    student = build_student(Teacher(teacher), StudentSpec(**{"half_life": (2.0, 16.0), **spec}), layers)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student


def teacher_activations(teacher: LlamaForCausalLM, ids: Tensor) -> list[dict[str, Tensor]]:
    """Everything that a forward of the teacher computes, layer by layer, by its own modules."""
    decoder = teacher.model
    teacher.set_attn_implementation("eager")
    hidden = decoder.embed_tokens(ids)
    length = ids.shape[1]
    rotary = decoder.rotary_emb(hidden, torch.arange(length)[None])
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    records = []
    with torch.no_grad():
        for block in decoder.layers:
            normed = block.input_layernorm(hidden)
            output, matrix = block.self_attn(normed, position_embeddings=rotary, attention_mask=mask)
            after = hidden + output
            after = after + block.mlp(block.post_attention_layernorm(after))
            records.append({"input": hidden, "normed": normed, "output": output, "matrix": matrix, "after": after})
            hidden = after
    return records


def straightforward(
    stage: StageSpec, student: ZooHybridForCausalLM, teacher: LlamaForCausalLM, layers: Sequence[int], ids: Tensor
) -> Tensor:
    """A stage's loss, all layers at once."""
    if stage.objective == "logit_distillation":
        targets = F.pad(ids[:, 1:], (0, 1), value=-100).flatten()
        log_q = student(input_ids=ids).logits.flatten(0, 1).log_softmax(-1)
        log_p = teacher(input_ids=ids).logits.flatten(0, 1).log_softmax(-1)
        divergence = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        surprise = F.nll_loss(log_q, targets, ignore_index=-100, reduction="sum")
        return ((1 - stage.ce_weight) * divergence + stage.ce_weight * surprise) / ids.numel()
    if stage.objective == "last_state_alignment":
        mine = student(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        theirs = teacher(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        return ((mine - theirs).square().sum((1, 2)) / theirs.square().sum((1, 2))).mean()
    terms = []
    own = student.backbone.embeddings(ids).detach()
    for layer, record in enumerate(teacher_activations(teacher, ids)):
        if stage.stream == "student":
            block: Any = student.backbone.layers[layer]
            sequence = student.backbone.sequence_of(own)
            mixed = block.mixer(block.input_layernorm(own), sequence)[0]
            after = block(own, sequence)[0]
            errors = (mixed - record["output"]) if stage.target == "mixer_output" else (after - record["after"])
            wanted = record["output"] if stage.target == "mixer_output" else record["after"] - record["input"]
            if layer in layers:
                terms.append((errors.square().sum((1, 2)) / wanted.square().sum((1, 2))).mean())
            own = after.detach()  # the gradient of a layer ends at its input
            continue
        if layer not in layers:
            continue
        sequence = student.backbone.sequence_of(record["normed"])
        if stage.objective == "matrix_orientation":
            # The matrix of the model's own forward, which distillation does not run.
            _, matrix = student_mixer(student, layer)(record["normed"], sequence, output_attentions=True)
            errors, norms = (matrix - record["matrix"]).square().sum(3), record["matrix"].square().sum(3)
            if stage.matrix_norm == "rows":
                distances = (errors / norms).mean(2).sqrt()
            else:
                distances = errors.sum(2).sqrt() / (norms.sum(2).sqrt() if stage.matrix_norm == "relative" else 1)
            terms.append(distances.mean())
            continue
        if stage.target == "mixer_output":
            output, _ = student_mixer(student, layer)(record["normed"], sequence)
            wanted = record["output"]
        else:
            block = student.backbone.layers[layer]
            output = block(record["input"], sequence)[0] - record["input"]
            wanted = record["after"] - record["input"]
        errors = (output - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2))
        terms.append(errors.mean())
    return torch.stack(terms).mean()


def gradients(student: ZooHybridForCausalLM) -> dict[str, Tensor]:
    """What is there by name, taken away."""
    taken = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    student.zero_grad()
    return taken


def followed(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
    """The function of token ids that calls a loss's backward and returns its value."""

    def step(ids: Tensor) -> float:
        value = loss(ids)
        value.backward()
        return value.item()

    return step


def choose(student: ZooHybridForCausalLM, train: str) -> set[str]:
    """Let a stage's parameters require gradients and no others, as a run does, and return their names."""
    mixers, others = trained_parameters(student, train, LAYERS)
    student.requires_grad_(False)
    for parameter in (*mixers.values(), *others.values()):
        parameter.requires_grad_(True)
    return {*mixers, *others}


STAGES = [
    pytest.param({"objective": "matrix_orientation"}, id="matrix orientation"),
    pytest.param({"objective": "matrix_orientation", "matrix_norm": "relative"}, id="relative matrix error"),
    pytest.param({"objective": "matrix_orientation", "matrix_norm": "rows"}, id="relative errors of rows"),
    pytest.param({"objective": "hidden_state_alignment"}, id="mixer output"),
    pytest.param({"objective": "hidden_state_alignment", "target": "block_output"}, id="block output"),
    pytest.param({"objective": "hidden_state_alignment", "stream": "student"}, id="mixer output, own stream"),
    pytest.param(
        {"objective": "hidden_state_alignment", "stream": "student", "target": "block_output"},
        id="block output, own stream",
    ),
    pytest.param({"objective": "last_state_alignment"}, id="last state"),
    pytest.param({"objective": "logit_distillation"}, id="logits"),
    pytest.param({"objective": "logit_distillation", "ce_weight": 0.4}, id="logits and cross-entropy"),
    pytest.param({"objective": "logit_distillation", "ce_weight": 1.0}, id="cross-entropy alone"),
]


@pytest.mark.parametrize("train", ["mixers", "all"])
@pytest.mark.parametrize("spec", MIXERS)
@pytest.mark.parametrize("options", STAGES)
def test_streamed_gradients_are_those_of_keeping_everything(
    options: dict[str, Any], spec: dict[str, Any], train: str
) -> None:
    teacher, ids, part = make_teacher(), draw_ids(3, 16), stage(**options)
    student = make_student(teacher, **spec)
    chosen = choose(student, train)
    value = followed(objective(part, student, Teacher(teacher), LAYERS))(ids)
    streamed = gradients(student)
    loss = straightforward(part, student, teacher, LAYERS, ids)
    loss.backward()
    expected = gradients(student)
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    assert streamed.keys() == expected.keys() <= chosen
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(streamed[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=name)
    moving = {name for name, gradient in streamed.items() if gradient.abs().max() > 0}
    if part.objective == "logit_distillation":
        assert moving == chosen
    elif part.objective != "matrix_orientation":
        assert moving >= set(trained_parameters(student, "mixers", LAYERS)[0])
    else:
        # What makes B, C, decay and skip; values, gate and output projection stay.
        decay = ("dt_bias", "A_log") if spec.get("mixer") == "mamba2" else ("dt_bias",)
        parts = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "D", *decay)
        assert moving == {f"backbone.layers.{layer}.mixer.{name}" for layer in LAYERS for name in parts}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("norm", ["frobenius", "relative", "rows"])
def test_a_mixer_without_factors_is_aligned_by_its_whole_matrix(norm: str) -> None:
    teacher, ids = make_teacher(), draw_ids(3, 16)
    student = make_student(teacher, mixer="masked_mixing", positions=16, half_life="calibrated")
    assert not hasattr(student_mixer(student, 1), "matrix_factors")
    choose(student, "mixers")
    part = stage("matrix_orientation", matrix_norm=norm)
    value = followed(objective(part, student, Teacher(teacher), LAYERS))(ids)
    streamed = gradients(student)
    loss = straightforward(part, student, teacher, LAYERS, ids)
    loss.backward()
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    expected = gradients(student)
    assert streamed.keys() == expected.keys() and len(expected) >= len(LAYERS)
    for name, gradient in expected.items():
        torch.testing.assert_close(streamed[name], gradient, rtol=1e-4, atol=1e-8, msg=name)


@pytest.mark.parametrize("options", STAGES)
def test_gradients_reach_the_chosen_parameters_alone(options: dict[str, Any]) -> None:
    teacher, ids, part = make_teacher(), draw_ids(2, 12), stage(**options)
    for train in ("mixers", "mixers+norms"):
        student = make_student(teacher)
        chosen = choose(student, train)
        before = {name: parameter.clone() for name, parameter in student.named_parameters()}
        followed(objective(part, student, Teacher(teacher), LAYERS))(ids)
        assert gradients(student).keys() <= chosen
        for name, parameter in student.named_parameters():
            assert torch.equal(parameter, before[name]), name


def test_gradients_add_up_over_calls() -> None:
    teacher, ids = make_teacher(), draw_ids(2, 12)
    student = make_student(teacher)
    choose(student, "mixers")
    step = followed(objective(stage("hidden_state_alignment"), student, Teacher(teacher), LAYERS))
    step(ids)
    once = gradients(student)
    step(ids)
    step(ids)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, 2 * once[name], msg=name)


@pytest.mark.parametrize("options", STAGES)
def test_every_objective_can_be_followed_downhill(options: dict[str, Any]) -> None:
    teacher, ids = make_teacher(), draw_ids(4, 16)
    student = make_student(teacher)
    part = stage(schedule="constant", warmup=0.0, learning_rate=3e-3, **options)
    choose(student, "mixers")
    optimizer, _ = make_optimizer(part, *trained_parameters(student, "mixers", LAYERS))
    step, values = followed(objective(part, student, Teacher(teacher), LAYERS)), []
    for _ in range(12):
        optimizer.zero_grad()
        values.append(step(ids))
        optimizer.step()
    assert values[-1] < 0.95 * values[0]
    assert loss_name(part)


def test_the_block_target_is_what_the_block_adds() -> None:
    teacher, ids = make_teacher(), draw_ids(2, 12)
    identical = build_student(Teacher(teacher), StudentSpec(mixer="sliding_attention"), LAYERS)
    silent = build_student(Teacher(teacher), StudentSpec(half_life=(4.0, 4.0)), LAYERS)
    with torch.no_grad():
        for layer in LAYERS:
            block: Any = silent.backbone.layers[layer]
            block.mixer.out_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    part = stage("hidden_state_alignment", target="block_output")
    assert objective(part, identical, Teacher(teacher), LAYERS)(ids).item() < 1e-8
    assert objective(part, silent, Teacher(teacher), LAYERS)(ids).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("target", ["mixer_output", "block_output"])
def test_both_streams_are_one_until_a_layer_differs(target: str) -> None:
    """The first converted layer reads the same; a later one reads the errors of those before it on its own stream."""
    teacher, ids = make_teacher(), draw_ids(2, 12)
    student = build_student(Teacher(teacher), StudentSpec(half_life=(2.0, 16.0)), LAYERS)

    def value(layers: list[int], stream: str) -> float:
        part = stage("hidden_state_alignment", target=target, stream=stream)
        return objective(part, student, Teacher(teacher), layers)(ids).item()

    assert value([0], "student") == pytest.approx(value([0], "teacher"), rel=1e-5)
    assert value([3], "student") != pytest.approx(value([3], "teacher"), rel=1e-2)


def test_one_block_at_a_time_has_activations_on_the_students_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, ids = make_teacher(), draw_ids(2, 12)
    student = make_student(teacher, [1, 3])
    choose(student, "mixers")
    ran: list[tuple[int, bool]] = []
    inner = HybridBlock.forward

    def noting(self: Any, *arguments: Any, **options: Any) -> Any:
        ran.append((self.layer_idx, torch.is_grad_enabled()))
        return inner(self, *arguments, **options)

    monkeypatch.setattr(HybridBlock, "forward", noting)
    objective(stage("hidden_state_alignment", stream="student"), student, Teacher(teacher), [1, 3])(ids)
    assert ran == [(0, False), (1, True), (2, False), (3, True)]


@pytest.mark.parametrize("spec", MIXERS)
def test_layer_errors_are_relative_distances(spec: dict[str, Any]) -> None:
    teacher, ids = make_teacher(), draw_ids(2, 16)
    student = make_student(teacher, **spec)
    records = teacher_activations(teacher, ids)
    rows = layer_errors(student, Teacher(teacher), LAYERS, ids)
    assert [row["layer"] for row in rows] == LAYERS
    for row in rows:
        record: dict[str, Any] = records[row["layer"]]
        mixer: Any = student_mixer(student, row["layer"])
        with torch.no_grad():
            sequence = student.backbone.sequence_of(record["normed"])
            output, matrix = mixer(record["normed"], sequence, output_attentions=True)
            rates = -mixer.log_decay(record["normed"]).mean((0, 1))
        distance = (output - record["output"]).norm() / record["output"].norm()
        assert row["output_error"] == pytest.approx(float(distance), rel=1e-4)
        for head in range(6):
            target = record["matrix"][:, head]
            distance = (matrix[:, head] - target).norm() / target.norm()
            assert row["matrix_error"][head] == pytest.approx(float(distance), rel=1e-4)
            assert row["half_life"][head] == pytest.approx(math.log(2) / float(rates[head]), rel=1e-4)
        assert len(row["matrix_error"]) == len(row["half_life"]) == 6
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_head_that_does_not_decay_has_no_half_life() -> None:
    teacher = make_teacher()
    student = build_student(Teacher(teacher), StudentSpec(half_life=(8.0, 8.0)), [1])
    with torch.no_grad():
        student_mixer(student, 1).get_parameter("dt_bias")[2] = -100.0
    (row,) = layer_errors(student, Teacher(teacher), [1], draw_ids(1, 8))
    assert row["half_life"][2] is None
    assert row["half_life"][3] == pytest.approx(8.0, rel=1e-5)


def test_attention_has_an_output_error_alone() -> None:
    teacher = make_teacher()
    student = build_student(Teacher(teacher), StudentSpec(mixer="sliding_attention"), [2])
    (row,) = layer_errors(student, Teacher(teacher), [2], draw_ids(1, 8))
    assert row["output_error"] < 1e-5
    assert row["matrix_error"] == row["half_life"] == []


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_stage_trains_mixers_norms_or_all(tied: bool) -> None:
    student = build_student(Teacher(make_teacher(tie_word_embeddings=tied)), StudentSpec(mixer="mamba2"), [1, 3])
    of_mixers = {
        name for name, _ in student.named_parameters() if ".layers.1.mixer." in name or ".layers.3.mixer." in name
    }
    # The norm inside a Mamba-2 mixer is the mixer's own.
    assert "backbone.layers.1.mixer.norm.weight" in of_mixers
    for train in ("mixers", "mixers+norms", "all"):
        assert set(trained_parameters(student, train, [1, 3])[0]) == of_mixers
    assert trained_parameters(student, "mixers", [1, 3])[1] == {}
    norms = {
        f"backbone.layers.{layer}.{kind}_layernorm.weight" for layer in range(4) for kind in ("input", "post_attention")
    }
    assert set(trained_parameters(student, "mixers+norms", [1, 3])[1]) == norms | {"backbone.norm_f.weight"}
    mixers, others = trained_parameters(student, "all", [1, 3])
    chosen = [*mixers.values(), *others.values()]
    assert len({id(parameter) for parameter in chosen}) == len(chosen)
    assert {id(parameter) for parameter in chosen} == {id(parameter) for parameter in student.parameters()}
    assert ("lm_head.weight" in others) == (not tied)
    assert "backbone.embeddings.weight" in others


@pytest.mark.parametrize("options", STAGES)
def test_shards_of_a_batch_average_to_the_whole(options: dict[str, Any]) -> None:
    teacher, ids, part = make_teacher(), draw_ids(4, 12), stage(**options)
    student = make_student(teacher)
    choose(student, "mixers")
    step = followed(objective(part, student, Teacher(teacher), LAYERS))
    whole = step(ids)
    expected = gradients(student)
    shards = [step(ids[:2]), step(ids[2:])]
    assert sum(shards) / 2 == pytest.approx(whole, rel=1e-5)
    for name, gradient in gradients(student).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient / 2, expected[name], rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=name)


def test_errors_of_layers_are_measured_on_two_windows_or_a_long_one() -> None:
    assert len(layer_windows(torch.zeros(5, 2047))) == 2
    assert len(layer_windows(torch.zeros(5, 2048))) == len(layer_windows(torch.zeros(1, 32))) == 1
