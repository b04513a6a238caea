"""The slots of a bounded memory go to the heads that lose most without them."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from teachers import save_teacher, small_text, text_windows, trained_teacher

from ssm_zoo.distill.recipe import StudentSpec, parse_recipe
from ssm_zoo.distill.run import distill
from ssm_zoo.distill.slots import allocate, divide_slots, repeat_passages, slot_errors
from ssm_zoo.distill.student import build_control, build_student, cache_bytes
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
    errors = slot_errors(teacher, [0, 2], SETTINGS, [0, 8, 48], WINDOWS, torch.ones(2, 48), progress=False)
    heads = teacher.zoo_config.num_key_value_heads
    assert errors.shape == (2, heads, 3, 3)
    assert (errors[:, :, 0] > errors[:, :, 1]).all() and (errors[:, :, 1] > errors[:, :, 2]).all()
    assert errors[:, :, 2] == pytest.approx(0.0, abs=1e-9)


def test_the_errors_of_tokens_and_windows_add_up_by_their_weights() -> None:
    teacher = Teacher(trained_teacher())
    first = torch.zeros(2, 48)
    first[0, :30] = 1
    second = 3 * (1 - first)
    parts = [
        slot_errors(teacher, [1], SETTINGS, [0, 4], WINDOWS, weights, progress=False)
        for weights in (first, second, first + second)
    ]
    assert parts[0] + parts[1] == pytest.approx(parts[2])
    alone = slot_errors(teacher, [1], SETTINGS, [0, 4], WINDOWS[:1, :30], torch.ones(1, 30), progress=False)
    assert parts[0] == pytest.approx(alone * 30 / 48, rel=1e-5)


def test_a_passage_is_repeated_at_another_distance_in_each_window() -> None:
    windows = torch.arange(120).view(3, 40)
    texts, scored = repeat_passages(windows)
    starts = [4 + 32 * part // 4 for part in (1, 2, 3)]
    for text, window, row, start in zip(texts, windows, scored, starts, strict=True):
        assert text[start : start + 4].equal(window[:4])
        assert text[:start].equal(window[:start]) and text[start + 4 :].equal(window[start + 4 :])
        assert row.nonzero()[:, 0].tolist() == list(range(start, start + 4))


def test_the_division_stays_within_its_rows() -> None:
    teacher = Teacher(trained_teacher())
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    slots, decays = divide_slots(teacher, [2, 0], SETTINGS, 12, WINDOWS, progress=False)
    assert [len(numbers) for numbers in decays] == [len(numbers) for numbers in slots]
    assert {decay for numbers in decays for decay in numbers} <= {1.0, 0.99, 0.97}
    assert [len(numbers) for numbers in slots] == [heads, 0, heads, *[0] * (teacher.num_layers - 3)]
    assert 0 < sum(map(sum, slots)) <= (12 - 4 - 1) * heads * 2


def test_exact_heads_get_no_slots_and_do_not_count() -> None:
    teacher = Teacher(trained_teacher())
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    every, others = list(range(heads)), [[]] * (teacher.num_layers - 3)

    def divided(exact: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        settings = BoundedAttentionSettings(window=4, sinks=1, slots=0, chunk_size=2, exact=exact)
        return divide_slots(teacher, [2, 0], settings, 14, WINDOWS, progress=False)

    slots, decays = divided([[1], [], every, *others])
    assert slots == [[8, 0], [], [0, 0], *others]  # out of 14 - 4 - 1 for one head, not for four
    assert decays[0][1] == 1.0 and decays[1:] == [[], [1.0, 1.0], *others]
    assert divided([every, [], every, *others])[0] == [[0, 0], [], [0, 0], *others]


def test_errors_that_are_not_finite_divide_nothing() -> None:
    teacher = trained_teacher()
    teacher.model.layers[0].mlp.down_proj.weight.data.fill_(3e38)
    with pytest.raises(ValueError, match=r"^teacher: the errors of its heads on the training text are not finite\."):
        divide_slots(Teacher(teacher), [2, 0], SETTINGS, 12, WINDOWS, progress=False)


def test_a_run_that_goes_on_keeps_the_division_of_its_slots(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", trained_teacher())
    for name, sentences in (("train", 300), ("heldout", 40)):
        (tmp_path / f"{name}.txt").write_text(small_text(sentences, seed=sentences), encoding="utf-8")
    student_of = {"mixer": "bounded_attention", "window": 4, "chunk_size": 2, "sinks": 1, "rows": 12}
    student_of |= {"exact_heads": [[3, 0]], "kv_dtype": "int8"}
    stage = {"name": "logits", "objective": "logit_distillation", "tokens": 256, "batch_size": 2}
    recipe = parse_recipe(
        {
            "teacher": str(tmp_path / "teacher"),
            "student": {"layers": "odd", **student_of},
            "data": {
                "train": str(tmp_path / "train.txt"),
                "heldout": str(tmp_path / "heldout.txt"),
                "sequence_length": 32,
            },
            "stages": [{**stage, "learning_rate": 1e-4}],
            "evaluation": {"tokens": 128, "repeat_distance": 64, "final": False},
        }
    )
    folder = tmp_path / "run"
    first = scores(distill(recipe, folder))
    config, student = (folder / "student" / name for name in ("config.json", "model.safetensors"))
    memory, trained = json.loads(config.read_text())["bounded_attention"], student.read_bytes()
    slots = memory["slots"]
    assert memory["kv_dtype"] == "int8"
    assert [len(numbers) for numbers in memory["score_decay"]] == [len(numbers) for numbers in slots]
    heads = int(trained_teacher().config.num_key_value_heads)
    assert [len(numbers) for numbers in slots] == [0, heads, 0, heads]
    assert memory["exact"] == [[], [], [], [0]] and slots[3][0] == 0
    assert 0 < sum(map(sum, slots)) <= (12 - 4 - 1) * (2 * heads - 1)
    assert len({number for numbers in slots for number in numbers}) > 1
    assert [kind for kind, *_ in first] == ["teacher", "zeroed", "control", "start", "stage"]
    assert [repeat is None for *_, repeat in first] == [False, True, False, False, False]
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "in a cache of as many bytes as the student's after 32 tokens." in text
    assert "Its cache grows with the context: 1 key-value head keeps all tokens (`exact_heads`)." in text
    shutil.rmtree(folder / "student")
    assert scores(distill(recipe, folder)) == first
    assert json.loads(config.read_text())["bounded_attention"] == memory
    assert student.read_bytes() == trained


def scores(report: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(row["kind"], row["loss"], row["kl"], row["repeat_loss"]) for row in report["evaluations"]]


def test_the_control_has_as_many_bytes_as_the_student() -> None:
    teacher = Teacher(trained_teacher())
    student = build_student(teacher, StudentSpec(mixer="discrete_mamba2", layers=[1]), [1])
    control = build_control(teacher, student, [1], 64)
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    row = heads * (2 * 4 * int(teacher.zoo_config.head_dim or 0) + 4)  # a key, a value and a score
    settings = control.config.settings_of("bounded_attention")
    assert settings.slots == 0 and settings.window + settings.sinks == cache_bytes(student, [1], 64) // row
    assert cache_bytes(control, [1], 64) == row * (settings.window + settings.sinks)


def test_the_control_of_a_student_with_rows_of_8_bits_has_such_rows_too() -> None:
    teacher = Teacher(trained_teacher())
    student = build_student(
        teacher, StudentSpec(mixer="bounded_attention", rows=96, slots="equal", kv_dtype="int8"), [0, 1]
    )
    heads, width = int(teacher.zoo_config.num_key_value_heads or 0), int(teacher.zoo_config.head_dim or 0)
    assert cache_bytes(student, [0, 1], 200) == 2 * 96 * heads * (2 * (width + 2) + 4)
    control = build_control(teacher, student, [0, 1], 200)
    settings = control.config.settings_of("bounded_attention")
    assert settings.kv_dtype == "int8" and settings.window + settings.sinks == 96
    assert cache_bytes(control, [0, 1], 200) == cache_bytes(student, [0, 1], 200)


def test_the_control_has_as_many_bytes_as_a_student_with_exact_heads_at_its_length() -> None:
    teacher = Teacher(trained_teacher())
    memory = StudentSpec(
        mixer="bounded_attention", window=4, chunk_size=2, sinks=1, rows=8, slots="equal", exact_heads=[(1, 0)]
    )
    student = build_student(teacher, memory, [0, 1])
    row = 2 * 4 * int(teacher.zoo_config.head_dim or 0)
    heads = int(teacher.zoo_config.num_key_value_heads or 0)
    bounded = (2 * heads - 1) * 8 * (row + 4)  # with the scores of the rows
    for length in (20, 64):
        assert cache_bytes(student, [0, 1], length) == bounded + length * row
        settings = build_control(teacher, student, [0, 1], length).config.settings_of("bounded_attention")
        assert settings.exact == [] and settings.slots == 0
        assert settings.window + settings.sinks == (bounded + length * row) // (2 * heads * (row + 4))
