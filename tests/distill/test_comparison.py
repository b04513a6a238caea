"""The comparison of teacher, control and student at the end of a run: what is measured, and that it is made once."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from teachers import save_teacher, small_text, small_tokenizer, trained_teacher

from ssm_zoo.distill.data import TokenWindows, tokenize
from ssm_zoo.distill.recipe import parse_recipe
from ssm_zoo.distill.run import distill, read_report
from ssm_zoo.evaluation.by_position import evaluate_by_position
from ssm_zoo.evaluation.key_value_recall import key_value_recall
from ssm_zoo.evaluation.language_modeling import repeat_loss
from ssm_zoo.modeling import ZooHybridForCausalLM
from ssm_zoo.reports.distillation_report import parse_report

EVALUATION = {
    "tokens": 640,
    "prompts": ["Ada sees the", "Then"],
    "max_new_tokens": 6,
    "repeat_distance": 40,
    "long_length": 300,
    "repeat_distances": [90, 40],
    "recall_pairs": [4, 16],
    "context_lengths": [64, 32],
    "prefill_limit": 32,
}


def recipe_values(folder: Path, student: dict[str, Any], **evaluation: Any) -> dict[str, Any]:
    stage = {"name": "logits", "objective": "logit_distillation", "tokens": 256, "batch_size": 2, "learning_rate": 1e-4}
    return {
        "teacher": str(folder / "teacher"),
        "student": student,
        "data": {"train": str(folder / "train.txt"), "heldout": str(folder / "heldout.txt"), "sequence_length": 32},
        "stages": [stage],
        "evaluation": {**EVALUATION, **evaluation},
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    save_teacher(folder / "teacher", trained_teacher())
    for name, sentences in (("train", 200), ("heldout", 80)):
        (folder / f"{name}.txt").write_text(small_text(sentences, seed=sentences), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    distill(parse_recipe(recipe_values(place, {"layers": "odd"})), place / "finished")
    return place / "finished"


def heldout(place: Path) -> torch.Tensor:
    text = (place / "heldout.txt").read_text(encoding="utf-8")
    return TokenWindows(tokenize([text], small_tokenizer(), progress=False)).windows(1)[:, 0]


def test_three_models_stand_side_by_side(finished: Path) -> None:
    report = parse_report(read_report(finished))
    comparison = report.comparison
    assert comparison is not None
    assert [(model.name, model.kind) for model in comparison.models] == [
        ("teacher", "teacher"),
        ("window + sinks", "control"),
        ("logits", "stage"),
    ]
    assert comparison.seconds.keys() == {"by_position", "repeat", "recall", "choice", "decoding"}
    rows = {row.kind: row for row in report.evaluations}
    for model in comparison.models:
        assert [(row.start, row.end) for row in model.by_position] == [(0, 128), (128, 256), (256, 300)]
        assert [row.distance for row in model.repeat] == [40, 90]
        assert model.repeat[0].loss == rows[model.kind].repeat_loss
        assert {row.pairs for row in model.recall} == {4, 16} and {row.distance for row in model.recall} >= {0}
        assert [(row.context, row.prefilled) for row in model.decoding] == [(32, True), (64, False)]
    teacher, control, student = comparison.models
    assert teacher.continuations is not None and teacher.continuations.agreement == 1.0
    assert teacher.continuations.tokens == 12 and teacher.continuations.common_prefix == 6.0
    assert student.continuations is not None and 0 <= student.continuations.agreement <= 1
    # Four layers of two heads of eight channels, keys and values in four bytes.
    assert [row.cache_bytes for row in teacher.decoding] == [4 * 2 * 2 * 8 * 4 * context for context in (32, 64)]
    for model in (control, student):
        half = 2 * 2 * 2 * 8 * 4
        grown = model.decoding[1].cache_bytes - model.decoding[0].cache_bytes
        assert grown == half * 32, model.name  # of the two layers that keep full attention


def test_the_measurements_are_those_of_the_models_that_are_left(finished: Path, place: Path) -> None:
    model = read_report(finished)["comparison"]["models"][2]
    student, teacher = ZooHybridForCausalLM.from_pretrained(finished / "student"), trained_teacher()
    ids = heldout(place)
    assert len(ids) > 900  # of which the evaluations read 640: two windows
    windows = ids[:600].view(2, 300)
    rows = evaluate_by_position({"teacher": teacher, "student": student}, windows, teacher="teacher")["student"]
    for row, expected in zip(model["by_position"], rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert model["repeat"][1]["loss"] == pytest.approx(repeat_loss(student, ids, 90), rel=1e-5)
    assert model["recall"] == key_value_recall(student, small_tokenizer(), ids, pairs=[4, 16])


def test_it_is_made_once_and_not_where_the_recipe_asks_for_none(finished: Path, place: Path) -> None:
    recipe = parse_recipe(recipe_values(place, {"layers": "odd"}))
    first = read_report(finished)["comparison"]
    shutil.rmtree(finished / "student")
    assert distill(recipe, finished)["comparison"] == first  # with the same times
    without = {**recipe_values(place, {"layers": "odd"}), "evaluation": {"tokens": 128, "final": False}}
    assert distill(parse_recipe(without), place / "without")["comparison"] is None


def test_a_student_with_positions_is_compared_as_far_as_they_reach(place: Path) -> None:
    student = {"layers": "odd", "mixer": "masked_mixing", "positions": 64}
    values = recipe_values(place, student, long_length=64)
    report = distill(parse_recipe(values), place / "masked")
    for model in report["comparison"]["models"]:
        assert [(row["start"], row["end"]) for row in model["by_position"]] == [(0, 64)]
        assert model["repeat"] == []
        assert [(row["pairs"], row["distance"]) for row in model["recall"]] == [(4, 0)]
        # A history of inputs cannot be filled, so that all of it is read.
        assert [(row["context"], row["prefilled"]) for row in model["decoding"]] == [(32, True), (64, True)]
    with pytest.raises(ValueError, match=r"`evaluation\.long_length` must be at most student\.positions = 64, got 300"):
        parse_recipe(recipe_values(place, student))
    with pytest.raises(ValueError, match=r"`evaluation\.context_lengths` must be at most student\.pos.* = 64, got 128"):
        parse_recipe(recipe_values(place, student, long_length=64, context_lengths=[32, 128]))
    defaults = {"long_length": None, "context_lengths": [512, 2048]}
    assert parse_recipe(recipe_values(place, student, **defaults)).evaluation.context_lengths == [512, 2048]
