"""Stepwise replacement: layers that are converted only from a later stage on."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from teachers import draw_ids, make_any_teacher, save_teacher, small_text, trained_teacher

from ssm_zoo.distill.distiller import Distiller, trained_parameters
from ssm_zoo.distill.plan import RunPlan
from ssm_zoo.distill.recipe import as_mapping, parse_recipe, resolve_layers
from ssm_zoo.distill.recipe_files import load_recipe
from ssm_zoo.distill.run import distill, read_report
from ssm_zoo.distill.stepwise import Conversion, layers_of_stages
from ssm_zoo.distill.student import build_student
from ssm_zoo.distill.teacher import Teacher

LOGITS = {"objective": "logit_distillation", "tokens": 512, "batch_size": 4, "learning_rate": 1e-3}
STAGES = [
    {**LOGITS, "name": "quarter", "layers": [3]},
    {**LOGITS, "name": "half", "layers": "odd", "objective": "hidden_state_alignment", "stream": "student"},
    {**LOGITS, "name": "whole", "train": "all", "ce_weight": 0.5},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained teacher and two texts."""
    folder = tmp_path_factory.mktemp("stepwise")
    save_teacher(folder / "teacher", trained_teacher())
    (folder / "train.txt").write_text(small_text(300, seed=1), encoding="utf-8")
    (folder / "heldout.txt").write_text(small_text(40, seed=9), encoding="utf-8")
    return folder


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "teacher": str(folder / "teacher"),
        "student": {"layers": "all", "half_life": [1, 8]},
        "data": {"train": str(folder / "train.txt"), "heldout": str(folder / "heldout.txt"), "sequence_length": 32},
        "stages": copy.deepcopy(STAGES),
        "evaluation": {"tokens": 128, "prompts": ["Ada sees"], "max_new_tokens": 4, "final": False},
        "checkpoint_every": 2,
        **changes,
    }


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """The folder of a run that nothing interrupted."""
    distill(parse_recipe(values(place)), place / "finished")
    return place / "finished"


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "student" / "model.safetensors")


def test_each_pattern_contains_the_one_before_it() -> None:
    nested = [set(resolve_layers(spec, 30)) for spec in ("every:4", "odd", "except:4", "except:8", "all")]
    assert [len(part) for part in nested] == [7, 15, 22, 26, 30]
    assert all(one < other for one, other in pairwise(nested))
    with pytest.raises(ValueError, match=r"'except:N' \(N at least 2\)"):
        resolve_layers("except:1", 30)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_that_wait_compute_the_teachers_attention(family: str) -> None:
    teacher = Teacher(make_any_teacher(family).eval())
    recipe = parse_recipe(values(Path(), stages=[{**STAGES[0], "layers": [1]}, STAGES[2]]))
    every = list(range(teacher.num_layers))
    student, ids = build_student(teacher, recipe.student, every), draw_ids(2, 12)
    expected = {tuple(layers): build_student(teacher, recipe.student, layers)(ids).logits for layers in ([1], every)}
    names, config = list(student.state_dict()), student.config.to_dict()
    conversion = Conversion(teacher, recipe, every)
    with conversion.converted(student, [1]):
        torch.testing.assert_close(student(ids).logits, expected[(1,)], rtol=0, atol=0)
        # Continued with a cache, which has the layers' kinds.
        output = student.generate(ids[:, :4], max_new_tokens=3, do_sample=False)  # pyright: ignore[reportCallIssue]
        assert output.shape == (2, 7)
        # Not even a stage that trains all weights trains the attention.
        trained = [*trained_parameters(student, "all", [1])[0], *trained_parameters(student, "all", [1])[1]]
        assert not [name for name in trained if ".layers.0.mixer." in name]
        assert {name.split(".")[2] for name in conversion.waiting} == {str(layer) for layer in every} - {"1"}
    torch.testing.assert_close(student(ids).logits, expected[tuple(every)], rtol=0, atol=0)
    assert (list(student.state_dict()), student.config.to_dict()) == (names, config)
    assert conversion.waiting == {}


def test_stages_convert_more_and_more_layers(finished: Path) -> None:
    report = read_report(finished)
    measured = {row["name"]: [layer["layer"] for layer in row["layers"]] for row in report["evaluations"]}
    assert measured["step 0"] == [0, 1, 2, 3]
    assert (measured["quarter"], measured["half"], measured["whole"]) == ([3], [1, 3], [0, 1, 2, 3])
    assert report["student"]["mixer_types"] == ["discrete_mamba2"] * 4
    rows = {row["name"]: row for row in report["evaluations"]}
    # The fewer layers are converted, the closer a student is.
    assert rows["quarter"]["kl"] < rows["half"]["kl"] < rows["step 0"]["kl"]


