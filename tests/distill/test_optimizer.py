"""How fast a stage trains its weights: groups of the optimiser, and schedules."""

import math
import re
from typing import Any

import pytest
from teachers import make_any_teacher, make_teacher

from ssm_zoo.distill.distiller import make_optimizer, schedule_factor, trained_parameters
from ssm_zoo.distill.recipe import StudentSpec
from ssm_zoo.distill.stages import StageSpec
from ssm_zoo.distill.student import build_student
from ssm_zoo.distill.teacher import Teacher
from ssm_zoo.modeling import ZooHybridForCausalLM

LAYERS = [0, 1, 3]


def stage(**changes: Any) -> StageSpec:
    values = {"name": "a", "objective": "logit_distillation", "tokens": 640, "sequence_length": 16, "batch_size": 4}
    return StageSpec(**{**values, "learning_rate": 1e-3, **changes})


def make_student() -> ZooHybridForCausalLM:
    return build_student(Teacher(make_teacher()), StudentSpec(), LAYERS)


@pytest.mark.parametrize("other_rate", [None, 1e-5], ids=["same rate", "own rate"])
def test_optimizer_groups_have_their_rates_and_decay(other_rate: float | None) -> None:
    student = make_student()
    part = stage(train="all", learning_rate=2e-3, other_learning_rate=other_rate, weight_decay=0.1, betas=(0.8, 0.9))
    mixers, others = trained_parameters(student, "all", LAYERS)
    optimizer, names = make_optimizer(part, mixers, others)
    assert len(names) == len(set(names)) == len(mixers) + len(others)
    at = iter(names)
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.9)
        for parameter in group["params"]:
            name = next(at)
            assert parameter is (mixers | others)[name]
            assert group["lr"] == (2e-3 if name in mixers else other_rate or 2e-3)
            vector = name.endswith(("dt_bias", "z_bias", ".D", "norm.weight", "norm_f.weight", "conv1d.bias"))
            assert group["weight_decay"] == (0.0 if vector else 0.1), name
    assert next(at, None) is None


def test_a_bias_with_an_entry_for_each_head_and_position_has_no_weight_decay() -> None:
    student = build_student(Teacher(make_teacher()), StudentSpec(mixer="masked_mixing", positions=16), [1])
    sets = trained_parameters(student, "mixers", [1])
    optimizer, names = make_optimizer(stage(weight_decay=0.1), *sets)
    decays = [group["weight_decay"] for group in optimizer.param_groups for _ in group["params"]]
    found = {name.rpartition("mixer.")[2]: decay for name, decay in zip(names, decays, strict=True)}
    assert sets[0]["backbone.layers.1.mixer.bias"].dim() == 2
    assert found["bias"] == 0 and found["weight"] == found["out_proj.weight"] == 0.1


