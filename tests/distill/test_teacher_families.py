"""Students of every family of teachers: the view of attention, the mixers that replace it, and a whole run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from teachers import VARIANTS, draw_ids, make_any_teacher, save_teacher, small_text
from torch import Tensor

from ssm_zoo.conversion.export import verify_export
from ssm_zoo.conversion.formats import TEACHERS
from ssm_zoo.distill.objectives import hidden_state_alignment, matrix_distances
from ssm_zoo.distill.recipe import StudentSpec, parse_recipe
from ssm_zoo.distill.run import distill
from ssm_zoo.distill.student import build_student, student_mixer
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.kernels.matrix_distance import row_distances_reference

LENGTH = 12
CASES = [
    pytest.param(family, changes, id=f"{family}-{name}")
    for family in TEACHERS
    for name, changes in {"plain": {}, **VARIANTS.get(family, {})}.items()
]


def captured(teacher: Any, layer: int) -> dict[str, Tensor]:
    """The activations of a layer for two rows."""
    found: dict[str, Tensor] = {}
    what = ("block_input", "normed_input", "attention_output", "block_output")
    Teacher(teacher).capture(
        draw_ids(2, LENGTH), [layer], what, on_layer=lambda _, **tensors: found.update(tensors), stop_after_last=True
    )
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "changes"), CASES)
@torch.no_grad()
def test_attention_is_rebuilt_from_the_view(family: str, changes: dict[str, Any]) -> None:
    teacher = make_any_teacher(family, **changes)
    teacher.set_attn_implementation("eager")
    for layer in (0, 1):
        view, found = Teacher(teacher).attention(layer), captured(teacher, layer)
        hidden = found["normed_input"]
        close(view.attention_output(hidden), found["attention_output"])
        matrix = view.attention_matrix(hidden)
        heads = torch.einsum("bhij,bjhp->bihp", matrix, view.values(hidden))
        close(F.linear(heads.flatten(2), view.o, view.o_bias), found["attention_output"])
        expected = teacher(input_ids=draw_ids(2, LENGTH), output_attentions=True).attentions[layer]
        close(matrix, expected)


@pytest.mark.parametrize("mixer", ["bounded_attention", "linear_attention", "sliding_attention"])
@pytest.mark.parametrize("family", TEACHERS)
@torch.no_grad()
def test_attention_that_sees_the_whole_text_is_the_teachers(family: str, mixer: str) -> None:
    teacher, ids = make_any_teacher(family), draw_ids(2, LENGTH)
    rows: dict[str, Any] = {"window": 8, "sinks": 2, "rows": 24, "slots": "equal", "chunk_size": 4}
    options = rows if mixer == "bounded_attention" else {"sliding_window": 32}
    student = build_student(Teacher(teacher), StudentSpec(mixer=mixer, **options), [0, 1])  # pyright: ignore
    expected = teacher(input_ids=ids).logits
    close(student(ids).logits, expected)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    output = student(ids[:, :-2], attention_mask=mask[:, :-2], use_cache=True)
    parts = [output.logits]
    for column in (LENGTH - 2, LENGTH - 1):
        output = student(
            ids[:, column : column + 1],
            attention_mask=mask[:, : column + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        parts.append(output.logits)
    alone = teacher(input_ids=ids[:1, 5:]).logits
    close(torch.cat(parts, dim=1)[0, 5:], alone[0])
    close(torch.cat(parts, dim=1)[1], expected[1])


@pytest.mark.parametrize("family", TEACHERS)
@torch.no_grad()
def test_discrete_mamba2_starts_as_linear_attention_with_the_teachers_queries_and_keys(family: str) -> None:
    teacher, layer = make_any_teacher(family), 1
    spec = StudentSpec(mixer="discrete_mamba2", rotary=True, half_life=(4.0, 4.0))
    student = build_student(Teacher(teacher), spec, [layer])
    view, hidden = Teacher(teacher).attention(layer), captured(teacher, layer)["normed_input"]
    queries, keys = view.queries_keys(hidden)
    age = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).clamp(min=0)
    decay = torch.tril(0.5 ** (age / 4))
    matrix = torch.einsum("bihp,bjhp->bhij", queries, keys) * view.scaling * decay
    heads = torch.einsum("bhij,bjhp->bihp", matrix, view.values(hidden))
    expected = F.linear(heads.flatten(2), view.o, view.o_bias)
    actual = student_mixer(student, layer)(hidden, student.backbone.sequence_of(hidden))[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", TEACHERS)
@torch.no_grad()
def test_retention_starts_with_the_teachers_projections(family: str) -> None:
    """Decays, norm and normalisation of scores as published; queries, keys, values and output of the teacher."""
    teacher, layer = make_any_teacher(family), 1
    student = build_student(Teacher(teacher), StudentSpec(mixer="retention"), [layer]).double()
    hidden = captured(teacher, layer)["normed_input"].double()
    view = Teacher(teacher.double()).attention(layer)
    queries, keys = view.queries_keys(hidden)
    gamma = 1 - 2.0 ** (-5 - torch.arange(queries.shape[2], dtype=torch.float64))[:, None, None]
    decay = torch.tril(gamma ** (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).clamp(min=0))
    matrix = torch.einsum("bihp,bjhp->bhij", queries, keys) * view.scaling * decay / decay.sum(-1, True).sqrt()
    matrix = matrix / matrix.sum(-1, keepdim=True).abs().clamp(min=1)
    heads = torch.einsum("bhij,bjhp->bihp", matrix, view.values(hidden))
    heads = heads / (heads.square().mean(-1, keepdim=True) + student.config.rms_norm_eps).sqrt()
    expected = F.linear(heads.flatten(2), view.o, view.o_bias)
    mixer: Any = student_mixer(student, layer)
    actual = mixer(hidden, student.backbone.sequence_of(hidden))[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    alone = mixer.hidden_attention(hidden, student.backbone.sequence_of(hidden))
    torch.testing.assert_close(alone, matrix, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", TEACHERS)
def test_a_block_of_the_student_on_the_teachers_stream_gives_the_teachers(family: str) -> None:
    teacher = make_any_teacher(family)
    student, found = build_student(Teacher(teacher), StudentSpec(), []), captured(teacher, 1)
    with torch.no_grad():
        stream = found["block_input"]
        output = student.backbone.layers[1](stream, student.backbone.sequence_of(stream))[0]
    close(output, found["block_output"])


@pytest.mark.parametrize("target", ["mixer_output", "block_output"])
@pytest.mark.parametrize("family", TEACHERS)
def test_on_its_own_stream_an_unchanged_student_has_no_error(family: str, target: str) -> None:
    """Its stream begins as the teacher's does, with learned positions and the factor of the embeddings."""
    teacher = Teacher(make_any_teacher(family))
    memory: dict[str, Any] = {"window": 32, "sinks": 0, "rows": 32, "slots": "equal"}
    student = build_student(teacher, StudentSpec(mixer="bounded_attention", **memory), [1, 3])
    error = hidden_state_alignment(student, teacher, [1, 3], draw_ids(2, 16), target=target, stream="student")
    assert float(error.detach()) < 1e-9


