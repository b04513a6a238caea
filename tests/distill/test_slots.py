"""The slots of a bounded memory go to the heads that lose most without them."""

from itertools import product

import pytest
import torch
from teachers import text_windows, trained_teacher

from ssm_zoo.distill.slots import allocate, divide_slots, slot_errors
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.modeling.bounded_memory import BoundedAttentionSettings

SETTINGS = BoundedAttentionSettings(window=4, sinks=1, slots=0, chunk_size=2)
WINDOWS = text_windows(40, 48)[:2]


def test_concave_errors_are_divided_as_well_as_can_be() -> None:
    candidates = [0, 1, 2, 3]
    errors = torch.tensor([[4.0, 2.0, 1.0, 0.5], [9.0, 3.0, 1.0, 0.0], [1.0, 0.9, 0.8, 0.7]])
    for budget in range(10):
        chosen = allocate(errors, candidates, budget)
        assert sum(chosen) <= budget
        reached = sum(errors[head, number] for head, number in enumerate(chosen))
        others = [numbers for numbers in product(candidates, repeat=3) if sum(numbers) <= budget]
        assert reached == min(sum(errors[head, number] for head, number in enumerate(each)) for each in others)


def test_a_step_over_a_plateau_is_taken_where_it_pays() -> None:
    errors = torch.tensor([[4.0, 4.0, 0.0], [3.0, 2.0, 1.0]])
    assert allocate(errors, [0, 8, 16], 16) == [16, 0]
    assert allocate(errors, [0, 8, 16], 8) == [0, 8]
    assert allocate(errors, [0, 8, 16], 7) == [0, 0]


def test_a_slot_that_makes_it_worse_is_not_given() -> None:
    assert allocate(torch.tensor([[1.0, 2.0], [1.0, 1.0]]), [0, 4], 100) == [0, 0]


def test_the_error_is_zero_where_the_memory_holds_everything() -> None:
    teacher = Teacher(trained_teacher())
    errors = slot_errors(teacher, [0, 2], SETTINGS, [0, 8, 48], WINDOWS, progress=False)
    heads = teacher.zoo_config.num_key_value_heads
    assert errors.shape == (2, heads, 3)
    assert (errors[..., 0] > errors[..., 1]).all() and (errors[..., 1] > errors[..., 2]).all()
    assert errors[..., 2] == pytest.approx(0.0, abs=1e-9)


def test_the_division_stays_within_its_rows() -> None:
    teacher = Teacher(trained_teacher())
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    slots = divide_slots(teacher, [2, 0], SETTINGS, 12, WINDOWS, progress=False)
    assert [len(numbers) for numbers in slots] == [heads, 0, heads, *[0] * (teacher.num_layers - 3)]
    assert 0 < sum(map(sum, slots)) <= (12 - 4 - 1) * heads * 2
