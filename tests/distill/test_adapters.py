"""Stages that train learned feature maps, or adapters that are merged: the recipe of LoLCATs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from teachers import draw_ids, make_teacher, save_teacher, small_text, trained_teacher

from ssm_zoo.distill.adapters import adapted, add_adapters, remove_adapters
from ssm_zoo.distill.distiller import Distiller, trained_parameters
from ssm_zoo.distill.plan import RunPlan
from ssm_zoo.distill.recipe import Recipe, StageSpec, StudentSpec, as_mapping, parse_recipe
from ssm_zoo.distill.recipe_files import load_recipe
from ssm_zoo.distill.run import distill, read_report
from ssm_zoo.distill.student import build_student
from ssm_zoo.distill.teacher import Teacher

LORA = StageSpec(
    name="a",
    objective="logit_distillation",
    train="lora",
    tokens=8,
    batch_size=1,
    learning_rate=1.0,
    lora_rank=3,
    lora_alpha=6.0,
)


def lolcats(folder: Path) -> Recipe:
    """The preset on a tiny teacher, with few steps and higher rates."""
    given = [
        f"teacher={folder / 'teacher'}",
        f"data.train={folder / 'train.txt'}",
        f"data.heldout={folder / 'held.txt'}",
    ]
    mapping = as_mapping(load_recipe("lolcats", given))
    for stage in mapping["stages"]:
        stage |= {"tokens": 768, "batch_size": 4, "sequence_length": 32}
    mapping["stages"][0]["learning_rate"], mapping["stages"][1]["learning_rate"] = 5e-2, 1e-3
    mapping["student"]["sliding_window"] = 4
    mapping["data"] |= {"sequence_length": 32}
    evaluation = {"tokens": 320, "sequence_length": 32, "final": False}
    return parse_recipe({**mapping, "evaluation": evaluation, "dtype": "float32", "checkpoint_every": 2})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lolcats")
    save_teacher(folder / "teacher", trained_teacher())
    (folder / "train.txt").write_text(small_text(300, seed=1), encoding="utf-8")
    (folder / "held.txt").write_text(small_text(60, seed=9), encoding="utf-8")
    distill(lolcats(folder), folder / "finished")
    return folder


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "student" / "model.safetensors")


@pytest.mark.parametrize("mixer", ["discrete_mamba2", "sliding_attention", "linear_attention"])
def test_merged_adapters_compute_what_they_computed_beside_the_weights(mixer: str) -> None:
    student, ids = build_student(Teacher(make_teacher()), StudentSpec(mixer=mixer), [1, 3]), draw_ids(2, 12)
    before, names = student(ids).logits, list(student.state_dict())
    add_adapters(student, LORA, [1, 3], 5)
    assert torch.equal(student(ids).logits, before)
    trained, others = trained_parameters(student, "lora", [1, 3])
    assert others == {} and len(trained) == 2 * 2 * (2 if mixer == "discrete_mamba2" else 4)
    assert {min(tensor.shape) for tensor in trained.values()} == {3}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in trained.values():
            tensor.normal_(std=0.1, generator=generator)
        beside = student(ids).logits
    assert (beside - before).abs().max() > 1e-3
    remove_adapters(student, merge=True)
    assert list(student.state_dict()) == names and not hasattr(student, "peft_config")
    torch.testing.assert_close(student(ids).logits, beside, rtol=1e-4, atol=1e-5)
    again = build_student(Teacher(make_teacher()), StudentSpec(mixer=mixer), [1, 3])
    with adapted(again, LORA, [1, 3]):
        assert any(".lora_A." in name for name, _ in again.named_parameters())
    assert torch.equal(again(ids).logits, before) and list(again.state_dict()) == names


def test_lolcats_learns_first_its_feature_maps_then_its_projections(place: Path) -> None:
    report, after = read_report(place / "finished"), weights(place / "finished")
    rows = {row["name"]: row for row in report["evaluations"]}
    errors = [sum(layer["output_error"] for layer in rows[name]["layers"]) for name in ("step 0", "attention_transfer")]
    assert errors[1] < 0.99 * errors[0]
    assert rows["low_rank_adaptation"]["loss"] < rows["attention_transfer"]["loss"] < rows["step 0"]["loss"]
    recipe = lolcats(place)
    start = build_student(Teacher(trained_teacher()), recipe.student, [0, 1, 2, 3], seed=recipe.seed).state_dict()
    assert after.keys() == start.keys() - {"lm_head.weight"} | after.keys() & {"lm_head.weight"}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, start[name])}
    mixers = {f"backbone.layers.{layer}.mixer." for layer in range(4)}
    projections = [f"{part}_proj.weight" for part in "qkvo"]
    learnt = ("q_features", "k_features", "window_factors", *projections)
    assert changed == {f"{mixer}{name}" for mixer in mixers for name in learnt}
    for mixer in mixers:
        for name in projections:
            change = after[f"{mixer}{name}"] - start[f"{mixer}{name}"]
            assert int((torch.linalg.svdvals(change.double()) > 1e-6).sum()) == 8, name


class _StoppedError(Exception):
    """Ends a run."""


def test_an_interrupted_stage_of_adapters_ends_with_the_same_bits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, left = Distiller.compute_loss, 9

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:  # in the second stage, after a checkpoint of its second step
            raise _StoppedError
        return compute(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "compute_loss", stop)
        with pytest.raises(_StoppedError):
            distill(lolcats(place), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-1-2").is_dir()
    plans: list[RunPlan] = []
    distill(lolcats(place), tmp_path / "run", on_plan=lambda plan: not plans.append(plan))
    ours, theirs = weights(tmp_path / "run"), weights(place / "finished")
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []
    transfer, adaptation = plans[0].stages
    mixer = (
        build_student(Teacher(trained_teacher()), lolcats(place).student, [0]).backbone.layers[0].get_submodule("mixer")
    )
    assert transfer.parameters == 4 * (2 * mixer.get_parameter("q_features").numel() + mixer.num_heads)
    sizes = [mixer.get_submodule(f"{part}_proj").weight.shape for part in "qkvo"]
    assert adaptation.parameters == 4 * sum(8 * sum(size) for size in sizes)


def test_feature_maps_that_are_not_learned_and_a_rank_without_adapters_are_refused(place: Path) -> None:
    mapping = as_mapping(lolcats(place))
    mapping["student"] = {"mixer": "discrete_mamba2", "feature_map": "softplus"}
    with pytest.raises(ValueError, match=r"`stages\.0\.train` must be 'mixers' .*'softplus', which has no weights"):
        parse_recipe(mapping)
    mapping = as_mapping(lolcats(place))
    mapping["stages"][1] |= {"train": "all", "lora_rank": 4}
    with pytest.raises(
        ValueError, match=r"`stages\.1\.lora_\w+` has no effect with train 'all', only with train 'lora'"
    ):
        parse_recipe(mapping)