def test_groups_of_weights_have_their_own_rates() -> None:
    student = make_student()
    rates = {"norm_learning_rate": 1e-4, "mlp_learning_rate": 2e-4, "embedding_learning_rate": 3e-4}
    part = stage(train="all", learning_rate=2e-3, other_learning_rate=5e-4, **rates)
    mixers, others = trained_parameters(student, "all", LAYERS)
    optimizer, names = make_optimizer(part, mixers, others)
    assert len(names) == len(set(names)) == len(mixers) + len(others)
    at, found = iter(names), {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = next(at)
            assert parameter is (mixers | others)[name]
            found[name] = group["lr"]
    assert {rate for name, rate in found.items() if name in mixers} == {2e-3}
    for name, rate in ((name, found[name]) for name in others):
        if "norm" in name:
            assert rate == 1e-4
        elif ".mlp." in name:
            assert rate == 2e-4
        else:
            assert rate == (5e-4 if "layers.2.mixer" in name else 3e-4), name
    assert set(found.values()) == {2e-3, 5e-4, 1e-4, 2e-4, 3e-4}


@pytest.mark.parametrize("train", ["all", "mixers+norms"])
def test_weights_that_the_loss_does_not_reach_are_not_trained(train: str) -> None:
    for objective in ("matrix_orientation", "hidden_state_alignment"):
        with pytest.raises(ValueError, match=rf"'{re.escape(train)}' has no effect with objective '{objective}'"):
            stage(objective=objective, train=train)
    block = {"objective": "hidden_state_alignment", "target": "block_output", "train": train}
    rates = {"norm_learning_rate": 1e-4} | ({"mlp_learning_rate": 1e-4} if train == "all" else {})
    assert stage(**block, **rates).train == train
    with pytest.raises(ValueError, match=r"has no effect with train .* since all weights outside of the mixers that"):
        stage(**block, **rates, other_learning_rate=1e-3)
    assert stage(**block, other_learning_rate=1e-3).other_learning_rate == 1e-3


def test_learned_positions_are_embeddings() -> None:
    student = build_student(Teacher(make_any_teacher("gpt2")), StudentSpec(), LAYERS)
    rates = {"other_learning_rate": 5e-4, "embedding_learning_rate": 3e-4}
    optimizer, _ = make_optimizer(stage(train="all", **rates), *trained_parameters(student, "all", LAYERS))
    positions = student.backbone.position_embeddings.weight
    (rate,) = [group["lr"] for group in optimizer.param_groups if any(one is positions for one in group["params"])]
    assert rate == 3e-4


def test_weights_without_a_rate_of_their_own_stay_in_their_order() -> None:
    """The state of an optimiser is saved by position."""
    student = make_student()
    sets = trained_parameters(student, "all", LAYERS)
    _, plain = make_optimizer(stage(train="all"), *sets)
    _, rated = make_optimizer(stage(train="all", norm_learning_rate=1e-4), *sets)
    norms = [name for name in sets[1] if "norm" in name]
    assert [name for name in plain if name not in norms] == rated[: -len(norms)]
    assert set(rated[-len(norms) :]) == set(norms)


def test_an_optimizer_of_mixers_alone_has_no_empty_group() -> None:
    student = make_student()
    optimizer, names = make_optimizer(stage(), *trained_parameters(student, "mixers", LAYERS))
    assert len(optimizer.param_groups) == 2
    assert all(group["params"] for group in optimizer.param_groups)
    assert all(".mixer." in name for name in names)


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        pytest.param(4, {"schedule": "constant", "warmup": 0.0}, [1, 1, 1, 1], id="constant"),
        pytest.param(4, {"schedule": "constant", "warmup": 0.5}, [0.5, 1, 1, 1], id="warm-up"),
        pytest.param(4, {"schedule": "constant", "warmup": 0.3}, [0.5, 1, 1, 1], id="warm-up rounded up"),
        pytest.param(
            5,
            {"schedule": "cosine", "warmup": 0.0, "final_learning_rate_ratio": 0.2},
            [1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2],
            id="cosine",
        ),
        pytest.param(
            5,
            {"schedule": "cosine", "warmup": 0.4, "final_learning_rate_ratio": 0.0},
            [0.5, 1, 1, 0.5, 0],
            id="cosine after warm-up",
        ),
        pytest.param(
            6,
            {"schedule": "wsd", "warmup": 1 / 6, "decay": 0.5, "final_learning_rate_ratio": 0.1},
            [1, 1, 1, 0.7, 0.4, 0.1],
            id="wsd",
        ),
        pytest.param(
            4,
            {"schedule": "wsd", "warmup": 0.5, "decay": 0.5, "final_learning_rate_ratio": 0.0},
            [0.5, 1, 0.5, 0],
            id="wsd without a stable part",
        ),
        pytest.param(
            3,
            {"schedule": "wsd", "warmup": 0.0, "decay": 1.0, "final_learning_rate_ratio": 0.25},
            [0.75, 0.5, 0.25],
            id="wsd that only falls",
        ),
        pytest.param(2, {"schedule": "cosine", "warmup": 0.0, "final_learning_rate_ratio": 0.5}, [1, 0.5], id="two"),
        pytest.param(1, {"schedule": "cosine"}, [1], id="one step, cosine"),
        pytest.param(1, {"schedule": "cosine", "warmup": 0.0}, [1], id="one step, cosine without warm-up"),
        pytest.param(1, {"schedule": "wsd"}, [1], id="one step, wsd"),
        pytest.param(1, {"schedule": "constant"}, [1], id="one step, constant"),
    ],
)
def test_schedules(steps: int, options: dict[str, Any], expected: list[float]) -> None:
    part = stage(tokens=steps * 64, **options)
    assert part.steps == steps
    assert [schedule_factor(part, step) for step in range(steps)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 100, 1000])
def test_a_schedule_rises_stays_and_falls_within_its_bounds(schedule: str, steps: int) -> None:
    shares = {"warmup": 0.07} | ({"decay": 0.28} if schedule == "wsd" else {})
    part = stage(tokens=steps * 64, schedule=schedule, **shares)
    factors = [schedule_factor(part, step) for step in range(steps)]
    # 0.07 * 100 is 7.000000000000001 in floating point: still seven steps.
    warm = math.ceil(steps * 7 / 100)
    assert factors[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    assert all(before >= after for before, after in zip(factors[warm - 1 :], factors[warm:], strict=False))
    if steps > 3:
        assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    if schedule == "wsd":
        assert sum(factor == 1.0 for factor in factors) == steps - warm + 1 - math.ceil(steps * 28 / 100) or steps < 7
