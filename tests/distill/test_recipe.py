"""Recipes: reading, inheriting, overriding, writing, and the choice of layers."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ssm_zoo.distill.recipe import (
    DataSpec,
    EvaluationSpec,
    Recipe,
    StageSpec,
    StudentSpec,
    as_mapping,
    dump,
    parse_recipe,
    resolve_layers,
)
from ssm_zoo.distill.recipe_files import load_recipe, preset_names

TEXT = """
teacher: folder/of/teacher
student: {layers: odd, mixer: discrete_mamba2}
data: {train: train.txt, heldout: [a.txt, b.txt], sequence_length: 64}
stages:
  - {name: align, objective: hidden_state_alignment, tokens: 1000, batch_size: 4, learning_rate: 2e-3}
  - {name: distil, objective: logit_distillation, tokens: 1e6, batch_size: 2, sequence_length: 100,
     learning_rate: 5.0e-4, train: all, other_learning_rate: .5E-4, temperature: 2, schedule: wsd}
"""


def fingerprint(recipe: Recipe) -> str:
    """Equal for recipes that compute the same."""
    return json.dumps(as_mapping(recipe), sort_keys=True)


def write(tmp_path: Path, text: str = TEXT, name: str = "recipe.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_a_file_with_types_and_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    align, distil = recipe.stages
    assert recipe.teacher == "folder/of/teacher"
    assert recipe.student == StudentSpec(layers="odd")
    assert recipe.data == DataSpec(train="train.txt", heldout=["a.txt", "b.txt"], sequence_length=64)
    assert (align.learning_rate, distil.learning_rate, distil.other_learning_rate) == (2e-3, 5e-4, 5e-5)
    assert (distil.tokens, type(distil.tokens)) == (1_000_000, int)
    assert (distil.temperature, type(distil.temperature)) == (2.0, float)
    assert (align.train, align.schedule, align.target, align.betas) == (
        "mixers",
        "cosine",
        "mixer_output",
        (0.9, 0.95),
    )
    assert (recipe.seed, recipe.dtype) == (0, "float32")


def test_windows_have_the_length_of_the_data_unless_they_name_their_own(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert [stage.sequence_length for stage in recipe.stages] == [64, 100]
    assert recipe.evaluation.sequence_length == 64
    other = load_recipe(write(tmp_path), ["evaluation.sequence_length=32"])
    assert other.evaluation.sequence_length == 32
    built = Recipe(
        teacher="t",
        student=StudentSpec(),
        data=recipe.data,
        stages=[StageSpec(name="a", objective="matrix_orientation", tokens=1, batch_size=1, learning_rate=1.0)],
        evaluation=EvaluationSpec(sequence_length=16),
    )
    assert (built.stages[0].sequence_length, built.evaluation.sequence_length) == (64, 16)


@pytest.mark.parametrize(
    ("tokens", "batch_size", "length", "steps"),
    [
        pytest.param(1, 4, 8, 1, id="less-than-a-step"),
        pytest.param(64, 4, 8, 2, id="whole"),
        pytest.param(65, 4, 8, 3, id="rounded-up"),
        pytest.param(2_760_000_000, 128, 2048, 10529, id="large"),
    ],
)
def test_steps(tokens: int, batch_size: int, length: int, steps: int) -> None:
    stage = StageSpec(
        name="s",
        objective="matrix_orientation",
        tokens=tokens,
        batch_size=batch_size,
        sequence_length=length,
        learning_rate=1e-3,
    )
    assert stage.steps == steps


def test_overrides_reach_mappings_and_lists_in_order(tmp_path: Path) -> None:
    overrides = [
        "stages.1.learning_rate=1e-3",
        "stages.0.betas=[0.8, 0.9]",
        "student.layers=[4, 0]",
        "student.half_life=[2, 1e2]",
        "evaluation.prompts=['a: b', c]",
        "seed=3",
        "seed=4",
        "data.heldout.1=c=d.txt",
    ]
    recipe = load_recipe(write(tmp_path), overrides)
    assert recipe.stages[1].learning_rate == 1e-3
    assert recipe.stages[0].betas == (0.8, 0.9)
    assert recipe.student.layers == [4, 0]
    assert recipe.student.half_life == (2.0, 100.0)
    assert recipe.evaluation.prompts == ["a: b", "c"]
    assert recipe.seed == 4
    assert recipe.data.heldout == ["a.txt", "c=d.txt"]


def test_a_recipe_lies_over_its_preset_key_by_key(tmp_path: Path) -> None:
    own = "preset: mohawk\nteacher: t\ndata: {train: a, heldout: b}\nstudent: {layers: even}\nseed: 7\n"
    recipe = load_recipe(write(tmp_path, own))
    preset = load_recipe("mohawk", ["teacher=t", "data.train=a", "data.heldout=b"])
    assert (recipe.student.layers, recipe.seed) == ("even", 7)
    assert recipe.student.copy_projections is preset.student.copy_projections is False
    assert recipe.data == preset.data and recipe.stages == preset.stages

    stage = "{name: only, objective: matrix_orientation, tokens: 5, batch_size: 1, learning_rate: 1e-3}"
    replaced = load_recipe(write(tmp_path, f"{own}stages: [{stage}]\n"))
    assert [stage.name for stage in replaced.stages] == ["only"]


GIVEN = ["teacher=t", "data.train=a", "data.heldout=b"]


def test_values_of_a_preset_without_effect_under_the_users_values_are_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    windowed = load_recipe("mamba2_hybrid", [*GIVEN, "student.mixer=sliding_attention"], said.append)
    assert windowed.student == StudentSpec(
        layers="odd", mixer="sliding_attention", calibration="ridge", calibration_tokens=16384
    )
    assert said == [
        "preset mamba2_hybrid: left out student.feature_map, student.normalize, student.rotary, "
        "student.half_life, which have no effect with the other values given"
    ]
    own = "preset: mohawk\nteacher: t\ndata: {train: a, heldout: b}\nstudent: {mixer: masked_mixing, positions: 2048}\n"
    said.clear()
    masked = load_recipe(write(tmp_path, own), ["stages.0.schedule=cosine"], said.append)
    assert masked.student.copy_projections is False and masked.student.half_life == "calibrated"
    (sentence,) = said
    assert "student.half_life, stages.0.decay," in sentence and "copy_projections" not in sentence
    said.clear()
    for name in preset_names():
        load_recipe(name, GIVEN, said.append)
    assert said == []


def test_a_users_value_without_effect_is_refused_under_a_preset_too(tmp_path: Path) -> None:
    other = "student.mixer=mamba2"
    for wrong in ("student.rotary=true", "student={mixer: mamba2, rotary: true}", "stages.0.kl=reverse"):
        with pytest.raises(ValueError, match=r"`(student.rotary|stages.0.kl)` has no effect with"):
            load_recipe("mamba2_hybrid", [*GIVEN, other, wrong], list[str]().append)
    own = "preset: mamba2_hybrid\nteacher: t\ndata: {train: a, heldout: b}\nstudent: {mixer: mamba2, normalize: true}\n"
    with pytest.raises(ValueError, match=r"`student\.normalize` has no effect with mixer 'mamba2'"):
        load_recipe(write(tmp_path, own))


def test_mohawk_is_the_papers_recipe() -> None:
    assert "mohawk" in preset_names()
    recipe = load_recipe("mohawk", ["teacher=t", "data.train=a", "data.heldout=b"])
    assert [stage.tokens for stage in recipe.stages] == [80_000_000, 160_000_000, 2_760_000_000]
    assert [stage.objective for stage in recipe.stages] == [
        "matrix_orientation",
        "hidden_state_alignment",
        "logit_distillation",
    ]
    assert [stage.learning_rate for stage in recipe.stages] == [1e-4, 1e-4, 1e-5]
    assert [stage.train for stage in recipe.stages] == ["mixers", "mixers", "all"]
    assert {(stage.schedule, stage.warmup, stage.decay) for stage in recipe.stages} == {("wsd", 0.1, 0.1)}
    assert {(stage.sequence_length, stage.weight_decay) for stage in recipe.stages} == {(2048, 0.1)}
    assert (recipe.student.feature_map, recipe.student.normalize, recipe.student.rotary) == (
        "identity",
        False,
        False,
    )


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_whole_but_for_teacher_and_texts(name: str) -> None:
    recipe = load_recipe(name, ["teacher=t", "data.train=a", "data.heldout=b"])
    assert parse_recipe(as_mapping(recipe)) == recipe


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="as-it-is"),
        pytest.param(["teacher='1e5'", "data.train='007'"], id="texts-like-numbers"),
        pytest.param(["teacher='no'", "data.train='2024-01-01'", "data.heldout=['~', 'ä: #']"], id="texts-like-yaml"),
        pytest.param(["student.layers=[3, 1]", "student.half_life=[0.5, 1e3]", "student.rotary=yes"], id="student"),
        pytest.param(["student.mixer=sliding_attention"], id="other-mixer"),
        pytest.param(["student.mixer=bounded_attention", "student.exact_heads=[[5, 1], [1, 0]]"], id="exact-heads"),
        pytest.param(["student.mixer=bounded_attention", "student.kv_dtype=int8"], id="rows-of-8-bits"),
        pytest.param(["stages.0.schedule=constant", "stages.0.learning_rate=1e-7"], id="constant"),
        pytest.param(["evaluation.prompts=['a\\nb', '']", "dtype=bfloat16"], id="prompts"),
        pytest.param(["evaluation.final=false"], id="no-comparison"),
        pytest.param(
            ["evaluation.long_length=512", "evaluation.repeat_distances=[]", "evaluation.context_lengths=[64, 4096]"],
            id="comparison",
        ),
    ],
)
def test_dump_round_trips(tmp_path: Path, overrides: list[str]) -> None:
    recipe = load_recipe(write(tmp_path), overrides)
    again = load_recipe(write(tmp_path, dump(recipe), "dumped.yaml"))
    assert again == recipe
    assert dump(again) == dump(recipe)
    assert fingerprint(again) == fingerprint(recipe)


def test_fingerprint_is_of_what_is_computed(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    spelt_out = load_recipe(write(tmp_path), ["seed=0", "stages.0.target=mixer_output", "stages.0.tokens=1e3"])
    assert fingerprint(spelt_out) == fingerprint(recipe)
    changed = [
        load_recipe(write(tmp_path), [override])
        for override in ("seed=1", "stages.1.kl=reverse", "student.layers=even", "evaluation.tokens=64")
    ]
    assert len({fingerprint(other) for other in [recipe, *changed]}) == 5


def test_a_setting_without_effect_is_not_dumped(tmp_path: Path) -> None:
    align, distil = as_mapping(load_recipe(write(tmp_path)))["stages"]
    assert "target" in align and not {"kl", "temperature", "ce_weight", "decay", "other_learning_rate"} & set(align)
    assert "target" not in distil and {"kl", "temperature", "ce_weight", "decay", "other_learning_rate"} <= set(distil)


def test_recipes_cannot_be_changed(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        recipe.stages[0].tokens = 1  # type: ignore[misc]


def test_merge_keys_may_be_overruled(tmp_path: Path) -> None:
    text = """
