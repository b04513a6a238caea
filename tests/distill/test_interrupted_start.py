"""A distillation that is interrupted before its first stage goes on where it stopped, with the plan it measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from teachers import save_teacher, small_text

from ssm_zoo.distill import run
from ssm_zoo.distill.distiller import Distiller
from ssm_zoo.distill.plan import RunPlan
from ssm_zoo.distill.recipe import Recipe, parse_recipe

PARTS = ["plan", "teacher", "zeroed", "slots", "control", "calibration", "start", "training", "stage"]


class _InterruptedError(Exception):
    pass


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    save_teacher(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(small_text(80, seed=1), encoding="utf-8")
    memory = {"mixer": "bounded_attention", "window": 4, "chunk_size": 2, "sinks": 1, "rows": 12}
    return parse_recipe(
        {
            "teacher": "teacher",
            "student": {"layers": "all", **memory, "calibration": "sequential", "calibration_tokens": 64},
            "data": {"train": "text.txt", "heldout": "text.txt", "sequence_length": 16},
            "stages": [
                {"name": "logits", "objective": "logit_distillation", "train": "all", "learning_rate": 1e-3}
                | {"tokens": 64, "batch_size": 4}
            ],
            "evaluation": {"tokens": 64, "prompts": [], "final": False},
        }
    )


class _Parts:
    """The parts of runs, in the order in which they are done; a run is interrupted before its second one.

    Args:
        patch: undone at the end of the test.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.left = 1
        functions = {"plan": "make_plan", "slots": "divide_slots", "calibration": "calibrate"}
        for part, name in functions.items():
            patch.setattr(run, name, self._counted(getattr(run, name), lambda *_, part=part: part))
        patch.setattr(run, "_evaluate", self._counted(run._evaluate, lambda *arguments: arguments[2]))
        train = self._counted(Distiller.train, lambda *_: "training")
        patch.setattr(Distiller, "train", lambda *arguments, **options: train(*arguments, **options))

    def _counted(self, function: Any, part_of: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            if not self.left:
                raise _InterruptedError
            self.left -= 1
            found = function(*arguments, **options)
            self.done.append(part_of(*arguments))
            return found

        return counted


def test_each_part_is_done_once_and_the_student_is_the_same(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[RunPlan] = []

    def on_plan(plan: RunPlan) -> bool:
        plans.append(plan)
        return True

    whole = run.distill(recipe, "whole")
    with monkeypatch.context() as patch:
        parts = _Parts(patch)
        for index in range(7):
            parts.left = 1
            with pytest.raises(_InterruptedError):
                run.distill(recipe, "run", on_plan=on_plan)
            assert parts.done == PARTS[: index + 1]
        parts.left = 2
        report = run.distill(recipe, "run", on_plan=on_plan)
        assert parts.done == PARTS
    assert len(plans) == 8 and all(plan == plans[0] for plan in plans)
    ours, theirs = (load_file(Path(name, "student", "model.safetensors")) for name in ("run", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["loss"] for row in report["evaluations"]] == [row["loss"] for row in whole["evaluations"]]
    assert report["preparation"].keys() == {"slots", "calibration"} and min(report["preparation"].values()) > 0


def other_threads(kept: dict[str, Any]) -> None:
    kept["circumstances"]["threads"] += 1


def other_versions(kept: dict[str, Any]) -> None:
    kept["circumstances"]["versions"]["torch"] = "1.0"


def other_format(kept: dict[str, Any]) -> None:
    kept["format"] = 2


def no_stages(kept: dict[str, Any]) -> None:
    del kept["plan"]["stages"]


@pytest.mark.parametrize("change", [other_threads, other_versions, other_format, no_stages])
def test_a_plan_of_another_machine_is_measured_again(
    change: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter([_plan(1.0), _plan(2.0)])
    monkeypatch.setattr(run, "make_plan", lambda *_, **__: next(made))
    monkeypatch.setattr(run, "_evaluate", _interrupt)
    plans: list[RunPlan] = []

    def start() -> None:
        with pytest.raises(_InterruptedError):
            run.distill(recipe, "run", on_plan=lambda plan: plans.append(plan) is None)

    start()
    start()
    assert plans == [_plan(1.0)] * 2
    path = Path("run", "plan.json")
    kept = json.loads(path.read_text())
    change(kept)
    path.write_text(json.dumps(kept))
    start()
    start()
    assert plans == [_plan(1.0)] * 2 + [_plan(2.0)] * 2


def _plan(seconds: float) -> RunPlan:
    return RunPlan(1, "cpu", 1, 1, 1, 1, 0, [], seconds)


def _interrupt(*_arguments: Any, **_options: Any) -> None:
    raise _InterruptedError


def test_looking_at_the_plan_of_an_unfinished_run_measures_and_writes_nothing(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "_evaluate", _interrupt)
    with pytest.raises(_InterruptedError):
        run.distill(recipe, "run", on_plan=lambda _plan: True)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    monkeypatch.setattr(run, "make_plan", _interrupt)
    assert run.distill(recipe, "run", on_plan=lambda _plan: False) == {}
    assert "plan: read from run/plan.json" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
