"""Every family of teachers: equal logits in `zoo_hybrid`, through padding, cache and `generate`, and exactly back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from teachers import TINY, VARIANTS, draw_ids, make_any_teacher
from transformers import AutoConfig, AutoModelForCausalLM

from ssm_zoo.conversion.convert import convert
from ssm_zoo.conversion.formats import TEACHERS
from ssm_zoo.distill.recipe import StudentSpec
from ssm_zoo.distill.student import build_student
from ssm_zoo.distill.teacher import Teacher

CASES = [
    pytest.param(family, changes, id=f"{family}-{name}")
    for family in TEACHERS
    for name, changes in {"plain": {}, **VARIANTS.get(family, {})}.items()
]


def student_of(teacher: Any) -> Any:
    return build_student(Teacher(teacher), StudentSpec(), [])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_tiny_configurations_are_of_registered_families() -> None:
    assert TINY.keys() | VARIANTS.keys() <= TEACHERS.keys()


@pytest.mark.parametrize(("family", "changes"), CASES)
@torch.no_grad()
def test_without_converted_layers_the_student_is_the_teacher(family: str, changes: dict[str, Any]) -> None:
    teacher = make_any_teacher(family, **changes)
    student, ids = student_of(teacher), draw_ids(2, 24)
    whole = teacher(input_ids=ids).logits
    assert whole.abs().max() > 0.5
    close(student(ids).logits, whole)
    assert student.num_parameters() == teacher.num_parameters()
    for padding in (slice(0, 7), slice(17, None)):  # on the left, on the right
        mask = torch.ones(2, 24, dtype=torch.long)
        mask[0, padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` passes them
        expected = teacher(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        close(student(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize(("family", "changes"), CASES)
@torch.no_grad()
def test_the_cache_of_the_student_goes_on_as_its_teacher(family: str, changes: dict[str, Any]) -> None:
    teacher = make_any_teacher(family, **changes)
    student, ids = student_of(teacher), draw_ids(2, 14)
    cache, parts = None, []
    for piece in ids.split([8, 1, 1, 4], dim=1):
        output = student(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    close(torch.cat(parts, dim=1), teacher(input_ids=ids).logits)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    prompt = {"input_ids": ids[:, :10], "attention_mask": mask}
    assert torch.equal(student.generate(**prompt, **options), teacher.generate(**prompt, **options))


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_conversion_comes_back_to_the_native_format_with_the_same_tensors(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    teacher = make_any_teacher(family, **changes)
    teacher.save_pretrained(tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert not isinstance(report.logits, str) and report.logits.difference < 1e-5
    ours = AutoConfig.from_pretrained(tmp_path / "ours")
    student = student_of(teacher)
    of_files = {"architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"}
    given, made = ours.to_dict(), student.config.to_dict()
    assert {key for key in given | made if given.get(key) != made.get(key)} <= of_files
    report = convert(tmp_path / "ours", tmp_path / "back")
    assert report.target == f"transformers {family}"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    before, after = teacher.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    ids = draw_ids(2, 24)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, teacher(input_ids=ids).logits)