teacher: t
student: {}
data: {train: a, heldout: b}
stages:
  - &first {name: a, objective: matrix_orientation, tokens: 5, batch_size: 1, learning_rate: 1e-3}
  - &second {<<: *first, name: b}
  - {<<: *second, name: c, tokens: 6}
"""
    recipe = load_recipe(write(tmp_path, text))
    assert [(stage.name, stage.tokens) for stage in recipe.stages] == [("a", 5), ("b", 5), ("c", 6)]


@pytest.mark.parametrize(
    ("spec", "num_layers", "expected"),
    [
        pytest.param("all", 3, [0, 1, 2], id="all"),
        pytest.param("odd", 5, [1, 3], id="odd"),
        pytest.param("even", 5, [0, 2, 4], id="even"),
        pytest.param("every:1", 3, [0, 1, 2], id="every-1"),
        pytest.param("every:5", 30, [4, 9, 14, 19, 24, 29], id="every-5"),
        pytest.param("every:4", 7, [3], id="every-4-of-7"),
        pytest.param("except:4", 9, [1, 2, 3, 5, 6, 7], id="except-4-of-9"),
        pytest.param("interleave:1", 4, [0, 1, 2, 3], id="interleave-all"),
        pytest.param("interleave:0.5", 6, [1, 3, 5], id="interleave-half"),
        pytest.param("interleave:0.75", 8, [0, 2, 3, 4, 6, 7], id="interleave-3-of-4"),
        pytest.param("interleave:3/4", 8, [0, 2, 3, 4, 6, 7], id="interleave-ratio"),
        pytest.param("interleave:0.25", 2, [1], id="interleave-half-rounds-up"),
        pytest.param([2, 0], 3, [0, 2], id="list-is-sorted"),
    ],
)
def test_resolve_layers(spec: Any, num_layers: int, expected: list[int]) -> None:
    assert resolve_layers(spec, num_layers) == expected


@pytest.mark.parametrize("num_layers", [1, 2, 7, 12, 30])
def test_interleave_is_even_for_every_count(num_layers: int) -> None:
    for count in range(1, num_layers + 1):
        chosen = resolve_layers(f"interleave:{count}/{num_layers}", num_layers)
        gaps = {b - a for a, b in pairwise(chosen)}
        assert len(chosen) == len(set(chosen)) == count
        assert chosen[0] >= 0 and chosen[-1] < num_layers
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_keys_that_earlier_versions_lacked_are_left_out_of_what_a_run_is(tmp_path: Path) -> None:
    """So that the folder of an earlier version's run is recognised."""
    plain = load_recipe(write(tmp_path))
    assert not {"gradient_checkpointing", "report_to"} & as_mapping(plain).keys()
    older = {"tokens", "sequence_length", "batch_size", "repeat_distance", "prompts", "max_new_tokens"}
    assert as_mapping(plain)["evaluation"].keys() == older
    later = {
        "layers",
        "matrix_norm",
        "stream",
        "reverse_weight",
        "jsd_beta",
        "norm_learning_rate",
        "embedding_learning_rate",
    }
    assert "untie" not in as_mapping(plain)["student"]
    assert not any(later & stage.keys() for stage in as_mapping(plain)["stages"])
    mixed = load_recipe(write(tmp_path), ["stages.1.kl=mixed", "stages.1.reverse_weight=0.25"])
    assert as_mapping(mixed)["stages"][1]["reverse_weight"] == 0.25
    spelt_out = ["evaluation.final=true", "evaluation.repeat_distances=[416, 1500]", "evaluation.prefill_limit=2048"]
    assert fingerprint(load_recipe(write(tmp_path), spelt_out)) == fingerprint(plain)
    assert as_mapping(load_recipe(write(tmp_path), ["evaluation.final=false"]))["evaluation"]["final"] is False
    reporting = load_recipe(write(tmp_path), ["report_to=[tensorboard]"])
    assert reporting.report_to == ["tensorboard"] and fingerprint(reporting) == fingerprint(plain)
    assert as_mapping(load_recipe(write(tmp_path), ["gradient_checkpointing=true"]))["gradient_checkpointing"] is True


def test_gradient_checkpointing_without_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`gradient_checkpointing` must be false, since it has no effect"):
        load_recipe(write(tmp_path, TEXT[: TEXT.index("  - {name: distil,")]), ["gradient_checkpointing=true"])