@pytest.mark.parametrize("mixer", ["discrete_mamba2", "mamba2"])
@pytest.mark.parametrize(
    ("family", "changes"), [("mistral", {"sliding_window": 5}), ("gemma2", {"sliding_window": 5}), ("phi", {})], ids=str
)
def test_matrices_are_compared_with_the_teachers_whole_attention(
    family: str, changes: dict[str, Any], mixer: str
) -> None:
    """With its window and soft cap, also where the matrices are not in memory."""
    teacher = Teacher(make_any_teacher(family, **changes))
    student = build_student(teacher, StudentSpec(mixer=mixer, copy_projections=False), [0, 1])
    hidden = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        found = matrix_distances(student, teacher, layer, hidden)
        matrix = student_mixer(student, layer).hidden_attention(hidden, student.backbone.sequence_of(hidden))
        expected = row_distances_reference(matrix, teacher.attention_matrix(layer, hidden))
        for part, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(part, exact, rtol=1e-4, atol=1e-5 * float(exact.detach().max()))


def test_a_mamba2_does_not_take_projections_that_need_a_norm() -> None:
    teacher = Teacher(make_any_teacher("qwen3"))
    with pytest.raises(ValueError, match=r"`student.copy_projections` must be False for a teacher with norms"):
        build_student(teacher, StudentSpec(mixer="mamba2", half_life=(2.0, 2.0)), [1])
    build_student(teacher, StudentSpec(mixer="mamba2", half_life=(2.0, 2.0), copy_projections=False), [1])