def test_mamba_in_llama_runs_as_it_is_but_for_its_size(place: Path) -> None:
    given = [
        f"teacher={place / 'teacher'}",
        f"data.train={place / 'train.txt'}",
        f"data.heldout={place / 'heldout.txt'}",
    ]
    mapping = as_mapping(load_recipe("mamba_in_llama", given))
    for stage in mapping["stages"]:
        stage |= {"tokens": 512, "batch_size": 4, "sequence_length": 32}
    mapping["stages"][-1]["learning_rate"] = 1e-3
    mapping["data"] |= {"sequence_length": 32}
    mapping["data"]["pseudo_labels"] |= {"tokens": 600, "prompt_length": 8}
    mapping |= {"evaluation": {"tokens": 128, "sequence_length": 32, "final": False}, "dtype": "float32"}
    report = distill(parse_recipe(mapping), place / "mamba_in_llama")
    measured = {row["name"]: [layer["layer"] for layer in row["layers"]] for row in report["evaluations"]}
    assert (measured["quarter"], measured["half"], measured["three_quarters"]) == ([3], [1, 3], [1, 2, 3])
    assert report["student"]["mixer_types"] == ["full_attention", *["mamba2"] * 3]
    start = trained_teacher().state_dict()
    frozen = weights(place / "mamba_in_llama")["backbone.layers.1.mlp.up_proj.weight"]
    assert torch.equal(frozen, start["model.layers.1.mlp.up_proj.weight"])


class _StoppedError(Exception):
    """Ends a run."""


def test_an_interrupted_run_ends_with_the_same_bits(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Distiller.compute_loss
    # In the first stage, in the second one after a checkpoint of the first, and in the third one.
    for steps in (3, 3, 5):
        left = steps

        def stop(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise _StoppedError
            return compute(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Distiller, "compute_loss", stop)
            with pytest.raises(_StoppedError):
                distill(parse_recipe(values(place)), tmp_path / "run")
    distill(parse_recipe(values(place)), tmp_path / "run")
    ours, theirs = weights(tmp_path / "run"), weights(finished)
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def test_the_plan_counts_the_mixers_of_each_stage(place: Path, tmp_path: Path) -> None:
    plans: list[RunPlan] = []
    stages = [STAGES[0], {**LOGITS, "name": "all"}]
    recipe = parse_recipe(values(place, stages=stages))
    assert distill(recipe, tmp_path / "run", on_plan=lambda plan: bool(plans.append(plan))) == {}
    first, second = plans[0].stages
    assert second.parameters == 4 * first.parameters


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[0, 9], None], r"`stages\.0\.layers` must be from 0 to 3, got \[0, 9\]"),
        (
            [[0, 2], None],
            r"`stages\.0\.layers` must only name layers of `student\.layers`, .*, got also \[0\]",
        ),
        ([[1, 2], [2, 3]], r"`stages\.1\.layers` must have the layers \[1\], which an earlier stage has converted"),
        ([None, [2, 3]], r"`stages\.1\.layers` must have the layers \[1\], which an earlier stage has converted"),
        ([[1], [1, 2]], r"`stages\.1\.layers` must be left out in the last stage, .*\[1, 2, 3\], got \[1, 2\]"),
    ],
)
def test_layers_that_do_not_fit_together_are_refused(layers: list[list[int] | None], message: str) -> None:
    stages = [
        {**LOGITS, "name": f"s{index}", **({} if chosen is None else {"layers": chosen})}
        for index, chosen in enumerate(layers)
    ]
    recipe = parse_recipe(values(Path(), stages=stages, student={"layers": "except:4"}))
    with pytest.raises(ValueError, match=message):
        layers_of_stages(recipe, 4)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"mixer": "bounded_attention"}, "left out with the mixer 'bounded_attention', which fits all converted"),
        ({"calibration": "sequential"}, "left out with a sequential calibration or refit, which fits all converted"),
    ],
)
def test_steps_of_what_is_fitted_as_a_whole_are_refused(student: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"`stages\.0\.layers` must be {message}"):
        parse_recipe(values(Path(), student=student, stages=[{**LOGITS, "name": "a", "layers": [1]}, STAGES[2]]))
