"""Attention averaged over a corpus, and masked mixers that start as it."""

from typing import Any

import pytest
import torch
from teachers import draw_ids, make_teacher, text_windows, trained_teacher
from torch import Tensor
from transformers import LlamaForCausalLM

from ssm_zoo.distill.calibrate import average_attention, calibrate
from ssm_zoo.distill.recipe import StudentSpec
from ssm_zoo.distill.student import build_student, student_mixer, zeroed_mixers
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.evaluation.language_modeling import evaluate_language_model
from ssm_zoo.modeling.position_mixers import DenseMixer

LENGTHS = (3, 11, 1, 7, 11, 5)
LAYERS = [2, 0]


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [draw_ids(length, seed=number) for number, length in enumerate(lengths)]


def blind(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    """Queries that read nothing: every head looks at all that precedes, alike."""
    for layer in teacher.model.layers:
        layer.self_attn.q_proj.weight.zero_()
        if layer.self_attn.q_proj.bias is not None:
            layer.self_attn.q_proj.bias.zero_()
    return teacher


def student_of(teacher: LlamaForCausalLM, layers: list[int], windows: Tensor, **options: Any) -> Any:
    spec = StudentSpec(mixer="masked_mixing", positions=windows.shape[1], **options)
    student = build_student(Teacher(teacher), spec, layers)
    calibrate(student, Teacher(teacher), spec, layers, windows, progress=False)
    return student


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_documents_of_any_lengths_count_where_they_reach(batch_size: int) -> None:
    teacher = make_teacher()
    teacher.set_attn_implementation("eager")
    averages = average_attention(Teacher(teacher), LAYERS, documents(), 11, batch_size=batch_size, progress=False)
    assert list(averages) == LAYERS
    seen: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    for document in documents():
        with torch.no_grad():
            attentions = teacher(document[None], output_attentions=True).attentions
        for layer in LAYERS:
            seen[layer].append(attentions[layer][0].double())
    for layer in LAYERS:
        for row in range(11):
            reaching = [matrix[:, row, : row + 1] for matrix in seen[layer] if matrix.shape[1] > row]
            expected = torch.stack(reaching).mean(0)
            torch.testing.assert_close(averages[layer][:, row, : row + 1].double(), expected, rtol=1e-4, atol=1e-6)
        assert averages[layer].shape == (6, 11, 11)
        assert not averages[layer].triu(1).any()
        torch.testing.assert_close(averages[layer].sum(-1), torch.ones(6, 11))


def test_documents_are_cut_at_the_last_position_and_may_be_rows_of_a_tensor() -> None:
    teacher, windows = make_teacher(), draw_ids(3, 9)
    whole = average_attention(Teacher(teacher), [1], windows, 9, progress=False)[1]
    cut = average_attention(Teacher(teacher), [1], windows, 5, progress=False)[1]
    torch.testing.assert_close(cut, whole[:, :5, :5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": 12}, "at least `positions` = 12 tokens, but the longest of 6 has 11"),
        ({"positions": 0}, "`positions` and `batch_size` must be at least 1, got 0 and 4"),
        ({"positions": 3, "batch_size": 0}, "`positions` and `batch_size` must be at least 1, got 3 and 0"),
        ({"positions": 3, "documents": []}, "the longest of 0 has 0"),
    ],
)
def test_a_wrong_argument_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"documents": documents(), **options}
    with pytest.raises(ValueError, match=message):
        average_attention(Teacher(make_teacher()), [0], **given, progress=False)


def test_a_mixer_of_other_sizes_is_refused() -> None:
    view = Teacher(make_teacher()).attention(0)
    with pytest.raises(
        ValueError, match=r"3 heads of 16 channels, and with projections; copying needs .* 6 heads of 8"
    ):
        DenseMixer(0, 48, 9, heads=3, projections=True).start_from(view)
    with pytest.raises(ValueError, match="6 heads of 8 channels, and no projections; copying needs"):
        DenseMixer(0, 48, 9, heads=6).start_from(view)
    for mixer in (DenseMixer(0, 48, 8, heads=6), DenseMixer(0, 48, 9, heads=3, taps=2)):
        with pytest.raises(ValueError, match=r"the average attention is \(6, 9, 9\)"):
            mixer.set_average_attention(torch.zeros(6, 9, 9))


def test_a_teacher_whose_heads_are_not_as_wide_as_its_stream_is_refused() -> None:
    spec = StudentSpec(mixer="masked_mixing", positions=9)
    with pytest.raises(ValueError, match=r"'masked_mixing' needs heads \* head_dim \(48\) to be .* hidden_size \(24\)"):
        build_student(Teacher(make_teacher(hidden_size=24)), spec, [0])


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"num_key_value_heads": 6}], ids=str)
def test_where_attention_is_constant_the_mixer_is_the_teacher(changes: dict[str, Any]) -> None:
    teacher, windows = blind(make_teacher(**changes)), draw_ids(3, 13)
    student = student_of(teacher, [0, 1, 2, 3], windows)
    mixer = student_mixer(student, 1)
    assert isinstance(mixer, DenseMixer)
    uniform = torch.ones(13, 13).tril() / torch.arange(1, 14)[:, None]
    torch.testing.assert_close(mixer.weight, uniform.expand(6, 13, 13))
    others = draw_ids(2, 13, seed=5)
    with torch.no_grad():
        expected = teacher(others).logits
        torch.testing.assert_close(student(others).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(student(others[:, :6]).logits, expected[:, :6], rtol=1e-4, atol=1e-5)


def test_a_learnt_teacher_is_better_replaced_by_its_average_than_by_nothing() -> None:
    teacher, windows = trained_teacher(), text_windows(400, 48, seed=2)
    heldout = text_windows(100, 48, seed=3)
    student = student_of(teacher, [1, 2], windows[:16])
    fitted = student_of(teacher, [1, 2], windows[:16], calibration="ridge")
    loss = {name: loss_of(model, heldout) for name, model in (("average", student), ("fitted", fitted))}
    with zeroed_mixers(student, [1, 2]):
        floor = loss_of(student, heldout)
    assert loss_of(teacher, heldout) < loss["fitted"] < loss["average"] < floor


def loss_of(model: Any, windows: Tensor) -> float:
    return evaluate_language_model(model, windows, progress=False)["loss"]