@torch.no_grad()
def test_masked_mixing_has_the_positions_that_the_teacher_has_learnt() -> None:
    teacher = Teacher(make_any_teacher("gpt2", max_position_embeddings=24))
    with pytest.raises(ValueError, match=r"`student.positions` must be 24, .* got 16"):
        build_student(teacher, StudentSpec(mixer="masked_mixing", positions=16), [1])
    student = build_student(teacher, StudentSpec(mixer="masked_mixing", positions=24), [1])
    assert student(draw_ids(1, 24)).logits.isfinite().all()


def test_layers_that_keep_the_teachers_window_forbid_another() -> None:
    teacher = Teacher(make_any_teacher("mistral", sliding_window=5))
    spec = StudentSpec(mixer="sliding_attention", sliding_window=7)
    with pytest.raises(ValueError, match=r"the settings of sliding_attention in the student must be the teacher's"):
        build_student(teacher, spec, [1])
    student = build_student(teacher, spec, range(4))
    assert student.config.sliding_attention == {"sliding_window": 7}
    build_student(teacher, StudentSpec(mixer="sliding_attention", sliding_window=5), [1])


@pytest.mark.parametrize("family", TEACHERS)
def test_a_whole_run(family: str, tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", make_any_teacher(family, vocab_size=328))  # Qwen2's tokenizer adds a token
    (tmp_path / "text.txt").write_text(small_text(80, seed=1), encoding="utf-8")
    memory = {"window": 8, "sinks": 2, "rows": 16, "slots": "equal", "chunk_size": 4}
    stage = {"tokens": 64, "batch_size": 2, "learning_rate": 1e-3}
    recipe: dict[str, Any] = {
        "teacher": str(tmp_path / "teacher"),
        "student": {"layers": [1, 2], "mixer": "bounded_attention", "calibration": "ridge"} | memory,
        "data": {"train": str(tmp_path / "text.txt"), "heldout": [str(tmp_path / "text.txt")], "sequence_length": 32},
        "stages": [
            {"name": "outputs", "objective": "hidden_state_alignment", "target": "block_output"} | stage,
            {"name": "logits", "objective": "logit_distillation", "train": "all"} | stage,
        ],
        "evaluation": {"tokens": 64, "prompts": ["Ada sees"], "max_new_tokens": 2, "final": False},
    }
    recipe["student"]["calibration_tokens"] = 128
    report = distill(parse_recipe(recipe), tmp_path / "run", command="ssm-zoo distill")
    assert report["stages"][1]["history"][-1]["loss"] < 10


@pytest.mark.parametrize("family", ["gemma3_text", "phi"])
def test_a_student_loads_without_the_package(family: str, tmp_path: Path) -> None:
    memory: dict[str, Any] = {"window": 8, "sinks": 2, "rows": 16, "slots": "equal", "chunk_size": 4}
    spec = StudentSpec(mixer="bounded_attention", **memory)
    build_student(Teacher(make_any_teacher(family)), spec, [1]).save_pretrained(tmp_path / "student")
    assert verify_export(tmp_path / "student")["bit_equal"]


def test_what_does_not_fit_a_family_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    stage = {"tokens": 64, "batch_size": 2, "learning_rate": 1e-3}
    (tmp_path / "text.txt").write_text(small_text(80, seed=1), encoding="utf-8")
    recipe: dict[str, Any] = {
        "student": {"mixer": "sliding_attention", "calibration_tokens": 1024},
        "data": {"train": str(tmp_path / "text.txt"), "heldout": [str(tmp_path / "text.txt")], "sequence_length": 32},
        "stages": [{"name": "a", "objective": "logit_distillation", **stage}],
        "evaluation": {"prompts": []},
    }
    save_teacher(tmp_path / "gpt2", make_any_teacher("gpt2", max_position_embeddings=24))
    save_teacher(tmp_path / "olmo2", make_any_teacher("olmo2"))
    with pytest.raises(ValueError, match=r"sequence_length` must be at most 24, the number of positions that have"):
        distill(parse_recipe({**recipe, "teacher": str(tmp_path / "gpt2")}), tmp_path / "run", command="")
    recipe["student"]["calibration"] = "sequential"
    with pytest.raises(ValueError, match=r"a sequential calibration or refit needs .* got .*norm_placement='after'"):
        distill(parse_recipe({**recipe, "teacher": str(tmp_path / "olmo2")}), tmp_path / "run", command="")
    assert not (tmp_path / "run").exists()
